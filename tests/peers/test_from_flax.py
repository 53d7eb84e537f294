"""Layers of other systems, against those systems themselves where they are installed."""

import numpy as np
import pytest

import cbn

from . import peer

peer("torch")


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
