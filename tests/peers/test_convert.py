"""Layers of other systems, against those systems themselves where they are installed."""

import numpy as np
import pytest

import cbn

from . import peer

torch = peer("torch")


def fill(rng, module):
    """Parameters and statistics that are no defaults."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            if getattr(module, name) is not None:
                getattr(module, name).copy_(torch.from_numpy(rng.normal(size=module.num_features)))
        if module.running_var is not None:
            module.running_var.copy_(torch.from_numpy(rng.uniform(0.1, 3, module.num_features)))
            module.num_batches_tracked += 7
    return module


@pytest.mark.parametrize("cls", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"eps": 1e-2, "momentum": None}, {"momentum": 0.3}])
def test_from_torch(rng, cls, kwargs):
    module = fill(rng, getattr(torch.nn, cls)(5, **kwargs)).eval()
    bn = cbn.from_torch(module)
    assert type(bn).__name__ == cls.replace("Sync", "")
    assert (bn.eps, bn.momentum, bn.training, int(bn.num_batches_tracked)) == (module.eps, module.momentum, False, 7)
    x = rng.normal(size=(4, 5, *[3] * {"BatchNorm1d": 0, "BatchNorm3d": 3}.get(cls, 2))).astype(np.float32)
    np.testing.assert_allclose(bn(x), module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    if cls != "SyncBatchNorm":  # which does not train on a CPU
        y = module.train()(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(bn.train()(x), y, atol=1e-5)
        np.testing.assert_allclose(bn.running_var, module.running_var.numpy(), rtol=1e-5)


def test_from_torch_takes_the_type_and_the_mode(rng):
    module = fill(rng, torch.nn.BatchNorm2d(3))
    assert cbn.from_torch(module.double()).dtype == np.float64
    assert cbn.from_torch(module.double()).training
    half = cbn.from_torch(module.bfloat16())
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half.weight, module.weight.detach().float().numpy())
    assert cbn.from_torch(torch.nn.BatchNorm1d(3, track_running_stats=False)).running_mean is None


def test_from_torch_copies(rng):
    module = fill(rng, torch.nn.BatchNorm1d(3))
    bn = cbn.from_torch(module)
    before = bn.weight.copy()
    with torch.no_grad():
        module.weight += 1
    np.testing.assert_array_equal(bn.weight, before)


def test_from_torch_refuses(rng):
    with pytest.raises(TypeError, match=r"expected a batch norm of torch.nn, not torch.nn.modules.linear.Linear"):
        cbn.from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LazyBatchNorm1d has no parameters before its first input"):
        cbn.from_torch(torch.nn.LazyBatchNorm1d())


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"dtype": np.float64}, {"track_running_stats": False}])
def test_to_torch_state(rng, kwargs):
    bn = cbn.BatchNorm2d(4, **kwargs)
    bn(rng.normal(size=(3, 4, 5, 5)))
    flags = {k: v for k, v in kwargs.items() if k != "dtype"}
    module = torch.nn.BatchNorm2d(4, dtype=torch.float64 if "dtype" in kwargs else torch.float32, **flags)
    state = cbn.to_torch_state(bn)
    assert not module.load_state_dict(state).missing_keys
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(getattr(module, name).detach().numpy(), value)
    if bn.running_mean is not None:
        state["running_mean"] += 1
        assert not np.array_equal(bn.running_mean, state["running_mean"].numpy())


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


def test_from_flax(rng):
    linen = peer("flax.linen")
    jax = peer("jax")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return linen.BatchNorm(use_running_average=not train, epsilon=0.1, use_bias=False)(x)

    x = rng.normal(1, 2, size=(6, 4, 3)).astype(np.float32)
    model = Model()
    variables = model.init(jax.random.key(0), x, train=False)
    y, variables_after = model.apply(variables, x, train=True, mutable=["batch_stats"])
    first = cbn.from_flax(variables, name="BatchNorm_0", momentum=0.9)
    second = cbn.from_flax(variables, name="BatchNorm_1", epsilon=0.1)
    assert (first.momentum, second.momentum, second.bias) == (0.1, 0.01, None)
    np.testing.assert_allclose(second.train()(first.train()(x)), np.asarray(y), atol=2e-5)
    for bn, name in ((first, "BatchNorm_0"), (second, "BatchNorm_1")):
        after = variables_after["batch_stats"][name]
        np.testing.assert_allclose(bn.running_mean, np.asarray(after["mean"]), atol=1e-5)
        np.testing.assert_allclose(bn.running_var, np.asarray(after["var"]), rtol=1e-4)
    y = model.apply({**variables, **variables_after}, x, train=False)
    np.testing.assert_allclose(second.eval()(first.eval()(x)), np.asarray(y), atol=2e-5)
