"""An image classifier trained in PyTorch, then served with cbn and numpy alone, from four threads at once.

The images are scikit-learn's digits, 8x8 pixels. Every batch norm of the network is folded into a neighbour's weights
or fused with what follows it, or for comparison neither; PyTorch and ONNX Runtime serve the same network beside it.
"""

import contextlib
import csv
import io
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from matplotlib.ticker import LogLocator
from threadpoolctl import threadpool_limits  # scikit-learn brings it

import cbn
from examples import digits_mlp, report

PEERS = "pip install -e '.[examples-peers]' in the checkout"
SIDE = 8  # of an image
BATCHES = (1, 32)  # images in a request
THREADS = (1, 4)  # that send requests at once
FOLDABLE = ("stem", "first", "head")
SERVED = "cbn, folded and fused"
MEASURES = ("p50", "p99", "images/s", "cores")
FORMATS = dict(zip(MEASURES, (",.0f", ",.0f", ",.0f", ".2f"), strict=True))


def network():
    """The network in PyTorch: a stem, a residual block, a pre-activation convolution, a normalized linear head."""
    import torch
    from torch import nn

    def conv(n_in, n_out, bias=False):
        return nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_bn = conv(1, 16), nn.BatchNorm2d(16)
            self.first, self.first_bn = conv(16, 16), nn.BatchNorm2d(16)
            self.second, self.second_bn = conv(16, 16), nn.BatchNorm2d(16)
            self.last_bn, self.last = nn.BatchNorm2d(16), conv(16, 32, bias=True)
            self.head_bn, self.head = nn.BatchNorm1d(32), nn.Linear(32, 10)

        def forward(self, x):
            x = torch.relu(self.stem_bn(self.stem(x)))
            y = torch.relu(self.first_bn(self.first(x)))
            x = torch.relu(self.second_bn(self.second(y)) + x)
            y = torch.relu(self.last(torch.relu(self.last_bn(x))))
            return self.head(self.head_bn(y.mean((2, 3))))

    return Classifier().eval()


def train(data, epochs, batch=32, seed=0):
    """The network after some epochs of Adam, in evaluation mode."""
    import torch

    x, labels = torch.from_numpy(data.x_train).reshape(-1, 1, SIDE, SIDE), torch.from_numpy(data.y_train).long()
    steps = len(x) // batch
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), report.progress(epochs * steps, "training") as bar:
        torch.manual_seed(seed)
        net = network().train()
        adam = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(x))[: steps * batch].reshape(steps, batch):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(net(x[index]), labels[index]).backward()
                adam.step()
                bar.update()
    return net.eval()


# ---- serving with cbn and numpy ------------------------------------------------------------------------------------


def window_places(side):
    """(side², 9): where in an image with a border of zeros, its pixels numbered, stand the nine under the kernel."""
    corners = np.arange(side)[:, None] * (side + 2) + np.arange(side)
    window = np.arange(3)[:, None] * (side + 2) + np.arange(3)
    return corners.reshape(-1, 1) + window.reshape(-1)


PLACES = window_places(SIDE)


class Convolution:
    """3x3 over images (N, H, W, C) with zeros around them, as one matrix product.

    Channels last, so that the product's result is the next layer's input without a transpose. Gathering by index takes
    a fraction of what a sliding window view costs here: the view's own construction is most of it on one small image.
    """

    def __init__(self, weight, bias=None):
        self.matrix = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
        self.bias = bias

    def __call__(self, x):
        n, h, w, c = x.shape
        padded = np.zeros((n, h + 2, w + 2, c), x.dtype)
        padded[:, 1:-1, 1:-1] = x
        windows = padded.reshape(n, -1, c).take(PLACES, axis=1)
        y = windows.reshape(n * h * w, 9 * c) @ self.matrix
        if self.bias is not None:
            y += self.bias
        return y.reshape(n, h, w, -1)


def relu(y):
    return np.maximum(y, 0, out=y)


class Fused:
    """Batch norm, the sum with a residual, ReLU: one pass over memory, in place.

    A plan is of one shape and serves any number of threads; there is one for each size of batch that has come.
    """

    def __init__(self, bn):
        self.bn = channels_last(bn, activation="relu")
        self.plans = {}

    def __call__(self, y, residual=None):
        plan = self.plans.get(y.shape)
        if plan is None:
            plan = self.plans[y.shape] = self.bn.plan(y.shape)
        return plan(y, out=y, residual=residual)


class Apart:
    """The same as layers one after the other: up to three passes."""

    def __init__(self, bn):
        self.bn = channels_last(bn)

    def __call__(self, y, residual=None):
        y = self.bn(y)
        if residual is not None:
            y += residual
        return relu(y)


