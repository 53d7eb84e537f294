"""Training steps of three networks in PyTorch, with its own batch norms and with cbn's, in turns.

A residual network, one of depthwise separable convolutions and a 1-D one, on random data: what a step takes, and how
much of it batch norm does, by PyTorch's profiler. `cbn.torch.convert` is all that differs; with `fuse=True` ReLU and
the residual addition are in the batch norm's pass, so that its time is that of all three. In the place of batch norm a
last network has a copy: y = x, and dx = dy + 0·x. It takes what memory and PyTorch's autograd ask of any such function.
"""

import copy
import os
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is quiet

import numpy as np

from examples import report

N = 32
COPY = "a copy"
WAYS = ("PyTorch", "cbn", "cbn, fused", COPY)
COLORS = dict(zip(WAYS, ("#444444", "#0072B2", "#009E73", "#BBBBBB"), strict=True))
# Of the profiler: an operator or a function of cbn's, with all that it calls
FORWARD = ("aten::batch_norm", "_BatchNorm", "_Copy")
BACKWARD = tuple(
    f"autograd::engine::evaluate_function: {name}Backward{n}"
    for name, n in (("NativeBatchNorm", 0), ("_BatchNorm", ""), ("_Copy", ""))
)


def residual_network():
    """ResNet-18 for images of 112x112."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, n, m, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
            self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
            short = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))
            self.short = nn.Identity() if n == m else short

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + self.short(x))

    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for n, m in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [Block(n, m, 1 if n == m else 2), Block(m, m, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def separable_network():
    """The first half of MobileNet, for images of 112x112."""
    from torch import nn

    layers, n = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()], 32
    for m, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        depthwise = nn.Conv2d(n, n, 3, stride, 1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6()
        layers += [*depthwise, nn.Conv2d(n, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU6()]
        n = m
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10))


def sequence_network():
    """Three 1-D convolutions over 4000 samples of a signal."""
    from torch import nn

    layers = []
    for n, m in ((1, 64), (64, 128), (128, 256)):
        layers += [nn.Conv1d(n, m, 7, 2, 3, bias=False), nn.BatchNorm1d(m), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 10))


NETWORKS = {
    "ResNet-18": (residual_network, (N, 3, 112, 112), ("first", "last")),
    "MobileNet": (separable_network, (N, 3, 112, 112), ("first", "last")),
    "1-D convolutions": (sequence_network, (N, 1, 4000), ("first",)),
}


def copying(model):
    """The network with a copy in the place of every batch norm."""
    import torch

    class _Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.mul(x, 1.0)

        @staticmethod
        def backward(ctx, dy):
            return torch.add(dy, *ctx.saved_tensors, alpha=0.0)

    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.forward = _Copy.apply
    return model


def prepared(make, shape, layout):
    """({way: model}, x, targets): the same weights in each."""
    import torch

    import cbn.torch

    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    if layout == "last":
        model, x = (a.to(memory_format=torch.channels_last) for a in (model, x))
    fused = cbn.torch.convert(copy.deepcopy(model), fuse=True)
    models = (model, cbn.torch.convert(copy.deepcopy(model)), fused, copying(copy.deepcopy(model)))
    return dict(zip(WAYS, models, strict=True)), x, torch.arange(len(x)) % 10


def step(model, x, targets):
    """Forward and backward; the loss."""
    from torch.nn import functional

    model.zero_grad()
    loss = functional.cross_entropy(model(x), targets)
    loss.backward()
    return loss.item()


def batch_norm_times(model, x, targets):
    """Milliseconds of batch norm in a step, forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(model, x, targets)
    events = profiler.key_averages()
    return [sum(e.cpu_time_total for e in events if e.key in keys) / 1e3 for keys in (FORWARD, BACKWARD)]


def measured(rounds):
    """{(network, layout): {way: (ms of a step, ms of batch norm forward, backward)}}, medians of turns."""
    found = {}
    with report.progress(sum(len(layouts) for *_, layouts in NETWORKS.values()) * rounds, "steps") as bar:
        for name, (make, shape, layouts) in NETWORKS.items():
            for layout in layouts:
                models, x, targets = prepared(make, shape, layout)
                losses = {way: step(model, x, targets) for way, model in models.items()}
                del losses[COPY]
                worst = max(abs(loss / losses["PyTorch"] - 1) for loss in losses.values())
                if worst > 1e-4:
                    raise RuntimeError(f"the losses of {name} differ by {worst:.0e}")
                times = {way: [] for way in WAYS}
                for _ in range(rounds):  # in turns, so that a slow moment of the machine meets all of them
                    for way, model in models.items():
                        begin = time.perf_counter()
                        step(model, x, targets)
                        end = time.perf_counter()
                        times[way].append([1e3 * (end - begin), *batch_norm_times(model, x, targets)])
                    bar.update()
                found[name, layout] = {way: np.median(rows, axis=0) for way, rows in times.items()}
    return found


def rows(found):
    """Of the table."""
    for (name, layout), ways in found.items():
        whole, *norm = ways["PyTorch"]
        for way, (step_ms, forward, backward) in ways.items():
            norms = "" if way in ("cbn, fused", COPY) else f"{sum(norm) / (forward + backward):.2f}×"
            cells = f"{step_ms:.0f} ms", f"{forward:.1f} ms", f"{backward:.1f} ms", norms, f"{whole / step_ms:.2f}×"
            yield [f"{name}, channels {layout}", way, *cells]


def paint(found):
    """Bars of whole steps, with batch norm's part dark."""

    def draw(figure, axes):
        ax = axes[0, 0]
        labels = [f"{name}\nchannels {layout}" for name, layout in found]
        for k, way in enumerate(WAYS):
            at = np.arange(len(found)) + (k - 1.5) * 0.22
            times = np.array([ways[way] / ways["PyTorch"][0] for ways in found.values()])
            ax.bar(at, times[:, 0], 0.2, color=COLORS[way], alpha=0.35, label=way)
            ax.bar(at, times[:, 1:].sum(axis=1), 0.2, color=COLORS[way])
        ax.set_xticks(np.arange(len(found)), labels)
        ax.set_ylabel("time of a step; PyTorch = 1")
        ax.grid(axis="x", visible=False)
        report.legend(figure, ax)

    return draw


def main(argv=None):
    args = report.parser(__doc__, rounds=(5, "steps of each network with each kind of batch norm")).parse_args(argv)
    found = measured(args.rounds)
    head = ["network", "batch norm", "step", "of it forward", "backward", "batch norm’s speed", "the step’s"]
    note = (
        f"N = {N}, medians of {args.rounds} steps in turns; speeds are PyTorch’s time over the row’s. "
        "Fused, batch norm’s time has ReLU and the residual addition in it. A copy in its place reads and writes once."
    )
    report.write(args.out, "torch_training", "Training steps in PyTorch", report.table(head, rows(found)), note)
    picture = args.out / "torch_training.png"
    report.draw(picture, paint(found), size=(10, 4.5), title="Training steps: batch norm’s part is dark")
    return 0


if __name__ == "__main__":
    sys.exit(report.run(main))
