"""Sequences of different lengths, padded to one: batch norm with `lengths=` beside batch norm over the padding too.

A digit comes in row by row, as a fast or a slow writer draws it: each row takes 1 to 4 steps, so a sequence has 8 to
32. Batches are padded with zeros, to their longest sequence or all to the same length. Without `lengths` the zeros are
values like others: mean and variance follow how much padding a batch has, which in evaluation is another share.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_digits

from cbn import BatchNorm1d
from examples import report, training
from examples.layers import Conv1d, Linear, ReLU, Sequential, softmax_cross_entropy

STEPS, SLOWEST = 8, 4
BATCHES = (16, 64)
PADDED = {"to the longest": None, "to 64 steps": 64}
MASKED, PLAIN, WITHOUT = "with lengths", "over the padding too", "without batch norm"
COLORS = {WITHOUT: report.WITHOUT_BN, PLAIN: report.PALETTE[3], MASKED: report.WITH_BN}


def written_digits(seed=0):
    """Digits (N, 8, 32) as sequences of 8 channels, NaN behind the end of each."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    x = np.full((len(digits.images), 8, STEPS * SLOWEST), np.nan, np.float32)
    for i, image in enumerate(digits.images):
        slow = np.repeat(image.T / 16, rng.integers(1, SLOWEST + 1), axis=1)
        x[i, :, : slow.shape[1]] = slow
    return training.hold_out(x, digits.target)


class Network(Sequential):
    """Two convolutions along the sequence, the mean over its steps, a linear map; what lies behind a sequence is 0.

    `norm` says how batch norm, if any, takes a padded batch, and `length` to how many steps batches are padded.
    """

    def __init__(self, norm, length, rng):
        self.norm, self.length = norm, length
        norms = [None if norm == WITHOUT else BatchNorm1d(n) for n in (16, 32)]
        self.blocks = [(Conv1d(8, 16, 3, rng), norms[0], ReLU()), (Conv1d(16, 32, 3, rng), norms[1], ReLU())]
        super().__init__(*(layer for block in self.blocks for layer in block), Linear(32, 10, rng))

    def __call__(self, x):
        self.lengths = np.count_nonzero(~np.isnan(x[:, 0]), axis=1)
        length = self.lengths.max() if self.length is None else self.length
        self.counts = (np.arange(length) < self.lengths[:, None])[:, None].astype(np.float32)
        h = np.zeros((*x.shape[:2], length), np.float32)
        h[:, :, : x.shape[2]] = np.nan_to_num(x[:, :, :length])
        for conv, norm, relu in self.blocks:
            h = conv(h)
            if norm is not None:
                h = norm(h, lengths=self.lengths if self.norm == MASKED else None)
            h = relu(h) * self.counts
        return self.layers[-1](h.sum(axis=2) / self.lengths[:, None].astype(np.float32))

    def backward(self, dy):
        dh = self.layers[-1].backward(dy) / self.lengths[:, None].astype(np.float32)
        dh = dh[:, :, None]
        for conv, norm, relu in reversed(self.blocks):
            dh = relu.backward(dh * self.counts)
            dh = conv.backward(dh if norm is None else norm.backward(dh))
        return dh


def run(*, seeds, epochs, batches=BATCHES):
    """{(padding, batch, norm): {metric: (seeds, epochs)}}."""
    data = written_digits()
    steps = sum(training.n_batches(len(data.x_train), batch) for batch in batches)
    with report.progress(len(PADDED) * len(COLORS) * seeds * epochs * steps, "sequences and padding") as bar:
        return {
            (padding, batch, norm): training.repeat(
                lambda rng, norm=norm, length=length: Network(norm, length, rng),
                softmax_cross_entropy,
                data,
                seeds=seeds,
                epochs=epochs,
                lr=3e-3,
                batch=batch,
                progress=bar,
            )
            for padding, length in PADDED.items()
            for batch in batches
            for norm in COLORS
        }


def show(results, out):
    """Table, runs and picture."""
    seeds, epochs = next(iter(results.values()))["test_loss"].shape
    batches = sorted({batch for _, batch, _ in results})
    rows = []
    for (padding, batch, norm), result in results.items():
        plain = results[padding, batch, PLAIN]["test_loss"][:, -1]
        better = "–" if norm == PLAIN else f"{np.sum(result['test_loss'][:, -1] < plain)} of {seeds}"
        last = [training.mean_std(result[metric][:, -1], metric) for metric in training.METRICS]
        rows.append([padding, batch, norm, *last, better])
    report.write(
        out,
        "lengths",
        "Sequences of 8 to 32 steps, padded",
        f"{seeds} seeds, after {epochs} epochs of Adam at 0.003: mean ± standard deviation over the seeds. The last "
        "column: on how many seeds the held-out loss is lower than that of batch norm over the padding too.",
        report.table(["padded", "batch", "batch norm", *training.METRICS.values(), "better"], rows),
    )
    labels = {key: f"padded {key[0]}, batch {key[1]}, {key[2]}" for key in results}
    report.write_runs(out, "lengths", {labels[key]: runs for key, runs in results.items()})

    def paint(figure, axes):
        for row, padding in zip(axes, PADDED, strict=True):
            for ax, batch in zip(row, batches, strict=True):
                for norm, color in COLORS.items():
                    report.band(ax, range(1, epochs + 1), results[padding, batch, norm]["test_loss"], color, norm)
                ax.set_yscale("log")
                ax.set_yticks((0.3, 0.5, 1, 2), ("0.3", "0.5", "1", "2"))
                ax.set_yticks((), minor=True)
                report.epochs_axis(ax, epochs)
                ax.set_title(f"Padded {padding}, batches of {batch}")
                ax.set_ylabel("held-out loss (nats)")
        report.legend(figure, axes[0, 0])

    report.draw(
        out / "lengths.png",
        paint,
        size=(6.2 * len(batches), 7.5),
        rows=len(PADDED),
        columns=len(batches),
        sharey="row",
        title=f"Digits at four speeds: {seeds} seeds, mean and range",
    )


def main(argv=None):
    parser = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(10, "epochs"))
    args = parser.parse_args(argv)
    show(run(seeds=args.seeds, epochs=args.epochs), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
