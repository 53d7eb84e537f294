"""How batch norm grows with ranks and threads: a cost model, measured where it can be, drawn for 2 to 10,000 ranks.

    python -m benchmarks.scaling [--out DIR] [--quick]

Two and four ranks of MPI on this machine, and one and more threads, give the model its parameters and a check. Networks
between machines are given by latency and bandwidth. docs/scaling.md has the derivation, and the tables from here.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cbn
from benchmarks.networks import resnet50
from cbn import Moments
from cbn.__main__ import run as run_command

ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD = 4, 3  # float64 numbers of a channel in an exchange
CHANNELS = (64, 256, 1024, 4096)
RANKS = (2, 4, 8, 16, 64, 256, 1024, 4096, 10_000)
NODE = 64  # ranks of a machine, in the hierarchical exchange
THREADS = (1, 2, 4, 8, 16, 32, 64, 128)
LARGE = (32, 64, 112, 112)  # for the bandwidth of threads


@dataclass(frozen=True)
class Network:
    """Between two ranks: seconds of a message without content, and seconds a byte; and how long merging takes."""

    name: str
    latency: float
    per_byte: float
    merging: float = 1.0e-9  # seconds a channel of one part

    def exchange(self, n_ranks, n_bytes):
        """Seconds until every rank has the n_bytes of each: doubling, so that the number of messages is log2."""
        return (
            self.latency * math.ceil(math.log2(n_ranks)) + (n_ranks - 1) * n_bytes * self.per_byte
            if n_ranks > 1
            else 0.0
        )

    def merge(self, n_parts, n_channels):
        return n_parts * n_channels * self.merging

    def flat(self, n_ranks, n_channels):
        """Forward and backward of a layer: every rank gets the numbers of all, and merges them."""
        n_bytes = [8 * rows * n_channels for rows in (FORWARD, BACKWARD)]
        return sum(self.exchange(n_ranks, n) for n in n_bytes) + 2 * self.merge(n_ranks, n_channels)


def hierarchical(inside, between, n_ranks, n_channels, node=NODE):
    """The same in three steps: all ranks of a machine, then one of each machine, then back to all of a machine."""
    own, machines, total = min(node, n_ranks), math.ceil(n_ranks / node), 0.0
    for rows in (FORWARD, BACKWARD):
        n_bytes = 8 * rows * n_channels
        total += inside.exchange(own, n_bytes) + inside.merge(own, n_channels)
        if machines > 1:
            total += between.exchange(machines, n_bytes) + between.merge(machines, n_channels)
            total += inside.latency * math.ceil(math.log2(own)) + n_bytes * inside.per_byte
    return total


ETHERNET = Network("10 Gb/s Ethernet", 30e-6, 1 / 1.25e9)
INFINIBAND = Network("100 Gb/s InfiniBand", 2e-6, 1 / 12.5e9)
SHARED = Network("memory of one machine", 2e-6, 1 / 8e9)


# ---- measured: ranks -------------------------------------------------------------------------------------------------


def best(call, repeats):
    """Seconds of a call: the median of seven rounds."""
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - start) / repeats)
    return float(np.median(rounds))


def be_a_rank(file, repeats):
    """What `measured_ranks` starts: seconds of an exchange, a merge, and a step of a layer with and without others."""
    from mpi4py import MPI

    import cbn.mpi

    world, found = MPI.COMM_WORLD, []
    for n_channels in CHANNELS:
        rng = np.random.default_rng(world.rank)
        x = rng.standard_normal((8, n_channels)).astype(np.float32)
        mine, all_of_them = np.ones((FORWARD, n_channels)), np.empty((world.size, FORWARD, n_channels))
        one = cbn.moments(x)
        own, together = cbn.BatchNorm1d(n_channels), cbn.mpi.SyncBatchNorm(n_channels)

        def step(layer, x=x):
            layer(x)
            layer.backward(x)

        seconds = {}
        for name, call in {
            "exchange": lambda a=mine, b=all_of_them: world.Iallgather(a, b).Wait(),
            "merge": lambda one=one: Moments.merge([one] * world.size),
            "own": lambda layer=own: step(layer),
            "together": lambda layer=together: step(layer),
        }.items():
            call()
            world.Barrier()
            seconds[name] = max(world.allgather(best(call, repeats)))
        found.append({"ranks": world.size, "channels": n_channels, **seconds})
    if world.rank == 0:
        Path(file).write_text(json.dumps(found))


def measured_ranks(n_ranks, repeats, cores=None):
    """Rows of `be_a_rank` on so many ranks, on these cores."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        sys.exit("mpiexec is missing: pip install -e '.[test-distributed]' in the checkout")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [mpiexec, "-n", str(n_ranks), sys.executable, "-m", "benchmarks.scaling", "--rank", str(file)]
        environment = os.environ | {"CBN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--repeats", str(repeats)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        return json.loads(file.read_text())


def fitted(rows):
    """The network, and what a step with others costs in Python: (seconds, seconds a channel). From one world's rows."""
    n_ranks = rows[0]["ranks"]
    channels = np.array([row["channels"] for row in rows], float)
    latency, per_byte = line_through(
        math.ceil(math.log2(n_ranks)),
        (n_ranks - 1) * 8 * FORWARD * channels,
        np.array([row["exchange"] for row in rows]),
    )
    merging = rows[-1]["merge"] / (n_ranks * rows[-1]["channels"])
    here = Network("measured here", latency, per_byte, merging)
    rest = [row["together"] - row["own"] - here.flat(n_ranks, row["channels"]) for row in rows]
    return here, line_through(1, channels, np.array(rest))


def line_through(constant, x, y):
    """a and b, neither of them negative, of y = a*constant + b*x, with the smallest relative errors."""
    design = np.stack([np.full(len(x), constant), x], 1) / y[:, None]
    return tuple(float(v) for v in np.maximum(np.linalg.lstsq(design, np.ones(len(x)), rcond=None)[0], 0.0))


def sharing(rows, of_one_core):
    """Seconds that two ranks lose in a step by taking turns on a core, which one of them holds while it waits."""
    return max(
        0.0, float(np.median([b["together"] - 2 * a["together"] for a, b in zip(rows, of_one_core, strict=True)]))
    )


def predicted(here, python, lost, row, n_cores):
    """Seconds of a step of a layer with others: ranks that share a core take turns."""
    turns = max(1.0, row["ranks"] / n_cores)
    alone = row["own"] / turns  # it was measured on the same ranks
    of_rank = alone + python[0] + python[1] * row["channels"] + here.flat(row["ranks"], row["channels"])
    return turns * of_rank + (turns - 1) * lost


# ---- measured: threads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threads:
    """With so many threads: bytes a second that can be read and written, and seconds of both passes."""

    scaling: float
    evaluation: float
    training: float


def measured_threads(counts):
    """{number: Threads}, each in a process of its own, for an array beyond the caches."""
    code = f"""
import ctypes
import numpy as np, cbn
from benchmarks import native
from benchmarks.scaling import best
lib, threads = native.driver("limits"), ctypes.c_int(cbn.get_num_threads())
x, bn = np.ones({LARGE}, np.float32), cbn.BatchNorm2d(64)
y = np.zeros_like(x)
a, b, n = x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_ssize_t(x.size)
print(2 * x.nbytes / best(lambda: lib.limit_scale(a, b, n, threads, 1), 3))
bn.eval()
print(best(lambda: bn(x, out=y), 3))
bn.train()
print(best(lambda: bn(x, out=y), 3))
"""
    found = {}
    for n in counts:
        environment = os.environ | {"CBN_NUM_THREADS": str(n), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found[n] = Threads(*map(float, done.stdout.split()))
    return found


def one_pass(threads):
    """Seconds of evaluation by bandwidth: one read and one write. Training has the same traffic: what a thread has
    measured is still in its caches when it applies.
    """
    return 2 * 4 * math.prod(LARGE) / threads.scaling


def thread_speed(n_threads, n_bytes, core=20e9, memory=370e9, region=0.15e-6):
    """How many times faster than one thread: all read and write, up to the memory's limit, after a region has begun."""
    if n_threads == 1:
        return 1.0
    return n_bytes / core / (n_bytes / min(n_threads * core, memory) + region * n_threads)


# ---- simulated -------------------------------------------------------------------------------------------------------


def waiting(n_ranks, n_layers, jitter, steps=20, seed=0):
    """Times of a step, as multiples of an undisturbed one: all wait in every layer, and all wait once at the end."""
    rng = np.random.default_rng(seed)
    often, once = 0.0, 0.0
    for _ in range(steps):
        slowest, total = 0.0, np.zeros(n_ranks)
        for _ in range(n_layers):
            seconds = rng.lognormal(-(jitter**2) / 2, jitter, n_ranks) / n_layers
            slowest += seconds.max()
            total += seconds
        often += slowest
        once += total.max()
    return often / steps, once / steps


def merging_error(n_parts, n_channels=8, fan_in=None):
    """(relative error of the variance, seconds) of merging the moments of so many parts of ten values each."""
    rng = np.random.default_rng(n_parts)
    x = rng.standard_normal((n_parts, 10, n_channels)) + 1000.0
    parts = [cbn.moments(one) for one in x]
    start = time.perf_counter()
    while len(parts) > 1:
        size = len(parts) if fan_in is None else fan_in
        parts = [Moments.merge(parts[i : i + size]) for i in range(0, len(parts), size)]
    seconds = time.perf_counter() - start
    wide = x.reshape(-1, n_channels).astype(np.longdouble)
    exact = ((wide - wide.mean(axis=0)) ** 2).mean(axis=0)
    return float(np.abs(parts[0].var() / exact - 1).max()), seconds


# ---- what is shown ---------------------------------------------------------------------------------------------------


def us(seconds):
    return (
        f"{seconds * 1e6:.3g} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )


def table(headers, rows):
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def network_cost(function):
    """Seconds of all batch norms of ResNet-50, forward and backward."""
    return sum(function(shape[0]) for shape in resnet50())


def check_table(rows, here, python, lost, n_cores):
    lines = []
    for row in rows:
        guess = predicted(here, python, lost, row, n_cores)
        exchange = max(1.0, row["ranks"] / n_cores) * here.exchange(row["ranks"], 8 * FORWARD * row["channels"])
        lines.append([
            f"{row['ranks']} ranks, {row['channels']:,} channels",
            us(row["exchange"]), us(exchange), us(row["own"]), us(row["together"]), us(guess),
            f"{guess / row['together']:.2f}",
        ])  # fmt: skip
    headers = ["measured here", "one exchange", "model", "step, own", "step, together", "model", "model/measured"]
    return table(headers, lines)


def growth_table():
    lines = []
    for n_ranks in RANKS:
        row = [f"{n_ranks:,}"]
        for network in (ETHERNET, INFINIBAND):
            flat = network_cost(lambda c, n=network, p=n_ranks: n.flat(p, c))
            stepwise = network_cost(lambda c, n=network, p=n_ranks: hierarchical(SHARED, n, p, c))
            row += [us(flat), us(stepwise)]
        lines.append(row)
    headers = ["ranks", *(f"{n.name}, {how}" for n in (ETHERNET, INFINIBAND) for how in ("flat", f"{NODE} a machine"))]
    return table(headers, lines)


def waiting_table(jitters, n_ranks):
    lines = []
    for p in n_ranks:
        row = [f"{p:,}"]
        for jitter in jitters:
            often, once = waiting(p, 2 * 53, jitter)
            row += [f"{often:.2f}", f"{once:.2f}"]
        lines.append(row)
    headers = ["ranks"] + [f"{100 * j:.0f} %, {when}" for j in jitters for when in ("in every layer", "once a step")]
    return table(headers, lines)


def merging_table(counts):
    lines = []
    for n in counts:
        (flat, seconds), (tree, _) = merging_error(n), merging_error(n, fan_in=16)
        lines.append([f"{n:,}", f"{flat:.0e}", f"{tree:.0e}", us(seconds)])
    return table(["parts", "error, one after the other", "error, tree of 16", "time, 8 channels"], lines)


SIZES = {"100 KB": 1e5, "1 MB": 1e6, "10 MB": 1e7, "100 MB": 1e8}


def thread_check_table(measured):
    lines = []
    for n, found in measured.items():
        guess = one_pass(found)
        seconds = [found.evaluation, found.training]
        ratios = [f"{guess / one:.2f}" for one in seconds]
        lines.append([n, f"{found.scaling / 1e9:.0f} GB/s", us(guess), *map(us, seconds), *ratios])
    headers = ["threads", "the memory's limit", "model", "evaluation", "training"]
    return table([*headers, "model/evaluation", "model/training"], lines)


def thread_table():
    rows = [[n, *(f"{thread_speed(n, 2 * size):.1f}" for size in SIZES.values())] for n in THREADS]
    return table(["threads", *SIZES], rows)


def draw(path, rows, here, python, lost, n_cores, measured):
    """Four panels, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    from benchmarks.plots import STYLE

    blue, orange, green, grey = "#0072b2", "#d55e00", "#008f68", "#6b7280"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        (a, b), (c, d) = figure.subplots(2, 2)
        for n_ranks, marker in ((2, "o"), (4, "s")):
            some = [row for row in rows if row["ranks"] == n_ranks]
            x = [row["channels"] for row in some]
            a.plot(x, [1e6 * row["together"] for row in some], marker, color=blue, label=f"{n_ranks} ranks, measured")
            guess = [1e6 * predicted(here, python, lost, row, n_cores) for row in some]
            a.plot(x, guess, color=blue, ls="-" if n_ranks == 2 else "--", label=f"{n_ranks} ranks, model")
        a.plot(x, [1e6 * row["own"] for row in rows if row["ranks"] == 2], color=grey, marker=".", label="a rank alone")
        a.set(xscale="log", yscale="log", xlabel="channels", ylabel="µs", ylim=(None, 1e4))
        a.set_title("Forward and backward of a layer, ranks on this machine")
        p = np.array(RANKS)
        for network, color in ((ETHERNET, orange), (INFINIBAND, green)):
            flat = [1e3 * network_cost(lambda ch, n=network, r=r: n.flat(r, ch)) for r in RANKS]
            stepwise = [1e3 * network_cost(lambda ch, n=network, r=r: hierarchical(SHARED, n, r, ch)) for r in RANKS]
            b.plot(p, flat, color=color, label=f"{network.name}, flat")
            b.plot(p, stepwise, color=color, ls="--", label=f"{network.name}, {NODE} ranks a machine")
        b.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms a step")
        b.set_title("All exchanges of ResNet-50, model")
        for jitter, color in ((0.05, blue), (0.2, orange)):
            often, once = zip(*(waiting(r, 106, jitter, steps=8) for r in RANKS), strict=True)
            c.plot(p, often, color=color, label=f"varying by {100 * jitter:.0f} %, all wait in every layer")
            c.plot(p, once, color=color, ls="--", label="all wait once a step")
        c.set(xscale="log", xlabel="ranks", ylabel="step, as a multiple", ylim=(0.95, None))
        c.set_title("Waiting for the slowest rank, simulated")
        for (name, size), color in zip(SIZES.items(), (grey, green, orange, blue), strict=True):
            d.plot(THREADS, [thread_speed(n, 2 * size) for n in THREADS], color=color, label=f"{name}, model")
        known = sorted(measured)
        speeds = [measured[1].evaluation / measured[n].evaluation for n in known]
        limits = [measured[n].scaling / measured[1].scaling for n in known]
        d.plot(known, limits, color="#b0568c", lw=3, alpha=0.5, label="103 MB, model with this memory")
        d.plot(known, speeds, "o", color="#b0568c", label="103 MB, measured here")
        d.set(xscale="log", yscale="log", xlabel="threads", ylabel="times faster than one", ylim=(None, 500))
        d.set_title("Threads of one machine")
        for ax in (a, b, c, d):
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.legend(fontsize=9.5, frameon=False, loc="upper left")
            ax.xaxis.set_major_formatter("{x:g}")
        for ax in (a, b, d):
            ax.yaxis.set_major_formatter("{x:g}")
        figure.savefig(path, metadata={"Date": None})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of scaling.md and .svg")
    parser.add_argument("--quick", action="store_true", help="to see that everything runs")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=300, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    repeats = 3 if args.quick else args.repeats
    if args.rank:
        return be_a_rank(args.rank, repeats)
    n_cores = len(os.sched_getaffinity(0))
    print("two and four ranks", file=sys.stderr)
    rows = [row for n_ranks in (2, 4) for row in measured_ranks(n_ranks, repeats)]
    two = [row for row in rows if row["ranks"] == 2]
    here, python = fitted(two)
    lost = sharing(two, measured_ranks(2, repeats, {min(os.sched_getaffinity(0))}))
    print("threads", file=sys.stderr)
    measured = measured_threads([n for n in THREADS if n <= n_cores])
    words = (
        f"On {n_cores} processors: latency {us(here.latency)}, {1e-9 / here.per_byte:.1f} GB/s, merging "
        f"{here.merging * 1e9:.1f} ns a channel of a part; in Python {us(python[0])} and {python[1] * 1e9:.0f} ns a "
        f"channel more for each step of a layer. Two ranks that share a core lose {us(lost)} a step."
    )
    counts = (2, 100, 1000) if args.quick else (2, 10, 100, 1000, 10_000)
    print("simulations", file=sys.stderr)
    ranks = RANKS[:5] if args.quick else RANKS
    text = "\n\n".join([
        "# Scaling", words, check_table(rows, here, python, lost, n_cores), growth_table(),
        waiting_table((0.05, 0.2), ranks), merging_table(counts), thread_check_table(measured), thread_table(),
    ])  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.md").write_text(text + "\n", encoding="utf-8")
    draw(args.out / "scaling.svg", rows, here, python, lost, n_cores, measured)
    print(text)
    print(f"written: {args.out / 'scaling.md'}, {args.out / 'scaling.svg'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
