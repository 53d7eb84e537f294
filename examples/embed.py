"""Somebody else's feature pipeline that embeds cbn: windows (N, L, C) of a sensor signal, a stored layer, four threads.

The signal is synthetic, and the same in every run: twenty minutes of a machine under six channels of sensors.
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np

import cbn
from examples import report

RATE = 200  # samples a second
WINDOW, HOP = 256, 64
THREADS = 4
CHANNELS = {
    "acceleration x": "m/s²",
    "acceleration y": "m/s²",
    "acceleration z": "m/s²",
    "rotation": "rad/s",
    "temperature": "°C",
    "pressure": "Pa",
}


def sensor_signal(seconds, seed=0):
    """(T, 6) float32: vibration on three axes, one of them under gravity, rotation, temperature, air pressure.

    Means and deviations differ by orders of magnitude; pressure is the hard one, 20 Pa around 101,325.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(seconds * RATE) / RATE
    speed = 25 + 0.5 * np.sin(2 * np.pi * t / 60)  # revolutions a second
    phase = 2 * np.pi * np.cumsum(speed) / RATE
    load = 1 + 0.4 * np.sin(2 * np.pi * t / 17)
    noise = rng.normal(size=(len(t), 6))
    signal = [
        load * np.sin(phase) + 0.2 * noise[:, 0],
        0.6 * load * np.cos(phase) + 0.2 * noise[:, 1],
        9.81 + 0.3 * load * np.sin(2 * phase) + 0.1 * noise[:, 2],
        0.02 * np.sin(2 * np.pi * t / 5) + 0.004 * noise[:, 3],
        52 - 8 * np.exp(-t / 300) + 0.05 * noise[:, 4],
        101325 + 20 * np.sin(2 * np.pi * t / 90) + 4 * noise[:, 5],
    ]
    return np.stack(signal, axis=1).astype(np.float32)


def windows(signal):
    """(N, L, C), overlapping by three quarters: a view of the signal, nothing is copied."""
    return np.lib.stride_tricks.sliding_window_view(signal, WINDOW, axis=0)[::HOP].swapaxes(1, 2)


def in_shares(work, n, pool):
    """``work(share)`` for as many equal parts of n windows as there are threads, all at once."""
    edges = np.linspace(0, n, THREADS + 1).astype(int)
    list(pool.map(work, map(slice, edges[:-1], edges[1:])))


class FeaturePipeline:
    """Windows in, one line of features a window out; all that it knows of normalization is the layer in a file."""

    def __init__(self, path):
        self.bn = cbn.load(path)

    def normalize(self, x, out, pool=None):
        """Normalize windows (N, L, C) into `out`, here or in the threads of a pool."""

        def work(share):
            with cbn.num_threads(1):  # the threads are Python's
                self.bn(x[share], out=out[share])

        if pool is None:
            work(slice(None))
        else:
            in_shares(work, len(x), pool)
        return out

    def features(self, y):
        """(N, 2C): mean and deviation of every channel in every window."""
        return np.concatenate([y.mean(axis=1), y.std(axis=1)], axis=1)


def store_layer(x, path, batch=64):
    """Store a layer with the exact statistics of all windows, taken batch by batch.

    Not the running averages of a training mode: those average the variances of the batches, and what lies between the
    batches (the temperature rises all the time) would be missing.
    """
    parts = [cbn.moments(x[start : start + batch], channel_axis=-1) for start in range(0, len(x), batch)]
    whole = cbn.Moments.merge(parts)
    bn = cbn.BatchNorm1d(x.shape[2], channel_axis=-1)
    bn.running_mean[...], bn.running_var[...] = whole.mean, whole.var()
    bn.eval().save(path)


