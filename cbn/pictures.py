"""Pictures of statistics per channel.

matplotlib draws them on figures of their own, without pyplot: no setting of the process changes.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, BinaryIO

import numpy as np

from .checks import Array, Doubles

# Okabe and Ito's palette, which stays distinct with every kind of colour blindness.
RUNNING, BATCH, INK = "#0072B2", "#D55E00", "#444444"
STYLE = {
    "font.size": 10,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
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
}
FEW = 48  # channels that are drawn one by one, in their own order

Statistics = tuple[Doubles, Doubles] | None  # mean and variance


def draw_statistics(
    file: str | os.PathLike[str] | BinaryIO,
    name: str,
    eps: float,
    running: Statistics,
    batch: Statistics,
    offsets: tuple[Doubles | Any, Doubles | Any],
    marked: Array,
) -> None:
    """Means and standard deviations, and below them the offsets (distances of means, ratios of variances) or variances.

    marked: the channels that the lower panels name, the most important first.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs the matplotlib package: pip install "cbn[plots]"') from error
    sources = {"running statistics": (running, RUNNING), "batch": (batch, BATCH)}
    drawn = [(label, *found, color) for label, (found, color) in sources.items() if found is not None]
    order = _order(drawn[0][1])
    shift, ratio = offsets
    compared = shift is not None and ratio is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 8 if compared else 6))
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        figure.suptitle(f"{name}\n", x=0.01, ha="left", weight="bold")  # with room for a legend of two lines
        axes = figure.subplots(3 if compared else 2, 1, sharex=True, height_ratios=[2, 1, 1] if compared else [2, 1])
        axes[0].set_xlim(-0.6, order.size - 0.4)
        _draw_means(axes[0], order, drawn)
        if compared:
            _draw_offsets(axes[1], order, shift, marked)
            _draw_ratios(axes[2], order, ratio, marked)
        else:
            _draw_variances(axes[1], order, drawn, eps)
        _label_channels(axes[-1], order)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, markerscale=1.5)
        figure.savefig(file, dpi=150)


def _order(mean: Doubles) -> Array:
    """The channels from left to right: many are a band that can be read only in the order of their means."""
    return np.arange(mean.size) if mean.size <= FEW else np.argsort(mean, kind="stable")


def _draw_means(ax: Any, order: Array, drawn: list[tuple[str, Doubles, Doubles, str]]) -> None:
    x = np.arange(order.size)
    for i, (label, mean, var, color) in enumerate(drawn):
        m, std = _finite(mean[order]), np.sqrt(_finite(var[order]).clip(0))
        if order.size <= FEW:
            aside = 0.12 * (2 * i + 1 - len(drawn))
            how = {"fmt": "os"[i], "color": color, "markersize": 5, "elinewidth": 1.6, "capsize": 3}
            ax.errorbar(x + aside, m, std, label=f"{label}: mean ± std", **how)
            continue
        low, high = _smooth(m - std), _smooth(m + std)
        ax.plot(x, m, "-" if i == 0 else ".", color=color, markersize=3, label=f"{label}: mean", zorder=3 - i)
        if i == 0:
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0, label="± std (median of neighbours)")
        else:
            ax.plot(x, low, "--", x, high, "--", color=color, linewidth=1.2)
            ax.plot([], [], "--", color=color, linewidth=1.2, label="± std (median of neighbours)")
    ax.set_ylabel("mean ± std")
    ax.set_title("Statistics of the input")


def _smooth(values: Doubles) -> Doubles:
    """The medians of the channels beside each one, of a 64th of all, which show a trend through the scatter."""
    half = values.size // 128 + 1
    padded = np.pad(values, half, mode="edge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a window of NaN
        medians: Doubles = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return medians


def _draw_offsets(ax: Any, order: Array, shift: Doubles, marked: Array) -> None:
    values = _finite(shift)
    ax.axhline(0, color=INK, linewidth=1)
    ax.plot(np.arange(order.size), values[order], "o", color=BATCH, markersize=5 if order.size <= FEW else 2)
    bound = float(np.nanmax(np.abs(values), initial=0.5))
    wide = bound > 20
    if wide:
        ax.set_yscale("symlog", linthresh=1)
    room = (6 if wide else 1.45) * bound  # for names too
    ax.set_ylim(-room, room)
    ax.set_ylabel("standard deviations")
    ax.set_title("Mean of the batch less running mean")
    _name(ax, order, values, marked)


def _draw_ratios(ax: Any, order: Array, ratio: Doubles, marked: Array) -> None:
    values = _finite(ratio)
    values[~(values > 0)] = np.nan
    ax.axhline(1, color=INK, linewidth=1)
    ax.plot(np.arange(order.size), values[order], "o", color=BATCH, markersize=5 if order.size <= FEW else 2)
    bound = 2 ** (1.35 * float(np.nanmax(np.abs(np.log2(values)), initial=1)))
    if bound < 100:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    else:
        ax.set_yscale("log")
    ax.set_ylim(1 / bound, bound)
    ax.set_ylabel("ratio")
    ax.set_title("Variance of the batch by running variance")
    _name(ax, order, values, marked)


def _draw_variances(ax: Any, order: Array, drawn: list[tuple[str, Doubles, Doubles, str]], eps: float) -> None:
    shown = [eps] if eps > 0 else []
    for _, _, var, color in drawn:
        values = np.where(np.isfinite(var) & (var > 0), var, np.nan)
        ax.plot(np.arange(order.size), values[order], "o", color=color, markersize=5 if order.size <= FEW else 2)
        shown += [float(value) for value in values[np.isfinite(values)]]
    ax.set_yscale("log")
    ax.set_ylim(min(shown, default=1.0) / 3, max(shown, default=1.0) * 3)
    if eps > 0:
        ax.axhline(eps, color=INK, linewidth=1, linestyle="--")
    ax.set_ylabel("variance")
    ax.set_title("Variance, and eps as a dashed line" if eps > 0 else "Variance")


def _name(ax: Any, order: Array, values: Doubles, marked: Array) -> None:
    """Write the numbers of channels at their points, unless another number is there."""
    place = {int(c): i for i, c in enumerate(order)}
    taken: list[Array] = []
    for c in marked:
        point = place[int(c)], values[c]
        at = ax.transAxes.inverted().transform(ax.transData.transform(point))
        if not np.isfinite(values[c]) or any(np.all(np.abs(at - other) < (0.12, 0.15)) for other in taken):
            continue
        taken.append(at)
        right = at[0] > 0.85
        words = {"xytext": (-6 if right else 6, 4), "textcoords": "offset points", "ha": "right" if right else "left"}
        ax.annotate(f"channel {c}", point, color=INK, fontsize=9, **words)


def _label_channels(ax: Any, order: Array) -> None:
    if order.size > FEW:
        ax.set_xlabel(f"{order.size} channels, in the order of their means")
        return
    step = 1 if order.size <= 24 else 2
    ax.set_xticks(range(0, order.size, step))
    ax.set_xlabel("channel")


def _finite(values: Doubles) -> Doubles:
    """A copy with NaN, which is not drawn, in the place of infinities."""
    return np.where(np.isfinite(values), values, np.nan)
