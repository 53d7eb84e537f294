"""How exact cbn is: largest errors against float64, as a table. Nothing is timed here.

    python -m benchmarks.accuracy [--out DIR]

Training forward and backward of (32, 16, 28, 28) in float32, channels first and channels last. An error is the largest
difference from `cbn.reference`, in float64 on the same float32 values, relative to the largest exact value. PyTorch
stands beside it where it is installed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from cbn import reference
from cbn.__main__ import run as run_command
from cbn.functional import native_batch_norm, native_batch_norm_backward
from cbn.kernels import passes

SHAPE = (32, 16, 28, 28)
INPUTS = {
    "N(0, 1)": (0, 1, 1),
    "N(1000, 1)": (1000, 1, 1),
    "N(1e4, 0.1)": (1e4, 0.1, 1),
    "N(1e6, 1)": (1e6, 1, 1),
    "N(0, 1) × 1e19": (0, 1, 1e19),
    "N(0, 1) × 1e-20": (0, 1, 1e-20),
}
CONSTANTS = (3.3, 1e7, 1e10)
RESULTS = ("y", "dx", "dweight", "dbias")


def cbn_run(x, dy, weight, bias):
    """(y, dx, dweight, dbias) of cbn."""
    y, *saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
    return y, *native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5)


def torch_run(x, dy, weight, bias):
    """The same of PyTorch."""
    import torch

    x, dy, weight, bias = (torch.from_numpy(np.copy(a, order="K")).requires_grad_() for a in (x, dy, weight, bias))
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    y.backward(dy.detach())
    return tuple(a.detach().numpy() for a in (y, x.grad, weight.grad, bias.grad))


def contenders():
    """Names and functions of what is compared."""
    found = {"cbn": cbn_run}
    try:
        import torch

        found[f"PyTorch {torch.__version__.split('+')[0]}"] = torch_run
    except ImportError:
        pass
    return found


def errors(run, x, dy, weight, bias):
    """Largest relative errors of y, dx, dweight, dbias."""
    n, mean, m2 = reference.moments(x)
    exact = (reference.normalize(x, mean, m2 / n, weight, bias), *reference.backward(dy, x, mean, m2 / n, weight))
    return [np.abs(a - e).max() / np.abs(e).max() for a, e in zip(run(x, dy, weight, bias), exact, strict=True)]


def as_nhwc(x):
    """The same NCHW-shaped array with NHWC memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def rows():
    """(input, contender, layout, values) of the table; for a constant input the value is max |y - bias|."""
    rng = np.random.default_rng(0)
    dy = rng.standard_normal(SHAPE).astype(np.float32)
    weight, bias = rng.standard_normal((2, SHAPE[1])).astype(np.float32)
    zero = np.zeros_like(bias)  # a bias would hide the error of a small y
    for name, (mean, std, factor) in INPUTS.items():
        x = ((rng.standard_normal(SHAPE) * std + mean) * factor).astype(np.float32)
        for who, run in contenders().items():
            yield name, who, "first", errors(run, x, dy, weight, zero)
            yield name, who, "last", errors(run, as_nhwc(x), as_nhwc(dy), weight, zero)
    for value in CONSTANTS:
        x = np.full(SHAPE, value, np.float32)
        for who, run in contenders().items():
            for layout, a in (("first", x), ("last", as_nhwc(x))):
                yield (
                    f"constant {value:g}",
                    who,
                    layout,
                    [np.abs(run(a, dy, weight, bias)[0] - bias[:, None, None]).max()],
                )


def table(rows):
    """All rows as Markdown."""
    lines = ["| input, float32 | | channels | " + " | ".join(RESULTS) + " |", "|---|---|---|" + "---|" * len(RESULTS)]
    for name, who, layout, values in rows:
        cells = [f"{v:.1e}" if v else "0" for v in values] + [""] * (len(RESULTS) - len(values))
        lines.append(f"| {name} | {who} | {layout} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(rows):
    """A row an input: the larger error of the two layouts, in y and in the worst gradient, of each contender."""
    worst = {}
    for name, who, _, values in rows:
        entry = worst.setdefault(name, {}).setdefault(who, [0.0, None])
        entry[0] = max(entry[0], values[0])
        if len(values) > 1:
            entry[1] = max(entry[1] or 0.0, *values[1:])
    names = list(next(iter(worst.values())))
    lines = [
        "| input, float32 | " + " | ".join(f"y, {who} | gradients, {who}" for who in names) + " |",
        "|---|" + "---|---|" * len(names),
    ]
    for name, by_who in worst.items():
        cells = ["" if v is None else f"{v:.1e}" if v else "0" for who in names for v in by_who[who]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Print the table for every instruction set, and write that of the one in use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of accuracy.md")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    measured = list(rows())
    text = table(measured)
    (out / "accuracy.md").write_text(text)
    (out / "accuracy_summary.md").write_text(summary(measured))
    print(text)
    for isa in passes.available():
        passes.use_isa(isa)
        worst = np.array([v for _, who, _, v in rows() if who == "cbn" and len(v) > 1])
        limits = " ".join(f"{r} {w:.1e}" for r, w in zip(RESULTS, worst.max(axis=0), strict=True))
        print(f"{isa}: largest error over all inputs and layouts: {limits}")
    if len(contenders()) == 1:
        print("PyTorch is not in the table, as it is not installed: pip install -e '.[peers]' in the checkout")
    print(f"written: {out / 'accuracy.md'}, {out / 'accuracy_summary.md'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
