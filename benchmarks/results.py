"""Results read for the report: rows, their groups, means over shapes, and the words for them."""

import itertools
from dataclasses import dataclass

import numpy as np

from .cases import GROWTH, LAYOUTS, OPS, SMALL, Case

OURS = "cbn"
OP_WORDS = {"eval": "evaluation", "train": "training", "backward": "backward", "moments": "moments",
            "moments+extrema": "moments with extrema", "moments+skipna": "moments without NaN", "update": "update",
            "standardize+clip": "standardize with clip", "step": "forward and backward"}  # fmt: skip
LAYOUT_WORDS = {"first": "channels first", "last": "channels last"}
SMALL_CALLS = ("small calls", "")  # stands where (op, layout) stands
NETWORKS = [(f"networks, {op}", layout) for layout in LAYOUTS for op in OPS]
FUNCTIONS = [(f"functions, {op}", "") for op in OPS]
GROWTH_SHAPES = {(4, 5, n // 20) for n in GROWTH}
GROWTH_NAMES = (OURS, "numpy", "PyTorch")
PLAIN, STREAM = "limit: scale, plain stores", "limit: scale, streaming stores"
LIMITS = {"read": ("limit: read", 1), "scale, plain stores": (PLAIN, 2), "scale, streaming stores": (STREAM, 2),
          "scale in place": ("limit: scale in place", 2)}  # fmt: skip
BEST = "oneDNN best"  # of its layouts, for one that can keep its data in it
ORDER = (OURS, "numpy", "PyTorch", "oneDNN", BEST, "ONNX Runtime", "OpenVINO", "JAX")  # of peers on the page
NBSP = "\u00a0"
LEVEL = 0.05  # geometric means within this of 1 are called neither fast nor slow


@dataclass(frozen=True)
class Row:
    """One contender in one case; ratio and share are {"median", "q1", "q3"} or None."""

    case: Case
    name: str
    time: float
    first: float
    ratio: dict | None
    share: dict | None
    units: int
    model: str
    errors: dict

    @property
    def is_limit(self):
        return self.name.startswith("limit")

    @property
    def is_peer(self):
        return not self.is_limit and not self.name.startswith(OURS)


def read_rows(results):
    """Rows of the results; one that has no finite time is left out."""
    rows = []
    for b in results["benchmarks"]:
        e = b["extra_info"]
        fields = {k: e[k] for k in Case.__dataclass_fields__ if k in e}
        times = np.asarray(b["stats"]["data"], float)
        if np.isfinite(times).any():
            case = Case(**{**fields, "shape": tuple(e["shape"])})
            rows.append(Row(case, e["contender"], float(np.nanmedian(times)), e["first"], finite(e.get("ratio")),
                            finite(e.get("share")), e["units"], e["model"], e["errors"]))  # fmt: skip
    return rows


def finite(quartiles):
    """The quartiles, if they are numbers."""
    return quartiles if quartiles and np.isfinite(list(quartiles.values())).all() else None


class Results:
    """The file, arranged."""

    def __init__(self, results):
        self.suite, self.machine = results["suite"], results["machine_info"]
        self.commit, self.date = results.get("commit_info") or {}, results.get("datetime", "")
        self.rows = read_rows(results)
        caches = self.machine.get("caches") or {}
        self.cache = caches.get("L3") or max(caches.values(), default=0)
        self.threads = max((r.case.threads for r in self.rows if group_of(r.case)), default=1)
        self.groups = grouped(self.rows, self.threads)
        self.compared = [r for r in self.rows if r.is_peer and r.ratio]
        self.lost = sorted((r for r in self.compared if r.ratio["median"] < 1), key=lambda r: r.ratio["median"])
        # in the order of the first appearance, and the two that are made of oneDNN's layouts together
        names = [n for slots in self.groups.values() for slot in slots.values() for n in peers_of(slot)]
        order = ORDER
        self.peers = sorted(dict.fromkeys(names), key=lambda n: order.index(n) if n in order else len(order))
        self.latency = [e for e in self.suite["latency"] if "p50" in e]
        self.has_limits = any(r.share for r in self.rows)

    def fits_cache(self, row):
        """Whether all that the operation must move fits in the last cache."""
        return row.units * row.case.n_bytes < self.cache

    def share_words(self, row):
        """The share of the limit, and whether that is a limit of the caches; empty without a limit."""
        return percent(row.share["median"]) + (" in cache" if self.fits_cache(row) else "") if row.share else ""


def group_of(case):
    """(op, layout) under which a case stands on the page; None for what has a plot or a section of its own."""
    if case.group in ("chain", "statistics", "variants", "modules", "steps"):
        return None
    if case.dtype != "float32" or case.fused or case.shape in GROWTH_SHAPES:
        return None
    if case.group != "shapes":
        return f"{case.group}, {case.op}", case.layout if case.network else ""
    if case.shape in SMALL:
        return SMALL_CALLS if case.op == "eval" else None
    return case.op, case.layout


def grouped(rows, threads, key=group_of):
    """{group: {shape: {contender: row}}}, large shapes first; for each contender the row that is most like the others.

    That is the one with most threads up to `threads`, and with memory given rather than allocated: numpy trains with
    one thread only, and JAX always allocates.
    """
    rank = {}
    for row in rows:
        group = key(row.case)
        if group and row.case.threads <= threads:
            place = rank.setdefault(group, {}).setdefault(row.case.subject, {})
            value = (row.case.threads, row.case.memory == "out")
            if row.name not in place or value > place[row.name][0]:
                place[row.name] = value, row
    groups = {}
    for group in [*NETWORKS, *((op, layout) for op in OPS for layout in LAYOUTS), *FUNCTIONS, SMALL_CALLS]:
        found = rank.get(group, {})
        shapes = sorted(found, key=lambda s: (-next(iter(found[s].values()))[1].case.n_bytes, s))
        slots = {s: {name: row for name, (_, row) in rank[group][s].items()} for s in shapes}
        slots = {s: with_onednn(slot) for s, slot in slots.items() if OURS in slot}
        if slots:
            groups[group] = slots
    return groups


def with_onednn(slot):
    """The slot with oneDNN's layouts as two contenders: the caller's own layout, and the fastest of all."""
    formats = {name: row for name, row in slot.items() if name.startswith("oneDNN ")}
    slot = {name: row for name, row in slot.items() if name not in formats}
    plain = f"oneDNN {'nhwc' if slot[OURS].case.layout == 'last' else 'nchw'}"
    if plain in formats:
        slot["oneDNN"] = formats[plain]
    if formats:
        slot[BEST] = min(formats.values(), key=lambda row: row.time)
    return slot


def peers_of(slot):
    """{name: row} of what cbn is compared with."""
    return {name: row for name, row in slot.items() if row.is_peer and row.ratio}


def verdict(ratio):
    return "fast" if ratio > 1 + LEVEL else "slow" if ratio < 1 - LEVEL else "level"


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(values))))


