"""The report: a page (report.html) and a summary (summary.md) from a file of results. The page needs no network."""

import json
import re
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from .cases import LAYOUTS, OPS
from .groups import chains, functions, modules, networks, statistics, steps, variants
from .html import Html, table
from .plots import (
    PAGE,
    growth_figure,
    growth_of,
    latency_figure,
    plot,
    ratio_figure,
    scaling_of,
    shape_label,
    share_figure,
    threads_figure,
)
from .results import (
    BEST,
    LAYOUT_WORDS,
    LEVEL,
    LIMITS,
    NBSP,
    OP_WORDS,
    OURS,
    SMALL_CALLS,
    Results,
    duration,
    group_of,
    group_words,
    grouped,
    listed,
    of_shapes,
    peers_of,
    percent,
    plural,
    ratio_mean,
    ratio_words,
    shape_words,
    share_mean,
    size_words,
    verdict,
)

PROSE = {
    "table": """Geometric means over the shapes; below each the worst shape. 2× means that cbn takes half the other’s
        time. Small calls are evaluations of at most 50,176 values, on one thread.""",
    "onednn": """“oneDNN” works on arrays as the caller has them; “oneDNN best” is the fastest of all its layouts for
        each shape, for programs that keep their arrays in one of them.""",
    "far": "The share is over arrays larger than the caches.",
    "share": """100 % is the time in which this machine’s memory moves the least that the operation must move. Bars
        are cbn, marks are the others; what reaches the end of an axis may lie beyond it. Outlined bars are arrays that
        fit in the caches, where “limit” is a bandwidth of caches.""",
    "ratio": """The peer’s time over cbn’s, turn by turn: right of the line, blue, cbn is faster; left of it, orange,
        the peer is; grey is level. Dots are medians, lines quartiles. A hollow dot was measured otherwise than its
        row says: numpy trains with one thread; JAX always allocates, and is compared with cbn allocating.""",
    "networks": """All batch norms of a network, one after the other in their order, through functions; beside it
        through layers, which keep what they prepared. PyTorch and cbn allocate in backward where they are compared;
        oneDNN and cbn are given memory.""",
    "functions": "Single calls of functions on arrays that stay in a cache; beside them the same through a layer.",
    "chains": """A batch norm between other code: a pass that reads its result, on all threads or on one, and one that
        writes its input. The time of the chain with plain and with non-temporal stores, over that with the stores that
        cbn chooses: below 1 the other choice is better.""",
    "statistics": """Mean and variance of every channel, of values around 1000 with variance 1 or of uniform bytes; the
        update of a running mean and variance; and (x − mean)/√(var + ε) between two bounds. The limit is a plain read,
        and y = a·x + b for standardize. fast-array-utils and stable-baselines3 are their formulas in numpy; gymnasium
        updates as stable-baselines3 does. An error is that of the variance (of y for standardize), relative to float64:
        from 1 on no digit is left.""",
    "variants": """What a variant of a batch norm costs, as a multiple of the plain call of the same layer (median and
        quartiles): values that do not count, ghost batches and a loop over their slices in Python, other statistics.
        Given moments are held against evaluation, which moves the same arrays, derivatives against the backward pass:
        it moves three arrays, a double backward five, a tangent three.""",
    "modules": """PyTorch’s modules as called on tensors, and those of cbn.torch in their place. All allocate.""",
    "steps": """Training steps of whole networks, forward and backward; only the batch norms are different. “Fused”:
        ReLU and residual additions are in the batch norm’s pass; a multiple of the step without.""",
    "latency": """Single calls on one thread, each timed by itself: on an idle machine, and beside one busy process
        per core. Further left is better.""",
    "growth": "Arrays of 5 channels, channels first. The flat part on the left is the cost of a call.",
    "threads": """Channels first; each over itself with the fewest threads. A kernel that is bound by the memory
        cannot gain more than the memory does.""",
    "first": """The first call pays for page faults, the start of threads and what a library compiles or chooses then;
        below it, small, the time of the steady state.""",
    "limits": """What this machine’s memory (or, for small arrays, its caches) moves, in GB/s: an array read, y = a·x
        + b with plain and with streaming stores, and the same in place. A write counts once.""",
    "none": "Not measured in this run.",
}
METHOD = (
    """Each contender is a process of its own, and all take turns, A B C A B C …; who is not in turn is stopped. A
    machine that becomes slower becomes so for all.""",
    """A turn gives the median of its calls. A time here is the median of the turns; a ratio is formed turn by turn,
    peer’s time over cbn’s, and is shown as median and quartiles.""",
    """Like is compared with like: memory given to both, or allocated by both; the same number of threads on the same
    cores; huge pages for everybody’s arrays and the limit’s.""",
    "Every result is compared with float64 once before timing; a wrong one is listed and gets no time.",
    """A share is the least traffic of the operation, in units of one array, at the bandwidth that was measured in the
    same turn on arrays of the same size, over the time taken. That bandwidth is the faster of y = a·x + b with plain
    and with streaming stores, which moves two units. Evaluation moves 2 units; training 2 and backward 3 where a
    channel stays in cache between the two passes (channels first), else 3 and 5. Moments and updates move 1 unit, in
    the time of a plain read. Reading is cheaper than writing, so a share can exceed 100 %.""",
    """“In cache” marks operations whose whole traffic is less than the last cache; for them the limit is a bandwidth
    of caches, and the cost of the call counts.""",
)