def in_numpy(x, bn, dtype):
    """The expression that one would write without cbn."""
    mean, var, weight, bias = (a.astype(dtype) for a in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return (x.astype(dtype, copy=False) - mean) / np.sqrt(var + dtype(bn.eps)) * weight + bias


def run(*, seconds, repeats):
    """Everything that is shown: results, differences and median times."""
    signal = sensor_signal(seconds)
    half = len(signal) // 2
    known, new = windows(signal[:half]), windows(signal[half:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sensors.npz"
        store_layer(known, path)
        pipeline = FeaturePipeline(path)
    bn = pipeline.bn
    x = np.ascontiguousarray(new)
    outs = {name: np.empty_like(x) for name in ("numpy", "numpy threads", "cbn", "cbn threads", "cbn openmp")}

    def numpy_share(share):
        outs["numpy threads"][share] = in_numpy(x[share], bn, np.float32)

    def numpy_whole():
        outs["numpy"][...] = in_numpy(x, bn, np.float32)

    ways = {
        "numpy": numpy_whole,
        "numpy threads": lambda: in_shares(numpy_share, len(x), pool),
        "cbn": lambda: pipeline.normalize(x, outs["cbn"]),
        "cbn threads": lambda: pipeline.normalize(x, outs["cbn threads"], pool),
        "cbn openmp": lambda: bn(x, out=outs["cbn openmp"]),
    }
    times = {name: [] for name in ways}
    with report.progress(repeats * len(ways), "sensor windows") as bar, ThreadPoolExecutor(THREADS) as pool:
        for _ in range(repeats):  # in turns, so that a slow moment of the machine meets all of them
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
                bar.update()
        from_view = pipeline.normalize(new, np.empty_like(x), pool)
    exact = in_numpy(x, bn, np.float64)
    return {
        "bn": bn,
        "x": x,
        "y": outs["cbn threads"],
        "features": pipeline.features(outs["cbn threads"]),
        "seconds": {name: float(np.median(values)) for name, values in times.items()},
        "difference": {name: float(np.max(np.abs(y - exact))) for name, y in outs.items()},
        "same bits": {name: bool(np.array_equal(y, outs["cbn"])) for name, y in outs.items()},
        "same bits from the view": bool(np.array_equal(from_view, outs["cbn"])),
        "drift": outs["cbn"].mean(axis=(0, 1), dtype=np.float64),
    }


def show(found, out):
    """Table and picture."""
    ways = {
        "numpy": "numpy's expression, 1 thread",
        "numpy threads": f"numpy's expression, {THREADS} Python threads",
        "cbn": "cbn, 1 thread",
        "cbn threads": f"cbn, {THREADS} Python threads",
        "cbn openmp": f"cbn, 1 Python thread, {cbn.get_num_threads()} OpenMP threads",
    }
    rows = [
        [
            text,
            f"{found['seconds']['numpy'] / found['seconds'][name]:.1f}×",
            f"{found['difference'][name]:.1e}",
            ("yes" if found["same bits"][name] else "no") if name.startswith("cbn") else "–",
        ]
        for name, text in ways.items()
    ]
    x, y, bn = found["x"], found["y"], found["bn"]
    slower = [text for name, text in ways.items() if found["seconds"][name] > found["seconds"]["numpy"]]
    statistics = [
        [name, f"{mean:.5g} {unit}", f"{np.sqrt(var):.3g} {unit}", f"{round(drift, 2) + 0.0:.2f}"]
        for (name, unit), mean, var, drift in zip(
            CHANNELS.items(), bn.running_mean, bn.running_var, found["drift"], strict=True
        )
    ]
    report.write(
        out,
        "embed",
        "cbn inside a feature pipeline",
        f"A synthetic six-channel sensor signal, in {len(x)} overlapping windows of {WINDOW} samples: x is {x.shape}, "
        "float32. The layer's statistics are those of the signal's first half; they were stored in a file and loaded, "
        "and normalize the second half.",
        report.table(["", "throughput", "largest difference from float64", "bits of 1 thread"], rows),
        "Throughput is relative to the first row, in the same run."
        + (f" Slower than it here: {'; '.join(slower)}." if slower else ""),
        "Reading the overlapping windows as a view of the signal, without a copy of them, gives the same bits: "
        + ("yes." if found["same bits from the view"] else "no."),
        "What the layer stores, and the mean of the normalized second half, in deviations of the first:",
        report.table(["channel", "mean", "deviation", "second half"], statistics),
    )

    def paint(figure, axes):
        shown = slice(0, 4 * WINDOW // HOP, WINDOW // HOP)  # every fourth window: they join without overlap
        raw, normalized = (a[shown].reshape(-1, a.shape[2]) for a in (x, y))
        t = np.arange(len(raw)) / RATE
        for i, (name, unit) in enumerate(CHANNELS.items()):
            color = report.PALETTE[i]
            axes[i, 0].plot(t, raw[:, i], color=color, lw=0.8)
            axes[i, 0].set_ylabel(unit)
            axes[i, 0].set_title(name)
            axes[i, 0].ticklabel_format(useOffset=False)
            axes[i, 1].plot(t, normalized[:, i], color=color, lw=0.8)
            axes[i, 1].set_ylim(-4, 4)
            axes[i, 1].set_ylabel("deviations")
            axes[i, 1].set_title(f"{name}, normalized")
            for ax in axes[i]:
                for edge in range(len(raw) // WINDOW + 1):
                    ax.axvline(edge * WINDOW / RATE, color=report.INK, lw=0.6, ls=":")
        for ax in axes[-1]:
            ax.set_xlabel("time in the second half (s); dotted: edges of the windows")
        figure.align_ylabels()

    report.draw(
        out / "embed.png",
        paint,
        size=(12, 11),
        rows=len(CHANNELS),
        columns=2,
        sharex=True,
        title="Windows of a synthetic sensor signal, raw and normalized by a stored layer",
    )


def main(argv=None):
    counts = {"seconds": (1200, "length of the signal"), "repeats": (15, "timed runs, of which the median counts")}
    parser = report.parser(__doc__, **counts)
    args = parser.parse_args(argv)
    if args.seconds < 12:
        parser.error("--seconds: each half must hold four windows, which takes 12 or more")
    show(run(seconds=args.seconds, repeats=args.repeats), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
