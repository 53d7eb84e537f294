"""Batches of two and four digits, and a large one: batch renormalization and ghost batches beside plain batch norm.

In a tiny batch a value is normalized by the mean and the deviation of itself and one or three others. In evaluation the
running statistics normalize, so the network gets other values than it has learned from. Batch renormalization
(`renorm=`) trains with nearly those values, as far as its bounds let it; the bounds widen step by step. Ghost batches
(`ghost_batch_size=`) do the reverse for a large batch: its statistics have little noise, and ghost batches add some.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np

from examples import digits_mlp, report, training
from examples.layers import softmax_cross_entropy

TINY, LARGE, GHOST = (2, 4), 256, 32
RATES = {2: 1e-3, 4: 1e-3, LARGE: 1e-2}
LARGE_EPOCHS = 5  # of the large batch, for each epoch of the tiny ones: its steps are few
PLAIN, WITHOUT = "plain", "without batch norm"
SLOW, RENORM, GHOSTS = "plain, momentum 0.01", "renorm, momentum 0.01", f"ghost batches of {GHOST}"
COLORS = {
    WITHOUT: report.WITHOUT_BN,
    PLAIN: report.WITH_BN,
    SLOW: report.PALETTE[5],  # dashed, as it covers the plain one
    RENORM: report.PALETTE[2],
    GHOSTS: report.PALETTE[3],
}


def widening(epoch):
    """Bounds (r_max, d_max) as a function of num_batches_tracked, for `epoch` batches an epoch.

    One epoch of plain batch norm (1, 0), then up to (3, 5) in two epochs: Ioffe's bounds, in fewer steps.
    """

    def bounds(batches):
        share = min(max(batches / epoch - 1, 0) / 2, 1)
        return 1 + 2 * share, 5 * share

    return bounds


def variants(batch, n):
    """{words: options of the batch norms, None for a network without}, for batches of n samples in all."""
    if batch not in TINY:
        return {PLAIN: {}, GHOSTS: {"ghost_batch_size": GHOST}, WITHOUT: None}
    renorm = widening(training.n_batches(n, batch))
    return {PLAIN: {}, SLOW: {"momentum": 0.01}, RENORM: {"momentum": 0.01, "renorm": renorm}, WITHOUT: None}


def run(*, seeds, epochs, batches=(*TINY, LARGE)):
    """{(batch, variant): {metric: (seeds, epochs)}}."""
    data = digits_mlp.digits()
    n, n_in = data.x_train.shape
    lengths = {batch: epochs * (1 if batch in TINY else LARGE_EPOCHS) for batch in batches}
    steps = sum(lengths[batch] * training.n_batches(n, batch) * len(variants(batch, n)) for batch in batches)
    with report.progress(seeds * steps, "tiny batches") as bar:
        return {
            (batch, words): training.repeat(
                lambda rng, options=options: digits_mlp.network(n_in, options is not None, rng, **(options or {})),
                softmax_cross_entropy,
                data,
                seeds=seeds,
                epochs=lengths[batch],
                lr=RATES[batch],
                batch=batch,
                progress=bar,
            )
            for batch in batches
            for words, options in variants(batch, n).items()
        }


def better_than_plain(results, batch, words):
    """On how many seeds the held-out loss is lower than that of plain batch norm."""
    if words == PLAIN:
        return "–"
    last, plain = (results[batch, key]["test_loss"][:, -1] for key in (words, PLAIN))
    return f"{np.sum(last < plain)} of {len(last)}"


def show(results, out):
    """Table, runs and picture."""
    seeds = len(next(iter(results.values()))["test_loss"])
    batches = sorted({batch for batch, _ in results})
    rows = [
        [
            batch,
            words,
            *(training.mean_std(result[metric][:, -1], metric) for metric in training.METRICS),
            better_than_plain(results, batch, words),
        ]
        for (batch, words), result in results.items()
    ]
    lengths = {batch: results[batch, PLAIN]["test_loss"].shape[1] for batch in batches}
    settings = "; ".join(f"batches of {b}: Adam at {RATES[b]:g}, {lengths[b]} epochs" for b in batches)
    report.write(
        out,
        "tiny_batches",
        "Tiny batches and a large one",
        f"{seeds} seeds, after the last epoch: mean ± standard deviation over the seeds ({settings}). The last column: "
        "on how many seeds the held-out loss is lower than that of plain batch norm.",
        report.table(["batch", "batch norm", *training.METRICS.values(), "better than plain"], rows),
    )
    report.write_runs(out, "tiny_batches", {f"batch {b}, {words}": runs for (b, words), runs in results.items()})

    def paint(figure, axes):
        for ax, batch in zip(axes[0], batches, strict=True):
            epochs = range(1, lengths[batch] + 1)
            for words, color in COLORS.items():
                if (batch, words) in results:
                    dashes = "--" if words == SLOW else "-"
                    report.band(ax, epochs, results[batch, words]["test_loss"], color, words, ls=dashes)
            ax.set_yscale("log")
            ax.set_yticks((0.05, 0.1, 0.2, 0.5, 1, 2), minor=False)
            ax.set_yticks((), minor=True)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_title(f"Batches of {batch}, Adam at {RATES[batch]:g}")
            report.epochs_axis(ax, lengths[batch])
        axes[0, 0].set_ylabel("held-out loss (nats)")
        lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
        shown = [words for words in COLORS if words in lines]
        figure.legend([lines[words] for words in shown], shown, loc="outside lower center", ncols=len(shown))

    report.draw(
        out / "tiny_batches.png",
        paint,
        size=(12, 4.6),
        columns=len(batches),
        sharey=True,
        title=f"MLP on digits, evaluation mode: mean and range of {seeds} seeds",
    )


def main(argv=None):
    args = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(4, "epochs of the tiny batches")).parse_args(argv)
    show(run(seeds=args.seeds, epochs=args.epochs), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
