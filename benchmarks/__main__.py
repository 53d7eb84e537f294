"""The command line of the benchmarks: run, report, compare. `python -m benchmarks --help`."""

import argparse
import json
import signal
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path

try:
    import ml_dtypes  # noqa: F401  of the cases in bfloat16
    from tqdm import tqdm

    from cbn.__main__ import run

    from . import cases, compare, contenders, report
    from .suite import LATENCY_CASES, SLICE, TURNS, Suite, cores, growth_cases
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "ml_dtypes", "tqdm"):
        raise
    root = Path(__file__).resolve().parents[1]
    raise ModuleNotFoundError(f"the benchmarks need {error.name}: pip install -e '{root}[bench]'") from error

OUT = Path(__file__).parent / "out"


def parser():
    """The arguments."""
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure, and write results.json, report.html and summary.md")
    run.add_argument("--full", action="store_true", help="every shape, one core and all; hours rather than minutes")
    run.add_argument("--group", action="append", choices=cases.GROUPS[1:], help="only this group; may be repeated")
    run.add_argument(
        "--op",
        action="append",
        choices=(*cases.OPS, "step", *cases.STATISTICS),
        help="only this operation; may be repeated",
    )
    run.add_argument("--shape", action="append", help="this shape instead of the list's, as 32x64x56x56")
    run.add_argument("--layout", choices=cases.LAYOUTS, help="only this layout")
    run.add_argument("--dtype", action="append", choices=cases.ITEMSIZE, help="of the inputs; may be repeated")
    run.add_argument("--fused", action="append", choices=cases.FUSED, help="what follows; may be repeated")
    run.add_argument("--variant", action="append", choices=cases.VARIANTS, help="only this variant; may be repeated")
    run.add_argument("--threads", type=int, action="append", help="these numbers of threads")
    run.add_argument("--peer", action="append", metavar="NAME", help=f"only these peers: {', '.join(peer_names())}")
    run.add_argument("--turns", type=int, default=TURNS, help=f"turns of each contender ({TURNS})")
    run.add_argument("--seconds", type=float, default=SLICE, help=f"length of a turn ({SLICE})")
    run.add_argument("--list", action="store_true", help="print what would be measured, and end")
    run.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    make = commands.add_parser("report", help="write report.html and summary.md from results.json")
    make.add_argument("results", type=Path, nargs="?", default=OUT / "results.json")
    against = commands.add_parser("compare", help="which rows became slower since BASE; exit status 1 if any")
    against.add_argument("base", type=Path)
    against.add_argument("new", type=Path, nargs="?", help="results to compare; without it BASE's rows are run again")
    against.add_argument("--out", type=Path, default=OUT, help="folder of the new results")
    return p


def peer_names():
    """What --peer accepts."""
    return [c.name for c in contenders.PEERS]


def chosen(options, n_cores):
    """The cases that the options ask for; ValueError in words for a user."""
    if options.threads and min(options.threads) < 1:
        raise ValueError(f"--threads must be 1 or more, but got {min(options.threads)}")
    if options.shape:
        shapes = [cases.parse_shape(s) for s in options.shape]
        found = [
            case
            for dtype in options.dtype or ["float32"]
            if dtype != "uint8"
            for fused in options.fused or [""]
            for case in cases.of_shapes(shapes, options.threads or [n_cores], dtype=dtype, fused=fused)
            if not (fused and case.op == "backward")
        ]
    elif options.group or options.variant:
        found = cases.of_groups(options.group or ["variants"], options.threads or sorted({1, n_cores}))
    else:
        found = cases.full(n_cores) if options.full else cases.short(n_cores)
        if options.threads:
            found = [replace(c, threads=n) for n in options.threads for c in found]
    found = list(dict.fromkeys(found))
    if options.op:
        found = [c for c in found if c.op in options.op]
    if options.layout:
        found = [c for c in found if c.layout == options.layout]
    if options.dtype:
        found = [c for c in found if c.dtype in options.dtype]
    if options.fused:
        found = [c for c in found if c.fused in options.fused]
    if options.variant:
        found = [c for c in found if c.variant in options.variant]
    for name in options.peer or ():
        if name not in peer_names():
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(peer_names())}")
    found = [c for c in found if c.network or c.op == "eval" or prod(c.shape) > c.shape[1]]
    if not found:
        raise ValueError("nothing to measure: no case is all that the options ask for; --list shows what there is")
    return found


