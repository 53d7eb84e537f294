"""Layers of other systems, against those systems themselves where they are installed."""

import numpy as np
import pytest

import cbn

from . import peer

peer("torch")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kwargs", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.1, "momentum": 0.9}])
def test_from_keras(rng, axis, kwargs, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = peer("keras")
    layer = keras.layers.BatchNormalization(axis=axis, **kwargs)
    layer.build((None, 3, 4, 3))
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 2, 3))
    bn = cbn.from_keras(layer)
    assert (bn.eps, bn.training, bn.channel_axis) == (layer.epsilon, False, axis)
    np.testing.assert_allclose(bn.momentum, 1 - layer.momentum, rtol=1e-12)
    x = rng.normal(size=(5, 3, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(bn(x), np.asarray(layer(x, training=False).detach()), atol=1e-5)
    np.testing.assert_allclose(bn.train()(x), np.asarray(layer(x, training=True).detach()), atol=1e-5)
    np.testing.assert_allclose(bn.running_mean, np.asarray(layer.moving_mean.value.detach()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bn.running_var, np.asarray(layer.moving_variance.value.detach()), rtol=1e-5)


def test_from_keras_refuses(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = peer("keras")
    with pytest.raises(ValueError, match="the Keras layer has no variables before it is built"):
        cbn.from_keras(keras.layers.BatchNormalization())
    with pytest.raises(TypeError, match=r"expected keras.layers.BatchNormalization, not .*Dense"):
        cbn.from_keras(keras.layers.Dense(2))