def prose(*names):
    """Paragraphs of the page in words."""
    return f"<p>{escape(' '.join(' '.join(PROSE[n].split()) for n in names))}</p>"


def case_cells(case):
    op = ", ".join(filter(None, (OP_WORDS[case.op], case.fused or case.variant)))
    return [op, shape_words(case.shape), LAYOUT_WORDS[case.layout], case.threads,
            "given" if case.memory == "out" else "allocated", case.dtype]  # fmt: skip


CASE_HEAD = ["operation", "shape", "layout", ">threads", "result's memory", "type"]


def headline(data):
    """Where cbn is fast, where it is not, how far from the limit; and the table that this comes from."""
    if not data.groups:
        return Html("<p>Nothing that can be compared was measured.</p>")
    fast, slow, level = verdicts(data)
    parts = [f'<p class="lead">{escape(lead(data))}</p>', '<div class="tiles">']
    parts.append(tile("Where it is fast", "speed, as a multiple of the other’s", fast, "fast"))
    parts.append(tile("Where it is not", "below 1× the other is faster", slow, "slow"))
    parts.append(limit_tile(data) + "</div>")
    if level:
        parts.append(f'<p class="note">About level (within {LEVEL:.0%}): {escape("; ".join(level))}.</p>')
    head = ["", *([">share of the limit"] if data.has_limits else []), *(f">{p}" for p in data.peers)]
    rows = []
    for group, slots in data.groups.items():
        means = [ratio_mean(slots, p) for p in data.peers]
        cells = [ratio_cell(m) for m in means]
        if data.has_limits:
            cells.insert(0, share_cell(None if group == SMALL_CALLS else share_mean(data, slots)))
        first, _, second = group_words(group).partition(", ")
        second = ", ".join(filter(None, [second, plural(len(slots), "case" if first == "networks" else "shape")]))
        rows.append([Html(f"<b>{first}</b><small>{second}</small>"), *cells])
    notes = ["table", *(["onednn"] if BEST in data.peers else []), *(["far"] if data.has_limits else [])]
    parts.append(table(head, rows, "heat") + f'<div class="note">{prose(*notes)}</div>')
    return "".join(parts)