@dataclass(frozen=True)
class Mean:
    """A geometric mean over shapes, with the worst of them."""

    value: float
    worst: float
    shape: tuple
    note: str = ""


def mean_of(values, note=""):
    """The Mean of {shape: value}; None of nothing."""
    values = {s: v for s, v in values.items() if v and v > 0}
    if not values:
        return None
    worst = min(values, key=values.get)
    return Mean(geometric_mean(list(values.values())), values[worst], worst, note)


def ratio_mean(slots, name):
    """Mean ratio to a peer, with what is unlike the row of cbn that stands beside it."""
    found = {s: (slot[name], slot[OURS]) for s, slot in slots.items() if name in peers_of(slot)}
    notes = {conditions(row, ours) for row, ours in found.values()} - {""}
    return mean_of({s: row.ratio["median"] for s, (row, _) in found.items()}, "; ".join(sorted(notes)))


def share_mean(data, slots):
    """Mean share of the limit over arrays larger than the caches; over all, with a note, where none is."""
    ours = {s: slot[OURS] for s, slot in slots.items() if slot[OURS].share}
    large = {s: row for s, row in ours.items() if not data.fits_cache(row)}
    note = "in cache" if ours and not large else ""
    return mean_of({s: row.share["median"] for s, row in (large or ours).items()}, note)


def conditions(row, ours):
    """In words, how a row was measured otherwise than the one beside it; its ratio is to cbn measured as it was."""
    words = []
    if row.case.threads != ours.case.threads:
        words.append(plural(row.case.threads, "thread"))
    if row.case.memory != ours.case.memory:
        words.append("both allocate" if row.case.memory == "called" else "memory given")
    return ", ".join(words)


def shape_words(shape):
    """Of a case's subject."""
    if isinstance(shape[0], str):
        return f"{shape[0]}, N{NBSP}={NBSP}{shape[1]}"
    return "×".join(map(str, shape))


def group_words(group):
    """As in "networks, evaluation, channels first"."""
    if group == SMALL_CALLS:
        return group[0]
    *kind, op = group[0].split(", ")
    return ", ".join(filter(None, [*kind, OP_WORDS[op], LAYOUT_WORDS.get(group[1])]))


def of_shapes(groups):
    """The groups of single shapes, which the plots show."""
    return {group: slots for group, slots in groups.items() if group[0] in OPS}


def plural(n, word):
    return f"{n} {word}{'' if n == 1 else 's'}"


def listed(words):
    """a, b and c."""
    words = list(words)
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ratio_words(r):
    return f"{r:.0f}×" if r >= 19.95 else f"{r:.1f}×" if r >= 1.95 else f"{r:.2f}×"


def percent(share):
    return f"{100 * share:.0f} %"


def duration(seconds):
    """Three significant digits and a unit."""
    if not np.isfinite(seconds):
        return "–"
    units = (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
    unit, size = next((u for u in units if seconds >= 0.9995 * u[1]), units[-1])
    value = seconds / size
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def size_words(n_bytes):
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"


def spread(values, gap):
    """Positions near the values, in their order, at least `gap` apart: labels that do not overlap."""
    values = np.asarray(values, float)
    order = np.argsort(values)
    placed = values.copy()
    for before, this in itertools.pairwise(order):
        placed[this] = max(placed[this], placed[before] + gap)
    return placed - (placed - values).mean() if len(values) else placed
