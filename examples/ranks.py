"""Training on two ranks of MPI, with batch norms of the whole batch and with each rank's own, beside one process.

Each rank has half of every batch and adds its gradients to the other's. With `cbn.mpi.SyncBatchNorm` the losses are
those of one process that has all of it, up to the rounding of float64. With a batch norm that sees its rank's half
alone the network is another one, and so are the running statistics of each rank.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from threadpoolctl import threadpool_limits

from cbn import BatchNorm, BatchNorm1d
from examples import digits_mlp, layers, report, training
from examples.layers import softmax_cross_entropy

NEEDED = "pip install -e '.[examples,test-distributed]'"
BATCH, RATE = 16, 1e-3
ONE, SYNCHRONIZED, OWN = "one process", "synchronized", "each rank its own"
COLORS = {ONE: report.INK, SYNCHRONIZED: report.WITH_BN, OWN: report.WITHOUT_BN}


class Alone:
    """A communicator of one rank, for a process without MPI."""

    rank, size = 0, 1

    def total(self, a):
        return a

    def spread(self, a):
        """How far the ranks' arrays are apart at most."""
        return 0.0


class Ranks:
    """MPI's world."""

    def __init__(self):
        from mpi4py import MPI

        self.world, self.max, self.min = MPI.COMM_WORLD, MPI.MAX, MPI.MIN
        self.rank, self.size = self.world.rank, self.world.size

    def total(self, a):
        return sum(self.world.allgather(a))  # in the order of the ranks: the same bits on each

    def spread(self, a):
        parts = np.array(self.world.allgather(a))
        return float(np.max(parts.max(axis=0) - parts.min(axis=0)))


def fit(model, data, ranks, *, epochs, batch, seed, progress=None):
    """Train; the loss of every step, and held-out loss and accuracy of every epoch."""
    rng = np.random.default_rng([seed, 1])
    pairs = model.parameters()
    optimizer = layers.Adam(pairs, RATE)
    losses, held_out = [], []
    for _ in range(epochs):
        model.train()
        for index in training.minibatches(len(data.x_train), batch, rng):
            own = np.array_split(index, ranks.size)[ranks.rank]
            share = len(own) / len(index)
            model.zero_grad()
            value, dy = softmax_cross_entropy(model(data.x_train[own]), data.y_train[own])
            model.backward(dy * share)  # of a mean over the whole batch
            sums = ranks.total(np.concatenate([[value * share], *(grad.ravel() for _, grad in pairs)]))
            losses.append(sums[0])
            start = 1
            for _, grad in pairs:
                grad[...] = sums[start : start + grad.size].reshape(grad.shape)
                start += grad.size
            optimizer.step()
            if progress is not None:
                progress.update()
        model.eval()
        y = model(data.x_test)
        held_out.append((softmax_cross_entropy(y, data.y_test)[0], np.mean(y.argmax(axis=1) == data.y_test)))
    return np.array(losses), np.array(held_out)


