"""Layers from Haiku, against the modules that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

jax = peer("jax")
hk = peer("haiku")


def make(rng, steps, shape=(6, 4, 3), **kwargs):
    """A module that has seen this many batches: its apply, parameters and state."""
    kwargs = {"create_scale": True, "create_offset": True, "decay_rate": 0.9, **kwargs}
    model = hk.transform_with_state(lambda x, is_training: hk.BatchNorm(**kwargs)(x, is_training))
    x = rng.normal(1, 2, size=shape).astype(np.float32)
    params, state = model.init(jax.random.key(0), x, True)
    params = jax.tree.map(lambda a: jax.numpy.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), params)
    apply = jax.jit(model.apply, static_argnums=4)
    for _ in range(steps):
        x = rng.normal(1, 2, size=shape).astype(np.float32)
        _, state = apply(params, state, None, x, True)
    return apply, params, state


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"eps": 0.1},
        {"create_scale": False},
        {"create_scale": False, "create_offset": False},
        {"data_format": "channels_first"},
    ],
)
def test_from_haiku(rng, kwargs):
    shape = (6, 3, 4) if "data_format" in kwargs else (6, 4, 3)
    apply, params, state = make(rng, 170, shape, **kwargs)
    ours = {k: v for k, v in kwargs.items() if not k.startswith("create")}
    if not params:
        with pytest.raises(ValueError, match=r"no parameters 'batch_norm'; .*pass create_scale=False, create_offset=F"):
            cbn.from_haiku(params, state, decay_rate=0.9, **ours)
        ours |= {"create_scale": False, "create_offset": False}
    bn = cbn.from_haiku(params, state, decay_rate=0.9, **ours)
    assert (bn.momentum, bn.training, int(bn.num_batches_tracked)) == (0.1, False, 170)
    x = rng.normal(1, 2, size=shape).astype(np.float32)
    np.testing.assert_allclose(bn(x), np.asarray(apply(params, state, None, x, False)[0]), atol=2e-5)
    y, state = apply(params, state, None, x, True)
    np.testing.assert_allclose(bn.train()(x), np.asarray(y), atol=2e-5)
    after = cbn.from_haiku(params, state, decay_rate=0.9, **ours)
    np.testing.assert_allclose(bn.running_mean, after.running_mean, atol=1e-5)
    np.testing.assert_allclose(bn.running_var, after.running_var, rtol=1e-4)


def test_few_batches_are_for_evaluation(rng):
    apply, params, state = make(rng, 3)
    with pytest.raises(ValueError, match=r"has seen 3 batches, and Haiku corrects .*pass frozen=True"):
        cbn.from_haiku(params, state, decay_rate=0.9)
    with pytest.raises(ValueError, match=r"decay_rate=0\.99 is not that of the module"):
        cbn.from_haiku(params, state, decay_rate=0.99, frozen=True)
    bn = cbn.from_haiku(params, state, decay_rate=0.9, frozen=True)
    x = rng.normal(1, 2, size=(6, 4, 3)).astype(np.float32)
    for mode in (True, False):
        np.testing.assert_allclose(bn.train(mode)(x), np.asarray(apply(params, state, None, x, False)[0]), atol=2e-5)


def test_averages_that_never_move_are_refused(rng):
    for decay_rate in (0.9, 1.0):
        _, params, state = make(rng, 2, decay_rate=decay_rate)
        with pytest.raises(ValueError, match=r"decay_rate=1 is not that of the module|a weight of 1\.0 for the old"):
            cbn.from_haiku(params, state, decay_rate=1)


def test_a_model_of_several(rng):
    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.5, name="first")(x, is_training)
        return hk.BatchNorm(True, True, 0.5, name="second")(x, is_training)

    model = hk.transform_with_state(forward)
    x = rng.normal(3, 2, size=(6, 3)).astype(np.float32)
    params, state = model.init(jax.random.key(0), x, True)
    for _ in range(30):
        _, state = model.apply(params, state, None, x, True)
    first, second = (cbn.from_haiku(params, state, name=n, decay_rate=0.5) for n in ("first", "second"))
    np.testing.assert_allclose(second(first(x)), np.asarray(model.apply(params, state, None, x, False)[0]), atol=2e-5)
    with pytest.raises(ValueError, match="name one of 'first', 'second'"):
        cbn.from_haiku(params, state, decay_rate=0.5)
