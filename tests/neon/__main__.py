"""`make neon`: the loops for 64-bit Arm, cross-compiled, run by an emulator, and compared with the reference.

Every type, both layouts and directions, plain and activated, with and without a residual; reduction, apply, both at
once. `driver.c` reads these cases from a file. The driver makes others itself: selections and bounds of an activation
(`selected.c`), reductions that count, second derivatives and few rows at once (`others.c`).

The results of each set have to lie within the limits of tests/paths.py. Where the compiler fuses no multiplication with
an addition (-ffp-contract=off), the sets `baseline` and `neon` have to give the same bits, and on an x86-64 machine its
own `baseline` too. By default the compiler fuses, and may choose other places in the two sets; then the number of cases
with the same bits is shown.
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from cbn import reference

from ..paths import GRADIENT_LIMIT, LIMIT, STATISTICS_LIMIT

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "cbn" / "kernels"
DRIVER = [Path(__file__).parent / name for name in ("driver.c", "selected.c", "others.c")]
TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
SETS = ("baseline", "neon")
NATIVE = "baseline of x86-64"
# Those of setup.py, but quickly compiled: -O1, with the optimizations that fuse multiplications with additions
FLAGS = ["-O1", "-fexpensive-optimizations", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-Wall",
         "-Wextra", "-Werror", f"-I{KERNELS}"]  # fmt: skip
NOT_FUSED = "not fused"
VARIANTS = {"fused": [], NOT_FUSED: ["-ffp-contract=off"]}
PARTS = ("y or dx", "mean or S(dh)", "m2 or S(dh*d)", "dh or counts")  # whose errors the driver prints

F32, F64, BF16, F16, U8, I8 = (np.dtype(t) for t in ("f4", "f8", ml_dtypes.bfloat16, "f2", "u1", "i1"))
KINDS = (F32, F64, BF16, F16, U8, I8)
# name -> (x, y)
TYPES = {
    "f32": (F32, F32), "f64": (F64, F64), "bf16": (BF16, BF16), "f16": (F16, F16),
    "f32_in_f64": (F32, F32), "bf16_in_f64": (BF16, BF16), "f16_in_f64": (F16, F16),
    "u8_f32": (U8, F32), "u8_bf16": (U8, BF16), "i8_f32": (I8, F32), "i8_bf16": (I8, BF16),
}  # fmt: skip
# (n_runs, copies, n_channels, length); the last of the runs and of the rows take many additions to a sum
RUNS = ((3, 1, 5, 301), (4, 1, 2, 13), (2, 1, 3, 1100))
ROWS = ((7, 1, 37, 1), (6, 3, 5, 3), (35, 2, 16, 2))
EPS = 1e-5


def cases():
    """(name, bytes for the driver, y's type)."""
    for type_, (x_type, y_type) in TYPES.items():
        only_apply, only_forward = "_" in type_, x_type in (U8, I8)
        for rows, shapes in ((False, RUNS), (True, ROWS)):
            for shape in shapes:
                data = Data(x_type, y_type, shape, seed=len(type_) + sum(shape))
                for backward in (False, True)[: 1 if only_forward else 2]:
                    for activation in ACTIVATIONS:
                        for operation in ("apply", "reduction", "both")[: 1 if only_apply else 3]:
                            yield from data.cases(type_, rows, backward, activation, operation)


# name -> (activated, checked, residual, negative slope)
ACTIVATIONS = {
    "plain": (0, 0, 0, 1.0),
    "relu": (1, 0, 0, 0.0),
    "residual": (1, 1, 1, 1.0),
    "leaky": (1, 1, 0, 0.1),
    "residual leaky": (1, 0, 1, 0.1),
}


class Data:
    """Arrays of one type and shape, and what the reference makes of them."""

    def __init__(self, x_type, y_type, shape, seed):
        rng = np.random.default_rng(seed)
        self.shape, self.x_type, self.y_type = shape, x_type, y_type
        n_channels = shape[2]
        if x_type in (U8, I8):
            self.x = rng.integers(0, 100, shape).astype(x_type)
        else:
            self.x = (2 * rng.standard_normal(shape) + 1.5).astype(x_type)
        self.dy = rng.standard_normal(shape).astype(x_type)
        self.z = rng.standard_normal(shape).astype(y_type)
        self.weight, self.bias = rng.standard_normal((2, n_channels))
        self.count, self.mean, self.m2 = reference.moments(self.x, 2)
        self.var = self.m2 / self.count
        self.scale = self.weight / np.sqrt(self.var + EPS)
        self.forward = np.array([self.mean, self.scale, self.bias, np.zeros(n_channels)])
        self.shift = self.mean + 0.01

    def cases(self, type_, rows, backward, activation, operation):
        activated, checked, residual, slope = ACTIVATIONS[activation]
        checked = checked if not backward or type_ == "f64" else 0
        z = self.z if residual else None
        a = reference.normalize(self.x, self.mean, self.var, self.weight, self.bias, EPS, 2)
        tiny = ml_dtypes.finfo(self.y_type).smallest_subnormal
        dh = np.asarray(self.dy, np.float64)
        coef, y, shift = self.forward, reference.activate(a, z, slope), self.shift
        if self.x_type == BF16:
            shift = np.zeros_like(shift)
        total, square = self.mean, self.m2  # what the driver makes of the sums
        if backward:
            shift = self.mean
            if activated:
                dh = reference.activate_backward(self.dy, a, z, slope)
            read = dh.astype(self.x_type)
            y, dweight, dbias = reference.backward(read, self.x, self.mean, self.var, self.weight, EPS, True, 2)
            invstd = 1 / np.sqrt(self.var + EPS)
            coef = np.array([self.mean, self.scale, dbias / self.count, dweight * invstd / self.count * self.scale])
            _, product, total = reference.backward(dh, self.x, self.mean, self.var, None, EPS, True, 2)
            square = product / invstd
        else:
            read = self.dy
        # Other paths to the same results: non-temporal stores, float64 sums, a copy of what is reduced
        halves = self.x_type in (BF16, F16)
        knobs = {"apply": [(0, 0, 0), (1, 0, 0)], "reduction": [(0, 0, 0)], "both": [(0, 0, 0), (1, 0, 1)]}[operation]
        if operation != "apply" and halves and not backward:
            knobs = [*knobs, (0, 1, 0)]
        for nontemporal, in_float64, copying in knobs:
            copying = copying and not rows
            name = f"{type_} {'rows' if rows else 'runs'} {'x'.join(map(str, self.shape))} "
            name += f"{'backward' if backward else 'forward'} {activation} {operation}"
            name += " nontemporal" * nontemporal + " float64 sums" * in_float64 + " copying" * copying
            header = struct.pack(
                "<96s16s16q2d", name.encode(), type_.encode(), KINDS.index(self.x_type), KINDS.index(self.y_type), rows,
                backward, operation != "reduction", operation != "apply", activated, checked, residual, nontemporal,
                in_float64, copying, self.shape[0], self.shape[2], self.shape[3], self.shape[1], slope,
                float(tiny) / 2 if backward else 0,
            )  # fmt: skip
            if in_float64:
                shift = self.shift
            arrays = (self.x, self.dy, self.z, read, coef, self.forward, shift, y, total, square, dh)
            yield name, header + b"".join(np.ascontiguousarray(v).tobytes() for v in arrays), self.y_type, backward


def limits(type_, backward):
    """Of y or dx, of the sums, of dh."""
    if backward:
        # Sums of float64, of a dh that the activation has rounded
        return GRADIENT_LIMIT[type_], 1e-6 if type_ == F32 else GRADIENT_LIMIT[type_], LIMIT[type_]
    return LIMIT[type_], STATISTICS_LIMIT[type_], 0


def limits_of(case):
    """The same of a case that the driver makes itself."""
    type_, _, _, direction = case.split()[:4]
    y_type = TYPES[type_][1]
    if direction == "second":  # float64 arithmetic, rounded once; the two statistics are sums, of an array and of two
        return LIMIT[y_type], STATISTICS_LIMIT[F64], LIMIT[y_type]
    return limits(y_type, direction == "backward")


def compile_all(folder):
    """The driver of each variant. Both sets are in each; the files that take long are compiled side by side."""

    def compile_one(variant, source):
        path = folder / f"{variant}_{source.stem}.o".replace(" ", "_")
        subprocess.run([TOOLS[0], *FLAGS, *VARIANTS[variant], "-c", source, "-o", path], check=True)
        return variant, path

    sources = [KERNELS / "sets" / f"{name}.c" for name in SETS]
    sources += [KERNELS / "select.c", *DRIVER]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, variant, source) for variant in VARIANTS for source in sources]
        objects = [job.result() for job in jobs]
    for variant in VARIANTS:
        program = folder / variant.replace(" ", "_")
        subprocess.run([TOOLS[0], *(p for v, p in objects if v == variant), "-lm", "-o", program], check=True)
        yield variant, program


