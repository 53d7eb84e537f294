"""The suite: who takes part, whose turn it is, and what came out.

Contenders take turns, A B C A B C ..., each in a process of its own, so that a machine that becomes slower becomes so
for all; ratios are formed turn by turn and their median is reported with its quartiles.
"""

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from cbn import reference

from . import contenders
from .cases import GROWTH, Case

ROOT = Path(__file__).parent.parent
OURS = "cbn"
TURNS = 7
SLICE = 0.03  # seconds of a turn
LATENCY_CASES = (Case("eval", (1, 64), "last"), Case("eval", (8, 64, 28, 28), "first"))
WIDE = ("y", "dx", "grad_dy", "grad_x", "y_t")  # results with the shape of x; the others have a value a channel
LATENCY_PEERS = ("cbn", "numpy", "PyTorch", "ONNX Runtime")


def cores():
    """Processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


class Process:
    """A worker that is stopped while it is not its turn."""

    def __init__(self, name, threads):
        self.name = name
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            # Everybody's arrays on huge pages, as numpy's are from 4 MB on: that alone is worth a quarter
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONWARNINGS": "ignore",
        }
        mine = set(cores()[:threads])

        def before_it_starts():
            os.sched_setaffinity(0, mine)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process must not outlive us

        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=before_it_starts,
            start_new_session=True,  # Ctrl-C is for the suite alone
        )

    def ask(self, **command):
        """Its answer; it runs until then, and is stopped again."""
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            why = " (killed; the system may have run out of memory)" if status == -signal.SIGKILL else ""
            return {"error": f"the process ended with status {status}{why}"}
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def end(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class Exact:
    """The float64 results of a case, computed once, in files that all workers read."""

    def __init__(self, case, folder, prefix=""):
        data = contenders.Data(case)
        self.files = {}
        if case.group == "steps":
            self.save(contenders.exact_step(case, data), folder, prefix)
            return
        # channel by channel: float64 copies of all at once would not fit beside the contenders
        names = contenders.RESULTS.get(case.op, ("y",))
        if case.variant:
            names = sum(contenders.names_of(case), ())
        wide = {name for name in names if name.split()[-1] in WIDE}
        results = {name: np.empty(case.shape if name in wide else case.shape[1:2], data.parameters) for name in names}
        step = max(1, case.shape[1] // max(1, case.n_bytes // (64 << 20)))
        find = {"statistics": self.statistics, "variants": self.variant}.get(case.group, self.normalized)
        for c in range(0, case.shape[1], step):
            part = slice(c, c + step)
            for name, value in zip(names, find(case, data, part), strict=True):
                results[name][(slice(None), part) if name in wide else part] = value
        self.save(results, folder, prefix)

    def save(self, results, folder, prefix):
        for name, a in results.items():
            self.files[name] = str(Path(folder) / f"{prefix}{name}.npy")
            np.save(self.files[name], a)

    @staticmethod
    def normalized(case, data, part, rows=slice(None)):
        """What batch normalization gives for some of the channels, and of some samples."""
        x, weight = data.x[rows, part], data.weight[part]
        mean, var = data.mean[part], data.var[part]
        if case.op != "eval":
            n, mean, m2 = reference.moments(x)
            var = m2 / n
        if case.op in ("backward", "step"):
            return reference.backward(data.dy[rows, part], x, mean, var, weight, contenders.EPS)
        y = reference.normalize(x, mean, var, weight, data.bias[part], contenders.EPS)
        if case.fused:
            y = reference.activate(y, data.dy[rows, part] if case.fused == "add+relu" else None, 0)
        return (y,)

    @classmethod
    def variant(cls, case, data, part):
        """What the plain call and the variant give for some of the channels."""
        plain = functools.partial(cls.normalized, case, data)
        return (*plain(part), *contenders.exact(case, data, part, plain))

    @staticmethod
    def statistics(case, data, part):
        """What operations on statistics give for some of the channels."""
        x = data.x[:, part]
        if case.op == "standardize+clip":
            y = reference.normalize(x, data.mean[part], data.var[part], eps=contenders.EPS)
            return (reference.activate(y, low=-contenders.CLIP, high=contenders.CLIP),)
        count, mean, m2, *extremes = reference.counted_moments(x, skipna=True)
        return (mean, m2 / count, *(extremes if case.op == "moments+extrema" else ()))


def cpu_model():
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def cache_sizes():
    """Bytes of the caches of the first processor: {"L1d": ..., "L2": ..., "L3": ...}."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            kind = (folder / "type").read_text().strip()
            size = (folder / "size").read_text().strip()
            if kind != "Instruction":
                level = (folder / "level").read_text().strip()
                sizes[f"L{level}" + ("d" if level == "1" else "")] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return sizes


