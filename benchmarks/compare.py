"""Two runs compared: which rows of cbn became slower than the noise of both.

Times of two runs are not comparable on a machine that drifts. What is compared is cbn's time over that of a fixed
probe (y = a*x + b over the same arrays, with plain stores, in C), taken in the same turn.

Even so the same code differs from run to run, by where its arrays lie and by who else is on the machine. How much is
read off the two runs themselves: most rows have not changed, so the scatter of all rows about their median is noise. A
row counts as slower if its change exceeds that, and what its own turns allow. A change of many rows, which may hide in
the noise of each, shows in their median, whose noise is smaller by the square root of their number: the rows of an
operation and layout, and all rows, are tested together as well.
"""

import json
from collections import defaultdict

import numpy as np

from .cases import Case

FLOOR = 0.12  # a change of a row below this is never reported
GROUP_FLOOR = 0.10  # nor one below this of a group's median
SIGMAS = 4.0
GROUP = "their median"


def load(path):
    """A file of results; ValueError where it is none of this suite's."""
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or "suite" not in results:
        raise ValueError(f"{path} is not a file of results of this suite")
    return results


def case_of(benchmark):
    """The case of a row."""
    found = benchmark["extra_info"]
    fields = {k: found[k] for k in Case.__dataclass_fields__ if k in found}
    return Case(**{**fields, "shape": tuple(fields["shape"])})


def rows(results):
    """{(contender, case): cbn's times over the probe's, turn by turn}."""
    return {
        (b["extra_info"]["contender"], case_of(b)): np.asarray(b["extra_info"]["probe"])
        for b in results["benchmarks"]
        if b["extra_info"]["contender"].startswith("cbn") and "probe" in b["extra_info"]
    }


def cases_of(results):
    """The cases in which cbn was measured."""
    return [case for contender, case in rows(results) if contender == "cbn"]


def noise(samples):
    """Standard error of the median, relative to it, from the quartiles."""
    q1, median, q3 = np.nanpercentile(samples, [25, 50, 75])
    return 1.25 * (q3 - q1) / 1.35 / np.sqrt(len(samples)) / median


class Comparison:
    """What changed from one run to another; `again` is a third one, of rows that looked slower in the second.

    Attributes
    ----------
    change : dict
        (contender, case) to the change of its ratio to the probe; 0.3 is 30 % slower. Of two new measurements the
        better one counts: what disturbs a run makes it slower, and seldom twice.
    scatter : float
        Standard deviation of a row's change from run to run, from the median deviation of all rows.
    slower, faster : list
        (name, change, what the noise allows). Only groups are called faster: a single row that looks so may have been
        disturbed in the first run, which cannot be measured again.
    """

    def __init__(self, base, new, again=None):
        before, after, repeated = rows(base), rows(new), rows(again) if again else {}
        self.change, allowed = {}, {}
        logs = {}
        for key in before.keys() & after.keys():
            medians = [np.nanmedian(r[key]) for r in (after, repeated) if key in r]
            logs[key] = float(np.log(min(medians) / np.nanmedian(before[key])))
            self.change[key] = float(np.expm1(logs[key]))
            allowed[key] = float(np.hypot(noise(before[key]), noise(after[key])))
        values = np.array(list(logs.values()))
        self.scatter = 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0
        self.slower, self.faster = [], []
        groups = defaultdict(list)
        for (contender, case), value in logs.items():
            for name in ("all rows", f"{case.op}, channels {case.layout}"):
                groups[name].append(value)
            limit = max(FLOOR, SIGMAS * float(np.hypot(allowed[contender, case], self.scatter)))
            if value > 0:
                self.sort(f"{contender} {case.name}", value, limit)
        for name, some in groups.items():
            if len(some) >= 4:
                limit = max(GROUP_FLOOR, SIGMAS * 1.25 * self.scatter / len(some) ** 0.5)
                self.sort(f"{name} ({len(some)}, {GROUP})", float(np.median(some)), limit)

    def sort(self, name, log_change, limit):
        """Put a row or a group where it belongs."""
        if abs(log_change) > np.log1p(limit):
            (self.slower if log_change > 0 else self.faster).append((name, float(np.expm1(log_change)), limit))

    def suspects(self):
        """The cases to measure once more before anything is said about them."""
        names = [name for name, _, _ in self.slower]
        whole = any(GROUP in name for name in names)
        return list(dict.fromkeys(case for _, case in self.change if whole or any(case.name in n for n in names)))

    def print(self):
        """Print what changed; 1 if anything became slower than the noise of both runs, or nothing can be compared."""
        if not self.change:
            print("the two files have no row in common")
            return 1
        for title, some in (("slower", self.slower), ("faster", self.faster)):
            for name, change, limit in sorted(some, key=lambda row: (GROUP not in row[0], -abs(row[1]))):
                print(f"{title}: {name}: {change:+.0%} (noise of both runs: {limit:.0%})")
        print(
            f"{len(self.change)} rows compared; a row scatters by {self.scatter:.0%} from run to run; "
            f"{len(self.slower)} slower, {len(self.faster)} faster, beyond the noise of both runs"
        )
        return 1 if self.slower else 0
