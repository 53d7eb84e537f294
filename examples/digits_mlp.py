"""An MLP on handwritten digits, with and without batch norm; with --cifar10, the same network on CIFAR-10."""

import io
import pickle
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_digits

from cbn import BatchNorm1d
from examples import report, training
from examples.layers import Linear, ReLU, Sequential, softmax_cross_entropy

BATCH = 10
RATES = (1e-4, 1e-3)  # the first is the article's
CIFAR10_PIXELS = 3 * 32 * 32
# Training loss in epoch 5 on CIFAR-10 that the article (MachineCurve, "Batch Normalization with PyTorch", 2021) prints,
# a mean over every 500 batches.
ARTICLE = {
    "with": (1.573, 1.570, 1.594, 1.568, 1.609, 1.573, 1.570, 1.571, 1.571, 1.584),
    "without": (1.650, 1.656, 1.668, 1.651, 1.664, 1.649, 1.647, 1.648, 1.620, 1.648),
}


def network(n_in, with_bn, rng, dtype=np.float32, layer=BatchNorm1d, **options):
    """n_in-64-32-10; batch norm, if any, between the linear map and ReLU: a `layer` with the options that are given."""
    return Sequential(
        Linear(n_in, 64, rng, dtype),
        layer(64, dtype=dtype, **options) if with_bn else None,
        ReLU(),
        Linear(64, 32, rng, dtype),
        layer(32, dtype=dtype, **options) if with_bn else None,
        ReLU(),
        Linear(32, 10, rng, dtype),
    )


def digits():
    """The 1,797 digits of scikit-learn, 64 pixels each in [0, 1], a fifth held out."""
    x, y = load_digits(return_X_y=True)
    return training.hold_out((x / 16).astype(np.float32), y)


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------


class PickledArray:
    """Stands in for numpy's array while a file is read: keeps the state and computes nothing."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.content = state

    def array(self):
        if self.dtype.code not in (b"u1", "u1"):
            raise ValueError(f"an array of type {self.dtype.code!r}, expected u1")
        order = "F" if self.fortran else "C"
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order=order)


class PickledDtype:
    """Stands in for numpy's dtype: keeps the type's code."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass  # byte order and alignment mean nothing for single bytes


def reconstruct(*_):
    return PickledArray()


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy arrays. No name in a file leads to code other than the three above:
    a pickle that asks for anything else is refused before anything is called.
    """

    names = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledDtype,
    }

    def find_class(self, module, name):
        try:
            return self.names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs") from None


def read_batch(path):
    """Pixels (n, 3072) as uint8 and labels (n,) of one file of the Python version of CIFAR-10.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    ValueError
        If it is anything but such a file; it names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected data_batch_1 to data_batch_5 and test_batch, "
            "as in cifar-10-batches-py of the Python version of CIFAR-10"
        )
    file = io.BytesIO(path.read_bytes())
    try:
        content = ArrayUnpickler(file, encoding="bytes").load()
        if not isinstance(content, dict) or not isinstance(content.get(b"data"), PickledArray):
            raise ValueError("expected a dict with an array b'data'")
        x, labels = content[b"data"].array(), content.get(b"labels")
        if x.ndim != 2 or x.shape[1] != CIFAR10_PIXELS:
            raise ValueError(f"b'data' has shape {x.shape}, expected (n, {CIFAR10_PIXELS})")
        if not isinstance(labels, list) or len(labels) != len(x):
            raise ValueError(f"b'labels' must be a list of {len(x)} labels")
        if not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("b'labels' must be whole numbers from 0 to 9")
    except Exception as error:  # a broken pickle may raise nearly anything
        raise ValueError(f"{path} is no batch of CIFAR-10: {error}") from error
    return x, np.array(labels)


def cifar10(folder):
    """CIFAR-10 with pixels in [0, 1]; its own test batch is what is held out."""
    batches = [read_batch(Path(folder) / f"data_batch_{i}") for i in range(1, 6)]
    x_test, y_test = read_batch(Path(folder) / "test_batch")
    x = np.concatenate([x for x, _ in batches])
    y = np.concatenate([y for _, y in batches])
    scale = np.float32(1 / 255)
    return training.Data(x * scale, y, x_test * scale, y_test)


