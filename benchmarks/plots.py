"""The plots of the report: functions of a theme that give a Figure of 1000 units' width, so that a point is a pixel.

Each is drawn twice, for light and for dark, as SVG in the page; CSS shows the one that fits.
"""

import io
import re
from html import escape

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from .cases import LAYOUTS, OPS
from .results import (
    BEST,
    GROWTH_NAMES,
    GROWTH_SHAPES,
    LAYOUT_WORDS,
    OP_WORDS,
    OURS,
    PLAIN,
    STREAM,
    conditions,
    duration,
    group_of,
    grouped,
    peers_of,
    percent,
    plural,
    ratio_words,
    shape_words,
    spread,
    verdict,
)

TOP = 2.0  # the largest share that is drawn to scale
# Okabe and Ito's colours, which colour-blind people tell apart, lighter on dark
PAGE = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "line": "#d1d9e0", "slow": "#c2410c"},
    "dark": {"page": "#14171c", "ink": "#e6e9ed", "soft": "#9aa4ae", "line": "#353c45", "slow": "#ff9a5c"},
}
COLORS = {  # name: (light, dark)
    OURS: ("#0072b2", "#58b4f5"),
    "numpy": ("#6b7280", "#a3acb6"),
    "PyTorch": ("#d55e00", "#ff8a4c"),
    "oneDNN": ("#008f68", "#33c79d"),
    BEST: ("#008f68", "#33c79d"),
    "ONNX Runtime": ("#b0568c", "#e39bc6"),
    "OpenVINO": ("#a87900", "#e6b450"),
    "JAX": ("#2f9fd8", "#a8dcff"),
}
MARKERS = {"numpy": "X", "PyTorch": "o", "oneDNN": "s", BEST: "D", "ONNX Runtime": "^", "OpenVINO": "v", "JAX": "P"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, the page's own font, and it can be searched
    "svg.hashsalt": "cbn",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
}


class Theme:
    """Colours of the light or the dark page."""

    def __init__(self, name):
        self.name = name
        for key, value in PAGE[name].items():
            setattr(self, key, value)

    def color(self, name):
        return COLORS.get(name, (self.soft, self.soft))[self.name == "dark"]

    def style(self):
        return {
            **STYLE,
            "text.color": self.ink,
            "axes.labelcolor": self.soft,
            "axes.edgecolor": self.line,
            "xtick.color": self.line,
            "ytick.color": self.line,
            "xtick.labelcolor": self.soft,
            "ytick.labelcolor": self.ink,
        }


def canvas(height, rows, columns, left, right, top, bottom, **spacing):
    """A Figure and its grid, with margins in pixels."""
    figure = Figure(figsize=(1000 / 72, height / 72))
    grid = figure.add_gridspec(rows, columns, left=left / 1000, right=1 - right / 1000, top=1 - top / height,
                               bottom=bottom / height, **spacing)  # fmt: skip
    return figure, grid


def marked(axes, x, y, name, theme):
    """A peer's mark, edged in the page's colour so that it reads on a bar."""
    marker = MARKERS.get(name, "*")
    axes.scatter([x], [y], s=60 if marker in "^v*" else 40, marker=marker, c=theme.color(name), linewidths=1,
                 edgecolors=theme.page, zorder=4, clip_on=False)  # fmt: skip


def rows_axis(axes, rows, labels, title=None):
    """Rows down an axis, from the top; a column that has a title shows their labels under it."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), labels if title else [])
    axes.tick_params("y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    if title:
        axes.annotate(title, (0, 1), xycoords="axes fraction", xytext=(-8, 8), textcoords="offset points", ha="right",
                      va="baseline", weight="bold", size=12.5)  # fmt: skip


def blank(axes):
    """Nothing but the labels of the rows."""
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def shape_label(slots, shape, threads):
    """The shape, and its thread count where it is not the page's."""
    n = slots[shape][OURS].case.threads
    return shape_words(shape) + ("" if n == threads else f" ({plural(n, 'thread')})")


def layouts_of(groups, ops):
    """{layout: {op: slots}} of what there is, and its shapes {layout: [shape]}, large ones first."""
    found, shapes = {}, {}
    for layout in LAYOUTS:
        of_op = {op: groups[op, layout] for op in ops if (op, layout) in groups}
        if of_op:
            found[layout] = of_op
            every = {s for slots in of_op.values() for s in slots}
            shapes[layout] = sorted(every, key=lambda s: (-np.prod(s, dtype=float), s))
    return found, shapes


