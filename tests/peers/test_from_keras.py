"""Layers from Keras, against the layers that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

peer("torch")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own


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


# ---- the same values, or a refusal -----------------------------------------------------------------------------------


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return peer("keras")


def built(rng, layer):
    layer.build((None, 4, 3))
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 2, 3))
    return layer


def numbers(a):
    return np.asarray(a.detach().float() if hasattr(a, "detach") else a)


def test_a_layer_that_is_not_trainable_is_frozen(rng, keras):
    layer = built(rng, keras.layers.BatchNormalization())
    layer.trainable = False
    bn = cbn.from_keras(layer)
    assert (bn.frozen, bn.training) == (True, False)
    x = rng.normal(size=(5, 4, 3)).astype(np.float32)
    for mode in (True, False):
        np.testing.assert_allclose(bn.train(mode)(x), numbers(layer(x, training=mode)), atol=1e-5)
    np.testing.assert_array_equal(bn.running_var, numbers(layer.moving_variance.value))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_dtype_policies(rng, keras, policy):
    layer = built(rng, keras.layers.BatchNormalization(dtype=policy))
    bn = cbn.from_keras(layer)
    assert bn.dtype == (np.float64 if policy == "float64" else np.float32)
    x = rng.normal(size=(5, 4, 3)).astype(np.float16).astype(np.float32)
    limit = {"float64": 1e-5, "mixed_float16": 1e-2, "float16": 1e-2}.get(policy, 5e-2)
    for mode in (False, True):
        np.testing.assert_allclose(bn.train(mode)(x), numbers(layer(x, training=mode)), atol=limit)


def test_the_running_variance_can_be_chosen(rng, keras):
    layer = built(rng, keras.layers.BatchNormalization())
    x = rng.normal(size=(2, 2, 3)).astype(np.float32)
    ratio = {}
    for kind in ("biased", "unbiased"):
        bn = cbn.from_keras(layer, running_var=kind).train()
        before = bn.running_var * (1 - bn.momentum)
        bn(x)
        ratio[kind] = bn.running_var - before
    np.testing.assert_allclose(ratio["unbiased"], ratio["biased"] * 4 / 3, rtol=1e-3)
    with pytest.raises(ValueError, match="running_var must be 'unbiased', 'biased' or None, not 'both'"):
        cbn.from_keras(layer, running_var="both")


def test_a_subclass_that_redefines_nothing_is_taken(rng, keras):
    class Mine(keras.layers.BatchNormalization):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

        def get_config(self):
            return super().get_config()

    assert cbn.from_keras(built(rng, Mine())).num_features == 3


def test_what_may_compute_something_else_is_refused(rng, keras, monkeypatch):
    class Doubled(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    class OtherMoments(keras.layers.BatchNormalization):
        def _moments(self, inputs, mask):
            return super()._moments(inputs, mask)

    for cls, name in ((Doubled, "call"), (OtherMoments, "_moments")):
        with pytest.raises(TypeError, match=rf"{cls.__name__} redefines {name} of BatchNormalization"):
            cbn.from_keras(built(rng, cls()))
    layer = built(rng, keras.layers.BatchNormalization())
    layer.call = lambda inputs, **_: inputs
    with pytest.raises(TypeError, match="redefines call of BatchNormalization"):
        cbn.from_keras(layer)
    with monkeypatch.context() as patch:
        patch.setattr(keras.layers.BatchNormalization, "call", lambda self, x: x)
        with pytest.raises(TypeError, match="redefines call"):
            cbn.from_keras(built(rng, keras.layers.BatchNormalization()))


def test_other_statistics_are_refused(rng, keras):
    layer = built(rng, keras.layers.BatchNormalization(renorm=True))
    with pytest.raises(ValueError, match=r"batch renormalization \(renorm=True\), which cbn does not do"):
        cbn.from_keras(layer)
    layer = built(rng, keras.layers.BatchNormalization())
    layer.synchronized = True
    with pytest.raises(ValueError, match=r"from all replicas \(synchronized\), which cbn does not do"):
        cbn.from_keras(layer)
    layer = built(rng, keras.layers.BatchNormalization(momentum=1.5))
    with pytest.raises(ValueError, match=r"the Keras layer's momentum must be in \[0, 1\].*, but got 1\.5"):
        cbn.from_keras(layer)
    with pytest.raises(TypeError, match=r"expected keras\.layers\.BatchNormalization, not .*TimeDistributed"):
        cbn.from_keras(keras.layers.TimeDistributed(keras.layers.BatchNormalization()))
