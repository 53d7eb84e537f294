"""How the examples show what they found: arguments, progress bar, Markdown tables, CSV of every run, pictures.

Pictures are drawn on figures of their own, without pyplot: neither backend nor style of the process is touched.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from cbn.__main__ import run  # noqa: F401  what every script is called by: a closed pipe is no traceback

OUT = Path(__file__).resolve().parent / "out"

# Okabe and Ito's palette, which stays distinct with every kind of colour blindness.
WITH_BN, WITHOUT_BN, INK = "#0072B2", "#D55E00", "#444444"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.titlesize": 13,
}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the description keeps its lines."""


def parser(doc, **counts):
    """Arguments of an example: --out, and a whole number for each keyword, with its default and its help."""
    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where pictures and tables go")
    for name, (default, text) in counts.items():
        p.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=text)
    return p


def positive(text):
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {n}")
    return n


def progress(total, label):
    """A progress bar on stderr."""
    return tqdm(total=total, desc=label, file=sys.stderr, unit="batch", leave=True)


def table(headers, rows):
    """A Markdown table that also reads well as plain text; the first column to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headers))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append("| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]) + " |")
    rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write(out, name, title, *blocks):
    """Print the blocks and write them to ``name``.md; the text."""
    text = "\n\n".join([f"# {title}", *blocks]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def write_runs(out, name, runs):
    """Every metric of every seed and epoch as CSV; `runs` maps a label to {metric: (seeds, epochs)}."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seed", "epoch", "metric", "value"])
        for label, metrics in runs.items():
            for metric, values in metrics.items():
                for (seed, epoch), value in np.ndenumerate(values):
                    writer.writerow([label, seed, epoch + 1, metric, f"{value:.6g}"])


def draw(path, paint, *, size, rows=1, columns=1, title=None, **options):
    """Make a figure, let ``paint(figure, axes)`` fill it, and write it as PNG; axes is a (rows, columns) array."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        if title:
            figure.suptitle(title, x=0.01, ha="left", weight="bold")
        paint(figure, axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def band(ax, x, runs, color, label, **line):
    """Mean over the first axis of `runs` as a line, smallest to largest as a band."""
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.18, linewidth=0)
    ax.plot(x, runs.mean(axis=0), color=color, label=label, marker="o", markersize=4, **line)


def with_and_without(ax, x, with_bn, without_bn, **line):
    """Two bands in the two colours that all pictures share."""
    band(ax, x, without_bn, WITHOUT_BN, "without batch norm", **line)
    band(ax, x, with_bn, WITH_BN, "with batch norm", **line)


def legend(figure, ax):
    """One legend for all axes, beside the title."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=len(labels))


def epochs_axis(ax, epochs):
    ax.set_xticks(range(1, epochs + 1) if epochs <= 10 else range(0, epochs + 1, 5))
    ax.set_xlabel("epoch")


def difference(a, b):
    """The largest absolute difference, as text."""
    return f"{np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))):.1e}"