def share_figure(data, groups, threads, theme):
    """Share of the limit by shape: a bar for cbn, marks for peers, the limit a line."""
    ops = [op for op in OPS if any((op, layout) in groups for layout in LAYOUTS)]
    found, shapes = layouts_of(groups, ops)
    heights = [len(shapes[layout]) for layout in found]
    height = 72 + 24 * sum(heights) + 72 * (len(heights) - 1) + 28
    figure, grid = canvas(height, len(found), len(ops), 190, 52, 72, 28, height_ratios=heights, wspace=0.27,
                          hspace=72 / (24 * np.mean(heights)))  # fmt: skip
    top, used = share_top(found), []
    for i, (layout, of_op) in enumerate(found.items()):
        labels = [shape_label(next(o for o in of_op.values() if s in o), s, threads) for s in shapes[layout]]
        for j, op in enumerate(ops):
            axes = figure.add_subplot(grid[i, j], xlim=(0, top))
            rows_axis(axes, shapes[layout], labels, LAYOUT_WORDS[layout] if j == 0 else "")
            if op not in of_op:
                blank(axes)
                continue
            for y, shape in enumerate(shapes[layout]):
                slot = of_op[op].get(shape, {})
                for name in [n for n, row in slot.items() if row.is_peer and row.share]:
                    marked(axes, min(slot[name].share["median"], top), y, name, theme)
                    used.append(name)
                if slot and slot[OURS].share:
                    share_bar(axes, y, slot[OURS], top, data.fits_cache(slot[OURS]), theme)
            axes.axvline(1, color=theme.ink, linewidth=1.4, zorder=1)
            above(axes, 1, "limit", axes.get_xaxis_transform(), ha="center", size=11)
            axes.set_xticks([v for v in (0, 0.5, 1, 1.5, 2) if v <= top])
            axes.xaxis.set_major_formatter(lambda v, _: percent(v))
            above(axes, 0, OP_WORDS[op])
    legend(figure, theme, used)
    return figure


def share_top(found):
    """Where the axis of shares ends: after cbn's largest and, within reason, the peers'; others lie at its end."""
    rows = [row for of_op in found.values() for slots in of_op.values() for slot in slots.values()
            for row in slot.values() if row.share]  # fmt: skip
    far = [min(row.share["median"], TOP if row.name == OURS else 1.4) for row in rows if not row.is_limit]
    return min(1.04 * max([*far, 1.11]), TOP)


def above(axes, x, text, transform=None, **kwargs):
    """Words over an axis, a few pixels above it."""
    axes.annotate(text, (x, 1), xycoords=transform or axes.transAxes, xytext=(0, 8), textcoords="offset points",
                  va="baseline", **{"weight": "normal" if kwargs else "bold", "size": 12.5, **kwargs})  # fmt: skip


def share_bar(axes, y, row, top, in_cache, theme):
    """cbn's bar: filled for arrays larger than the caches, an outline for those that fit; quartiles as a line."""
    color, share = theme.color(OURS), min(row.share["median"], top)
    axes.barh(y, share, height=0.56, color="none" if in_cache else color, edgecolor=color, linewidth=1.1, zorder=2)
    axes.hlines(y, min(row.share["q1"], top), min(row.share["q3"], top), color=theme.ink, linewidth=1.2, zorder=3)
    axes.text(1.06, y, percent(row.share["median"]), transform=axes.get_yaxis_transform(), va="center", size=11.5,
              color=color, weight="normal" if in_cache else "bold")  # fmt: skip


