"""Ghost batches: the bits of a layer that is called slice by slice, and the running statistics of the whole batch."""

import copy

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import ghost


def slices(n, size, values):
    """The slices of n samples, by the rule of the specification."""
    parts = [(a, min(a + size, n)) for a in range(0, n, size)]
    if len(parts) > 1 and values * (parts[-1][1] - parts[-1][0]) == 1:
        parts[-2:] = [(parts[-2][0], n)]
    return parts


def layer(rng, n, **kwargs):
    bn = cbn.BatchNorm(n, dtype=np.float64, **kwargs)
    bn.weight[:], bn.bias[:] = rng.standard_normal((2, n))
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal(n), rng.random(n) + 0.5
    return bn


def one_by_one(bn, x, dy, residual, parts, axis=0):
    """(y, dx, dresidual) of the layer without ghost batches, called for each slice; gradients add up in it."""
    results = []
    for a, b in parts:
        at = (slice(None),) * axis + (slice(a, b),)
        y = bn(x[at], residual=None if residual is None else residual[at])
        dx = bn.backward(dy[at])
        results.append((y, dx, dx) if residual is None else (y, *dx))
    return [np.concatenate(arrays, axis) for arrays in zip(*results, strict=True)]


SHAPES = [
    ((20, 3), 1),
    ((21, 3), 1),
    ((9, 3, 7), 1),
    ((9, 7, 3), -1),
    ((6, 3, 30, 40), 1),
    ((3, 17), 0),
    ((70, 200), 1),
    ((19, 1030), 1),  # few rows, of two tiles
]