def lead(data):
    """What this is, in two sentences."""
    peers = listed(dict.fromkeys("oneDNN" if p == BEST else p for p in data.peers)) or "nothing else"
    won = len(data.compared) - len(data.lost)
    where = f"{data.machine['processor']}, with {plural(data.threads, 'thread')}"
    text = f"cbn computes batch normalization on CPUs. Here it ran beside {peers} on {where}"
    if not data.compared:
        return text + "."
    return text + f": it was the faster one in {won} of {plural(len(data.compared), 'comparison')}."


def verdicts(data):
    """([(group, words)] where cbn is faster, where it is slower, and [words] where they are level)."""
    fast, slow, level = [], [], []
    for group, slots in data.groups.items():
        means = {p: m for p in data.peers if (m := ratio_mean(slots, p))}
        ranked = sorted(means.items(), key=lambda item: item[1].value)
        for kind, found, order in (("fast", fast, -1), ("slow", slow, 1)):
            words = [
                f"{ratio_words(m.value)} {p}".replace(" ", NBSP) for p, m in ranked[::order] if verdict(m.value) == kind
            ]
            if words:
                found.append((group, ", ".join(words)))
        equal = [p for p, m in ranked if verdict(m.value) == "level"]
        if equal:
            level.append(f"{group_words(group)}: {listed(equal)}")
    return fast, slow, level


def tile(title, subtitle, lines, kind):
    items = "".join(f"<li><b>{escape(group_words(g))}</b> {escape(words)}</li>" for g, words in lines)
    body = f"<ul>{items}</ul>" if items else "<p>Nowhere, by the geometric means of this run.</p>"
    return f'<section class="tile {kind}"><h3>{escape(title)}</h3><small>{escape(subtitle)}</small>{body}</section>'


def limit_tile(data):
    """A bar for each operation and layout."""
    lines = []
    for group, slots in data.groups.items():
        mean = None if group == SMALL_CALLS else share_mean(data, slots)
        if mean:
            worst = f"worst {percent(mean.worst)}, {shape_words(mean.shape)}" + (", in cache" if mean.note else "")
            bar = f'<span class="bar"><i style="width:{min(100, 100 * mean.value):.0f}%"></i></span>'
            share = f"<span>{percent(mean.value)}</span>"
            lines.append(f"<li><b>{group_words(group)}</b> {share}{bar}<small>{worst}</small></li>")
    why = next((w for n, w in data.suite["absent"].items() if n.startswith("limit")), "")
    body = f"<ul>{''.join(lines)}</ul>" if lines else f"{prose('none')}<p>{escape(why)}</p>"
    title = "<h3>How far from the limit</h3><small>share of what the memory allows</small>"
    return f'<section class="tile far">{title}{body}</section>'


def ratio_cell(mean):
    return mean_cell(mean, ratio_words, verdict(mean.value) if mean else "")


def share_cell(mean):
    return mean_cell(mean, percent)


def mean_cell(mean, words, kind=""):
    """A mean over its worst shape."""
    if mean is None:
        return Html('<span class="none">–</span>')
    note = f"<br>{escape(mean.note)}" if mean.note else ""
    worst = f"<small>worst {words(mean.worst)}<br>{shape_words(mean.shape)}{note}</small>"
    return Html(f'<b class="{kind}">{words(mean.value)}</b>{worst}')


