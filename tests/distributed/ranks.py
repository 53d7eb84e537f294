"""What each rank of the tests of `cbn.mpi` does: `mpiexec -n 3 python -m tests.distributed.ranks NAME FOLDER`."""

import pickle
import sys
from pathlib import Path

import numpy as np

SIZES = {2: (6, 3), 3: (4, 0, 1), 4: (1, 2, 5, 1)}  # samples of each rank
SHAPE, AXES = (5, 4, 3), {"first": 1, "last": 3}
OPTIONS = {  # of a layer, and what a forward takes
    "plain": ({}, ()),
    "no weight": ({"affine": False, "momentum": None}, ()),
    "fused": ({"activation": "relu"}, ("residual",)),
    "mask": ({}, ("mask",)),
    "lengths and weights": ({}, ("lengths", "sample_weight")),
    "mask and weights, fused": ({"activation": ("leaky_relu", 0.1)}, ("mask", "sample_weight", "residual")),
}
CASES = [(what, layout, dtype) for what in OPTIONS for layout in AXES for dtype in ("float32", "float64", "float16")]


def given(n, layout, dtype, seed=3):
    """(x, dy, {name: what a forward takes}) of a joined batch of n samples."""
    rng = np.random.default_rng(seed)
    shape = (n, *SHAPE) if layout == "first" else (n, *SHAPE[1:], SHAPE[0])
    x, dy, z = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    along = shape[2] if layout == "first" else shape[1]
    options = {
        "residual": z,
        "mask": rng.random((n, *SHAPE[1:])) < 0.7,
        "lengths": rng.integers(1, along + 1, n),
        "sample_weight": rng.uniform(0.5, 2, n),
    }
    return (x + 3).astype(dtype), dy, options


def step(layer, x, dy, options):
    """Forward, backward, evaluation: everything that comes out."""
    y = layer(x, **options)
    dx = layer.backward(dy)
    dx, dz = dx if isinstance(dx, tuple) else (dx, None)
    found = {"y": y, "dx": dx, "dz": dz, "dweight": layer.weight_grad, "dbias": layer.bias_grad}
    found |= {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    evaluated = layer.eval()(x, **{k: v for k, v in options.items() if k == "residual"})
    return {name: None if a is None else np.array(a) for name, a in (found | {"evaluated": evaluated}).items()}


def made(cls, what, layout, dtype, **kwargs):
    layer = cls(SHAPE[0], channel_axis=AXES[layout], dtype="float64" if dtype == "float64" else "float32",
                **OPTIONS[what][0], **kwargs)  # fmt: skip
    if layer.weight is not None:
        layer.weight[:] = np.linspace(0.5, 2, SHAPE[0])
        layer.bias[:] = np.linspace(-1, 1, SHAPE[0])
    return layer


def values(comm):
    """All cases on this rank's part."""
    from cbn.mpi import SyncBatchNorm

    sizes, found = SIZES[comm.size], {}
    part = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    for case in CASES:
        x, dy, options = given(sum(sizes), *case[1:])
        options = {name: options[name][part] for name in OPTIONS[case[0]][1]}
        found[case] = step(made(SyncBatchNorm, *case, timeout=20), x[part], dy[part], options)
    return found


def in_flight(comm):
    """Two layers whose forward passes are under way at once."""
    from cbn.mpi import SyncBatchNorm

    x, dy, _ = given(comm.size * 2, "first", "float64")
    part = slice(2 * comm.rank, 2 * comm.rank + 2)
    layers = [made(SyncBatchNorm, "plain", "first", "float64") for _ in range(2)]
    started = [layer.start_forward(scale * x[part]) for layer, scale in zip(layers, (1, 2), strict=True)]
    y = [layer.finish_forward(s) for layer, s in zip(layers, started, strict=True)]
    try:
        layers[0].finish_forward(started[0])
    except RuntimeError as error:
        y.append(str(error))
    return {"y": y, "dx": [layer.backward(dy[part]) for layer in layers]}


def freed(comm):
    """A communicator of all ranks, and after its end one of two, which may have its handle."""
    from cbn.mpi import SyncBatchNorm

    x = given(3, "first", "float64")[0][comm.rank : comm.rank + 1]
    found = []
    for color in (0, comm.rank // 2):
        part = comm.Split(color)
        found.append(SyncBatchNorm(5, dtype="float64", comm=part, timeout=5)(x))
        part.Free()
    return found


def missing(comm):
    """Rank 1 raises in the middle of a step; the others say so in time."""
    import time

    from cbn.mpi import SyncBatchNorm

    layer = SyncBatchNorm(5, timeout=1.5, name="stage 2")
    x, dy, _ = given(4, "first", "float32")
    layer(x)
    try:
        return missing_of(layer, lambda: layer.backward(dy if comm.rank != 1 else dy[:2]))
    except ValueError as error:
        time.sleep(4)
        return str(error)


def killed(comm):
    """Rank 1 is killed in the middle of a step; the others write what they were told, and end by themselves."""
    import os
    import signal

    from cbn.mpi import SyncBatchNorm

    layer = SyncBatchNorm(5, timeout=1.5, name="stage 2")
    x, dy, _ = given(4, "first", "float32")
    layer(x)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return missing_of(layer, lambda: layer.backward(dy))


def missing_of(layer, call):
    """(message, ranks missing, seconds, what a later call says) of a call for which ranks do not come."""
    import time

    from cbn.mpi import MissingRanksError

    begin = time.monotonic()
    try:
        call()
    except MissingRanksError as error:
        first = str(error), error.ranks, time.monotonic() - begin
        try:
            layer(given(4, "first", "float32")[0])
        except RuntimeError as after:
            return (*first, str(after))


def details(comm):
    """Copies, pickles, evaluation, given moments, refusals; on two ranks, which all take part."""
    import copy

    import cbn
    from cbn.mpi import SyncBatchNorm

    x = given(4, "first", "float64")[0][2 * comm.rank : 2 * comm.rank + 2]
    layer = SyncBatchNorm(5, dtype="float64")
    found = {"refused": []}
    for arguments, kwargs in (
        ((5,), {"ghost_batch_size": 4}),
        ((5,), {"renorm": (3, 5)}),
        ((5,), {"comm": 3}),
        ((5,), {"timeout": 0}),
        ((5,), {"timeout": "long"}),
    ):
        try:
            SyncBatchNorm(*arguments, **kwargs)
        except (TypeError, ValueError) as error:
            found["refused"].append(str(error))
    layer.use_batch_stats = False
    try:
        layer(x)
    except ValueError as error:
        found["refused"].append(str(error))
    layer.use_batch_stats = None
    found["alone"] = layer(x, moments=cbn.moments(x))  # exchanges nothing, and neither does its backward
    layer(x, moments=cbn.moments(given(4, "first", "float64")[0]))
    try:
        layer.backward(x)
    except RuntimeError as error:
        found["refused"].append(str(error))
    layer.running_mean[:], layer.running_var[:] = 0, 1
    if comm.rank == 0:
        found["eval"] = layer.eval()(x)  # the other rank is not there
        layer.train()
    for name, other in (("copied", copy.copy(layer)), ("pickled", pickle.loads(pickle.dumps(layer)))):
        found[name] = other(x)
    lazy = SyncBatchNorm(None, dtype="float64")
    found["lazy"] = lazy(x)
    try:
        layer(x[:1, :, :1, :1] if comm.rank == 0 else x[:0])
    except ValueError as error:
        found["refused"].append(str(error))
    return found


def main(name, folder):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    found = globals()[name](comm)
    Path(folder, f"{comm.rank}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
