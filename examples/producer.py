"""Given statistics: a matrix product measures its output block by block, and batch norm need not read it first.

A producer that has a block of its output in a cache can add it to `cbn.Moments` there. `bn(y, moments=m)` then
normalizes in one pass, as evaluation does, where training reads y twice. Real data: scikit-learn's digits.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import ThreadpoolController  # comes with scikit-learn

import cbn
from examples import report

WIDTHS = (256, 1024, 2048)  # outputs of the linear layer
BLOCK = 1 << 20  # bytes of a block of the product, which stays in a cache
LIBRARIES = ThreadpoolController()
PLAIN, GIVEN = "product, bn(y)", "blocks with moments, bn(y, moments=m)"


def features():
    """(17970, 64): the digits ten times, each time with other noise, as a table of augmented data has them."""
    pixels = (load_digits().data / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    return np.concatenate([pixels + rng.normal(0, 0.1, pixels.shape).astype(np.float32) for _ in range(10)])


def product_with_moments(x, weight, y, pool):
    """y = x @ weight, and the moments of y's columns, taken of each block of rows when it has just been written.

    A block is of one thread: threads of BLAS, which wait for their next product, and those of cbn would take turns.
    """
    rows = max(1, BLOCK // (y.shape[1] * y.itemsize))

    def part(begin):
        block = y[begin : begin + rows]
        np.matmul(x[begin : begin + rows], weight, out=block)
        with cbn.num_threads(1):
            return cbn.moments(block)

    with LIBRARIES.limit(limits=1, user_api="blas"):
        return cbn.Moments.merge(list(pool.map(part, range(0, len(x), rows))))


def best(f, rounds):
    """Milliseconds of the fastest of some calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def run(*, rounds, widths=WIDTHS):
    """{width: (milliseconds of the product, then of PLAIN and GIVEN and of batch norm alone in both, difference)}."""
    x, found = features(), {}
    pool = ThreadPoolExecutor(cbn.get_num_threads())
    for width in widths:
        weight = (np.random.default_rng(1).normal(size=(x.shape[1], width)) / 8).astype(np.float32)
        y, out = np.empty((len(x), width), np.float32), np.empty((len(x), width), np.float32)
        bn = cbn.BatchNorm1d(width)

        def plain(weight=weight, y=y, out=out, bn=bn):
            np.matmul(x, weight, out=y)
            return bn(y, out=out)

        def given(weight=weight, y=y, out=out, bn=bn):
            return bn(y, out=out, moments=product_with_moments(x, weight, y, pool))

        expected = plain().copy()
        difference = report.difference(given(), expected)
        m = cbn.moments(y)
        found[width] = {
            "product": best(lambda weight=weight, y=y: np.matmul(x, weight, out=y), rounds),
            PLAIN: best(plain, rounds),
            GIVEN: best(given, rounds),
            "bn(y)": best(lambda y=y, out=out, bn=bn: bn(y, out=out), rounds),
            "bn(y, moments=m)": best(lambda y=y, out=out, bn=bn, m=m: bn(y, out=out, moments=m), rounds),
            "difference": difference,
        }
    return found


def show(results, out, rounds):
    """Table and picture."""
    columns = [key for key in next(iter(results.values())) if key != "difference"]
    rows = [
        [f"(17970, {width})", *(f"{times[key]:.2f}" for key in columns), times["difference"]]
        for width, times in results.items()
    ]
    report.write(
        out,
        "producer",
        "Statistics from the product",
        f"Milliseconds, the fastest of {rounds} rounds; the last column is the largest difference of the two outputs.",
        report.table(["y", *columns, "difference"], rows),
    )

    def paint(figure, axes):
        ax = axes[0, 0]
        places = np.arange(len(results))
        for i, (key, color) in enumerate(((PLAIN, report.PALETTE[1]), (GIVEN, report.PALETTE[0]))):
            behind = [times[key] - times["product"] for times in results.values()]
            ax.bar(places + 0.4 * i - 0.2, behind, 0.38, color=color, label=key)
        ax.set_xticks(places, [f"(17970, {width})" for width in results])
        ax.set_ylabel("time beside the product (ms)")
        ax.legend(loc="upper left")

    report.draw(out / "producer.png", paint, size=(8, 4), title="Batch norm behind a matrix product")


def main(argv=None):
    parser = report.parser(__doc__, rounds=(20, "rounds"))
    args = parser.parse_args(argv)
    show(run(rounds=args.rounds), args.out, args.rounds)


if __name__ == "__main__":
    sys.exit(report.run(main))
