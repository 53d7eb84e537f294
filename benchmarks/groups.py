"""The sections of the page on networks, functions, chains, statistics, variants, PyTorch's modules and steps."""

from .html import Html, table
from .results import (
    BEST,
    LAYOUT_WORDS,
    OP_WORDS,
    OURS,
    duration,
    ratio_words,
    shape_words,
    size_words,
    verdict,
    with_onednn,
)

LAYERS, STORES = "cbn layers", ("cbn, plain stores", "cbn, non-temporal stores")
VARIANT, LOOP = "cbn, variant", "cbn, loop over slices"
FUSED = "cbn, fused"
PEERS = (
    "numpy",
    "PyTorch",
    "PyTorch, compiled",
    "oneDNN",
    BEST,
    "scikit-learn",
    "fast-array-utils",
    "stable-baselines3",
)


def by_case(data, group):
    """{case: {contender: row}} of a group, oneDNN's layouts as two."""
    found = {}
    for row in data.rows:
        if row.case.group == group and not row.is_limit:
            found.setdefault(row.case, {})[row.name] = row
    return {case: with_onednn(slot) for case, slot in found.items() if OURS in slot}


def ratio_html(row):
    """The median ratio of a row, coloured."""
    if row is None or row.ratio is None:
        return ""
    ratio = row.ratio["median"]
    words = f'<b class="{verdict(ratio)}">{ratio_words(ratio)}</b><small>{duration(row.time)}</small>'
    return Html(words + error_html(row))


def error_html(row):
    """For statistics, how far the variance is from float64, or else the result."""
    error = row.errors.get("var", row.errors.get("y"))
    return f"<small>error {error:.0e}</small>" if row.case.group == "statistics" else ""


def compared(data, group, head, cells):
    """A table with a row for each case: its time, that of a layer if there is one, and what the peers take."""
    rows = []
    found = by_case(data, group)
    taken = {name for slot in found.values() for name in slot}
    layers, peers = ([name for name in names if name in taken] for names in ((LAYERS,), PEERS))
    for case, slot in found.items():
        ours = slot[OURS]
        times = [Html(duration(ours.time) + error_html(ours))]
        times += [duration(slot[name].time) if name in slot else "" for name in layers]
        rows.append([*cells(case), *times, data.share_words(ours), *(ratio_html(slot.get(name)) for name in peers)])
    head = [*head, ">cbn", *(">through layers" for _ in layers), ">share of the limit", *(f">{name}" for name in peers)]
    return table(head, rows, "tall") if rows else ""


def networks(data):
    return compared(data, "networks", ["network", "operation", "layout", ">threads", "memory"], lambda c: [
        shape_words(c.subject), OP_WORDS[c.op], LAYOUT_WORDS[c.layout], c.threads, memory_words(c)])  # fmt: skip


def functions(data):
    return compared(data, "functions", ["shape", "operation", ">threads", "memory"], lambda c: [
        shape_words(c.subject), OP_WORDS[c.op], c.threads, memory_words(c)])  # fmt: skip


def statistics(data):
    return compared(data, "statistics", ["operation", "shape", "type", ">threads"], lambda c: [
        OP_WORDS[c.op], shape_words(c.subject), c.dtype, c.threads])  # fmt: skip


def modules(data):
    return compared(data, "modules", ["shape", "call", "layout", ">threads"], lambda c: [
        shape_words(c.subject), OP_WORDS[c.op], LAYOUT_WORDS[c.layout], c.threads])  # fmt: skip


def steps(data):
    """A row for each network: the times of its step with cbn's modules, fused and not, and with PyTorch's."""
    rows = []
    for case, slot in by_case(data, "steps").items():
        cells = [shape_words(case.subject), LAYOUT_WORDS[case.layout], case.threads, duration(slot[OURS].time)]
        peers = (ratio_html(slot.get(name)) for name in ("PyTorch", "PyTorch, compiled"))
        rows.append([*cells, cost_html(slot.get(FUSED)), *peers])
    head = ["network", "layout", ">threads", ">cbn", ">fused", ">PyTorch", ">PyTorch, compiled"]
    return table(head, rows, "tall") if rows else ""


def memory_words(case):
    return "given" if case.memory == "out" else "allocated"


def chains(data):
    """A row for each chain and size: its time, and the times with either kind of store over it."""
    rows = []
    for case, slot in by_case(data, "chain").items():
        cells = [case.chain, OP_WORDS[case.op], LAYOUT_WORDS[case.layout], case.threads, size_words(case.n_bytes)]
        rows.append([*cells, duration(slot[OURS].time), *(ratio_html(slot.get(name)) for name in STORES)])
    head = ["chain", "operation", "layout", ">threads", ">array", ">cbn", *(f">{name[5:]}" for name in STORES)]
    return table(head, rows, "tall") if rows else ""


def variants(data):
    """A row for each variant: the time of the plain call, and what the variant takes, and a loop of plain calls."""
    rows = []
    for case, slot in by_case(data, "variants").items():
        cells = [case.variant, OP_WORDS[case.op], shape_words(case.shape), LAYOUT_WORDS[case.layout], case.threads]
        rows.append([*cells, duration(slot[OURS].time), *(cost_html(slot.get(name)) for name in (VARIANT, LOOP))])
    head = ["variant", "plain call", "shape", "layout", ">threads", ">its time", ">with the variant"]
    return table([*head, ">loop over slices"], rows, "tall") if rows else ""


def cost_html(row):
    """A multiple of the time of cbn's plain call, with the quartiles."""
    if row is None or row.ratio is None:
        return ""
    found = f"{row.ratio['median']:.2f}×<small>{row.ratio['q1']:.2f}–{row.ratio['q3']:.2f}</small>"
    return Html(found + f"<small>{duration(row.time)}</small>")
