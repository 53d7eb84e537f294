"""Recalibration of a network whose weights are an average over epochs: its running statistics belong to no network.

Averaged weights (stochastic weight averaging) never saw a batch, so the running statistics are those of other weights.
Three ways take them anew from the training data: the way of PyTorch's update_bn, which averages over batches; cbn's
recalibrate for both layers at once; and recalibrate for one layer after the other. A small last batch and batches
sorted by class show where an average over batches is wrong. Then: how many batches are enough, and does the standard
error that recalibrate reports say so?
"""

import copy
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from threadpoolctl import threadpool_limits  # comes with scikit-learn

import cbn
from examples import digits_mlp, report, training
from examples.layers import softmax_cross_entropy

BATCH, RATE, WARM_UP = 32, 0.01, 3  # WARM_UP: epochs before the average begins
COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)  # batches for one recalibration
LAST, STALE = "last epoch", "average, stale"
NO_BATCHES = "–"  # those two are measured as they are
QUANTITIES = {"mean": "mean (standard deviations)", "var": "variance (relative)"}


# ---- the network ---------------------------------------------------------------------------------------------------


def batch_norms(model):
    return [layer for layer in model.layers if isinstance(layer, cbn.BatchNorm)]


def average(models):
    """A network with the mean of the weights, and with the running statistics of the last network."""
    mean = copy.deepcopy(models[-1])
    for (target, _), *pairs in zip(*(model.parameters() for model in (mean, *models)), strict=True):
        target[...] = np.mean([parameter for parameter, _ in pairs], axis=0, dtype=np.float64)
    return mean


def train(data, seed, epochs, progress=None):
    """The network of the last epoch, and the average over its weights after each of the last `epochs` epochs.

    Adam starts anew with every epoch, so that the networks of the average lie apart.
    """
    model = digits_mlp.network(data.x_train.shape[1], True, np.random.default_rng([seed, 0]), data.x_train.dtype)
    kept = []
    for epoch in range(WARM_UP + epochs):
        settings = {"lr": RATE, "epochs": 1, "batch": BATCH, "seed": 1000 * seed + epoch}
        training.fit(model, softmax_cross_entropy, data, progress=progress, **settings)
        kept.append(copy.deepcopy(model))
    return model, average(kept[WARM_UP:])


def evaluate(model, data):
    """Held-out accuracy and loss."""
    y = model.eval()(data.x_test)
    return np.mean(training.largest_class(y) == data.y_test), softmax_cross_entropy(y, data.y_test)[0]


# ---- three ways to new statistics ----------------------------------------------------------------------------------


def update_bn(model, batches):
    """What PyTorch's update_bn does: forget, then a plain average over the statistics of the batches."""
    for bn in batch_norms(model):
        bn.reset_running_stats()
        bn.momentum = None
    model.train()
    for x in batches:
        model(x)


def at_once(model, batches):
    """All layers in one pass over the data: each gets what it gets in training."""
    cbn.recalibrate(batch_norms(model), batches, forward=model, progress=False)


def layer_by_layer(model, batches):
    """One pass for each layer, in evaluation mode: each gets what it gets in evaluation. A list of Recalibration."""
    model.eval()
    return [cbn.recalibrate(bn, batches, forward=model, progress=False) for bn in batch_norms(model)]


WAYS = {"update_bn": update_bn, "recalibrate": at_once, "recalibrate, layer by layer": layer_by_layer}


def orders(data, rng):
    """The training data in batches, in three ways: {words: list of arrays}."""

    def cut(order, size):
        return np.split(data.x_train[order], range(size, len(order), size))

    shuffled, by_class = rng.permutation(len(data.x_train)), np.argsort(data.y_train, kind="stable")
    cuts = {"shuffled": cut(shuffled, 64), "small last batch": cut(shuffled, 205), "sorted by class": cut(by_class, 64)}
    return {f"{words}: {len(x) - 1} of {len(x[0])}, one of {len(x[-1])}": x for words, x in cuts.items()}