def plots(data):
    """The sections with pictures."""
    views = [(data.threads, data.groups)]
    fewest = min((r.case.threads for r in data.rows if group_of(r.case)), default=1)
    if fewest < data.threads:
        views.append((fewest, grouped(data.rows, fewest)))
    views = [(threads, of_shapes(groups)) for threads, groups in views]
    sections = (
        ("limit", "Share of the physical limit", "share", share_plots),
        ("ratios", "Ratio to each peer", "ratio", ratio_plots),
    )
    parts = []
    for name, title, words, draw in sections:
        drawn = [(threads, draw(data, groups, threads)) for threads, groups in views]
        parts.append(f'<h2 id="{name}">{title}</h2>' + prose(words if drawn[0][1] else "none") + drawn[0][1])
        parts += [f"<details><summary>The same with {plural(threads, 'thread')}</summary>{pictures}</details>"
                  for threads, pictures in drawn[1:] if pictures]  # fmt: skip
    for name, title, draw in (("networks", "Networks", networks), ("functions", "Functions, small calls", functions),
                              ("chains", "Chains", chains), ("statistics", "Statistics", statistics),
                              ("variants", "Variants", variants), ("modules", "Modules", modules),
                              ("steps", "Training steps", steps)):  # fmt: skip
        drawn = draw(data)
        parts.append(f'<h2 id="{name}">{title}</h2>' + (prose(name) + drawn if drawn else prose("none")))
    parts.append('<h2 id="latency">Latency of a call</h2>' + (latency(data) or prose("none")))
    growth = growth_of(data)
    pictures = (
        plot("growth", "Time against number of elements", lambda theme: growth_figure(growth, theme)) if growth else ""
    )
    parts.append('<h2 id="growth">Time against size</h2>' + (prose("growth") + pictures if growth else prose("none")))
    shape, scaling = scaling_of(data)
    parts.append('<h2 id="threads">Speed-up against threads</h2>')
    if scaling:
        parts.append(f"<h3>{shape_words(shape)}</h3>" + prose("threads"))
        parts.append(plot("threads", "Speed-up against threads", lambda theme: threads_figure(scaling, theme)))
    else:
        parts.append("<p>Only one number of threads was measured.</p>")
    return "".join(parts)


def share_plots(data, groups, threads):
    if not data.has_limits or not groups:
        return ""
    label = f"Share of the memory limit by shape, {plural(threads, 'thread')}"
    return plot(f"share-{threads}", label, lambda theme: share_figure(data, groups, threads, theme))


def ratio_plots(data, groups, threads):
    """A plot for each operation that was compared with a peer."""
    parts = []
    for op in OPS:
        if any(peers_of(slot) for layout in LAYOUTS for slot in groups.get((op, layout), {}).values()):
            title = f"{OP_WORDS[op]}, {plural(threads, 'thread')}"
            picture = plot(f"ratio-{op}-{threads}", f"Ratio of each peer's time to cbn's, {title}",
                           lambda theme, op=op: ratio_figure(data, groups, op, threads, theme))  # fmt: skip
            parts.append(f"<h3>{title.capitalize()}</h3>{picture}")
    return "".join(parts)


def latency(data):
    """Percentiles of single calls, as a picture and as a table."""
    if not data.latency:
        return ""
    picture = plot("latency", "Latency percentiles, idle and under load", lambda theme: latency_figure(data, theme))
    rows = []
    for e in data.latency:
        times = [duration(e[p]) for p in ("p50", "p95", "p99")]
        rows.append([OP_WORDS[e["op"]], shape_words(e["shape"]), e["contender"], e["load"], *times, e["calls"]])
    head = ["operation", "shape", "contender", "machine", ">p50", ">p95", ">p99", ">calls"]
    return f"{prose('latency')}{picture}<details><summary>As a table</summary>{table(head, rows)}</details>"


def losses(data):
    """Rows with a ratio below 1."""
    parts = [f'<h2 id="losses">Rows that cbn loses</h2><p>{loss_words(data)}</p>']
    if data.lost:
        ours = {r.case: r.time for r in data.rows if r.name == OURS}
        rows = []
        for r in data.lost:
            ratio = Html(f'<b class="slow">{r.ratio["median"]:.2f}×</b>')
            times = duration(ours.get(r.case, np.nan)), duration(r.time)
            rows.append([r.name, ratio, quartile_words(r.ratio), *times, *case_cells(r.case)])
        parts.append(table(["peer", ">ratio", ">quartiles", ">cbn", ">peer", *CASE_HEAD], rows, "tall"))
    return "".join(parts)