def channels_last(module, activation=None):
    """A batch norm of PyTorch's as one of cbn's that reads channels last."""
    bn = cbn.BatchNorm(module.num_features, module.eps, channel_axis=-1, activation=activation).eval()
    bn.load_state_dict(module.state_dict())
    return bn


def arrays(module):
    """(weight, bias) of a PyTorch layer: copies, so that nothing of PyTorch's is left in the server."""
    state = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    return state["weight"], state.get("bias")


class Server:
    """The network out of numpy arrays and cbn's layers; called with images (N, 8, 8, 1), from any number of threads.

    Parameters
    ----------
    net : the PyTorch network, in evaluation mode
    fold : which of FOLDABLE have their batch norm in their weights
    norm : Fused or Apart, for the others
    """

    def __init__(self, net, fold=FOLDABLE, norm=Fused):
        def unit(name):
            conv, bn = getattr(net, name), getattr(net, f"{name}_bn")
            if name in fold:
                return Convolution(*cbn.fuse_conv_bn(*arrays(conv), cbn.from_torch(bn))), relu
            return Convolution(*arrays(conv)), norm(bn)

        self.stem, self.stem_end = unit("stem")
        self.first, self.first_end = unit("first")
        # Never folded: bias, skip connection and ReLU would be three passes over the product, and so they are one.
        self.second, self.second_end = Convolution(*arrays(net.second)), norm(net.second_bn)
        # Never folded: ReLU stands between this batch norm and its convolution. Without it fuse_bn_linear would refuse
        # too, as the convolution pads: its zeros stand behind the batch norm, and would then stand before it.
        self.last_start, self.last = norm(net.last_bn), Convolution(*arrays(net.last))
        self.head_bn = cbn.from_torch(net.head_bn)
        self.head_weight, self.head_bias = arrays(net.head)
        if "head" in fold:
            self.head_weight, self.head_bias = cbn.fuse_bn_linear(self.head_bn, self.head_weight, self.head_bias)
            self.head_bn = None

    def __call__(self, x):
        x = self.stem_end(self.stem(x))
        y = self.first_end(self.first(x))
        x = self.second_end(self.second(y), residual=x)
        y = relu(self.last(self.last_start(x)))
        features = y.mean(axis=(1, 2))
        if self.head_bn is not None:
            features = self.head_bn(features)
        return features @ self.head_weight.T + self.head_bias

    def forms(self):
        """How each batch norm is served, in the network's order."""
        ends = {"stem": self.stem_end, "first": self.first_end, "second": self.second_end, "last": self.last_start}
        forms = {name: "folded" if end is relu else type(end).__name__.lower() for name, end in ends.items()}
        return {**forms, "head": "folded" if self.head_bn is None else "apart"}


# ---- beside others -------------------------------------------------------------------------------------------------


