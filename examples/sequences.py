"""BatchNorm1d on sequences (N, C, L): three shapes in training and evaluation, and a 1-D CNN on real digits."""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_digits

from cbn import BatchNorm1d
from examples import report, training
from examples.layers import Conv1d, Flatten, Linear, ReLU, Sequential, softmax_cross_entropy

SHAPES = ((4, 1, 10), (8, 3, 15), (4, 2, 20))
BATCHES = (2, 8, 32, 128)
RATES = (1e-3, 1e-2)


# ---- three shapes --------------------------------------------------------------------------------------------------


def demonstrate(shape, seed=0):
    """A fresh layer on normal random numbers: what it gives and holds in training and then in evaluation."""
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    bn = BatchNorm1d(shape[1])
    y_train = bn(x)
    after_train = bn.running_mean.copy(), bn.running_var.copy()
    y_eval = bn.eval()(x)
    after_eval = bn.running_mean.copy(), bn.running_var.copy()
    return {
        "x": x,
        "gamma": bn.weight,
        "beta": bn.bias,
        "y_train": y_train,
        "y_eval": y_eval,
        "after_train": after_train,
        "after_eval": after_eval,
    }


def settle(batches=50, seed=0):
    """One batch (4, 2, 20) around 3 and -2, and what becomes of it: in training, then in evaluation after one batch and
    after many of the same kind.
    """
    rng = np.random.default_rng(seed)

    def batch():
        z = rng.normal(size=SHAPES[-1])
        return (z * [[0.5], [2.0]] + [[3.0], [-2.0]]).astype(np.float32)

    x = batch()
    bn = BatchNorm1d(2)
    panels = {"Input x": x, "Training: y": bn(x), "Evaluation after 1 batch: y": bn.eval()(x)}
    bn.train()
    for _ in range(batches - 1):
        bn(batch())
    panels[f"Evaluation after {batches} batches: y"] = bn.eval()(x)
    return panels


def normalized_by_hand(x, ddof, eps=1e-5):
    """(x - mean)/sqrt(var + eps) over N and L, the variance with 1/(N·L - ddof)."""
    x = x.astype(np.float64)
    return (x - x.mean(axis=(0, 2), keepdims=True)) / np.sqrt(x.var(axis=(0, 2), ddof=ddof, keepdims=True) + eps)


def numbers(a):
    return ", ".join(f"{v:.4f}" for v in np.ravel(a))


def describe(shape, seen):
    """Markdown: the shapes, parameters, first outputs and statistics of one demonstration."""
    n, _, length = shape
    biased, unbiased = (report.difference(seen["y_train"], normalized_by_hand(seen["x"], ddof)) for ddof in (0, 1))
    rows = [
        ["input, output", f"{seen['x'].shape}, {seen['y_train'].shape}"],
        ["γ, β", f"{numbers(seen['gamma'])} and {numbers(seen['beta'])}, shape {seen['gamma'].shape}"],
        ["training: y[0, 0, :4]", numbers(seen["y_train"][0, 0, :4])],
        ["evaluation: y[0, 0, :4]", numbers(seen["y_eval"][0, 0, :4])],
        ["running mean after training", numbers(seen["after_train"][0])],
        ["running mean after evaluation", numbers(seen["after_eval"][0])],
        ["running variance after training", numbers(seen["after_train"][1])],
        ["running variance after evaluation", numbers(seen["after_eval"][1])],
        [f"training against 1/(N·L) = 1/{n * length}", biased],
        [f"training against 1/(N·L − 1) = 1/{n * length - 1}", unbiased],
    ]
    return f"### {shape}\n\n" + report.table(["quantity", "value"], rows)


# ---- the 1-D CNN ---------------------------------------------------------------------------------------------------


def network(with_bn, rng):
    """Two convolutions along the sequence and a linear map, for (N, 8, 8); batch norm, if any, before ReLU."""
    return Sequential(
        Conv1d(8, 16, 3, rng),
        BatchNorm1d(16) if with_bn else None,
        ReLU(),
        Conv1d(16, 32, 3, rng),
        BatchNorm1d(32) if with_bn else None,
        ReLU(),
        Flatten(),
        Linear(32 * 8, 10, rng),
    )


def digit_sequences():
    """A digit as its rows come in from above: 8 steps (L) of 8 pixels (C)."""
    digits = load_digits()
    x_nlc = (digits.images / 16).astype(np.float32)
    return training.hold_out(np.ascontiguousarray(x_nlc.swapaxes(1, 2)), digits.target)