def legend(figure, theme, names):
    """The marks, in one line at the top."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    color = theme.color(OURS)
    handles = [Patch(facecolor=color, edgecolor=color, label="cbn"),
               Patch(facecolor="none", edgecolor=color, label="cbn, in cache")]  # fmt: skip
    for name in sorted(set(names), key=lambda n: list(MARKERS).index(n) if n in MARKERS else 99):
        handles.append(Line2D([], [], linestyle="", marker=MARKERS.get(name, "*"), markersize=6, label=name,
                              color=theme.color(name)))  # fmt: skip
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1), ncols=len(handles), frameon=False,
                  fontsize=11.5, handletextpad=0.35, columnspacing=1.1, borderpad=0, handlelength=1.3)  # fmt: skip


def ratio_figure(data, groups, op, threads, theme):
    """Ratio to each peer: a column each, a row a shape, 1 a line, quartiles as whiskers."""
    found, shapes = layouts_of(groups, [op])
    peers = [p for p in data.peers if any(p in peers_of(slot) for of in found.values() for slot in of[op].values())]
    ratios = [row.ratio[q] for of in found.values() for slot in of[op].values() for row in peers_of(slot).values()
              for q in ("median", "q1", "q3")]  # fmt: skip
    low, high = min(0.5, *ratios) / 1.15, max(2, *ratios) * 1.15
    low, high = max(low, 1 / 30), min(high, 30)
    heights = [len(shapes[layout]) for layout in found]
    height = 30 + 22 * sum(heights) + 64 * (len(heights) - 1) + 28
    figure, grid = canvas(height, len(found), len(peers), 190, 42, 30, 28, height_ratios=heights, wspace=0.55,
                          hspace=64 / (22 * np.mean(heights)))  # fmt: skip
    for i, (layout, of_op) in enumerate(found.items()):
        labels = [shape_label(of_op[op], s, threads) for s in shapes[layout]]
        for j, peer in enumerate(peers):
            axes = figure.add_subplot(grid[i, j], xscale="log", xlim=(low, high))
            rows_axis(axes, shapes[layout], labels, LAYOUT_WORDS[layout] if j == 0 else "")
            if not any(peer in peers_of(slot) for slot in of_op[op].values()):
                blank(axes)
                continue
            axes.hlines(range(len(labels)), low, high, color=theme.line, linewidth=0.6, zorder=0)
            ratio_marks(axes, [of_op[op][shape] for shape in shapes[layout]], peer, theme)
            axes.axvline(1, color=theme.ink, linewidth=1.2, zorder=1)
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            ticks = [t for t in (0.1, 0.3, 1, 3, 10) if low < t < high]
            axes.set_xticks(ticks if len(ticks) <= 3 else [t for t in (0.1, 1, 10) if low < t < high])
            axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
            above(axes, 0, peer, size=11.5, weight="bold")
    return figure


def ratio_marks(axes, slots, peer, theme):
    """Dots with quartiles and numbers, coloured by who is faster; hollow where measured unlike cbn's row."""
    colors = {"fast": theme.color(OURS), "slow": theme.slow, "level": theme.soft}
    marks = [(y, slot[peer].ratio, bool(conditions(slot[peer], slot[OURS])))
             for y, slot in enumerate(slots) if peer in peers_of(slot)]  # fmt: skip
    ys, ratios, hollow = zip(*marks, strict=True)
    q1, median, q3 = np.clip([[r[k] for r in ratios] for k in ("q1", "median", "q3")], *axes.get_xlim())
    edges = [colors[verdict(r["median"])] for r in ratios]
    faces = [theme.page if h else edge for h, edge in zip(hollow, edges, strict=True)]
    axes.hlines(ys, q1, q3, colors=edges, linewidth=2, alpha=0.55, zorder=2)
    axes.scatter(median, ys, s=34, c=faces, edgecolors=edges, zorder=3)
    for y, ratio, color in zip(ys, ratios, edges, strict=True):
        axes.text(1.04, y, ratio_words(ratio["median"])[:-1], transform=axes.get_yaxis_transform(), va="center",
                  size=11, color=color)  # fmt: skip