def repeat(layer, ranks, *, seeds, epochs, batch, progress=None):
    """{what: one row for each seed} of networks with this batch norm, on these ranks."""
    data = digits_mlp.digits()
    data.x_train, data.x_test = data.x_train.astype(np.float64), data.x_test.astype(np.float64)
    found = {"losses": [], "held_out": [], "spread": []}
    with threadpool_limits(1):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 0])
            model = digits_mlp.network(data.x_train.shape[1], True, rng, np.float64, layer=layer)
            losses, held_out = fit(model, data, ranks, epochs=epochs, batch=batch, seed=seed, progress=progress)
            norms = [one for one in model.layers if isinstance(one, BatchNorm)]
            statistics = np.concatenate([np.concatenate([one.running_mean, one.running_var]) for one in norms])
            for name, value in (("losses", losses), ("held_out", held_out), ("spread", ranks.spread(statistics))):
                found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def on_ranks(n_ranks, words, args):
    """The same on so many ranks of MPI, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.npz"
        beside = Path(sys.executable).parent / "mpiexec"
        command = [
            str(beside) if beside.exists() else "mpiexec",
            "-n",
            str(n_ranks),
            sys.executable,
            "-m",
            "examples.ranks",
        ]
        command += ["--seeds", str(args.seeds), "--epochs", str(args.epochs), "--batch", str(args.batch)]
        done = subprocess.run(
            [*command, "--write", str(file), "--norms", words],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
        with np.load(file) as content:
            return dict(content)


def be_a_rank(args):
    """What `on_ranks` starts."""
    ranks = Ranks()
    layer = BatchNorm1d
    if args.norms == SYNCHRONIZED:
        from cbn import mpi

        layer = mpi.SyncBatchNorm
    found = repeat(layer, ranks, seeds=args.seeds, epochs=args.epochs, batch=args.batch)
    if ranks.rank == 0:
        np.savez(args.write, **found)


def run(args):
    """{words: what `repeat` found}."""
    n_batches = training.n_batches(len(digits_mlp.digits().x_train), args.batch)
    with report.progress(3 * args.seeds * args.epochs * n_batches, f"{args.ranks} ranks") as bar:
        results = {
            ONE: repeat(BatchNorm1d, Alone(), seeds=args.seeds, epochs=args.epochs, batch=args.batch, progress=bar)
        }
        for words in (SYNCHRONIZED, OWN):
            results[words] = on_ranks(args.ranks, words, args)
            bar.update(args.seeds * args.epochs * n_batches)
    return results


def show(results, args):
    """Table and picture."""
    one, steps = results[ONE]["losses"], results[ONE]["losses"].shape[1]
    epoch = steps // args.epochs
    rows, each = [], f"{args.ranks} × {args.batch / args.ranks:.3g}"
    for words, found in results.items():
        last = found["losses"][:, -epoch:].mean(axis=1)
        rows.append([
            f"1 × {args.batch}" if words == ONE else each,
            words,
            training.mean_std(last),
            training.mean_std(found["held_out"][:, -1, 0]),
            training.mean_std(found["held_out"][:, -1, 1], "test_accuracy"),
            "–" if words == ONE else f"{np.abs(found['losses'] - one).max():.1e}",
            "–" if words == ONE else f"{found['spread'].max():.1e}",
        ])  # fmt: skip
    headers = [
        *("ranks × samples", "batch norm", "training loss", "held-out loss", "held-out accuracy"),
        *("losses, from one process", "running statistics, from rank to rank"),
    ]
    report.write(
        args.out,
        "ranks",
        "Digits on several ranks",
        f"Adam at {RATE:g}, {args.seeds} seeds, after {args.epochs} epochs, in float64: mean ± standard deviation over "
        f"the seeds. The last two columns are the largest differences: of the loss, of all {steps:,} steps, and of the "
        "running means and variances at the end.",
        report.table(headers, rows),
    )

    def paint(figure, axes):
        left, right = axes[0]
        n = np.arange(1, steps + 1)
        for words, found in results.items():
            width = {ONE: 4, SYNCHRONIZED: 1.5, OWN: 1.5}[words]
            color = "#BBBBBB" if words == ONE else COLORS[words]
            smooth = [np.convolve(row, np.ones(20) / 20, "valid") for row in found["losses"]]
            left.plot(n[19:], np.mean(smooth, axis=0), color=color, linewidth=width, label=words)
            if words != ONE:
                distance = np.abs(found["losses"] - one).max(axis=0)
                right.plot(n, np.maximum(distance, 1e-17), color=COLORS[words], linewidth=1, label=words)
        left.set_title("Training loss, means of 20 steps")
        right.set_title("Distance of a step's loss from one process")
        left.set_ylabel("cross-entropy (nats)")
        for ax in (left, right):
            ax.set_yscale("log")
            ax.set_xlabel("step")
        report.legend(figure, left)

    report.draw(
        args.out / "ranks.png",
        paint,
        size=(12, 4.4),
        columns=2,
        title=f"Digits, ranks × samples: {each}, and 1 × {args.batch}",
    )


def main(argv=None):
    parser = report.parser(
        __doc__,
        seeds=(3, "random seeds"),
        epochs=(4, "epochs"),
        ranks=(2, "ranks"),
        batch=(BATCH, "samples, of all ranks"),
    )
    parser.add_argument("--write", type=Path, help=report.argparse.SUPPRESS)
    parser.add_argument("--norms", default=SYNCHRONIZED, help=report.argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write:
        return be_a_rank(args)
    if not 2 <= args.ranks <= args.batch // 2:
        parser.error(f"--ranks must be from 2 to half of the batch, {args.batch // 2}, not {args.ranks}")
    beside = Path(sys.executable).parent / "mpiexec"
    if not importlib.util.find_spec("mpi4py") or not (beside.exists() or shutil.which("mpiexec")):
        parser.error(f"it needs mpi4py and mpiexec: {NEEDED}")
    return show(run(args), args)


if __name__ == "__main__":
    sys.exit(report.run(main))
