"""A binary classifier trained with the logits loss in three arrangements, with and without batch norm.

1. Linear, batch norm, Linear; the logits loss, which PyTorch calls BCEWithLogitsLoss
2. Linear, ReLU, batch norm, Linear; the logits loss
3. Linear, batch norm, Linear, sigmoid; plain binary cross-entropy of the probability
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_breast_cancer

from cbn import BatchNorm1d
from examples import report, training
from examples.layers import Linear, ReLU, Sequential, Sigmoid, bce, bce_with_logits, sigmoid

BATCH, RATE, HIDDEN = 64, 0.01, 5
ARRANGEMENTS = {
    1: "Linear, BN, Linear; logits loss",
    2: "Linear, ReLU, BN, Linear; logits loss",
    3: "Linear, BN, Linear, sigmoid; plain BCE",
}
LOSSES = {1: bce_with_logits, 2: bce_with_logits, 3: bce}
FEATURES = ("standardized", "raw")
LOGITS = (1, 5, 10, 15, 20, 50, 100, 150)


def network(arrangement, n_in, with_bn, rng, dtype=np.float32):
    return Sequential(
        Linear(n_in, HIDDEN, rng, dtype),
        ReLU() if arrangement == 2 else None,
        BatchNorm1d(HIDDEN, dtype=dtype) if with_bn else None,
        Linear(HIDDEN, 1, rng, dtype),
        Sigmoid() if arrangement == 3 else None,
    )


def breast_cancer(features):
    """569 patients, 30 features, benign or malignant; standardized with the training part's mean and deviation."""
    x, y = load_breast_cancer(return_X_y=True)
    data = training.hold_out(x.astype(np.float32), y.astype(np.float32)[:, None])
    if features == "standardized":
        mean, std = data.x_train.mean(axis=0), data.x_train.std(axis=0)
        data.x_train, data.x_test = (data.x_train - mean) / std, (data.x_test - mean) / std
    return data


def predictors(arrangement):
    """From the network's output to the class."""
    return (lambda p: p > 0.5) if arrangement == 3 else (lambda z: z > 0)


def run(*, seeds, epochs):
    """{(features, arrangement, with_bn): {metric: (seeds, epochs)}}."""
    data = {features: breast_cancer(features) for features in FEATURES}
    batches = training.n_batches(len(data["raw"].x_train), BATCH)
    with report.progress(12 * seeds * epochs * batches, "breast cancer") as bar:
        return {
            (features, arrangement, with_bn): training.repeat(
                lambda rng, a=arrangement, bn=with_bn, n=data[features].x_train.shape[1]: network(a, n, bn, rng),
                LOSSES[arrangement],
                data[features],
                seeds=seeds,
                epochs=epochs,
                lr=RATE,
                batch=BATCH,
                predict=predictors(arrangement),
                progress=bar,
            )
            for features in FEATURES
            for arrangement in ARRANGEMENTS
            for with_bn in (True, False)
        }


def agreement(dtype):
    """Largest differences between arrangements 1 and 3, of the same weights: (loss, any gradient)."""
    data = breast_cancer("standardized")
    x, t = data.x_train[:BATCH].astype(dtype), data.y_train[:BATCH].astype(dtype)
    losses, gradients = [], []
    for arrangement in (1, 3):
        model = network(arrangement, x.shape[1], True, np.random.default_rng(0), dtype)
        loss, dy = LOSSES[arrangement](model(x), t)
        model.backward(dy)
        losses.append(loss)
        gradients.append(np.concatenate([grad.ravel() for _, grad in model.parameters()]))
    return abs(losses[0] - losses[1]), float(np.max(np.abs(gradients[0] - gradients[1])))


def saturation(logits=LOGITS):
    """What both losses make, in float32, of a sample of class 0 with the logit z: rows of numbers.

    z, loss from the logit, p, loss from p, loss from p as PyTorch bounds it, dloss/dz from the logit and through p.
    """
    rows = []
    t = np.zeros(1, np.float32)
    for z in logits:
        z = np.array([z], np.float32)
        p = sigmoid(z)
        with np.errstate(divide="ignore"):
            unbounded = -np.log1p(-p)
        (exact, dz), (bounded, dp) = bce_with_logits(z, t), bce(p, t)
        rows.append([float(v) for v in (z[0], exact, p[0], unbounded[0], bounded, dz[0], (dp * p * (1 - p))[0])])
    return rows


def lost_gradients(seeds, with_bn):
    """Share of the raw training samples that a fresh network of arrangement 3 gets wrong and learns nothing from.

    Their probability has rounded to the wrong one of 0 and 1, and there dloss/dz through the sigmoid is exactly 0.
    """
    data = breast_cancer("raw")
    shares = []
    for seed in range(seeds):
        p = network(3, data.x_train.shape[1], with_bn, np.random.default_rng([seed, 0]))(data.x_train)
        shares.append(np.mean(p == 1 - data.y_train))
    return np.array(shares)


