"""Arrays larger than memory, from file to file, beside a copy of the file: times, resident memory, and a killed run.

    python -m benchmarks.outofcore [--gigabytes 4] [--turns 7] [--folder DIR] [--out DIR]

Each contender is a process of its own; they take turns in random order, and the disk has all of the last one before the
next one begins. The folder needs three times the space. Results are compared with the layer's on parts of the array.
"""

import argparse
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import cbn
from cbn.__main__ import run as run_command

ROOT = Path(__file__).parents[1]
SHAPE = (64, 56, 56)  # of a sample
COPY, SYNCED = "copy of the file (cp)", "copy, and sync"
CONTENDERS = {
    COPY: None,
    SYNCED: None,
    "evaluation": 'outofcore.batch_norm("x.npy", bn.eval(), out="y.npy")',
    "evaluation, memmap to memmap": (
        'outofcore.batch_norm(np.load("x.npy", mmap_mode="r"), bn.eval(), out=np.lib.format.open_memmap('
        '"y.npy", "w+", np.float32, np.load("x.npy", mmap_mode="r").shape))'
    ),
    "evaluation with a state": 'outofcore.batch_norm("x.npy", bn.eval(), out="y.npy", state="state")',
    "training: moments, then y": 'outofcore.batch_norm("x.npy", bn, out="y.npy")',
    "moments": 'outofcore.moments("x.npy")',
}
CODE = """
import time
import numpy as np, cbn
from cbn import outofcore
bn = cbn.BatchNorm2d(64)
bn.running_mean[:], bn.running_var[:] = 1, 2
start = time.perf_counter()
{call}
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:  # getrusage has the parent's memory in it
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(seconds, peak)
"""


def make(folder, n_bytes):
    """x.npy, about so large."""
    n = max(64, round(n_bytes / (4 * np.prod(SHAPE)) / 64) * 64)
    part = np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float32)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (n, *SHAPE))
    for i in range(0, n, 64):
        x[i : i + 64] = part + i % 7
    return x.nbytes


def settled(folder):
    """Nothing of the last contender is left, and nothing is on its way to the disk."""
    for file in [folder / "y.npy", folder / "state", *folder.glob("*.part")]:
        file.unlink(missing_ok=True)
    os.sync()
    time.sleep(0.5)


def process(folder, call):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(call=call)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def one_turn(folder, name):
    """(seconds, bytes of resident memory at most or None)."""
    if CONTENDERS[name] is None:
        start = time.perf_counter()
        subprocess.run(["cp", "x.npy", "y.npy"], cwd=folder, check=True)
        if name == SYNCED:
            subprocess.run(["sync", "y.npy"], cwd=folder, check=True)
        return time.perf_counter() - start, None
    child = process(folder, CONTENDERS[name])
    output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{name} ended with status {child.returncode}")
    seconds, peak = map(float, output.split())
    return seconds, peak


def check(folder, name):
    """What is in y.npy, against the layer's own y of some parts."""
    if not (folder / "y.npy").exists() or "evaluation" not in name:
        return
    x, y = (np.load(folder / name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    bn = cbn.BatchNorm2d(SHAPE[0]).eval()
    bn.running_mean[:], bn.running_var[:] = 1, 2
    for at in (0, len(x) // 3, len(x) - 2):
        if not np.array_equal(bn(np.array(x[at : at + 2])), y[at : at + 2]):
            raise RuntimeError(f"{name}: y is wrong from sample {at} on")


def killed(folder):
    """(blocks done when it was killed, blocks in all, whether the file that a second run ended is that of one run)."""
    settled(folder)
    call = CONTENDERS["evaluation with a state"]
    process(folder, call).communicate()
    (folder / "y.npy").rename(folder / "whole.npy")
    settled(folder)
    child = process(folder, call)
    half = os.path.getsize(folder / "x.npy") / 2
    while child.poll() is None:  # blocks are written one after the other, into a file without content
        written = sum(part.stat().st_blocks * 512 for part in folder.glob("*.part"))
        if written > half and (folder / "state").exists():
            child.send_signal(signal.SIGKILL)
            child.wait()
    if not (folder / "state").exists():
        raise RuntimeError("the work was done before it could be killed: take a larger array")
    record = json.loads((folder / "state").read_text())
    done, size = record["applied"], record["work"]["block"][0]
    total = -(-record["work"]["shape"][0] // size)
    process(folder, call).communicate()
    same = filecmp.cmp(folder / "y.npy", folder / "whole.npy", shallow=False)
    (folder / "whole.npy").unlink()
    return done, total, same


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the array")
    parser.add_argument("--turns", type=int, default=7, help="of each contender")
    parser.add_argument("--folder", type=Path, help="where the files are; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of outofcore.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        n_bytes = make(folder, args.gigabytes * 1e9)
        found = {name: [] for name in CONTENDERS}
        for turn in range(args.turns):
            for name in random.Random(turn).sample(list(CONTENDERS), len(CONTENDERS)):
                settled(folder)
                found[name].append(one_turn(folder, name))
                check(folder, name)
                print(f"turn {turn + 1} of {args.turns}, {name}: {found[name][-1][0]:.2f} s", file=sys.stderr)
        done, total, same = killed(folder)
    medians = {name: float(np.median([seconds for seconds, _ in turns])) for name, turns in found.items()}
    lines = [
        f"| {n_bytes / 1e9:.2f} GB | seconds | speed of the copy | resident memory at most |",
        "|---|---:|---:|---:|",
    ]
    for name, turns in found.items():
        seconds = [one for one, _ in turns]
        peak = max((rss for _, rss in turns if rss), default=None)
        against = medians[SYNCED if "state" in name else COPY] / medians[name]
        lines.append(
            f"| {name} | {medians[name]:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{'' if peak is None else f'{against:.2f}'} | {'' if peak is None else f'{peak / 1e6:.0f} MB'} |"
        )
    words = "the same file as that of an undisturbed run" if same else "ANOTHER FILE than that of an undisturbed run"
    text = "\n".join(["# Out of core", "", *lines, ""]) + (
        f"\nMedian and range of {args.turns} turns; with a state, beside the copy that is synced. Killed with {done} "
        f"of {total} blocks in its state, and called again, evaluation gave {words}.\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "outofcore.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
