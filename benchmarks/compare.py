"""Two runs compared: which rows of cbn became slower than the noise of both.

Times of two runs are not comparable on a machine that drifts. What is compared is cbn's time over that of a fixed
probe (y = a*x + b over the same arrays, with plain stores, in C), taken in the same turn.
"""

import json

import numpy as np

from .cases import Case

FLOOR = 0.12  # a change below this is never reported: placement of arrays in memory alone makes as much
SIGMAS = 4.0


def load(path):
    """A file of results; ValueError where it is none of this suite's."""
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or "suite" not in results:
        raise ValueError(f"{path} is not a file of results of this suite")
    return results


def rows(results):
    """{case name: cbn's times over the probe's, turn by turn}."""
    return {
        b["extra_info"]["contender"] + " " + b["group"]: np.asarray(b["extra_info"]["probe"])
        for b in results["benchmarks"]
        if b["extra_info"]["contender"].startswith("cbn") and "probe" in b["extra_info"]
    }


def cases_of(results):
    """The cases in which cbn was measured."""
    found = []
    for b in results["benchmarks"]:
        if b["extra_info"]["contender"] == "cbn":
            fields = {k: b["extra_info"][k] for k in Case.__dataclass_fields__}
            found.append(Case(**{**fields, "shape": tuple(fields["shape"])}))
    return found


def noise(samples):
    """Standard error of the median, relative to it, from the quartiles."""
    q1, median, q3 = np.nanpercentile(samples, [25, 50, 75])
    return 1.25 * (q3 - q1) / 1.35 / np.sqrt(len(samples)) / median


def changes(base, new):
    """[(name, change, what the noise of both allows)] of the rows that both have; a change of 0.3 is 30 % slower."""
    a, b = rows(base), rows(new)
    found = []
    for name in a:
        if name in b:
            change = np.nanmedian(b[name]) / np.nanmedian(a[name]) - 1
            found.append((name, change, max(FLOOR, SIGMAS * float(np.hypot(noise(a[name]), noise(b[name]))))))
    return found


def print_changes(base, new):
    """Print what changed; 1 if a row became slower than the noise of both runs, or nothing can be compared."""
    found = changes(base, new)
    if not found:
        print("the two files have no row in common")
        return 1
    slower = [row for row in found if row[1] > row[2]]
    faster = [row for row in found if row[1] < -row[2]]
    for title, some in (("slower", slower), ("faster", faster)):
        for name, change, allowed in sorted(some, key=lambda row: -abs(row[1])):
            print(f"{title}: {name}: {change:+.0%} (noise of both runs: {allowed:.0%})")
    print(f"{len(found)} rows compared: {len(slower)} slower, {len(faster)} faster, beyond the noise of both runs")
    return 1 if slower else 0