# ---- errors --------------------------------------------------------------------------------------------------------


def reaching(model, batches):
    """All inputs of each batch norm while the network runs in its mode, each one float64 array."""
    parts = {bn: [] for bn in batch_norms(model)}
    for x in batches:
        for layer in model.layers:
            if layer in parts:
                parts[layer].append(x)
            x = layer(x)
    return [np.concatenate(part).astype(np.float64) for part in parts.values()]


def errors(model, inputs):
    """Errors of the running statistics of all channels of all layers, against those of the inputs in float64.

    Of the means in standard deviations, of the variances relative.
    """
    of_mean, of_var = [], []
    for bn, x in zip(batch_norms(model), inputs, strict=True):
        mean, var = x.mean(axis=0), x.var(axis=0, ddof=1)
        of_mean.append(np.abs(bn.running_mean - mean) / np.sqrt(var))
        of_var.append(np.abs(bn.running_var / var - 1))
    return {"mean": np.concatenate(of_mean), "var": np.concatenate(of_var)}


def largest_errors(model, batches, training_mode=False):
    """The largest errors against what reaches the layers when the network runs in this mode."""
    inputs = reaching(copy.deepcopy(model).train(training_mode), batches)
    return [found.max() for found in errors(model, inputs).values()]


def compare(model, batches, data):
    """{way: (accuracy, loss, largest error of means, of variances)}, from the same network and batches."""
    found = {}
    for way, renew in WAYS.items():
        one = copy.deepcopy(model)
        renew(one, batches)
        in_training = renew is not layer_by_layer
        found[way] = (*evaluate(one, data), *largest_errors(one, batches, in_training))
    return found


def root_mean_square(parts):
    return float(np.sqrt(np.mean(np.square(np.concatenate(parts)))))


def draw_batches(model, data, count, rng):
    """Recalibrate by `count` batches, drawn with replacement as from a stream without end.

    The root mean squares over all channels of the standard errors that recalibrate reports, and of the actual errors
    against all training data; and the held-out loss.
    """
    one = copy.deepcopy(model)
    batches = data.x_train[rng.integers(len(data.x_train), size=(count, BATCH))]
    reported = layer_by_layer(one, list(batches))
    actual = errors(one, reaching(one, [data.x_train]))
    return {
        "reported mean": root_mean_square([found.relative_mean_error for found in reported]),
        "reported var": root_mean_square([found.relative_var_error for found in reported]),
        "actual mean": root_mean_square([actual["mean"]]),
        "actual var": root_mean_square([actual["var"]]),
        "loss": evaluate(one, data)[1],
    }


# ---- the experiment ------------------------------------------------------------------------------------------------


def run(*, seeds, epochs, draws, counts=COUNTS):
    """{(batches, way): (seeds, 4)}, {quantity: (draws, counts)}, and the loss with the statistics of all data."""
    data = digits_mlp.digits()
    steps = seeds * (WARM_UP + epochs) * training.n_batches(len(data.x_train), BATCH)
    table, networks = {}, []
    with threadpool_limits(1), report.progress(steps + draws * sum(counts), "recalibration") as bar:
        for seed in range(seeds):
            last, averaged = train(data, seed, epochs, bar)
            networks.append(averaged)
            for words, model in ((LAST, last), (STALE, averaged)):
                row = *evaluate(model, data), *largest_errors(model, [data.x_train])
                table.setdefault((NO_BATCHES, words), []).append(row)
            for words, batches in orders(data, np.random.default_rng([seed, 2])).items():
                for way, row in compare(averaged, batches, data).items():
                    table.setdefault((words, way), []).append(row)
        drawn = []
        for draw in range(draws):
            for count in counts:
                drawn.append(draw_batches(networks[0], data, count, np.random.default_rng([draw, count])))
                bar.update(count)
    sampled = {key: np.reshape([one[key] for one in drawn], (draws, len(counts))) for key in drawn[0]}
    layer_by_layer(networks[0], [data.x_train])
    return {key: np.array(rows) for key, rows in table.items()}, sampled, evaluate(networks[0], data)[1]