def quartile_words(ratio):
    unclear = "" if ratio["q3"] < 1 else "<small>not clear</small>"
    return Html(f"{ratio['q1']:.2f}–{ratio['q3']:.2f}{unclear}")


def loss_words(data):
    """How many, to whom."""
    if not data.lost:
        return "None." if data.compared else "No peer took part."
    counts = Counter(r.name for r in data.lost)
    all_of = Counter(r.name for r in data.compared)
    unclear = sum(r.ratio["q3"] >= 1 for r in data.lost)
    words = listed(f"{counts[n]} of {all_of[n]} to {n}" for n in sorted(counts, key=counts.get, reverse=True))
    more = f" In {unclear} the quartiles reach 1: not clear." if unclear else ""
    return escape(f"{len(data.lost)} of {len(data.compared)} comparisons: {words}.{more} Worst first.")


def faults(data):
    """What was not timed, and why."""
    suite, parts, empty = data.suite, [], []
    for title, head, rows in (
        ("Wrong results, therefore not timed", ["contender", "case", "why"], [fault_cells(e) for e in suite["wrong"]]),
        ("Failed", ["contender", "case", "why"], [fault_cells(e) for e in suite["failed"]]),
        ("Absent", ["contender", "why"], list(suite["absent"].items())),
    ):
        if rows:
            parts.append(f"<h3>{title}</h3>" + table(head, rows))
        else:
            empty.append(f"{title}: none.")
    return f'<h2 id="faults">Wrong, failed, absent</h2>{"".join(parts)}<p>{" ".join(empty)}</p>'


def fault_cells(entry):
    return entry["contender"], entry["case"], entry["why"]


def first_calls(data):
    """The first call beside the steady state."""
    names = [OURS, *(p for p in data.peers if p != BEST)]
    rows = []
    for group, slots in data.groups.items():
        for shape, slot in slots.items():
            cells = [first_cell(slot.get(n)) for n in names]
            rows.append([group_words(group), shape_label(slots, shape, data.threads), *cells])
    head = ["", "shape", *(f">{n}" for n in names)]
    return f'<h2 id="first">The first call</h2>{prose("first")}{table(head, rows, "tall")}'


def first_cell(row):
    return Html(f"{duration(row.first)}<small>{duration(row.time)}</small>") if row else ""


def everything(data):
    """All rows."""
    rows = []
    for r in data.rows:
        if not r.is_limit:
            ratio = f"{r.ratio['median']:.2f}× ({r.ratio['q1']:.2f}–{r.ratio['q3']:.2f})" if r.ratio else ""
            errors = ", ".join(f"{k} {v:.0e}" for k, v in r.errors.items())
            rows.append(
                [
                    *case_cells(r.case),
                    r.name,
                    duration(r.time),
                    ratio,
                    data.share_words(r),
                    f"{r.units}: {r.model}",
                    errors,
                ]
            )
    head = [*CASE_HEAD, "contender", ">time", ">ratio (quartiles)", ">share", "units of traffic", "error, float64"]
    inner = f"<summary>{plural(len(rows), 'row')}</summary>{table(head, rows, 'tall')}"
    return f'<h2 id="all">All rows</h2><details>{inner}</details>'


def limits(data):
    """Bandwidths that were measured, by size and threads."""
    found = {}
    for r in data.rows:
        if r.is_limit:
            found.setdefault((r.case.threads, r.case.n_bytes), {}).setdefault(r.name, []).append(r.time)
    rows = []
    for (threads, n_bytes), times in sorted(found.items()):
        rates = [f"{units * n_bytes / np.median(times[name]) / 1e9:.1f}" if name in times else ""
                 for name, units in LIMITS.values()]  # fmt: skip
        rows.append([threads, size_words(n_bytes), *rates])
    head = [">threads", ">array", *(f">{k}" for k in LIMITS)]
    return '<h2 id="limits">The limits as measured</h2>' + (
        prose("limits") + table(head, rows, "tall") if rows else prose("none")
    )


