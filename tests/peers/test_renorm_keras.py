"""Batch renormalization against Keras' layer with `renorm=True`."""

import numpy as np
import pytest

import cbn

from . import peer

torch = peer("torch")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(("r_max", "d_max"), [(1.1, 0.2), (3, 5)])
def test_ten_steps(rng, axis, r_max, d_max, monkeypatch):
    """Outputs and gradients, from the same statistics before each step.

    Keras averages standard deviations, as the paper does; cbn, as its other modes need them, variances. Both see
    the same in a step.
    """
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = peer("keras")
    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    layer = keras.layers.BatchNormalization(axis=axis, renorm=True, renorm_clipping=clipping, renorm_momentum=0.9)
    layer.build((None, 3, 4, 3))
    bn = cbn.BatchNorm2d(3, eps=1e-3, channel_axis=axis, running_var="biased", renorm=(r_max, d_max))
    for name, variable in (("weight", layer.gamma), ("bias", layer.beta)):
        getattr(bn, name)[:] = rng.uniform(0.5, 2, 3)
        variable.assign(getattr(bn, name))
    corrected = 0
    for step in range(10):
        layer.renorm_mean.assign(bn.running_mean)
        layer.renorm_stddev.assign(np.sqrt(bn.running_var + 1e-3))
        x = rng.normal(step / 5, 1 + step / 5, size=(5, 3, 4, 3)).astype(np.float32)
        dy = rng.normal(size=x.shape).astype(np.float32)
        t = torch.from_numpy(x).requires_grad_()
        expected = layer(t, training=True)
        y = bn(x)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
        expected.backward(torch.from_numpy(dy))
        bn.zero_grad()
        np.testing.assert_allclose(bn.backward(dy), t.grad.numpy(), rtol=1e-4, atol=1e-5)
        for found, variable in ((bn.weight_grad, layer.gamma), (bn.bias_grad, layer.beta)):
            np.testing.assert_allclose(found, variable.value.grad.numpy(), rtol=1e-4, atol=1e-4)
            variable.value.grad = None
        np.testing.assert_allclose(bn.running_mean, layer.renorm_mean.value.detach().numpy(), rtol=1e-5, atol=1e-6)
        plain = cbn.BatchNorm2d(3, eps=1e-3, channel_axis=axis)
        plain.weight, plain.bias = bn.weight, bn.bias
        corrected += not np.allclose(plain(x), y, atol=1e-3)
    assert corrected == 10
