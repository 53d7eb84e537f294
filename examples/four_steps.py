"""The four steps of batch norm by hand in numpy beside cbn's, and a CNN with and without it.

Steps: normalize, scale and shift, gradients, inference; for tables (N, C) and for images (N, C, H, W).
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from sklearn.datasets import load_digits, load_wine

from cbn import BatchNorm1d, BatchNorm2d
from examples import report, training
from examples.layers import Conv2d, Flatten, Linear, ReLU, Sequential, softmax_cross_entropy

EPS, MOMENTUM = 1e-5, 0.1
PASSES = 10  # over five batches: what is left of the initial running statistics is 0.9**50, half a percent
BATCH = 32
RATES = (1e-3, 1e-2)
WINE_FEATURES = ("alcohol", "magnesium", "flavanoids", "proline")


# ---- by hand -------------------------------------------------------------------------------------------------------


def along(v, x):
    """A vector (C,) in a shape that broadcasts along axis 1 of x."""
    return v.reshape(-1, *[1] * (x.ndim - 2))


class HandWritten:
    """Batch norm over axis 1 as it stands in a textbook, in float64.

    The running variance is the unbiased one, PyTorch's, or with ``unbiased=False`` the biased one, the article's.
    """

    def __init__(self, gamma, beta, *, unbiased=True):
        self.gamma, self.beta, self.unbiased = gamma, beta, unbiased
        self.running_mean, self.running_var = np.zeros_like(gamma), np.ones_like(gamma)

    def normalize(self, x):
        """Step 1: x_hat = (x - mean) / sqrt(var + eps), with the mean and the biased variance of the batch."""
        self.axes = (0, *range(2, x.ndim))
        self.n = x.size // x.shape[1]
        mean = x.mean(axis=self.axes)
        var = ((x - along(mean, x)) ** 2).mean(axis=self.axes)
        self.centred = x - along(mean, x)
        self.std = np.sqrt(var + EPS)
        self.x_hat = self.centred / along(self.std, x)
        tracked = var * self.n / (self.n - 1) if self.unbiased else var
        self.running_mean = (1 - MOMENTUM) * self.running_mean + MOMENTUM * mean
        self.running_var = (1 - MOMENTUM) * self.running_var + MOMENTUM * tracked
        return self.x_hat

    def scale_and_shift(self, x_hat):
        """Step 2: y = gamma * x_hat + beta."""
        return along(self.gamma, x_hat) * x_hat + along(self.beta, x_hat)

    def gradients(self, dy):
        """Step 3: (dx, dgamma, dbeta); dx by the chain rule, through x itself, the mean and the variance."""
        dgamma, dbeta = (dy * self.x_hat).sum(axis=self.axes), dy.sum(axis=self.axes)
        dx_hat = dy * along(self.gamma, dy)
        dvar = (dx_hat * self.centred).sum(axis=self.axes) * -0.5 / self.std**3
        dmean = -dx_hat.sum(axis=self.axes) / self.std
        dx = dx_hat / along(self.std, dy) + along(dvar, dy) * 2 * self.centred / self.n + along(dmean, dy) / self.n
        return dx, dgamma, dbeta

    def infer(self, x):
        """Step 4: steps 1 and 2 with the running statistics."""
        std = np.sqrt(self.running_var + EPS)
        return self.scale_and_shift((x - along(self.running_mean, x)) / along(std, x))


def compare_steps(layer_class, batches, dtype, seed=0):
    """The four steps by hand and by cbn on the same batches: {(step, quantity): (by hand, cbn's)}.

    Steps 1 to 3 are of the last batch; step 4 looks at the first one again, after all have been seen.
    """
    rng = np.random.default_rng(seed)
    channels = batches[0].shape[1]
    gamma, beta = rng.uniform(0.5, 2, channels), rng.normal(size=channels)
    hand = HandWritten(gamma, beta)
    bare = layer_class(channels, affine=False, dtype=dtype)
    bn = layer_class(channels, dtype=dtype)
    bn.weight[...], bn.bias[...] = gamma, beta
    # Both start from what the layer can hold, so that the differences are those of the arithmetic.
    hand.gamma, hand.beta = bn.weight.astype(np.float64), bn.bias.astype(np.float64)
    for batch in batches * PASSES:
        x = batch.astype(dtype)
        x_hat = hand.normalize(x.astype(np.float64))
        y, y_cbn, x_hat_cbn = hand.scale_and_shift(x_hat), bn(x), bare(x)
    dy = rng.normal(size=x.shape).astype(dtype)
    dx, dgamma, dbeta = hand.gradients(dy.astype(np.float64))
    dx_cbn = bn.backward(dy)
    first = batches[0].astype(dtype)
    return {
        ("1 normalize", "x̂"): (x_hat, x_hat_cbn),
        ("2 scale and shift", "y"): (y, y_cbn),
        ("3 gradients", "dx"): (dx, dx_cbn),
        ("3 gradients", "dγ"): (dgamma, bn.weight_grad),
        ("3 gradients", "dβ"): (dbeta, bn.bias_grad),
        ("4 inference", "running mean"): (hand.running_mean, bn.running_mean),
        ("4 inference", "running variance"): (hand.running_var, bn.running_var),
        ("4 inference", "y"): (hand.infer(first.astype(np.float64)), bn.eval()(first)),
    }


def relative_difference(a, b):
    """The largest difference, as a share of the largest value."""
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def wine_batches():
    """178 wines, 13 chemical measures from 0.1 to 1,680, in five batches (N, C)."""
    x = load_wine().data
    order = np.random.default_rng(0).permutation(len(x))
    return [x[index] for index in np.array_split(order, 5)]


def image_batches():
    """Digits behind a convolution, in five batches (N, 8, 8, 8)."""
    rng = np.random.default_rng(0)
    images = load_digits().images[:160, None] / 16
    convolution = Conv2d(1, 8, 3, rng, np.float64)
    return [convolution(batch) for batch in np.split(images, 5)]


def running_variances():
    """The running variance after x = [[0], [4]], by hand and by cbn: {which: (by hand, cbn's)}."""
    x = np.array([[0.0], [4.0]])
    values = {}
    for which in ("biased", "unbiased"):
        hand = HandWritten(np.ones(1), np.zeros(1), unbiased=which == "unbiased")
        hand.normalize(x)
        bn = BatchNorm1d(1, dtype=np.float64, running_var=which)
        bn(x)
        values[which] = float(hand.running_var[0]), float(bn.running_var[0])
    return values


# ---- the CNN -------------------------------------------------------------------------------------------------------


def network(with_bn, rng):
    """Two convolutions and a linear map for digits (N, 1, 8, 8); batch norm, if any, before ReLU."""
    return Sequential(
        Conv2d(1, 8, 3, rng),
        BatchNorm2d(8) if with_bn else None,
        ReLU(),
        Conv2d(8, 16, 3, rng),
        BatchNorm2d(16) if with_bn else None,
        ReLU(),
        Flatten(),
        Linear(16 * 8 * 8, 10, rng),
    )


def digit_images():
    digits = load_digits()
    return training.hold_out((digits.images[:, None] / 16).astype(np.float32), digits.target)


def run(*, seeds, epochs, rates=RATES):
    """{(rate, with_bn): {metric: (seeds, epochs)}} of the CNN."""
    data = digit_images()
    total = len(rates) * 2 * seeds * epochs * training.n_batches(len(data.x_train), BATCH)
    with report.progress(total, "digits, CNN") as bar:
        return {
            (rate, with_bn): training.repeat(
                lambda rng, with_bn=with_bn: network(with_bn, rng),
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


# ---- what is shown -------------------------------------------------------------------------------------------------


def show_steps(out):
    """Tables of the four steps and their picture; Markdown blocks."""
    wine, images = wine_batches(), image_batches()
    columns = [
        compare_steps(layer, batches, dtype)
        for layer, batches in ((BatchNorm1d, wine), (BatchNorm2d, images))
        for dtype in (np.float64, np.float32)
    ]
    rows = [[*key, *(f"{relative_difference(*column[key]):.1e}" for column in columns)] for key in columns[0]]
    headers = ["step", "quantity", "(N, C) float64", "(N, C) float32", "NCHW float64", "NCHW float32"]
    variances = [
        [f"{which}, {who}", f"{by_hand:.4g}", f"{ours:.4g}"]
        for (which, (by_hand, ours)), who in zip(
            running_variances().items(), ("as in the article", "as in PyTorch"), strict=True
        )
    ]

    names = load_wine().feature_names
    shown = [names.index(name) for name in WINE_FEATURES]
    x, steps = wine[-1], columns[0]
    jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(x))

    def paint(figure, axes):
        panels = [
            ("A batch: x", x[:, shown]),
            ("1  normalize: x̂", steps["1 normalize", "x̂"][1][:, shown]),
            ("2  scale and shift: y", steps["2 scale and shift", "y"][1][:, shown]),
            ("4  inference: y", steps["4 inference", "y"][1][:, shown]),
        ]
        order = [axes[0, i] for i in (0, 1, 2, 4)]
        for ax, (title, values) in zip(order, panels, strict=True):
            for i, color in enumerate(report.PALETTE[: len(shown)]):
                ax.plot(i + jitter[: len(values)], values[: len(jitter), i], "o", color=color, ms=4, alpha=0.6, mew=0)
            ax.set_xticks(range(len(shown)), WINE_FEATURES, rotation=30, ha="right")
            ax.set_title(title)
        order[0].set_yscale("log")
        order[0].set_ylabel("measured value")
        order[1].set_ylabel("no unit")
        hand, ours = steps["3 gradients", "dx"]
        ax = axes[0, 3]
        # dx is as small as x is large: each feature by its own largest gradient
        scale = np.abs(hand[:, shown]).max(axis=0)
        for i, color in enumerate(report.PALETTE[: len(shown)]):
            ax.plot(
                hand[:, shown[i]] / scale[i], ours[:, shown[i]] / scale[i], "o", color=color, ms=4, alpha=0.6, mew=0
            )
        ax.axline((0, 0), slope=1, color=report.INK, lw=0.8)
        ax.set_title("3  gradients: dx")
        ax.set_xlabel("by hand, share of the largest")
        ax.set_ylabel("cbn")

    report.draw(
        out / "four_steps.png",
        paint,
        size=(16, 4.2),
        columns=5,
        title="The four steps on scikit-learn's wines: four of 13 measures",
    )
    return (
        "Largest difference between the steps by hand (float64) and cbn's, as a share of the largest value. "
        f"(N, C): wines; NCHW: digits behind a convolution; {PASSES} passes over five batches each.",
        report.table(headers, rows),
        "The article's hand-written layer stores the biased variance, PyTorch the unbiased one. "
        "The running variance after one batch x = [[0], [4]], from 1 and with momentum 0.1:",
        report.table(["running_var", "by hand", "cbn"], variances),
    )


def show(results, out):
    """Tables and pictures of everything."""
    seeds, epochs = next(iter(results.values()))["train_loss"].shape
    rates = sorted({rate for rate, _ in results})
    words = {True: "with", False: "without"}
    rows, comparisons = [], []
    for rate in rates:
        for with_bn in (True, False):
            last = [training.mean_std(results[rate, with_bn][metric][:, -1], metric) for metric in training.METRICS]
            rows.append([f"{rate:g}", words[with_bn], *last])
        comparisons += training.compare(f"Adam at {rate:g}", results[rate, True], results[rate, False])
    report.write(
        out,
        "four_steps",
        "Batch norm in four steps",
        *show_steps(out),
        "## A CNN on scikit-learn's digits, with BatchNorm2d and without\n\n"
        f"Batch {BATCH}, {seeds} seeds, after {epochs} epochs: mean ± standard deviation over the seeds.",
        report.table(["Adam", "batch norm", *training.METRICS.values()], rows),
        training.verdict(comparisons),
    )
    report.write_runs(out, "four_steps", {f"Adam at {r:g}, {words[bn]}": runs for (r, bn), runs in results.items()})

    def paint(figure, axes):
        for row, rate in zip(axes, rates, strict=True):
            for ax, metric in zip(row, ("train_loss", "test_accuracy"), strict=True):
                scale = 100 if metric == "test_accuracy" else 1
                curves = [results[rate, with_bn][metric] * scale for with_bn in (True, False)]
                report.with_and_without(ax, range(1, epochs + 1), *curves)
                ax.set_title(f"{training.METRICS[metric].capitalize()}, Adam at {rate:g}")
                ax.set_ylabel("accuracy (%)" if scale == 100 else "cross-entropy (nats)")
                report.epochs_axis(ax, epochs)
        report.legend(figure, axes[0, 0])

    report.draw(
        out / "four_steps_cnn.png",
        paint,
        size=(10, 3.4 * len(rates)),
        rows=len(rates),
        columns=2,
        title=f"CNN on digits: mean and range of {seeds} seeds",
    )


def main(argv=None):
    args = report.parser(__doc__, seeds=(5, "random seeds"), epochs=(5, "epochs")).parse_args(argv)
    show(run(seeds=args.seeds, epochs=args.epochs), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
