"""How exact cbn is: largest errors against float64, as a table. Nothing is timed here.

    python -m benchmarks.accuracy [--out DIR]

Training forward and backward of (32, 16, 28, 28) in float32, channels first and channels last. An error is the largest
difference from `cbn.reference`, in float64 on the same float32 values, relative to the largest exact value. Then the
variance of float64 channels whose values come in an order that costs digits, against sums in long double. PyTorch
stands beside it where it is installed.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

import cbn
from cbn import reference
from cbn.__main__ import run as run_command
from cbn.functional import native_batch_norm, native_batch_norm_backward
from cbn.kernels import engine

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


def with_outlier(values, place):
    """The values with one of 31 among them."""
    values[place] = 31
    return values


VALUES = 20_000  # of a channel
ORDERS = {
    "N(0, 1)": lambda rng: rng.standard_normal(VALUES),
    "N(0, 1), 31 first": lambda rng: with_outlier(rng.standard_normal(VALUES), 0),
    "N(0, 1), 31 last": lambda rng: with_outlier(rng.standard_normal(VALUES), -1),
    "N(0, 1) ascending": lambda rng: np.sort(rng.standard_normal(VALUES)),
    "0.3 and −0.3 in turn": lambda rng: np.where(np.arange(VALUES) % 2, 0.3, -0.3),
    "0, and 1 % of N(0, 1)": lambda rng: np.where(rng.random(VALUES) < 0.01, rng.standard_normal(VALUES), 0),
    "1.1, then 2.3": lambda rng: np.where(np.arange(VALUES) < VALUES // 2, 1.1, 2.3),
}


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


def cbn_variance(x):
    """Sum of squared distances from the mean, of each channel."""
    return cbn.moments(x).m2


def torch_variance(x):
    """The same of PyTorch, from the running variance of one batch."""
    import torch

    mean, var = torch.zeros(x.shape[1], dtype=torch.float64), torch.ones(x.shape[1], dtype=torch.float64)
    torch.nn.functional.batch_norm(torch.from_numpy(np.copy(x, order="K")), mean, var, training=True, momentum=1.0)
    return var.numpy() * (x.size // x.shape[1] - 1)


VARIANCES = {cbn_run: cbn_variance, torch_run: torch_variance}


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


def exact_variance(x):
    """Sum of squared distances of float64 values from their mean, in long double."""
    high = math.fsum(x) / len(x)
    low = math.fsum([*x, *[-high] * len(x)]) / len(x)
    square = (x.astype(np.longdouble) - high - low) ** 2
    rounded = square.astype(np.float64)
    return np.longdouble(math.fsum(rounded)) + math.fsum((square - rounded).astype(np.float64))


def order_rows():
    """(order, contender, largest relative error of the variance in both layouts), float64."""
    rng = np.random.default_rng(1)
    for name, make in ORDERS.items():
        values = make(rng)
        exact = exact_variance(values)
        x = np.repeat(values.reshape(8, 1, 50, 50), 4, 1)
        for who, run in contenders().items():
            found = np.concatenate([VARIANCES[run](a) for a in (x, as_nhwc(x))])
            yield name, who, float(np.abs(found - exact).max() / exact)


def order_table(rows):
    """A row an order, a column a contender."""
    errors = {}
    for name, who, value in rows:
        errors.setdefault(name, {})[who] = value
    names = list(next(iter(errors.values())))
    lines = [f"| {VALUES:,} values a channel, float64 | " + " | ".join(f"variance, {who}" for who in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    lines += [f"| {name} | " + " | ".join(f"{by[who]:.1e}" for who in names) + " |" for name, by in errors.items()]
    return "\n".join(lines) + "\n"


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
    measured, orders = list(rows()), order_table(order_rows())
    text = f"{table(measured)}\n{orders}"
    (out / "accuracy.md").write_text(text)
    (out / "accuracy_summary.md").write_text(f"{summary(measured)}\n{orders}")
    print(text)
    for isa in engine.available():
        engine.use_isa(isa)
        worst = np.array([v for _, who, _, v in rows() if who == "cbn" and len(v) > 1])
        limits = " ".join(f"{r} {w:.1e}" for r, w in zip(RESULTS, worst.max(axis=0), strict=True))
        print(f"{isa}: largest error over all inputs and layouts: {limits}")
    if len(contenders()) == 1:
        print("PyTorch is not in the table, as it is not installed: pip install -e '.[peers]' in the checkout")
    print(f"written: {out / 'accuracy.md'}, {out / 'accuracy_summary.md'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