def run(*, seeds, epochs, rates=RATES, batches=BATCHES):
    """{(rate, batch, with_bn): {metric: (seeds, epochs)}}."""
    data = digit_sequences()
    steps = sum(training.n_batches(len(data.x_train), batch) for batch in batches)
    with report.progress(len(rates) * 2 * seeds * epochs * steps, "digits as sequences") as bar:
        return {
            (rate, batch, with_bn): training.repeat(
                lambda rng, with_bn=with_bn: network(with_bn, rng),
                softmax_cross_entropy,
                data,
                seeds=seeds,
                epochs=epochs,
                lr=rate,
                batch=batch,
                progress=bar,
            )
            for rate in rates
            for batch in batches
            for with_bn in (True, False)
        }


# ---- what is shown -------------------------------------------------------------------------------------------------


def show(results, out):
    """Tables, runs and two pictures."""
    seeds, epochs = next(iter(results.values()))["train_loss"].shape
    rates, batches = sorted({key[0] for key in results}), sorted({key[1] for key in results})
    words = {True: "with", False: "without"}
    seen = {shape: demonstrate(shape) for shape in SHAPES}
    rows, comparisons = [], []
    for rate in rates:
        for batch in batches:
            pair = [results[rate, batch, with_bn] for with_bn in (True, False)]
            for result, with_bn in zip(pair, (True, False), strict=True):
                last = [training.mean_std(result[metric][:, -1], metric) for metric in training.METRICS]
                rows.append([f"{rate:g}", batch, words[with_bn], *last])
            comparisons += training.compare(f"Adam at {rate:g}, batch {batch}", *pair)
    report.write(
        out,
        "sequences",
        "BatchNorm1d on sequences (N, C, L)",
        "One mean and one variance per channel, over N and L together. Evaluation uses the running statistics and "
        "leaves them as they are.",
        *(describe(shape, values) for shape, values in seen.items()),
        "The last two rows are the largest differences from y by hand. What normalizes is the variance with 1/(N·L); "
        "the 1/(N·L − 1) of the article's formula goes into the running variance only.",
        "## A 1-D CNN on scikit-learn's digits, read as 8 steps of 8 channels\n\n"
        f"{seeds} seeds, after {epochs} epochs: mean ± standard deviation over the seeds.",
        report.table(["Adam", "batch", "batch norm", *training.METRICS.values()], rows),
        training.verdict(comparisons),
    )
    labels = {(r, b, bn): f"Adam at {r:g}, batch {b}, {words[bn]}" for r, b, bn in results}
    report.write_runs(out, "sequences", {labels[key]: runs for key, runs in results.items()})

    def paint_states(figure, axes):
        for ax, (title, a) in zip(axes[0], settle().items(), strict=True):
            steps = range(1, a.shape[2] + 1)
            for channel, color in enumerate((report.WITH_BN, report.WITHOUT_BN)):
                values = a[:, channel]
                ax.plot(steps, values.T, color=color, lw=0.8, alpha=0.5)
                mean = round(float(values.mean()), 2) + 0.0  # + 0.0: no "-0.00"
                ax.axhline(mean, color=color, label=f"{channel}: {mean:.2f} ± {values.std():.2f}")
            ax.set_title(title)
            ax.set_xlabel("step")
            ax.set_xticks((1, 5, 10, 15, 20))
            ax.set_ylim(-8, 8)
            ax.legend(loc="upper right", ncols=2, fontsize=8, handlelength=1, columnspacing=1)
        axes[0, 0].set_ylabel("value, no unit")

    report.draw(
        out / "sequences.png",
        paint_states,
        size=(15, 4),
        columns=4,
        sharey=True,
        title=f"BatchNorm1d on {SHAPES[-1]}: four sequences in two channels, and each channel's mean ± deviation",
    )

    def paint_batches(figure, axes):
        for row, rate in zip(axes, rates, strict=True):
            for ax, metric in zip(row, training.METRICS, strict=True):
                scale = 100 if metric == "test_accuracy" else 1
                curves = [
                    np.stack([results[rate, batch, with_bn][metric][:, -1] for batch in batches], axis=1) * scale
                    for with_bn in (True, False)
                ]
                report.with_and_without(ax, batches, *curves)
                ax.set_xscale("log", base=2)
                ax.set_xticks(batches, batches)
                ax.set_xlabel("batch size (samples)")
                ax.set_title(f"{training.METRICS[metric].capitalize()}, Adam at {rate:g}")
                ax.set_ylabel("accuracy (%)" if scale == 100 else "cross-entropy (nats)")
        report.legend(figure, axes[0, 0])

    report.draw(
        out / "sequences_cnn.png",
        paint_batches,
        size=(12, 3.4 * len(rates)),
        rows=len(rates),
        columns=3,
        title=f"1-D CNN on digits as sequences, epoch {epochs}: mean and range of {seeds} seeds",
    )


def main(argv=None):
    parser = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(3, "epochs"))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="batch sizes")
    args = parser.parse_args(argv)
    if min(args.batches) < 2:
        parser.error("--batches: batch norm needs two samples or more")
    show(run(seeds=args.seeds, epochs=args.epochs, batches=args.batches), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