def onnx_session(net):
    """An ONNX Runtime session of the network, for batches of any size, on the calling thread."""
    import onnxruntime
    import torch

    file = io.BytesIO()
    sizes = {"x": {0: "n"}, "y": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dynamo=False: the newer exporter needs more packages
        torch.onnx.export(
            net,
            (torch.zeros(2, 1, SIDE, SIDE),),
            file,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=sizes,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


def contenders(net):
    """({name: function of images (N, 8, 8, 1) that returns logits}, words for what is absent or None)."""
    import torch

    ways = {
        SERVED: Server(net),
        "cbn, fused": Server(net, fold=("head",)),
        "cbn, layer by layer": Server(net, fold=(), norm=Apart),
        "PyTorch": lambda x: net(torch.from_numpy(x).reshape(-1, 1, SIDE, SIDE)).numpy(),
    }
    try:
        session = onnx_session(net)
    except Exception as error:  # whatever an optional package or the deprecated exporter fails with
        reason = str(error).strip().partition("\n")[0]
        return ways, f"ONNX Runtime is absent: {type(error).__name__}: {reason} ({PEERS})."
    return ways | {"ONNX Runtime": lambda x: session.run(None, {"x": x.reshape(-1, 1, SIDE, SIDE)})[0]}, None


@contextlib.contextmanager
def one_thread_each():
    """A request is computed in the thread that sends it: neither BLAS nor PyTorch opens others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def client():
    """What holds for a thread that sends requests."""
    import torch

    with cbn.num_threads(1), torch.inference_mode():
        yield


def answers(serve, requests, threads):
    """The logits of all requests, in their order, from that many threads at once."""

    def share(first):
        with client():
            ready.wait()  # all threads at once, however short the work is
            return [serve(x) for x in requests[first::threads]]

    ready = threading.Barrier(threads, timeout=60)
    results = [None] * len(requests)
    with ThreadPoolExecutor(threads) as pool:
        for first, logits in enumerate(pool.map(share, range(threads))):
            results[first::threads] = logits
    return results


def turn(serve, x, threads, seconds):
    """Threads that send one request after the other: {p50 and p99 of a request in µs, images/s, cores kept busy}."""

    def send(_):
        with client():
            serve(x)  # a thread's first call sets up what the later ones find
            ready.wait()
            edges = [time.perf_counter()]
            while edges[-1] < edges[0] + seconds:
                serve(x)
                edges.append(time.perf_counter())
        return edges

    ready = threading.Barrier(threads, timeout=60)
    start, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        runs = list(pool.map(send, range(threads)))
    cores = (time.process_time() - busy) / (time.perf_counter() - start)
    latencies = np.concatenate([np.diff(edges) for edges in runs])
    wall = max(edges[-1] for edges in runs) - min(edges[0] for edges in runs)
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e6
    return dict(zip(MEASURES, (p50, p99, len(latencies) * len(x) / wall, cores), strict=True))


def measure(ways, images, rounds, seconds):
    """{(batch, threads, name): a turn's results, for each round}."""
    turns = {(batch, threads, name): [] for batch in BATCHES for threads in THREADS for name in ways}
    with report.progress(rounds * len(turns), "requests") as bar:
        for _ in range(rounds):  # in turns, so that a slow moment of the machine meets all of them
            for (batch, threads, name), results in turns.items():
                results.append(turn(ways[name], images[:batch], threads, seconds))
                bar.update()
    return turns


def run(*, epochs, rounds, milliseconds):
    """Everything that is shown: accuracy, agreement, latencies."""
    data = digits_mlp.digits()
    images = data.x_test.reshape(-1, SIDE, SIDE, 1)
    requests = [images[start : start + BATCHES[-1]] for start in range(0, len(images), BATCHES[-1])]
    with one_thread_each():
        net = train(data, epochs)
        ways, absent = contenders(net)
        logits = {name: np.concatenate(answers(serve, requests, 1)) for name, serve in ways.items()}
        at_once = np.concatenate(answers(ways[SERVED], requests, THREADS[-1]))
        turns = measure(ways, images, rounds, milliseconds / 1000)
    scale = np.abs(logits["PyTorch"]).max()
    return {
        "accuracy": {name: float(np.mean(z.argmax(axis=1) == data.y_test)) for name, z in logits.items()},
        "difference": {name: float(np.abs(z - logits["PyTorch"]).max() / scale) for name, z in logits.items()},
        "same bits": bool(np.array_equal(at_once, logits[SERVED])),
        "forms": {name: serve.forms() for name, serve in ways.items() if isinstance(serve, Server)},
        "held out": len(images),
        "turns": turns,
        "absent": absent,
    }


# ---- what is shown -------------------------------------------------------------------------------------------------

PARTS = {
    "stem": "convolution → BN → ReLU",
    "first": "residual block: convolution → BN → ReLU",
    "second": "residual block: convolution → BN, plus skip → ReLU",
    "last": "BN → ReLU → padded convolution",
    "head": "average → BN → linear",
}


def plural(n, noun):
    return f"{n} {noun}{'s' if n > 1 else ''}"


def medians(found):
    """{(batch, threads, name): {measure: its median over the rounds}}."""
    return {
        key: {measure: float(np.median([result[measure] for result in results])) for measure in MEASURES}
        for key, results in found["turns"].items()
    }


def ahead(median, names):
    """Where another contender does better than the one that is served; text."""
    lines = []
    for batch in BATCHES:
        alone, together = (
            {name: median[batch, threads, name] for name in names} for threads in (THREADS[0], THREADS[-1])
        )
        own, own_rate = alone[SERVED]["p50"], together[SERVED]["images/s"]
        sooner = [f"{name} ({m['p50'] / own:.2f}×)" for name, m in alone.items() if m["p50"] < own]
        more = [f"{name} ({m['images/s'] / own_rate:.2f}×)" for name, m in together.items() if m["images/s"] > own_rate]
        for found, text in (
            (sooner, "shorter latency in 1 thread"),
            (more, f"more images/s from {THREADS[-1]} threads"),
        ):
            if found:
                lines.append(f"- {plural(batch, 'image')} a request, {text}: {', '.join(found)}")
    title = f"Ahead of “{SERVED}”"
    return f"{title}:\n\n" + "\n".join(lines) if lines else f"{title}: none."


def write_turns(out, turns):
    """Every turn as CSV."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "pipeline.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "batch", "threads", "round", "p50_us", "p99_us", "images_per_second", "cores"])
        for (batch, threads, name), results in turns.items():
            for i, result in enumerate(results, 1):
                writer.writerow([name, batch, threads, i, *(f"{result[measure]:.6g}" for measure in MEASURES)])


def show(found, out):
    """Tables, CSV and picture."""
    median = medians(found)
    names = list(found["accuracy"])
    columns = [(t, m) for t in THREADS for m in MEASURES if t > 1 or m != "cores"]
    headers = [f"{m} (µs)" if m.startswith("p") else m for _, m in columns]
    headers = [f"{header}, {plural(t, 'thread')}" for header, (t, _) in zip(headers, columns, strict=True)]
    blocks = []
    for batch in BATCHES:
        rows = [[name, *(f"{median[batch, t, name][m]:{FORMATS[m]}}" for t, m in columns)] for name in names]
        blocks += [f"Requests of {plural(batch, 'image')}:", report.table(["", *headers], rows)]
    ratios = [
        [
            name,
            *(f"{median[b, 1, name]['p50'] / median[b, 1, SERVED]['p50']:.2f}×" for b in BATCHES),
            *(f"{median[b, THREADS[-1], name]['images/s'] / median[b, 1, name]['images/s']:.2f}×" for b in BATCHES),
        ]
        for name in names
    ]
    of = [f"{plural(batch, 'image')} a request" for batch in BATCHES]
    report.write(
        out,
        "pipeline",
        "A classifier trained in PyTorch, served with cbn",
        f"Digits of 8x8 pixels. Held-out accuracy over {found['held out']} images and the largest difference of the "
        "logits from PyTorch's, relative to PyTorch's largest logit:",
        report.table(
            ["", "accuracy", "difference"],
            [[name, f"{100 * found['accuracy'][name]:.1f} %", f"{found['difference'][name]:.1e}"] for name in names],
        ),
        f"“{SERVED}” gives the same bits from {plural(THREADS[-1], 'thread')} at once as from one: "
        + ("yes." if found["same bits"] else "no."),
        "How each batch norm is served: folded into weights; fused with what follows, in one pass; or apart, in a pass "
        "of its own:",
        report.table(
            ["", *found["forms"]],
            [[text, *(forms[part] for forms in found["forms"].values())] for part, text in PARTS.items()],
        ),
        *blocks,
        f"Each number is a median over {plural(len(found['turns'][1, 1, SERVED]), 'turn')}. A request is computed by "
        "the thread that sends it; each thread sends one after the other. “cores” is the processor time a second: the "
        "others of the threads waited, for a core or for each other.",
        *([found["absent"]] if found["absent"] else []),
        f"Median latency in one thread, as a multiple of that of “{SERVED}”: above 1 is slower than it. And images a "
        f"second from {plural(THREADS[-1], 'thread')} as a multiple of those from one: below 1 the threads hinder each "
        "other.",
        report.table(["", *(f"latency, {t}" for t in of), *(f"more threads, {t}" for t in of)], ratios),
        ahead(median, names),
    )
    write_turns(out, found["turns"])

    def paint(figure, axes):
        places = np.arange(len(names))
        for (latency, throughput), batch in zip(axes.T, BATCHES, strict=True):
            for i, threads in reversed(list(enumerate(THREADS))):
                results = [median[batch, threads, name] for name in names]
                p50, p99, rate = (np.array([m[measure] for m in results]) for measure in MEASURES[:3])
                y, color = places + 0.36 * (i - 0.5), report.PALETTE[i]
                latency.hlines(y, p50, p99, color=color, lw=1.5)
                latency.plot(p99, y, "|", color=color, ms=9, mew=1.5)
                latency.plot(p50, y, "o", color=color, ms=7)
                throughput.barh(y, rate, height=0.32, color=color, label=plural(threads, "thread"))
            latency.set_title(f"{plural(batch, 'image')} a request: latency")
            latency.set_xlabel("µs; dot: median, stroke: 99th percentile")
            latency.set_xscale("log")
            latency.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            latency.minorticks_off()
            throughput.set_title(f"{plural(batch, 'image')} a request: throughput")
            throughput.set_xlabel("images a second")
            throughput.locator_params(axis="x", nbins=6)
        for ax in axes.flat:
            ax.grid(False, axis="y")
            ax.xaxis.set_major_formatter("{x:,.0f}")
        axes[0, 0].set_yticks(places, names)
        axes[0, 0].invert_yaxis()  # shared: the first contender on top everywhere
        report.legend(figure, axes[1, 0])

    report.draw(
        out / "pipeline.png",
        paint,
        size=(12, 7.5),
        rows=2,
        columns=2,
        sharey=True,
        title="Serving one network, trained in PyTorch: latency and throughput",
    )


def main(argv=None):
    counts = {
        "epochs": (8, "of training"),
        "rounds": (10, "turns of each contender, of which the median counts"),
        "milliseconds": (100, "length of a turn"),
    }
    args = report.parser(__doc__, **counts).parse_args(argv)
    try:
        import torch  # noqa: F401  at the first use of it, so that --help and the other examples do without
    except ImportError:
        sys.exit(f"examples/pipeline.py trains its network in PyTorch, which is not installed: {PEERS}")
    show(run(epochs=args.epochs, rounds=args.rounds, milliseconds=args.milliseconds), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))
