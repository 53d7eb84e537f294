"""One contender's process: prepares cases, checks its results once, and times itself when it is its turn.

Started by `benchmarks.suite`; speaks one JSON object a line on standard input and output. No other contender, and so
no second OpenMP runtime, is ever in this process; while it is not its turn it is stopped by a signal, so that none of
its threads spins beside another's turn.

CBN_BENCH_PLANT plants faults, separated by ";", for the suite's own tests: "slow:NAME:1.3" makes contender NAME 1.3
times as slow, "wrong:NAME" spoils one value of its result.
"""

import json
import os
import sys
import time
import traceback

import numpy as np

from . import contenders
from .cases import Case

LIMITS = {"y": 1e-4, "dx": 1e-3, "dweight": 1e-3, "dbias": 1e-3}  # largest error relative to the largest exact value
SHORT = 20e-6  # calls shorter than this are timed several at a time


def planted(kind, name):
    """The value of a planted fault of this kind for this contender, or None."""
    for fault in filter(None, os.environ.get("CBN_BENCH_PLANT", "").split(";")):
        what, who, *value = fault.split(":")
        if what == kind and who == name:
            return float(value[0]) if value else True
    return None


def slowed(run, factor):
    """A function that takes `factor` times as long as `run`."""

    def slow():
        begin = time.perf_counter()
        result = run()
        end = begin + (time.perf_counter() - begin) * factor
        while time.perf_counter() < end:
            pass
        return result

    return slow


def in_order(calls):
    """A function that makes these calls; the call itself if it is one."""
    if len(calls) == 1:
        return calls[0]

    def run():
        for call in calls:
            call()

    return run


def error_of(value, exact):
    """The largest error relative to the largest exact value, sample by sample."""
    value = value.reshape(exact.shape)
    scale = float(np.abs(exact).max()) or 1.0  # where all are 0, as the least of many bytes
    differences = [np.abs(value[i].astype(exact.dtype) - exact[i]).max() for i in range(len(exact))]
    return float(np.max(differences)) / scale  # numpy's maximum, because Python's passes over NaN


class Worker:
    """The contender's cases; each method is a command."""

    def __init__(self):
        self.run = {}

    def version(self, contender):
        return {"version": contenders.ALL[contender].version()}

    def prepare(self, contender, case, exact):
        """Build everything, make the first call, and compare the result with float64.

        `exact` has a {name of a result: .npy file} for each different part of the case. Gives the time of the first
        call, which pays for page faults and the start of threads, and the largest relative error of each result.
        """
        case = Case(**{**case, "shape": tuple(case["shape"])})
        made = contenders.of(contender, case)
        parts = {part: made(part, contenders.Data(part)) for part in dict.fromkeys(case.parts)}
        run = in_order([parts[part].run for part in case.parts])
        begin = time.perf_counter()
        run()
        first = time.perf_counter() - begin
        errors, wrong = {}, None
        for held, files in zip(parts.values(), exact, strict=True):
            results, limits = held.results(), LIMITS | held.tolerances
            if planted("wrong", contender) and results:
                next(iter(results.values()))[-1] += 1
            for name, value in results.items():
                error = error_of(value, np.load(files[name], mmap_mode="r"))
                errors[name] = max(error, errors.get(name, 0.0))
                if not error <= (2**-8 if case.dtype == "bfloat16" else limits[name]):
                    wrong = f"{name} is off by {error:.1e} of its scale"
        factor = planted("slow", contender)
        self.run[contender] = parts, slowed(run, factor) if factor else run
        return {"first": first, "errors": errors, "wrong": wrong}

    def time(self, contender, seconds):
        """Times of single calls for so many seconds, at least one; short calls are averaged over several."""
        run, clock = self.run[contender][1], time.perf_counter
        begin = clock()
        run()
        once = clock() - begin
        calls = 1 if once > SHORT else max(1, int(100e-6 / max(once, 1e-7)))
        times = []
        end = clock() + seconds
        while True:
            begin = clock()
            for _ in range(calls):
                run()
            now = clock()
            times.append((now - begin) / calls)
            if now >= end:
                return {"median": float(np.median(times)), "calls": calls * len(times)}

    def latency(self, contender, calls, seconds):
        """Percentiles of single calls, each timed by itself, and how many there were."""
        run, clock = self.run[contender][1], time.perf_counter
        times = np.empty(calls)
        for _ in range(20):
            run()
        stop = clock() + seconds
        n = 0
        while n < calls and (n < 200 or clock() < stop):
            begin = clock()
            run()
            times[n] = clock() - begin
            n += 1
        p50, p95, p99 = np.percentile(times[:n], [50, 95, 99])
        return {"p50": p50, "p95": p95, "p99": p99, "calls": n}

    def forget(self, contender):
        self.run.pop(contender, None)
        return {}


def main():
    """Answer commands until standard input ends."""
    # What a library prints must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0], "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