@pytest.mark.parametrize("size", [2, 4, 5, 100])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", True), (("leaky_relu", 0.1), False)])
def test_the_bits_of_slices(rng, isa, size, shape, axis, dtype, activation, with_residual):
    x, dy, residual = ((rng.standard_normal(shape) * 2 + 3).astype(dtype) for _ in range(3))
    residual = residual if with_residual else None
    bn = layer(rng, shape[axis], channel_axis=axis, activation=activation, ghost_batch_size=size)
    plain = copy.deepcopy(bn)
    plain.ghost_batch_size = None
    samples = 1 if axis == 0 else 0
    parts = slices(shape[samples], size, x.size // shape[samples] // shape[axis])
    whole = cbn.moments(x, channel_axis=axis)
    expected = 0.9 * bn.running_mean + 0.1 * whole.mean, 0.9 * bn.running_var + 0.1 * whole.var(1)
    y_parts, dx_parts, dz_parts = one_by_one(plain, x, dy, residual, parts, samples)
    found = []
    for threads in (1, 2, 3):
        with cbn.num_threads(threads):
            one = copy.deepcopy(bn)
            y, dx = one(x, residual=residual), one.backward(dy)
        found.append((y, dx, one))
        dz = dx
        if with_residual:
            dx, dz = dx
            np.testing.assert_array_equal(dz, dz_parts)
        np.testing.assert_array_equal(y, y_parts)
        np.testing.assert_array_equal(dx, dx_parts)
        np.testing.assert_allclose(one.weight_grad, plain.weight_grad, rtol=1e-13, atol=1e-12)
        np.testing.assert_allclose(one.bias_grad, plain.bias_grad, rtol=1e-13, atol=1e-12)
        half = x.dtype.itemsize == 2  # its sums have the digits of float32
        np.testing.assert_allclose(one.running_mean, expected[0], rtol=1e-7 if half else 1e-14, atol=1e-15)
        np.testing.assert_allclose(one.running_var, expected[1], rtol=1e-6 if half else 1e-13)
        assert one.num_batches_tracked == 1
    for y, _, one in found[1:]:
        assert y.tobytes() == found[0][0].tobytes()
        assert all(np.array_equal(a, found[0][2].state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize(("n", "size"), [(2000, 3), (1100, 32), (130, 65), (64, 64), (65, 64), (400, 1000)])
def test_the_whole_batch_out_of_groups_of_slices(rng, parallel, n, size):
    """Running statistics of slices that come in groups, the last group and the last slice smaller than the others."""
    x = rng.standard_normal((n, 5)) * [1, 1, 1e-3, 1e5, 1] + [0, 1e4, 1, 0, 0]
    x[:, 4] = np.arange(n) // size  # slices that have a variance between them alone
    bn = layer(rng, 5, ghost_batch_size=size, momentum=1.0)
    bn(x)
    whole = cbn.moments(x)
    assert (abs(bn.running_mean - whole.mean) <= 1e-15 * (abs(whole.mean) + whole.std(1))).all()
    np.testing.assert_allclose(bn.running_var, whole.var(1), rtol=1e-12)
    x[n // 2, 0], x[1, 1] = np.inf, np.nan
    bn(x)
    assert bn.running_mean[0] == np.inf
    assert np.isnan(bn.running_mean[1])
    assert np.isnan(bn.running_var[:2]).all()


@pytest.mark.parametrize("size", [2, 8])
def test_in_place_other_types_and_strides(rng, size, parallel):
    """Gradients of another type, arrays no slice of which can be walked, overlapping outputs: slice by slice."""
    base = rng.standard_normal((16, 2, 3, 5)).astype(np.float32)
    for x in (base[:, 0], base[::-1, 1], np.asfortranarray(base[:, 0]), np.broadcast_to(base[:, 0, :, :1], (16, 3, 5))):
        bn = layer(rng, 3, ghost_batch_size=size, activation="relu")
        plain = copy.deepcopy(bn)
        plain.ghost_batch_size = None
        dy = rng.standard_normal(x.shape)
        y, dx, _ = one_by_one(plain, x, dy, None, slices(16, size, 5))
        np.testing.assert_array_equal(bn(x), y)
        np.testing.assert_array_equal(bn.backward(dy), dx)
        same = dy.astype(np.float32)
        expected = bn.backward(same)
        np.testing.assert_array_equal(bn.backward(same, out=same), expected)
    x = base[:, 0].copy()
    expected = bn(x)
    np.testing.assert_array_equal(bn(x, out=x), expected)
    with pytest.raises(RuntimeError, match="has been overwritten"):
        bn.backward(x)


def test_evaluation_and_controls(rng):
    x = rng.standard_normal((10, 3))
    bn = layer(rng, 3, ghost_batch_size=4)
    plain = copy.deepcopy(bn)
    plain.ghost_batch_size = None
    assert np.array_equal(bn.eval()(x), plain.eval()(x))
    bn.train()
    assert np.array_equal(bn(x, moments=cbn.moments(x)), plain.train()(x))
    frozen = copy.deepcopy(bn).freeze()
    assert np.array_equal(frozen(x), copy.deepcopy(plain).freeze()(x))
    assert bn(np.empty((0, 3))).shape == (0, 3)
    bad = x.copy()
    bad[1, 2] = np.nan
    bn.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match="not finite in channel 2"):
        bn(bad)
    bn.nonfinite = "skip"
    before = bn.running_mean[2]
    y = bn(bad)
    assert np.isnan(y[:4, 2]).all()
    assert np.isfinite(y[4:]).all()
    assert bn.running_mean[2] == before
    with pytest.raises(ValueError, match="renorm corrects the statistics of the whole batch"):
        cbn.BatchNorm(3, ghost_batch_size=2, renorm=(3, 5))(x)


def test_refusals(rng):
    for value, kind in ((0, ValueError), (-2, ValueError), (1.5, TypeError), ("4", TypeError), (True, TypeError)):
        with pytest.raises(kind, match="ghost_batch_size must be"):
            cbn.BatchNorm1d(3, ghost_batch_size=value)
    bn = cbn.BatchNorm1d(3, ghost_batch_size=1)
    with pytest.raises(
        ValueError, match="Expected more than 1 value per channel when training, got 1 in a ghost batch"
    ):
        bn(rng.standard_normal((4, 3)))
    assert bn(rng.standard_normal((4, 3, 2))).shape == (4, 3, 2)
    assert repr(cbn.BatchNorm1d(3, ghost_batch_size=np.int64(4))).endswith("ghost_batch_size=4)")


def test_bounds():
    def found(n, size, length=1):
        inp = cbn.inputs.Input(np.zeros((n, 2, length)), 1)
        return [(part.start, part.stop) for part in ghost.bounds(inp, size)]

    assert found(9, 4) == [(0, 4), (4, 9)]  # one value joins the slice before
    assert found(9, 4, 2) == [(0, 4), (4, 8), (8, 9)]
    assert found(1, 4) == [(0, 1)]
    assert found(8, 4) == [(0, 4), (4, 8)]
    assert found(3, 4) == [(0, 3)]