def method(data):
    """How it was measured, and where."""
    m, config = data.machine, data.machine.get("cbn") or {}
    items = "".join(f"<li>{escape(text)}</li>" for text in METHOD)
    turns = f"{data.suite['turns']} turns of {data.suite['seconds']:g} s for each contender and case"
    if data.suite.get("minutes"):
        turns += f"; {data.suite['minutes']:.0f} minutes in all"
    commit = str(data.commit.get("id") or "unknown")[:12] + (" with changes" if data.commit.get("dirty") else "")
    facts = {
        "processor": f"{m['processor']}, {plural(m['cores'], 'core')} used",
        "caches": ", ".join(f"{k} {v >> 10} KiB" for k, v in (m.get("caches") or {}).items()) or "unknown",
        "system": " ".join(str(m.get(k, "")) for k in ("system", "release", "machine")),
        "Python": m.get("python_version", "unknown"),
        "cbn": ", ".join(f"{k} {config[k]}" for k in ("compiler", "in use", "threads") if k in config) or "unknown",
        "versions": version_words(data),
        "commit": f"{commit}, measured {data.date[:16].replace('T', ' ')} UTC",
        "turns": turns,
    }
    title = '<h2 id="machine">Machine and versions</h2>'
    return f'<h2 id="method">How it was measured</h2><ul>{items}</ul>{title}{table(["", " "], facts.items())}'


def version_words(data):
    """numpy 2.4.6, oneDNN 2.6.3, ...: cbn and oneDNN once."""
    measured = {row.name for row in data.rows}
    every = [(name, version) for name, version in data.suite["versions"].items() if name in measured]
    versions = {re.match(r"cbn|oneDNN|.*", name)[0]: version for name, version in every}
    return ", ".join(f"{n} {v}" for n, v in versions.items() if v)


CSS = """
:root { color-scheme: light dark; --page: PAGE-light; --ink: INK-light; --soft: SOFT-light; --line: LINE-light;
  --tile: #f6f8fa; --fast: #0067a3; --slow: SLOW-light; }
.on-dark { display: none; }
@media (prefers-color-scheme: dark) {
  :root { --page: PAGE-dark; --ink: INK-dark; --soft: SOFT-dark; --line: LINE-dark; --tile: #1c2128; --fast: #58b4f5;
    --slow: SLOW-dark; }
  .on-light { display: none; } .on-dark { display: block; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem; max-width: 1180px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: .3em 0; } h2 { margin: 2.8rem 0 .6rem; font-size: 1.4rem; } h3 { margin: 1.4rem 0 .4rem;
  font-size: 1.05rem; }
p { max-width: 80ch; } .lead { font-size: 1.12rem; } .note, small { color: var(--soft); } .note { font-size:
  .88rem; }
small { display: block; font-size: .75rem; line-height: 1.35; font-weight: normal; }
a { color: var(--fast); } nav { font-size: .9rem; } nav a { margin-right: 1em; white-space: nowrap; }
.partial { border-left: 4px solid var(--slow); background: var(--tile); padding: .7rem 1rem; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 1rem; margin: 1.2rem 0; }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem; }
.tile h3 { margin: 0; } .tile.fast h3, b.fast { color: var(--fast); } .tile.slow h3, b.slow { color: var(--slow); }
.tile ul { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .9rem; line-height: 1.4; }
.tile li { margin: .55rem 0; } .tile li b { display: block; } .tile.far li b { display: inline; }
.tile.far li span { white-space: nowrap; }
.bar { display: block; height: 8px; margin: .2rem 0; background: var(--line); border-radius: 4px; }
.bar i { display: block; height: 100%; background: var(--fast); border-radius: 4px; }
.scroll { overflow-x: auto; max-width: 100%; }
.tall { max-height: 30rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; width: fit-content; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td:last-child { white-space: normal; min-width: 5rem; }
th { font-weight: 600; color: var(--soft); position: sticky; top: 0; background: var(--page); }
.n { text-align: right; }
.heat table { width: 100%; } .heat b { font-size: 1.02rem; } .heat td, .heat th { padding: .45rem .25rem; }
.heat small { font-size: .7rem; letter-spacing: -.01em; }
.none { color: var(--soft); } figure { margin: 1rem 0; } .plot svg { display: block; width: 100%; min-width: 760px; }
svg text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }
summary { cursor: pointer; color: var(--fast); margin: .6rem 0; } li { max-width: 85ch; margin: .3rem 0; }
"""
NAV = {"limit": "share of the limit", "ratios": "ratios", "networks": "networks", "functions": "functions",
       "chains": "chains", "statistics": "statistics", "variants": "variants", "modules": "modules", "steps": "steps",
       "latency": "latency", "growth": "size", "threads": "threads", "losses": "losses",
       "faults": "wrong, failed, absent", "first": "first call", "all": "all rows",
       "method": "how it was measured"}  # fmt: skip