def machine_info():
    """Where the figures come from."""
    from cbn import config

    return {
        "node": "",
        "processor": cpu_model(),
        "machine": platform.machine(),
        "system": platform.system(),
        "release": platform.release(),
        "python_version": platform.python_version(),
        "cores": len(cores()),
        "caches": cache_sizes(),
        "cbn": config.config(),
        "cpu": {"brand_raw": cpu_model(), "count": len(cores())},
    }


def commit_info():
    """What was measured, in pytest-benchmark's words."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "id": git("rev-parse", "HEAD"),
        "time": git("log", "-1", "--format=%cI"),
        "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "project": "cbn",
    }


def statistics(samples):
    """The fields of pytest-benchmark's "stats"."""
    data = np.asarray(samples, float)
    q1, median, q3 = np.percentile(data, [25, 50, 75])
    iqr = q3 - q1
    mild = int(((data < q1 - 1.5 * iqr) | (data > q3 + 1.5 * iqr)).sum())
    severe = int((np.abs(data - data.mean()) > data.std()).sum())
    return {
        "min": data.min(), "max": data.max(), "mean": data.mean(), "stddev": data.std(ddof=1) if len(data) > 1 else 0.0,
        "rounds": len(data), "median": median, "iqr": iqr, "q1": q1, "q3": q3, "iqr_outliers": mild,
        "stddev_outliers": severe, "outliers": f"{severe};{mild}", "ld15iqr": data.min(), "hd15iqr": data.max(),
        "ops": 1 / data.mean(), "total": data.sum(), "data": data.tolist(), "iterations": 1,
    }  # fmt: skip