def compile_native(folder):
    """The driver for this machine, with the baseline of x86-64, which has no instruction that fuses."""
    program = folder / "native"
    sources = [KERNELS / "sets" / "baseline.c", *DRIVER]
    subprocess.run(["cc", *FLAGS, "-DBASELINE_ALONE", *sources, "-lm", "-o", program], check=True)
    return program


def results(program, name, path, emulator=(TOOLS[1], "-L", "/usr/aarch64-linux-gnu")):
    """Case -> its errors and its digest."""
    command = [*emulator, program, name, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stderr}")
    lines = [line.split("|") for line in done.stdout.splitlines()]
    found = {case: ([float(e) for e in errors], digest) for case, *errors, digest in lines}
    assert len(found) == len(lines), "every case has a name of its own"
    return found


def differences(variant, found, about):
    """Prints what is wrong, and returns how much is: results of each set, beside the limits of each case."""
    failures, worst = 0, {}
    for name, of_set in found.items():
        assert of_set.keys() == about.keys(), "every case has a result of each set"
        for case, (errors, _) in of_set.items():
            y, statistics, dh = about[case]
            for what, error, limit in zip(PARTS, errors, (y, statistics, statistics, dh), strict=True):
                key = case.split()[0], what
                worst[key] = max(worst.get(key, 0), error)
                if not error <= limit:
                    failures += 1
                    print(f"{variant}, {name}: {case}: {what} is {error:.2e} off, more than {limit:.2e}")
    differ = [case for case in about if len({of_set[case][1] for of_set in found.values()}) > 1]
    print(f"{variant}: {len(about)} cases, {len(about) - len(differ)} with the same bits from {', '.join(found)}")
    for type_ in TYPES:
        errors = [f"{what} {e:.1e}" for (t, what), e in worst.items() if t == type_ and e]
        print(f"  largest errors of {type_}: {', '.join(errors)}")
    if variant == NOT_FUSED:
        failures += len(differ)
        for case in differ:
            print(f"{variant}: {case}: not the same bits from {', '.join(found)}")
    return failures


def main():
    if not all(shutil.which(tool) for tool in TOOLS):
        print(f"skipped: {' or '.join(TOOLS)} is not installed")
        return 0
    began = time.monotonic()
    print(f"compiling the sets {' and '.join(SETS)}, with and without fused multiplications and additions", flush=True)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, about = folder / "cases", {}
        with path.open("wb") as file:
            for case, data, y_type, backward in cases():
                file.write(data)
                about[case] = limits(y_type, backward)
        for variant, program in compile_all(folder):
            found = {name: results(program, name, path) for name in SETS}
            assert found[SETS[0]].keys() >= about.keys(), "every case of the file has a result"
            if variant == NOT_FUSED and platform.machine() == "x86_64":
                found[NATIVE] = results(compile_native(folder), "baseline", path, emulator=())
            failures += differences(variant, found, {case: limits_of(case) for case in found[SETS[0]]} | about)
    print(f"{'failed' if failures else 'passed'} in {time.monotonic() - began:.0f} s")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
