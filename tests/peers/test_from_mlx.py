"""Layers from MLX, against the layers that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

mx = peer("mlx.core")
nn = peer("mlx.nn")


def filled(rng, layer):
    for name in list(layer):
        layer[name] = mx.array(rng.uniform(0.5, 2, 3).astype(np.float32))
    return layer


def same(layer, bn, rng):
    """y in both modes, and the running statistics after a training step."""
    for training in (True, False):
        x = rng.normal(1, 2, size=(6, 4, 3)).astype(np.float32)
        y = np.array(layer.train(training)(mx.array(x)).astype(mx.float32))
        np.testing.assert_allclose(bn.train(training)(x), y, atol=2e-5)
        for name in ("running_mean", "running_var"):
            if layer.track_running_stats:
                np.testing.assert_allclose(getattr(bn, name), np.array(layer[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"eps": 0.1, "momentum": 0.3}, {"track_running_stats": False}]
)
def test_from_mlx(rng, kwargs):
    layer = filled(rng, nn.BatchNorm(3, **kwargs))
    bn = cbn.from_mlx(layer)
    assert (bn.eps, bn.momentum, bn.training, bn.channel_axis) == (layer.eps, layer.momentum, True, -1)
    same(layer, bn, rng)
    assert not cbn.from_mlx(layer.eval()).training


def test_versions_with_the_biased_variance(rng, monkeypatch):
    """As MLX was before 0.32.1: what is tracked is what normalizes."""
    calc = nn.BatchNorm._calc_stats
    monkeypatch.setattr(nn.BatchNorm, "_calc_stats", lambda self, x, ddof=0: calc(self, x))
    layer = filled(rng, nn.BatchNorm(3))
    bn = cbn.from_mlx(layer)
    same(layer, bn, rng)
    x = mx.array(rng.normal(size=(2, 3)).astype(np.float32))
    before = np.array(layer.running_var)
    layer.train()(x)
    np.testing.assert_allclose(np.array(layer.running_var), 0.9 * before + 0.1 * np.array(x).var(axis=0), rtol=1e-4)


def test_statistics_that_are_switched_off_later(rng):
    layer = filled(rng, nn.BatchNorm(3))
    layer.track_running_stats = False
    bn = cbn.from_mlx(layer)
    assert bn.running_mean is None
    same(layer, bn, rng)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mlx_parameters_of_16_bits(rng, dtype):
    layer = filled(rng, nn.BatchNorm(3))
    layer.set_dtype(getattr(mx, dtype))
    bn = cbn.from_mlx(layer)
    assert bn.dtype == np.float32
    np.testing.assert_array_equal(bn.weight, np.array(layer.weight.astype(mx.float32)))


def test_from_mlx_refuses(rng):
    class Doubled(nn.BatchNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Plain(nn.BatchNorm):
        def describe(self):
            return "a method of its own"

    assert cbn.from_mlx(Plain(3)).num_features == 3
    with pytest.raises(TypeError, match="Doubled redefines __call__ of BatchNorm"):
        cbn.from_mlx(Doubled(3))
    with pytest.raises(TypeError, match=r"expected mlx.nn.BatchNorm, not mlx.nn.*LayerNorm"):
        cbn.from_mlx(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        cbn.from_mlx(nn.BatchNorm(3, momentum=1.5))
    layer = nn.BatchNorm(3, track_running_stats=False)
    layer.track_running_stats = True
    with pytest.raises(ValueError, match="has track_running_stats, but no running_mean"):
        cbn.from_mlx(layer)
