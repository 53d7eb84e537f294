"""What people write, and both type checkers must accept; it runs too, so that no line here is wrong."""

# pyright: strict

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import cbn
from cbn.checks import ArrayLike
from cbn.functional import (
    batch_norm,
    batch_norm_jvp,
    native_batch_norm,
    native_batch_norm_backward,
    native_batch_norm_double_backward,
)


class Data:
    """An object that numpy reads, as those of pandas, PyTorch and JAX."""

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.float64]:
        return np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 6.0]])


class Doubled(cbn.BatchNorm1d):
    """A subclass with a forward of its own, which its calls follow."""

    def forward(self, x: ArrayLike, *, factor: float = 2, **options: Any) -> npt.NDArray[np.float32]:
        return np.asarray(factor * super().forward(x, **options), np.float32)


def inputs() -> None:
    bn = cbn.BatchNorm1d(3)
    x = np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 6.0]], np.float32)
    rows = [[1.0, 2.0, 3.0], [4.0, 0.0, 6.0]]
    several: Sequence[Sequence[float]] = rows
    for y in (bn(x), bn(x.T.T), bn(x.astype("float64")), bn(x.astype(np.float16)), bn(x.astype(ml_dtypes.bfloat16))):
        assert y.shape == (2, 3)
    assert bn(rows).sum() + bn(several).sum() < 1
    assert bn(((1.0, 2.0, 3.0), (4.0, 0.0, 6.0))).dtype == np.float64
    assert bn([x[0], x[1]]).mean() < 1
    assert bn([[np.float64(1), np.float64(2), np.float32(3)]] * 2, residual=None).ndim == 2
    assert bn(Data()).shape == bn(x, residual=x).shape == bn(x, out=x).shape == bn.forward(x).shape
    assert Doubled(3)(x, factor=3).shape == (2, 3)


def attributes() -> None:
    bn = cbn.BatchNorm2d(3, eps=1e-3, momentum=None, activation="relu", dtype="float64", channel_axis=-1)
    assert int(bn.num_batches_tracked) == 0
    assert (bn.weight * 2).sum() == 6
    assert bn.weight @ bn.bias == 0
    assert bn.running_mean[0] + bn.running_var[1] == 1
    assert bn.weight is not None
    bn.weight[...] = 1.5
    bn.bias += 1
    bn.bias[:] = [1, 2, 3]
    bn.weight -= 0.1 * bn.weight_grad
    bn.weight = np.ones(3)
    bn.weight = None
    bn.running_var = np.ones(3, np.float32)
    bn.num_batches_tracked = np.array(3)
    bn.num_batches_tracked += 1
    bn.eps = 1e-4
    bn.momentum = 0.5
    bn.momentum *= 0.5
    bn.momentum = None
    bn.activation = ("leaky_relu", 0.1)
    bn.training = False
    bn.train().eval().freeze().unfreeze().zero_grad()
    assert not bn.training
    assert bn.num_features + 1 == 4
    assert bn.dtype.itemsize == 8
    assert [p.size for p in bn.parameters()] == [3]
    assert cbn.BatchNorm1d(3, 1e-5, 0.1, True, False).eps * 2 > 0


def steps() -> None:
    bn = cbn.BatchNorm1d(3, activation=("leaky_relu", 0.01))
    x = np.eye(3, dtype=np.float32)
    y = bn(x)
    assert bn.backward(y).sum() < 1
    dx = bn.backward(y, out=x)
    assert dx.shape == x.shape
    bn(np.eye(3), residual=np.ones((3, 3)))
    dx, dz = bn.backward(y)
    assert dx.shape == dz.shape
    plan = bn.eval().plan((3, 3))
    assert plan(y, out=y).shape == plan(y, residual=y).shape == plan(y).shape
    assert bn.plan(x.shape, dtype=np.float64).shape == (3, 3)
    other = cbn.BatchNorm1d(3)
    other.load_state_dict(bn.state_dict())
    missing, unexpected = other.load_state_dict({"weight": [1.0, 2.0, 3.0]}, strict=False)
    assert missing
    assert not unexpected


def functions() -> None:
    x, mean, var = np.eye(3), np.zeros(3), np.ones(3)
    assert batch_norm(x, mean, var, weight=[1.0, 2.0, 3.0], training=True).sum() < 1
    assert batch_norm(x.astype(np.uint8), mean, var, x_scale=1 / 255, x_zero_point=0, out_dtype=np.float32).ndim == 2
    y, save_mean, save_invstd = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    dx, dweight, dbias = native_batch_norm_backward(y, x, None, None, None, save_mean, save_invstd, True, 1e-5)
    assert dx.sum() + dweight.sum() + dbias.sum() < 10
    statistics = None, None, save_mean, save_invstd, True, 1e-5
    of_dy, of_x, of_weight = native_batch_norm_double_backward(dx, None, [1.0, 0.0, 1.0], y, x, mean + 1, *statistics)
    assert of_dy.shape == of_x.shape
    assert of_weight.shape == (3,)
    assert batch_norm_jvp(x, None, None, x, None, None, *statistics).dtype == np.float64
    counted = cbn.moments(x, mask=x[:, 0] > 0, weights=[1.0, 2.0, 0.5], skipna=True, extrema=True)
    running = cbn.RunningMoments(3, prior=(0, 1, 1e-4)).update(x).merge(counted)
    y = running.standardize(x, clip=10, out=cbn.standardize(x, running.mean, running.var(), dtype=np.float64))
    running.load_state_dict(running.state_dict())
    cbn.BatchNorm(3, activation=("clip", 0, 6))
    total = cbn.moments(x) + cbn.Moments(3, [0.0, 0.0, 0.0], np.ones(3))
    assert cbn.Moments.merge([total, total]).var(correction=1).mean() > 0
    merged = cbn.Moments.merge([layer.running_moments(9) for layer in (cbn.BatchNorm(3), cbn.BatchNorm1d(3))])
    layer = cbn.BatchNorm1d(3)
    layer.set_running_moments(merged)
    assert (layer.running_moments([2.0, 3.0, 4.0]).mean == 0).all()
    assert cbn.recalibrate(layer, [x, [[1.0, 2.0, 3.0]]], progress=False).mean_error.max() >= 0
    several = cbn.recalibrate([layer, cbn.BatchNorm1d(3)][:1], (x for _ in range(2)), forward=layer)
    assert [one.batches for one in several] == [2]
    report = layer.check(x)
    assert not report.ok or report.far.size + report.nan_count.sum() == 0
    folded, bias = cbn.fuse_linear_bn([[1.0, 2.0]], None, cbn.BatchNorm1d(1).eval())
    assert folded.shape == (1, 2)
    assert bias.shape == (1,)
    with cbn.num_threads(1):
        assert cbn.get_num_threads() == 1
    cbn.empty_cache()
    assert cbn.reference.batch_norm(x, None, None, training=True)[0].shape == (3, 3)


if __name__ == "__main__":
    inputs()
    attributes()
    steps()
    functions()