def show(results, out):
    """Table, runs and two pictures."""
    seeds, epochs = next(iter(results.values()))["train_loss"].shape
    words = {True: "with", False: "without"}
    rows, comparisons = [], []
    for features in FEATURES:
        for arrangement, name in ARRANGEMENTS.items():
            pair = [results[features, arrangement, with_bn] for with_bn in (True, False)]
            for result, with_bn in zip(pair, (True, False), strict=True):
                last = [training.mean_std(result[metric][:, -1], metric) for metric in training.METRICS]
                rows.append([f"{arrangement}. {name}", features, words[with_bn], *last])
            comparisons += training.compare(f"Arrangement {arrangement}, {features}", *pair)
    apart = {
        metric: np.abs(results["standardized", 1, True][metric] - results["standardized", 3, True][metric]).max()
        for metric in ("train_loss", "test_loss")
    }
    raw = {a: training.mean_std(results["raw", a, False]["train_loss"][:, -1]) for a in (1, 3)}
    agreements = [[np.dtype(t).name, *(f"{v:.1e}" for v in agreement(t))] for t in (np.float64, np.float32)]
    saturated = [[f"{v:.9g}" if i == 2 else f"{v:.4g}" for i, v in enumerate(row)] for row in saturation()]
    lost = {with_bn: training.mean_std(lost_gradients(seeds, with_bn), "test_accuracy") for with_bn in (True, False)}
    report.write(
        out,
        "binary_logits",
        "The logits loss on scikit-learn's breast-cancer data",
        f"Adam {RATE}, batch {BATCH}, {seeds} seeds, after {epochs} epochs: mean ± standard deviation over the seeds.",
        report.table(["arrangement", "features", "batch norm", *training.METRICS.values()], rows),
        training.verdict(comparisons),
        "## Arrangements 1 and 3 are the same function\n\nLargest differences, with the same weights and samples:",
        report.table(["type", "loss", "any gradient"], agreements),
        "Trained on standardized features with batch norm, their training losses differ by at most "
        f"{apart['train_loss']:.1e}, their held-out losses by {apart['test_loss']:.1e}: the bias in front of batch "
        "norm has no gradient but rounding noise, Adam scales that up to steps like any other's, and the running mean "
        "follows late. (A linear layer in front of batch norm needs no bias.)",
        f"Trained on raw features without batch norm, they end at a training loss of {raw[1]} and {raw[3]}. Why:",
        "## Where plain BCE breaks\n\n"
        "float32, a sample of class 0 with the logit z. The probability p rounds to 1, log(1 − p) to −∞; PyTorch's "
        "BCELoss bounds the logarithm at −100, and the sample that is most wrong has no gradient left.",
        report.table(
            ["z", "loss from z", "p", "loss from p", "bounded", "gradient from z", "gradient through p"], saturated
        ),
        "Raw features, fresh networks of arrangement 3: training samples that are wrong and have lost their gradient: "
        f"{lost[True]} with batch norm, {lost[False]} without.",
    )
    report.write_runs(
        out, "binary_logits", {f"{a}, {f}, {words[bn]} batch norm": runs for (f, a, bn), runs in results.items()}
    )

    def paint_curves(figure, axes):
        for row, features in zip(axes, FEATURES, strict=True):
            for ax, arrangement in zip(row, ARRANGEMENTS, strict=True):
                pair = [results[features, arrangement, with_bn]["test_loss"] for with_bn in (True, False)]
                report.with_and_without(ax, range(1, epochs + 1), *pair)
                ax.set_title(f"{ARRANGEMENTS[arrangement]}\n{features} features")
                if features == "raw":
                    ax.set_yscale("log")
                    ax.yaxis.set_major_formatter("{x:g}")
                ax.set_ylabel("held-out loss (nats)" if arrangement == 1 else "")
                report.epochs_axis(ax, epochs)
        report.legend(figure, axes[0, 0])

    report.draw(
        out / "binary_logits.png",
        paint_curves,
        size=(12, 7),
        rows=2,
        columns=3,
        sharey="row",
        title=f"Breast cancer: mean and range of {seeds} seeds",
    )

    def paint_saturation(figure, axes):
        z, exact, _, unbounded, bounded, dz, through_p = np.array(saturation(np.linspace(0, 130, 521))).T
        left, right = axes[0]
        left.plot(z, exact, color=report.WITH_BN, label="from the logit")
        left.plot(z, bounded, color=report.WITHOUT_BN, label="from p, logarithm bounded at −100")
        finite = np.isfinite(unbounded)
        left.plot(z[finite], unbounded[finite], color=report.INK, ls=":", lw=3, label="from p, then infinite")
        left.set_title("Loss of a sample of class 0")
        left.set_ylabel("loss (nats)")
        left.legend(loc="lower right")
        right.plot(z, dz, color=report.WITH_BN, label="from the logit")
        right.plot(z, through_p, color=report.WITHOUT_BN, label="through p")
        right.set_title("Its gradient")
        right.set_ylabel("d loss / d logit")
        right.legend(loc="center right")
        for ax in (left, right):
            ax.set_xlabel("logit")

    report.draw(
        out / "binary_logits_saturation.png",
        paint_saturation,
        size=(10, 3.8),
        columns=2,
        title="Why the loss takes the logit: float32",
    )


def main(argv=None):
    args = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(10, "epochs")).parse_args(argv)
    show(run(seeds=args.seeds, epochs=args.epochs), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