# ---- the experiment ------------------------------------------------------------------------------------------------


def run(data, *, seeds, epochs, rates=RATES, label="digits"):
    """{(rate, with_bn): {metric: (seeds, epochs)}}."""
    n_in = data.x_train.shape[1]
    total = len(rates) * 2 * seeds * epochs * training.n_batches(len(data.x_train), BATCH)
    with report.progress(total, label) as bar:
        return {
            (rate, with_bn): training.repeat(
                lambda rng, with_bn=with_bn: network(n_in, with_bn, rng),
                softmax_cross_entropy,
                data,
                seeds=seeds,
                epochs=epochs,
                lr=rate,
                batch=BATCH,
                progress=bar,
            )
            for rate in rates
            for with_bn in (True, False)
        }


def article(which):
    values = ARTICLE[which]
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(results, out, name, source):
    """Table, runs and picture."""
    rates = sorted({rate for rate, _ in results})
    seeds, epochs = next(iter(results.values()))["train_loss"].shape
    words = {True: "with", False: "without"}
    headers = ["Adam", "batch norm", *training.METRICS.values(), "article, CIFAR-10"]
    rows, by_epoch, comparisons = [], [], []
    for rate in rates:
        for with_bn in (True, False):
            result = results[rate, with_bn]
            last = [training.mean_std(result[metric][:, -1], metric) for metric in training.METRICS]
            rows.append([f"{rate:g}", words[with_bn], *last, article(words[with_bn]) if rate == RATES[0] else "–"])
            by_epoch.append([f"{rate:g}", words[with_bn], *map(training.mean_std, result["train_loss"].T)])
        comparisons += training.compare(f"Adam at {rate:g}", results[rate, True], results[rate, False])
    report.write(
        out,
        name,
        f"The MLP on {source}, with and without batch norm",
        f"Batch {BATCH}, {seeds} seeds, after {epochs} epochs: mean ± standard deviation over the seeds. "
        "The last column is the training loss that the article prints for epoch 5 on CIFAR-10, at the first rate: "
        "median and range of ten values.",
        report.table(headers, rows),
        "Training loss by epoch:",
        report.table(["Adam", "batch norm", *(f"epoch {i + 1}" for i in range(epochs))], by_epoch),
        training.verdict(comparisons),
    )
    report.write_runs(out, name, {f"Adam at {rate:g}, {words[bn]}": runs for (rate, bn), runs in results.items()})

    def paint(figure, axes):
        for row, rate in zip(axes, rates, strict=True):
            for ax, metric in zip(row, training.METRICS, strict=True):
                scale = 100 if metric == "test_accuracy" else 1
                curves = [results[rate, with_bn][metric] * scale for with_bn in (True, False)]
                report.with_and_without(ax, range(1, epochs + 1), *curves)
                ax.set_title(f"{training.METRICS[metric].capitalize()}, Adam at {rate:g}")
                ax.set_ylabel("accuracy (%)" if scale == 100 else "cross-entropy (nats)")
                report.epochs_axis(ax, epochs)
        report.legend(figure, axes[0, 0])

    report.draw(
        out / f"{name}.png",
        paint,
        size=(12, 3.4 * len(rates)),
        rows=len(rates),
        columns=3,
        title=f"MLP on {source}: mean and range of {seeds} seeds",
    )


def main(argv=None):
    parser = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(5, "epochs"))
    parser.add_argument("--cifar10", metavar="DIR", help="folder cifar-10-batches-py, instead of the digits")
    args = parser.parse_args(argv)
    if args.cifar10:
        try:
            data = cifar10(args.cifar10)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        show(run(data, seeds=args.seeds, epochs=args.epochs, label="CIFAR-10"), args.out, "cifar10_mlp", "CIFAR-10")
    else:
        show(run(digits(), seeds=args.seeds, epochs=args.epochs), args.out, "digits_mlp", "scikit-learn's digits")


if __name__ == "__main__":
    sys.exit(report.run(main))
