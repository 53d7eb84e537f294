"""Test-time adaptation: a network that was trained on clean digits gets blurred, pale, bright or noisy ones.

Its running statistics are those of clean digits. `bn(x, mix=a)` normalizes with a mixture: the share a of the batch's
statistics, the rest of the running ones. A large a follows the shift; but the statistics of a small batch are noisy,
and those of a batch of few classes are the classes'.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from cbn import BatchNorm1d
from examples import digits_mlp, layers, report, training

SIDE = 8  # of an image
BATCH, RATE = 32, 1e-3  # of the training
MIXES = (0, 0.25, 0.5, 0.75, 1)
SMALL, BIG, SORTED = "batches of 8", "batches of 128", "batches of 128, sorted by class"
SIZES = {SMALL: 8, BIG: 128, SORTED: 128}


# ---- shifts --------------------------------------------------------------------------------------------------------


def blur(x, times, rng):
    """The mean of 3x3 pixels, several times; zeros beyond the edges."""
    images = x.reshape(-1, 1, SIDE, SIDE)
    for _ in range(times):
        images = layers.columns(images, (3, 3)).mean(axis=-1)[:, None]
    return images.reshape(x.shape)


def contrast(x, factor, rng):
    return x * np.float32(factor)


def offset(x, added, rng):
    return x + np.float32(added)


def noise(x, deviation, rng):
    return x + rng.normal(0, deviation, x.shape).astype(np.float32)


CLEAN = "clean"
KINDS = {
    "blur × {}": (blur, (1, 2, 3)),
    "contrast × {}": (contrast, (0.5, 0.25, 0.1)),
    "brightness + {}": (offset, (0.25, 0.5, 1)),
    "noise of deviation {}": (noise, (0.2, 0.4, 0.6)),
}
SHIFTS = {CLEAN: (offset, 0)}
SHIFTS |= {words.format(s): (shift, s) for words, (shift, strengths) in KINDS.items() for s in strengths}
DRAWN = (CLEAN, "blur × 2", "contrast × 0.25", "brightness + 0.5", "noise of deviation 0.4")  # in the picture


# ---- the experiment ------------------------------------------------------------------------------------------------


def forward(model, x, mix):
    """The network in evaluation mode, with a mixture of statistics in its batch norms."""
    for layer in model.layers:
        x = layer(x, mix=mix) if isinstance(layer, BatchNorm1d) else layer(x)
    return x


def accuracies(model, x, y, size):
    """Accuracy for every mixture, on batches of this size."""
    batches = np.split(x, range(size, len(x), size))
    labels = [np.concatenate([training.largest_class(forward(model, b, mix)) for b in batches]) for mix in MIXES]
    return np.mean(np.stack(labels) == y, axis=1)


def understated(model, x, mix=0.5):
    """The variances of a mixture in the first layer, divided by those without the term between: mean over channels."""
    first, bn = model.layers[:2]
    z = first(x)
    within = (1 - mix) * bn.running_var + mix * z.var(axis=0)
    between = mix * (1 - mix) * (bn.running_mean - z.mean(axis=0)) ** 2
    return float(np.mean(1 + between / within))


def train(data, seed, epochs, progress=None):
    model = digits_mlp.network(data.x_train.shape[1], True, np.random.default_rng([seed, 0]))
    settings = {"lr": RATE, "epochs": epochs, "batch": BATCH, "seed": seed}
    training.fit(model, layers.softmax_cross_entropy, data, progress=progress, **settings)
    return model.eval()


def run(*, seeds, epochs):
    """{(batches, shift): (seeds, mixtures) accuracies}, {shift: (seeds,) factors of `understated`}."""
    data = digits_mlp.digits()
    steps = epochs * training.n_batches(len(data.x_train), BATCH) + len(SHIFTS)
    found = {(batches, words): [] for batches in SIZES for words in SHIFTS}
    factors = {words: [] for words in SHIFTS}
    with threadpool_limits(1), report.progress(seeds * steps, "adaptation") as bar:
        for seed in range(seeds):
            model = train(data, seed, epochs, bar)
            rng = np.random.default_rng([seed, 3])
            shuffled = rng.permutation(len(data.x_test))
            by_class = shuffled[np.argsort(data.y_test[shuffled], kind="stable")]
            for words, (shift, strength) in SHIFTS.items():
                x = shift(data.x_test, strength, rng)
                factors[words].append(understated(model, x))
                for batches, size in SIZES.items():
                    order = by_class if batches == SORTED else shuffled
                    found[batches, words].append(accuracies(model, x[order], data.y_test[order], size))
                bar.update()
    return {key: np.array(rows) for key, rows in found.items()}, {key: np.array(f) for key, f in factors.items()}


# ---- what is shown -------------------------------------------------------------------------------------------------


def accuracy_table(results, batches, shifts):
    """Markdown: accuracy by shift and mixture; the best ones of a row bold."""
    rows = []
    for words in shifts:
        cells = [training.mean_std(values, "test_accuracy") for values in results[batches, words].T]
        best = np.argmax(results[batches, words].mean(axis=0))
        cells[best] = f"**{cells[best]}**"
        rows.append([words, *cells])
    return report.table([batches, *(f"a = {mix:g}" for mix in MIXES)], rows)


def show(results, factors, out):
    """Tables, accuracies of every seed, and the picture."""
    seeds = len(next(iter(results.values())))
    strongest = [words.format(strengths[-1]) for words, (_, strengths) in KINDS.items()]
    too_small = ", ".join(f"{factors[words].mean():.2f} ({words})" for words in strongest)
    report.write(
        out,
        "adaptation",
        "Adaptation to shifted digits",
        f"Held-out accuracy with `mix=a`: mean ± standard deviation over {seeds} seeds, the best a bold. a = 0 is "
        "plain evaluation, a = 1 normalizes with the batch alone. Pixels are in [0, 1].",
        accuracy_table(results, SMALL, SHIFTS),
        accuracy_table(results, BIG, SHIFTS),
        accuracy_table(results, SORTED, DRAWN),
        "The mixture is a population: the share a of its values is like the batch, the share 1 − a like the training "
        "data. Its mean is (1 − a)·running_mean + a·mean, and its variance is (1 − a)·running_var + a·var + a·(1 − a)·"
        "(running_mean − mean)². The last term is the variance between the two parts: where their means differ, values "
        "of both lie off the common mean. Without this term the variances of the first layer (mean over its channels, "
        f"a = 0.5, all held-out digits) would be too small by these factors: {too_small}.",
    )
    names = [f"accuracy, a = {mix:g}" for mix in MIXES]
    runs = {", ".join(key): dict(zip(names, values.T[..., None], strict=True)) for key, values in results.items()}
    report.write_runs(out, "adaptation", runs)

    def paint(figure, axes):
        for ax, batches in zip(axes[0], SIZES, strict=True):
            for words, color in zip(DRAWN, (report.INK, *report.PALETTE), strict=False):
                report.band(ax, MIXES, results[batches, words] * 100, color, words)
            ax.set_title(batches.capitalize())
            ax.set_xticks(MIXES, [f"{mix:g}" for mix in MIXES])
            ax.set_xlabel("a, the weight of the batch's statistics")
            ax.set_ylim(0, 101)
        axes[0, 0].set_ylabel("held-out accuracy (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))

    report.draw(
        out / "adaptation.png",
        paint,
        size=(13, 4.8),
        columns=len(SIZES),
        sharey=True,
        title=f"Trained on clean digits, tested on shifted ones with mix=a: mean and range of {seeds} seeds",
    )


def main(argv=None):
    args = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(10, "epochs")).parse_args(argv)
    show(*run(seeds=args.seeds, epochs=args.epochs), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