def latency_figure(data, theme):
    """Percentiles of single calls: p50 a dot, p95 a tick, p99 the end; idle above, busy below."""
    cases = list(dict.fromkeys(e["case"] for e in data.latency))
    names = list(dict.fromkeys(e["contender"] for e in data.latency))
    height = 62 + 46 * len(names) + 48
    figure, grid = canvas(height, 1, len(cases), 120, 60, 62, 48, wspace=0.28)
    for j, case in enumerate(cases):
        entries = [e for e in data.latency if e["case"] == case]
        axes = figure.add_subplot(grid[0, j], xscale="log")
        rows_axis(axes, names, names, " " if j == 0 else "")
        for e in entries:
            busy = e["load"] == "busy"
            y = names.index(e["contender"]) + (0.18 if busy else -0.18)
            color = theme.color(OURS if e["contender"].startswith(OURS) else e["contender"])
            p50, p95, p99 = (1e6 * e[p] for p in ("p50", "p95", "p99"))
            axes.hlines(y, p50, p99, color=color, linewidth=1.8, linestyle="--" if busy else "-")
            axes.scatter([p50], [y], s=44, c=theme.page if busy else color, edgecolors=color, linewidths=1.6, zorder=3)
            axes.scatter([p95, p99], [y, y], s=70, marker="|", c=color, linewidths=1.8, zorder=3)
            axes.text(1.02, y, duration(e["p99"]), transform=axes.get_yaxis_transform(), va="center", size=11,
                      color=theme.soft)  # fmt: skip
        above(axes, 1.02, "p99", size=11, color=theme.soft)
        for y in range(1, len(names)):
            axes.axhline(y - 0.5, color=theme.line, linewidth=0.6)
        log_time(axes, "x")
        layout = "" if len(entries[0]["shape"]) == 2 else f", {LAYOUT_WORDS[entries[0]['layout']]}"
        above(axes, 0, f"{OP_WORDS[entries[0]['op']]} {shape_words(entries[0]['shape'])}{layout}")
    key = "filled, solid: idle  ·  hollow, dashed: every core busy  ·  dot p50, tick p95, end p99"
    figure.text(0.5, 1 - 6 / height, key, ha="center", va="top", size=11.5, color=theme.soft)
    return figure


def log_time(axes, which):
    """Microseconds on a log axis, in words."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    low, high = (axes.get_xlim if which == "x" else axes.get_ylim)()
    if high / low < 30:
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(
        lambda v, _: f"{v:g} µs" if v < 999 else f"{v / 1e3:g} ms" if v < 999e3 else f"{v / 1e6:g} s"
    )


def end_labels(axes, ends, gap, theme, log=False):
    """Names at the right of their lines; `ends` is [(name, last y)], `gap` in the axis's scale."""
    values = np.array([y for _, y in ends])
    placed = spread(np.log10(values) if log else values, gap)
    for (name, _), y in zip(ends, 10**placed if log else placed, strict=True):
        axes.text(1.02, y, name, transform=axes.get_yaxis_transform(), va="center", size=11.5,
                  weight="bold" if name == OURS else "normal", color=theme.color(name))  # fmt: skip


def growth_of(data):
    """{threads: {op: {n: slot}}} of the cases that grow."""
    counts = sorted({r.case.threads for r in data.rows if r.case.shape in GROWTH_SHAPES})
    found = {}
    for threads in dict.fromkeys((*counts[:1], *counts[-1:])):
        groups = grouped(data.rows, threads, lambda c: (c.op, c.layout) if c.shape in GROWTH_SHAPES else None)
        ops = {op: {int(np.prod(s)): slot for s, slot in slots.items()} for (op, _), slots in groups.items()}
        found[threads] = {op: dict(sorted(of_n.items())) for op, of_n in ops.items() if len(of_n) > 1}
    return {threads: ops for threads, ops in found.items() if ops}


