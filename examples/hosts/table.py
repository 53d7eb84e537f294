"""cbn behind the interfaces of its hosts: errors and times, beside those of each host's own code.

A host that is not installed is left out, or its formula stands in for it.
"""

import sys
import time

import numpy as np

import cbn
from examples import report
from examples.hosts.cases import CASES, LeftOut

SECONDS = 0.05  # of one round of one side


def best_times(calls, rounds, seconds):
    """The best time of each call, in seconds; their rounds take turns."""
    numbers = []
    for call in calls:
        call()  # what compiles or imports, does so now
        start = time.perf_counter()
        call()
        numbers.append(max(1, round(seconds / (time.perf_counter() - start))))
    best = [np.inf] * len(calls)
    for _ in range(rounds):
        for i, (call, number) in enumerate(zip(calls, numbers, strict=True)):
            start = time.perf_counter()
            for _ in range(number):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / number)
    return best


def measure(quick, rounds):
    """[(case, errors, times)], each of theirs and ours, and a line for each case that is left out."""
    rows, left_out = [], []
    with report.progress(len(CASES), "hosts") as bar:
        for make, sizes, short in CASES:
            try:
                case = make(*(short if quick else sizes))
            except LeftOut as reason:
                line = f"left out: {make.__name__.replace('_', ' ')}, as {reason}"
                left_out += [] if line in left_out else [line]
            else:
                calls, results = zip(*map(case.use, (case.theirs, case.ours)), strict=True)
                errors = [case.error(result) for result in results]
                times = best_times(calls, rounds, 0 if quick else SECONDS)
                rows.append((case, errors, times))
            bar.update()
    return rows, left_out


def duration(seconds):
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def show(rows, left_out, rounds, out):
    """Table and picture."""
    threads = f"{cbn.get_num_threads()} thread{'s' * (cbn.get_num_threads() > 1)}"
    table = report.table(
        ["host", "operation", "their error", "ours", "their time", "ours", "ratio"],
        [
            [case.host, case.what, *(f"{e:.1e}" for e in errors), *map(duration, times), f"{times[0] / times[1]:.1f}"]
            for case, errors, times in rows
        ],
    )
    report.write(
        out,
        "hosts",
        "cbn behind the interfaces of its hosts",
        "float32 N(1000, 1) where nothing else is said. Errors are against float64: those of variances relative, those "
        "of observations and of BatchNormalization's y absolute, beside a standard deviation of 1. A host's start "
        "(mean 0, variance 1, count 1e-4) is part of both.",
        table,
        f"Best of {rounds} rounds that take turns, in one process: cbn with {threads}, hosts as they come; numba takes "
        "all processors. A formula stands in for a host that is not installed, or that does more: lerobot and openpi "
        "fill histograms, too.",
        *left_out,
    )

    def paint(figure, axes):
        y = np.arange(len(rows))[::-1]
        labels = [f"{case.host}\n{case.what}" for case, _, _ in rows]
        faster, nearer = axes[0]
        faster.barh(y, [times[0] / times[1] for _, _, times in rows], color=report.WITH_BN)
        faster.axvline(1, color=report.INK)
        faster.set(xscale="log", yticks=y, title="their time / ours")
        faster.set_yticklabels(labels, fontsize=8)
        for i, (color, label) in enumerate([(report.WITHOUT_BN, "theirs"), (report.WITH_BN, "cbn")]):
            nearer.plot([max(errors[i], 1e-16) for _, errors, _ in rows], y, "o", color=color, label=label)
        nearer.set(xscale="log", title="error against float64")
        report.legend(figure, nearer)

    title = "cbn behind the interfaces of its hosts"
    report.draw(out / "hosts.png", paint, size=(11, 6), columns=2, title=title, sharey=True)


def main(argv=None):
    parser = report.parser(__doc__, threads=(1, "of cbn"), rounds=(7, "of each call"))
    parser.add_argument("--quick", action="store_true", help="small arrays, one call a round: to see that all runs")
    args = parser.parse_args(argv)
    with cbn.num_threads(args.threads):
        rows, left_out = measure(args.quick, args.rounds)
        show(rows, left_out, args.rounds, args.out)
    for line in left_out:
        print(line, file=sys.stderr)
