"""Layers from Equinox, against the layers that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

jax = peer("jax")
eqx = peer("equinox")


def make(rng, steps, **kwargs):
    """A layer that has seen this many batches, and its state."""
    kwargs = {"mode": "batch", "momentum": 0.9, **kwargs}
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", **kwargs)
    if layer.weight is not None:
        new = [jax.numpy.asarray(rng.uniform(0.5, 2, 3), layer.weight.dtype) for _ in range(2)]
        layer = eqx.tree_at(lambda bn: (bn.weight, bn.bias), layer, new)
    for _ in range(steps):
        _, state = call(layer, state, rng.normal(1, 2, size=(6, 3, 4)).astype(np.float32))
    return layer, state


def call(layer, state, x, inference=None):
    forward = jax.vmap(
        lambda x, state: layer(x, state, inference=inference), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
    )
    y, state = forward(jax.numpy.asarray(x), state)
    return np.asarray(y), state


@pytest.mark.parametrize("kwargs", [{}, {"channelwise_affine": False}, {"eps": 0.1}])
def test_from_equinox(rng, kwargs):
    layer, state = make(rng, 170, **kwargs)
    bn = cbn.from_equinox(layer, state)
    assert (bn.eps, bn.momentum, bn.training, bn.frozen) == (layer.eps, 0.1, True, False)
    assert int(bn.num_batches_tracked) == 170
    x = rng.normal(1, 2, size=(6, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(bn.eval()(x), call(layer, state, x, inference=True)[0], atol=2e-5)
    y, state = call(layer, state, x)
    np.testing.assert_allclose(bn.train()(x), y, atol=2e-5)
    after = cbn.from_equinox(layer, state)
    np.testing.assert_allclose(bn.running_mean, after.running_mean, atol=2e-5)
    np.testing.assert_allclose(bn.running_var, after.running_var, rtol=2e-5)
    assert bn.num_batches_tracked == after.num_batches_tracked


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_equinox_parameters_of_16_bits(rng, dtype):
    layer, state = make(rng, 170)
    halves = (layer.weight.astype(dtype), layer.bias.astype(dtype))
    layer = eqx.tree_at(lambda bn: (bn.weight, bn.bias), layer, halves)
    bn = cbn.from_equinox(layer, state)
    assert bn.dtype == np.float32
    x = rng.normal(1, 2, size=(6, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(bn.eval()(x), call(layer, state, x, inference=True)[0], atol=2e-5)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_few_equinox_batches_are_for_evaluation(rng, steps):
    layer, state = make(rng, steps)
    with pytest.raises(ValueError, match=rf"has seen {steps} batches, and Equinox corrects .*pass frozen=True"):
        cbn.from_equinox(layer, state)
    bn = cbn.from_equinox(layer, state, frozen=True)
    x = rng.normal(1, 2, size=(6, 3, 4)).astype(np.float32)
    expected, _ = call(layer, state, x, inference=True)
    for mode in (True, False):
        np.testing.assert_allclose(bn.train(mode)(x), expected, atol=1e-4)


def test_equinox_averages_that_never_move_are_refused(rng):
    layer, state = make(rng, 2, momentum=1.0)
    with pytest.raises(ValueError, match=r"with a weight of 1\.0 for the old statistics Equinox has none"):
        cbn.from_equinox(layer, state)


def test_moving_statistics_in_training_are_for_evaluation(rng):
    layer, state = make(rng, 3, mode="ema")
    with pytest.raises(ValueError, match='mode="ema": in training it normalizes with the running statistics'):
        cbn.from_equinox(layer, state)
    x = rng.normal(1, 2, size=(6, 3, 4)).astype(np.float32)
    expected, _ = call(layer, state, x, inference=True)
    np.testing.assert_allclose(cbn.from_equinox(layer, state, frozen=True)(x), expected, atol=2e-5)
    with pytest.raises(ValueError, match="has seen no batch"):
        cbn.from_equinox(*make(rng, 0, mode="ema"), frozen=True)


def test_a_layer_of_a_model_in_inference_mode(rng):
    class Model(eqx.Module):
        first: eqx.nn.BatchNorm
        second: eqx.nn.BatchNorm

        def __init__(self):
            self.first = eqx.nn.BatchNorm(3, "batch", mode="batch", momentum=0.5)
            self.second = eqx.nn.BatchNorm(3, "batch", mode="batch", momentum=0.5)

    model, state = eqx.nn.make_with_state(Model)()
    for _ in range(30):
        x = rng.normal(5, 2, size=(6, 3, 4)).astype(np.float32)
        y, state = call(model.first, state, x)
        _, state = call(model.second, state, y)
    model = eqx.nn.inference_mode(model)
    bn = cbn.from_equinox(model.second, state)
    assert not bn.training
    np.testing.assert_allclose(bn(y), call(model.second, state, y)[0], atol=2e-5)


def test_from_equinox_refuses(rng):
    class Doubled(eqx.nn.BatchNorm):
        def __call__(self, x, state, *, key=None, inference=None):
            y, state = super().__call__(x, state, key=key, inference=inference)
            return 2 * y, state

    layer, state = make(rng, 0)
    with pytest.raises(TypeError, match=r"expected equinox.nn.BatchNorm, not equinox.*LayerNorm"):
        cbn.from_equinox(eqx.nn.LayerNorm(3), state)
    with pytest.raises(TypeError, match=r"state must be an equinox.nn.State, not builtins.dict"):
        cbn.from_equinox(layer, {})
    with pytest.raises(TypeError, match="Doubled redefines __call__ of BatchNorm"):
        cbn.from_equinox(*eqx.nn.make_with_state(Doubled)(3, "batch", mode="batch"))
    _, other = eqx.nn.make_with_state(eqx.nn.Sequential)([eqx.nn.BatchNorm(3, "batch", mode="batch")])
    with pytest.raises(ValueError, match="the state has no entry for this layer"):
        cbn.from_equinox(layer, other)