class Suite:
    """A run: its processes, its results, and the file that they are kept in as they come."""

    def __init__(self, path, peers=None, turns=TURNS, seconds=SLICE, note=lambda text: None, limits=None):
        self.path = Path(path)
        self.turns, self.seconds, self.note = turns, seconds, note
        self.processes = {}
        self.threads = None
        self.peers, self.versions, self.absent = self.present(peers, limits)
        self.results = {
            "machine_info": machine_info(),
            "commit_info": commit_info(),
            "benchmarks": [],
            "datetime": datetime.now(timezone.utc).isoformat(),
            "version": "5.2.3",  # of pytest-benchmark, whose format this is
            "suite": {
                "versions": self.versions,
                "absent": self.absent,
                "wrong": [],
                "failed": [],
                "latency": [],
                "turns": turns,
                "seconds": seconds,
                "complete": False,
            },
        }

    def present(self, peers, limits):
        """(names that take part, their versions, {absent name: reason}); None stands for all peers, all limits."""
        versions, absent = {}, {}
        names = [c.name for c in contenders.OURS]
        names += [c.name for c in contenders.PEERS if peers is None or c.name in peers]
        names += [c.name for c in contenders.LIMITS if limits is None or c.name in limits]
        for name in names:
            try:
                versions[name] = contenders.ALL[name].version()
            except (ImportError, OSError) as error:
                absent[name] = str(error).splitlines()[0]
                if isinstance(error, ImportError):
                    absent[name] += ": pip install -e '.[bench-peers]' in the checkout"
        return [n for n in names if n in versions], versions, absent

    def process(self, name, threads):
        """The process of a contender; all limits share one, which runs no library's threads but its own."""
        if threads != self.threads:
            self.end()
            self.threads = threads
        key = "limits" if name.startswith("limit") else name
        if key not in self.processes:
            self.processes[key] = Process(key, threads)
        return self.processes[key]

    def end(self):
        for process in self.processes.values():
            process.end()
        self.processes.clear()

    def save(self):
        """Write what there is so far: an interrupted run leaves a whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, default=float))
        temporary.rename(self.path)

    @contextlib.contextmanager
    def prepared(self, case, names):
        """{name: answer} of the contenders that are ready to be timed; wrong and failing ones are noted, not timed."""
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2**31 else None
        ready = {}
        with tempfile.TemporaryDirectory(dir=memory, prefix="cbn-bench-") as folder:
            parts = dict.fromkeys(case.parts)
            exact = [Exact(part, folder, f"{i}-").files for i, part in enumerate(parts)]
            for name in names:
                self.note(f"{case.name}: {name} prepares")
                answer = self.process(name, case.threads).ask(
                    do="prepare", contender=name, case=asdict(case), exact=exact
                )
                if "error" in answer:
                    self.failed(case, name, answer["error"])
                elif answer["wrong"]:
                    self.results["suite"]["wrong"].append(
                        {"case": case.name, "contender": name, "why": answer["wrong"]}
                    )
                else:
                    ready[name] = answer
        try:
            yield ready
        finally:
            for name in ready:
                self.process(name, case.threads).ask(do="forget", contender=name)

    def failed(self, case, name, why):
        """Note a failure once, and start afresh where a process died of it."""
        entry = {"case": case.name, "contender": name, "why": why}
        if entry not in self.results["suite"]["failed"]:
            self.results["suite"]["failed"].append(entry)
        if "process ended" in why:
            self.processes.pop("limits" if name.startswith("limit") else name).end()

    def measure(self, case):
        """Time one case: all contenders that can do it, and the limits, turn by turn."""
        every = [n for n in self.peers if contenders.of(n, case).fuses or not case.fused]
        names = [n for n in every if all(contenders.of(n, case).supports(part) for part in set(case.parts))]
        if not names:
            return
        with self.prepared(case, names) as ready:
            turns = {name: [] for name in ready}
            for turn in range(self.turns):
                for name in list(ready):
                    self.note(f"{case.name}: {name}, turn {turn + 1} of {self.turns}")
                    answer = self.process(name, case.threads).ask(do="time", contender=name, seconds=self.seconds)
                    if "error" in answer:
                        self.failed(case, name, answer["error"])
                        del ready[name]  # a process of its own would not know the case
                    turns[name].append(answer.get("median", np.nan))
        turns = {name: samples for name, samples in turns.items() if np.all(np.isfinite(samples))}
        self.record(case, ready, turns)

    def record(self, case, ready, turns):
        """Rows of the results, in pytest-benchmark's format; ratios and shares stand in extra_info."""
        cache = self.results["machine_info"]["caches"].get("L2", 1 << 20)
        units, model = case.units(cache)
        # Bandwidth of this turn: one unit in the time of a read, or two in that of the faster of the two kinds of store
        probes = (contenders.LimitRead,) if units == 1 else (contenders.LimitScale, contenders.LimitStream)
        found = [turns[probe.name] for probe in probes if probe.name in turns]
        unit = np.min(found, axis=0) / len(probes) if found and not case.chain else None
        for name, samples in turns.items():
            samples = np.asarray(samples)
            extra = {
                **asdict(case),
                "contender": name,
                "version": self.versions[name],
                "bytes": case.n_bytes,
                "units": units,
                "model": model,
                "first": ready[name]["first"],
                "errors": ready[name]["errors"],
            }
            if OURS in turns and name != OURS:
                extra["ratio"] = quartiles(samples / np.asarray(turns[OURS]))
            if unit is not None and not name.startswith("limit"):
                extra["share"] = quartiles(units * unit / samples)
            if contenders.LimitScale.name in turns:
                extra["probe"] = (samples / np.asarray(turns[contenders.LimitScale.name])).tolist()
            self.results["benchmarks"].append(
                {
                    "group": case.name,
                    "name": f"{case.name} {name}",
                    "fullname": f"benchmarks/{case.name}/{name}",
                    "params": {"contender": name},
                    "param": name,
                    "extra_info": extra,
                    "options": {},
                    "stats": statistics(samples),
                }
            )
        self.save()

    def latency(self, case, seconds=2.0, calls=20000):
        """Percentiles of single calls on an idle machine, and with one busy process a core beside them."""
        names = [n for n in LATENCY_PEERS if n in self.peers and contenders.ALL[n].supports(case)]
        with self.prepared(case, names) as ready:
            for load in ("idle", "busy"):
                burners = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True, args=(core,))
                           for core in cores()] if load == "busy" else []  # fmt: skip
                for burner in burners:
                    burner.start()
                if burners:
                    time.sleep(1)
                try:
                    for name in ready:
                        self.note(f"latency of {case.name}, {load}: {name}")
                        answer = self.process(name, case.threads).ask(
                            do="latency", contender=name, calls=calls, seconds=seconds
                        )
                        self.results["suite"]["latency"].append(
                            {"case": case.name, **asdict(case), "contender": name, "load": load, **answer}
                        )
                finally:
                    for burner in burners:
                        burner.terminate()
                        burner.join()
        self.save()


def burn(core):
    """Keep a core busy."""
    os.sched_setaffinity(0, {core})
    n = 0
    while True:
        n += 1


def quartiles(samples):
    """{"median", "q1", "q3"} of samples."""
    q1, median, q3 = np.nanpercentile(samples, [25, 50, 75])
    return {"median": median, "q1": q1, "q3": q3}


def growth_cases(largest, n_cores):
    """Time against size: 10^2 to 10^8 elements in 5 channels; and against threads at one large shape."""
    cases = [
        Case(op, (4, 5, n // 20), "first", threads)
        for threads in ((1, n_cores) if n_cores > 1 else (1,))
        for n in GROWTH
        if n <= largest
        for op in ("eval", "train")
    ]
    counts = sorted({*range(1, min(n_cores, 8) + 1), n_cores})
    return cases, [Case(op, (32, 256, 28, 28), "first", n) for n in counts for op in ("eval", "train", "backward")]
