"""Train a network over several random seeds, and say where batch norm won and where it did not."""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from examples import layers

METRICS = {"train_loss": "training loss", "test_loss": "held-out loss", "test_accuracy": "held-out accuracy"}
LOWER_IS_BETTER = {"train_loss": True, "test_loss": True, "test_accuracy": False}


@dataclass
class Data:
    """Inputs and targets, some of them held out."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def hold_out(x, y, fraction=0.2):
    """Data with a fraction of every class held out; always the same samples, so that seeds differ in training only."""
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=fraction, stratify=y, random_state=0)
    return Data(x_train, y_train, x_test, y_test)


def minibatches(n, batch, rng):
    """Shuffled indices; the last batch may be smaller, but a single sample has no variance and is left out."""
    order = rng.permutation(n)
    for start in range(0, n, batch):
        index = order[start : start + batch]
        if len(index) > 1:
            yield index


def n_batches(n, batch):
    """How many minibatches an epoch has."""
    return n // batch + (n % batch > 1)


def largest_class(y):
    return y.argmax(axis=1)


def fit(model, loss, data, *, lr, epochs, batch, seed, predict=largest_class, progress=None):
    """Train with Adam; {metric: (epochs,)}.

    The training loss of an epoch is the mean over its batches while they are trained on, as the articles print it; the
    held-out figures are taken in evaluation mode after the epoch.
    """
    rng = np.random.default_rng([seed, 1])
    optimizer = layers.Adam(model.parameters(), lr)
    history = {metric: np.empty(epochs) for metric in METRICS}
    for epoch in range(epochs):
        model.train()
        losses = []
        for index in minibatches(len(data.x_train), batch, rng):
            model.zero_grad()
            value, dy = loss(model(data.x_train[index]), data.y_train[index])
            model.backward(dy)
            optimizer.step()
            losses.append(value)
            if progress is not None:
                progress.update()
        model.eval()
        y = model(data.x_test)
        history["train_loss"][epoch] = np.mean(losses)
        history["test_loss"][epoch] = loss(y, data.y_test)[0]
        history["test_accuracy"][epoch] = np.mean(predict(y) == data.y_test)
    return history


def repeat(build, loss, data, *, seeds, **settings):
    """`fit` of ``build(rng)`` for every seed; {metric: (seeds, epochs)}.

    The weights and the order of the batches depend on the seed alone, so that two networks are compared pair by pair.
    """
    # For batches of some kilobytes a second thread costs more than it brings: in numpy's products by far, and in cbn,
    # which follows this limit too.
    with threadpool_limits(1):
        runs = [fit(build(np.random.default_rng([s, 0])), loss, data, seed=s, **settings) for s in range(seeds)]
    return {metric: np.stack([run[metric] for run in runs]) for metric in METRICS}


@dataclass(eq=False)
class Comparison:
    """One metric after the last epoch, with and without batch norm, one value per seed."""

    label: str
    metric: str
    with_bn: np.ndarray
    without_bn: np.ndarray

    @property
    def gains(self):
        """By how much batch norm is better, per seed."""
        gains = self.with_bn - self.without_bn
        return -gains if LOWER_IS_BETTER[self.metric] else gains

    @property
    def better(self):
        """On how many seeds batch norm is better."""
        return int(np.sum(self.gains > 0))

    @property
    def worse(self):
        """On how many seeds it is worse."""
        return int(np.sum(self.gains < 0))

    def __str__(self):
        return (
            f"{self.label}, {METRICS[self.metric]}: {mean_std(self.with_bn, self.metric)} with, "
            f"{mean_std(self.without_bn, self.metric)} without; "
            f"better on {self.better} and worse on {self.worse} of {len(self.gains)} seeds"
        )


def compare(label, with_bn, without_bn):
    """A Comparison for each metric."""
    return [Comparison(label, metric, with_bn[metric][:, -1], without_bn[metric][:, -1]) for metric in METRICS]


def verdict(comparisons):
    """Markdown: in how many comparisons batch norm is better on every seed, and all the others one by one."""
    won = [c for c in comparisons if c.better == len(c.gains)]
    lost = [c for c in comparisons if c.better <= c.worse]
    mixed = [c for c in comparisons if c not in won and c not in lost]
    parts = [f"Batch norm is better on every seed in {len(won)} of {len(comparisons)} comparisons."]
    for words, group in (("It is better on more seeds than it is worse:", mixed), ("Where it does not win:", lost)):
        if group:
            parts += [words, "\n".join(f"- {c}" for c in group)]
    return "\n\n".join(parts)


def mean_std(values, metric="train_loss"):
    """Mean ± standard deviation over the seeds; accuracies in percent."""
    percent = metric == "test_accuracy"
    values = np.asarray(values) * (100 if percent else 1)
    digits = 1 if percent else 3 if np.max(np.abs(values)) < 100 else 1
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" + (" %" if percent else "")