def measure(options):
    """Run the suite; an interruption leaves a report of what was measured."""
    n_cores = len(cores())
    wanted = chosen(options, n_cores)
    chosen_by = ("shape", "group", "op", "layout", "dtype", "fused", "variant", "threads")
    extras = not any(getattr(options, name) for name in chosen_by)
    small = [
        cases.Case("eval", shape, "last" if len(shape) == 2 else "first", 1, memory)
        for shape in cases.SMALL
        for memory in ("out", "called")
    ]
    growth, scaling = growth_cases(10**8 if options.full else 10**7, n_cores)
    plan = wanted + ((small + growth + scaling) if extras else [])
    plan = sorted(dict.fromkeys(plan), key=lambda c: c.threads)
    for case in plan:
        print(case.name)
    if extras:
        print("latency, idle and under load:", ", ".join(c.name for c in LATENCY_CASES))
    if options.list:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(plan) + (len(LATENCY_CASES) if extras else 0), unit="case", dynamic_ncols=True)

    def note(text):
        bar.set_description_str(f"{text:64.64}", refresh=False)

    path = options.out / "results.json"
    suite = Suite(path, options.peer, options.turns, options.seconds, note)
    for name, why in suite.absent.items():
        bar.write(f"absent: {name} ({why})")
    begin, interruptions = time.monotonic(), []

    def interrupt(*_):
        interruptions.append(True)  # Python ignores the exception if it meets a destructor
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for case in plan:
            suite.measure(case)
            bar.update()
            if interruptions:
                raise KeyboardInterrupt
        if extras:
            for case in LATENCY_CASES:
                suite.latency(case)
                bar.update()
        suite.results["suite"]["complete"] = True
    except KeyboardInterrupt:
        bar.write("interrupted: the report holds what was measured")
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()
        suite.end()
        suite.results["suite"]["minutes"] = (time.monotonic() - begin) / 60
        suite.save()
    for row in suite.results["suite"]["wrong"]:
        print(f"WRONG, not timed: {row['contender']} at {row['case']}: {row['why']}")
    for row in suite.results["suite"]["failed"]:
        print(f"failed: {row['contender']} at {row['case']}: {row['why']}")
    page = report.write(path)
    print(f"results: {path}\nreport:  {page}")
    return 0 if suite.results["suite"]["complete"] else 130


def measure_again(wanted, settings, path, title):
    """Results of cbn and the probe alone, in these cases."""
    with tqdm(total=len(wanted), unit="case", dynamic_ncols=True, desc=title) as bar:
        suite = Suite(
            path,
            peers=(),
            turns=settings["turns"],
            seconds=settings["seconds"],
            note=lambda text: bar.set_postfix_str(f"{text:64.64}", refresh=False),
            limits=(contenders.LimitScale.name,),
        )
        try:
            for case in wanted:
                suite.measure(case)
                bar.update()
        finally:
            suite.end()
            suite.save()
    return compare.load(path)


def against(options):
    """Compare two results; without a second one, run the rows of the first again, and what looks slower twice."""
    base = compare.load(options.base)
    if options.new:
        return compare.Comparison(base, compare.load(options.new)).print()
    settings = base["suite"]
    new = measure_again(compare.cases_of(base), settings, options.out / "compare.json", "measuring")
    found = compare.Comparison(base, new)
    if suspects := found.suspects():
        again = measure_again(suspects, settings, options.out / "compare_again.json", "once more")
        found = compare.Comparison(base, new, again)
    return found.print()


def main(arguments=None):
    """Run a command; returns the exit status."""
    p = parser()
    options = p.parse_args(arguments)
    try:
        if options.command == "run":
            return measure(options)
        if options.command == "report":
            print(report.write(options.results))
            return 0
        if options.command == "compare":
            return against(options)
    except (ValueError, FileNotFoundError, json.JSONDecodeError) as error:
        p.error(str(error))
    p.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(run(main))