def growth_figure(growth, theme):
    """Time against size, log-log, with the limit."""
    ops = [op for op in OPS if any(op in of for of in growth.values())]
    height = 46 + 250 * len(growth) + 84 * (len(growth) - 1) + 50
    figure, grid = canvas(height, len(growth), len(ops), 70, 110, 46, 50, wspace=0.5, hspace=84 / 250)
    for i, (threads, of_op) in enumerate(growth.items()):
        for j, op in enumerate(ops):
            if op not in of_op:
                continue
            axes = figure.add_subplot(grid[i, j], xscale="log", yscale="log")
            ends = []
            lines = {
                name: {n: slot[name].time for n, slot in of_op[op].items() if name in slot} for name in GROWTH_NAMES
            }
            lines["limit"] = {n: slot[OURS].time * slot[OURS].share["median"] for n, slot in of_op[op].items()
                              if slot[OURS].share}  # fmt: skip
            for name, line in lines.items():
                if line:
                    times = 1e6 * np.array(list(line.values()))
                    axes.plot(list(line), times, color=theme.color(name), linewidth=2.2 if name == OURS else 1.5,
                              linestyle="--" if name == "limit" else "-", marker="o" if name != "limit" else None,
                              markersize=4, zorder=3 if name == OURS else 2)  # fmt: skip
                    ends.append((name, times[-1]))
            low, high = np.log10(axes.get_ylim())
            end_labels(axes, ends, (high - low) * 16 / 250, theme, log=True)
            log_time(axes, "y")
            axes.grid(color=theme.line, linewidth=0.6)
            axes.set_title(f"{OP_WORDS[op]}, {plural(threads, 'thread')}", pad=10)
            axes.xaxis.set_major_formatter(lambda v, _: f"10{str(round(np.log10(v))).translate(SUPERSCRIPTS)}")
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            if i == len(growth) - 1:
                axes.set_xlabel("elements", labelpad=6)
    return figure


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scaling_of(data):
    """(shape, {op: {contender: {threads: time}}}) of the shape with most thread counts, if there are two."""
    counts = {}
    for r in data.rows:
        if r.name == OURS and r.case.layout == "first" and r.case.memory == "out" and group_of(r.case):
            counts.setdefault(r.case.shape, set()).add(r.case.threads)
    shape = max(counts, key=lambda s: (len(counts[s]), s == (32, 256, 28, 28), np.prod(s)), default=None)
    if shape is None or len(counts[shape]) < 2:
        return None, {}
    found = {}
    for threads in sorted(counts[shape]):
        same = [r for r in data.rows if r.case.threads == threads and r.case.shape == shape and r.case.memory == "out"]
        for (op, layout), slots in grouped(same, threads).items():
            if layout != "first":
                continue
            slot = slots[shape]
            times = {name: row.time for name, row in slot.items() if row.is_peer or name == OURS}
            scales = [slot[n].time for n in (PLAIN, STREAM) if n in slot]
            if scales:
                times["memory limit"] = min(scales)
            for name, time in times.items():
                found.setdefault(op, {}).setdefault(name, {})[threads] = time
    return shape, found


def threads_figure(found, theme):
    """Speed-up against threads, each over itself with the fewest."""
    height = 46 + 250 + 50
    figure, grid = canvas(height, 1, len(found), 50, 120, 46, 50, wspace=0.75)
    for j, (op, lines) in enumerate(found.items()):
        axes = figure.add_subplot(grid[0, j])
        ends, points, counts = [], [0.8], sorted({n for line in lines.values() for n in line})
        for name, line in lines.items():
            first = min(line)
            if len(line) < 2 or name == "numpy":  # it has one thread whatever is asked
                continue
            up = [line[first] / t for t in line.values()]
            color = theme.ink if name == "memory limit" else theme.color(name)
            axes.plot(list(line), up, color=color, linewidth=2.4 if name == OURS else 1.4,
                      linestyle="--" if name == "memory limit" else "-", marker=MARKERS.get(name, "o"), markersize=5,
                      zorder=3 if name == OURS else 2)  # fmt: skip
            ends.append((name, up[-1]))
            points += up
        axes.plot(counts, np.divide(counts, counts[0]), color=theme.soft, linewidth=1.4, linestyle=":", zorder=1)
        ends.append(("perfect", counts[-1] / counts[0]))
        low, high = min(points) * 0.96, max(*points, counts[-1] / counts[0]) * 1.06
        axes.set_ylim(low, high)
        end_labels(axes, ends, (high - low) * 16 / 250, theme)
        axes.set_xticks(counts)
        axes.set_xlabel("threads", labelpad=6)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}×")
        axes.grid(color=theme.line, linewidth=0.6)
        axes.set_title(OP_WORDS[op], pad=10)
    return figure


def svg(figure, prefix, label):
    """Inline SVG: no prologue, ids of its own, and a label for who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"\n\s+", "\n", text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # only the root has sizes in points
    text = re.sub(r' (width|height)="[^"]*pt"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def plot(name, label, draw):
    """A <figure> with a light and a dark picture; `draw` takes a theme."""
    parts = []
    for kind in PAGE:
        theme = Theme(kind)
        with matplotlib.rc_context(theme.style()):
            parts.append(f'<div class="on-{kind}">{svg(draw(theme), f"{name}-{kind}", label)}</div>')
    return f'<figure id="plot-{name}"><div class="scroll plot">{"".join(parts)}</div></figure>'