def page(data):
    """The whole page."""
    css = CSS
    for kind, colors in PAGE.items():
        for key, value in colors.items():
            css = css.replace(f"{key.upper()}-{kind}", value)
    partial = f'<p class="partial">{escape(partial_words(data))}</p>' if partial_words(data) else ""
    nav = " ".join(f'<a href="#{k}">{v}</a>' for k, v in NAV.items())
    body = "\n".join((headline(data), f"<nav>{nav}</nav>", plots(data), losses(data), faults(data), first_calls(data),
                      everything(data), limits(data), method(data)))  # fmt: skip
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>cbn: benchmarks</title><link rel="icon" href="data:,"><style>{css}</style></head>
<body><h1>How fast is cbn?</h1>{partial}{body}</body></html>
"""


def partial_words(data):
    if data.suite["complete"]:
        return ""
    n = len({r.case for r in data.rows})
    return f"This run was interrupted: the page shows the {plural(n, 'case')} that had been measured by then."


SUMMARY_NOTE = """Speed as a multiple of the other’s, geometric means over the shapes; 2× is half the other’s time. The
limit is the memory’s bandwidth at the least traffic that the operation needs, for arrays larger than the caches.
“oneDNN” works on arrays as the caller has them, “oneDNN best” in the fastest of all its layouts."""


def summary(data):
    """Markdown for README.md: the table of the headline."""
    lines = ["# Speed", ""]
    if partial_words(data):
        lines += [f"**{partial_words(data)}**", ""]
    lines += [markdown(lead(data)), ""]
    head = ["", *(["share of the limit"] if data.has_limits else []), *data.peers]
    lines += ["| " + " | ".join(markdown(h) for h in head) + " |", "|---" * len(head) + "|"]
    for group, slots in data.groups.items():
        cells = [group_words(group)]
        if data.has_limits:
            mean = None if group == SMALL_CALLS else share_mean(data, slots)
            cells.append(f"{percent(mean.value)} (worst {percent(mean.worst)})" if mean else "")
        for peer in data.peers:
            mean = ratio_mean(slots, peer)
            cells.append(f"{ratio_words(mean.value)} (worst {ratio_words(mean.worst)})" if mean else "")
        lines.append("| " + " | ".join(map(markdown, cells)) + " |")
    lines += ["", SUMMARY_NOTE, f"{markdown(version_words(data))}; {data.date[:10]}."]
    return "\n".join(lines) + "\n"


def markdown(text):
    """Text for a table's cell."""
    return escape(str(text), quote=False).replace("|", "\\|")


def write(path):
    """Write report.html and summary.md beside a file of results; gives the path of the page."""
    path = Path(path)
    data = Results(json.loads(path.read_text()))
    found = path.with_name("report.html")
    found.write_text(page(data), encoding="utf-8")
    path.with_name("summary.md").write_text(summary(data), encoding="utf-8")
    return found