# ---- what is shown -------------------------------------------------------------------------------------------------


def paint_samples(axes, sampled, loss, counts):
    """Errors and loss over the number of batches, three axes."""
    for ax, (quantity, words) in zip(axes, QUANTITIES.items(), strict=False):
        report.band(ax, counts, sampled[f"actual {quantity}"], report.WITHOUT_BN, "actual error")
        report.band(ax, counts, sampled[f"reported {quantity}"], report.WITH_BN, "standard error, as reported")
        ax.set_yscale("log")
        ax.set_yticks((0.01, 0.02, 0.05, 0.1, 0.2), minor=False)
        ax.set_yticks((), minor=True)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(f"Error of the running {words}")
        ax.set_ylabel("root mean square over the channels")
        ax.legend(loc="lower left")
    axes[2].axhline(loss, color=report.INK, ls="--", lw=1.2, label="statistics of all training data")
    report.band(axes[2], counts, sampled["loss"], report.PALETTE[2], "statistics of so many batches")
    axes[2].set_title("Held-out loss")
    axes[2].set_ylabel("cross-entropy (nats)")
    axes[2].legend(loc="upper right")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, counts)
        ax.set_xlabel(f"batches of {BATCH} digits")


def show(results, sampled, loss, out, counts=COUNTS):
    """Tables, figures of every seed, and the picture."""
    seeds, draws = len(next(iter(results.values()))), len(sampled["loss"])
    rows = [
        [
            words,
            way,
            training.mean_std(values[:, 0], "test_accuracy"),
            training.mean_std(values[:, 1]),
            *(f"{error:.1e}" for error in values[:, 2:].max(axis=0)),
        ]
        for (words, way), values in results.items()
    ]
    by_count = [
        [
            count,
            *(
                f"{sampled[f'{kind} {quantity}'][:, i].mean():.3f}"
                for quantity in QUANTITIES
                for kind in ("reported", "actual")
            ),
            training.mean_std(sampled["loss"][:, i]),
        ]
        for i, count in enumerate(counts)
    ]
    report.write(
        out,
        "recalibration",
        "Recalibration after averaging weights",
        f"{seeds} seeds: mean ± standard deviation over the seeds. The errors are the largest ones of all seeds, "
        "layers and channels: of the running mean in standard deviations, of the running variance relative, against "
        "all values that reached the layer, in one float64 array.",
        report.table(
            ["batches", "statistics", "held-out accuracy", "held-out loss", "error of mean", "of variance"], rows
        ),
        f"How many batches are enough? Batches of {BATCH}, drawn with replacement, one layer after the other: root "
        f"mean square over the channels, mean of {draws} draws. With the statistics of all training data the held-out "
        f"loss is {loss:.3f}.",
        report.table(
            ["batches", "mean: reported", "actual", "variance: reported", "actual", "held-out loss"], by_count
        ),
    )
    names = ("test_accuracy", "test_loss", "largest mean error", "largest var error")
    labels = {key: ", ".join(key) for key in results}
    runs = {labels[key]: dict(zip(names, values.T[..., None], strict=True)) for key, values in results.items()}
    report.write_runs(out, "recalibration", runs)
    report.draw(
        out / "recalibration.png",
        lambda figure, axes: paint_samples(axes[0], sampled, loss, counts),
        size=(13, 4.2),
        columns=3,
        title=f"Recalibrated by few batches: mean and range of {draws} draws",
    )


def main(argv=None):
    parser = report.parser(
        __doc__, seeds=(5, "random seeds"), epochs=(8, "epochs to average"), draws=(20, "draws of batches")
    )
    args = parser.parse_args(argv)
    show(*run(seeds=args.seeds, epochs=args.epochs, draws=args.draws), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
