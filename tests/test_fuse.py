"""Folding, by numpy alone: linear layers, types, rounding, refusals. Convolutions are in tests/peers."""

import ml_dtypes
import numpy as np
import pytest

import cbn

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def layer(n, rng, dtype=np.float32, **kwargs):
    bn = cbn.BatchNorm(n, dtype=dtype, **kwargs).eval()
    for name, values in {
        "weight": rng.normal(size=n), "bias": rng.normal(size=n), "running_mean": rng.normal(size=n),
        "running_var": rng.uniform(0.1, 3, n),
    }.items():  # fmt: skip
        if getattr(bn, name) is not None:
            getattr(bn, name)[:] = values
    return bn


def scale_and_offset(bn):
    """In float64, from the definition."""
    one, zero = np.ones(bn.num_features), np.zeros(bn.num_features)
    w, b = (d if a is None else a.astype(np.float64) for a, d in ((bn.weight, one), (bn.bias, zero)))
    scale = w / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    return scale, b - bn.running_mean * scale


def ulp(a):
    """The distance of a's values to their neighbours, in float64; twice that where the exact value has it too."""
    a = np.abs(a)
    return (2 if a.dtype == np.float64 else 1) * (
        np.nextafter(a, a.dtype.type(np.inf)).astype(np.float64) - a.astype(np.float64)
    ).clip(1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"affine": False}])
def test_linear_before(rng, dtype, with_bias, kwargs):
    bn = layer(7, rng, **kwargs)
    w, b = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=7).astype(dtype) if with_bias else None
    folded, folded_bias = cbn.fuse_linear_bn(w, b, bn)
    assert folded.dtype == folded_bias.dtype == dtype
    assert (folded.shape, folded_bias.shape) == ((7, 5), (7,))
    scale, offset = scale_and_offset(bn)
    exact = w.astype(np.float64) * scale[:, None]
    exact_bias = (0 if b is None else b.astype(np.float64)) * scale + offset
    assert np.all(np.abs(folded.astype(np.float64) - exact) <= ulp(folded))
    assert np.all(np.abs(folded_bias.astype(np.float64) - exact_bias) <= ulp(folded_bias) + 1e-15)
    x = rng.normal(size=(9, 5))
    y = (x @ w.astype(np.float64).T + (0 if b is None else b.astype(np.float64))) * scale + offset
    error = np.abs(x @ folded.astype(np.float64).T + folded_bias.astype(np.float64) - y).max()
    assert error <= {8: 1e-14, 4: 1e-6}.get(np.dtype(dtype).itemsize, 0.1) * np.abs(y).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_after(rng, dtype, with_bias):
    bn = layer(5, rng)
    w, b = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=7).astype(dtype) if with_bias else None
    folded, folded_bias = cbn.fuse_bn_linear(bn, w, b)
    assert folded.dtype == folded_bias.dtype == dtype
    scale, offset = scale_and_offset(bn)
    exact = w.astype(np.float64) * scale
    exact_bias = w.astype(np.float64) @ offset + (0 if b is None else b.astype(np.float64))
    assert np.all(np.abs(folded.astype(np.float64) - exact) <= ulp(folded))
    assert np.all(np.abs(folded_bias.astype(np.float64) - exact_bias) <= ulp(folded_bias) + 1e-13)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_a_transposed_convolution(rng, groups):
    """Each weight is multiplied by the scale of the output that it leads to, found by walking through all of them."""
    n_in, per_group = 8, 3
    bn = layer(per_group * groups, rng)
    w = rng.normal(size=(n_in, per_group, 2, 5))
    folded, _ = cbn.fuse_conv_bn(w, None, bn, transpose=True, groups=groups)
    scale, _ = scale_and_offset(bn)
    for i in range(n_in):
        group = i // (n_in // groups)
        for o in range(per_group):
            np.testing.assert_allclose(folded[i, o], w[i, o] * scale[group * per_group + o], rtol=1e-15)


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_after(rng, groups):
    bn = layer(6, rng)
    w = rng.normal(size=(9, 6 // groups, 3))
    folded, folded_bias = cbn.fuse_bn_linear(bn, w, None, padding=(0,), groups=groups)
    scale, offset = scale_and_offset(bn)
    for o in range(9):
        inputs = np.arange(6 // groups) + o // (9 // groups) * (6 // groups)
        np.testing.assert_allclose(folded[o], w[o] * scale[inputs, None], rtol=1e-15)
        np.testing.assert_allclose(folded_bias[o], (w[o] * offset[inputs, None]).sum(), rtol=1e-12)


def test_frozen_layer_in_training_mode_is_folded(rng):
    bn = layer(4, rng)
    w = rng.normal(size=(4, 4))
    expected = cbn.fuse_linear_bn(w, None, bn)
    for a, b in zip(cbn.fuse_linear_bn(w, None, bn.freeze().train()), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_flushed_on_request(dtype):
    bn = cbn.BatchNorm(1, eps=0, dtype=np.float64).eval()
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    w = np.array([[tiny, 4 * tiny, -tiny]]).astype(dtype)
    bn.weight[:] = 0.5
    kept, _ = cbn.fuse_linear_bn(w, None, bn)
    np.testing.assert_array_equal(kept.astype(np.float64), [[tiny / 2, 2 * tiny, -tiny / 2]])
    flushed, _ = cbn.fuse_linear_bn(w, None, bn, flush_subnormals=True)
    np.testing.assert_array_equal(flushed.astype(np.float64), [[0, 2 * tiny, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_rounding_is_a_bound_that_is_reached(rng, dtype):
    bn = layer(6, rng)
    w, b = rng.normal(size=(6, 40)).astype(dtype), rng.normal(size=6).astype(dtype)
    folded, folded_bias, error = cbn.fuse_linear_bn(w, b, bn, return_error=True)
    wide, wide_bias = cbn.fuse_linear_bn(w.astype(np.float64), b.astype(np.float64), bn)
    x = rng.uniform(-1, 1, (200, 40))
    moved = np.abs(x @ (folded - wide).T + (folded_bias - wide_bias))
    assert np.all(moved <= error + 1e-14)
    worst = np.sign(folded - wide) * np.sign(folded_bias - wide_bias + 1e-300)[:, None]
    reached = np.abs((worst * (folded - wide)).sum(axis=1) + (folded_bias - wide_bias))
    np.testing.assert_allclose(reached.astype(np.float64), error, atol=1e-14)


def test_values_beyond_the_type_are_refused():
    bn = cbn.BatchNorm(2, eps=0).eval()
    bn.running_var[1] = 1e-12
    with pytest.raises(ValueError, match=r"the folded weight of output 1 is 1e\+06, beyond the range of float16"):
        cbn.fuse_linear_bn(np.ones((2, 3), np.float16), None, bn)
    bn.running_var[1] = 0
    with pytest.raises(ValueError, match="bn has no finite scale and offset in channel 1"):
        cbn.fuse_linear_bn(np.ones((2, 3)), None, bn)


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda bn: cbn.fuse_linear_bn(np.ones((3, 2), int), None, bn),
            TypeError,
            "weight has dtype int64; exp",
        ),
        (lambda bn: cbn.fuse_linear_bn(None, None, bn), TypeError, "weight must be an array, not None"),
        (lambda bn: cbn.fuse_linear_bn(ones(3, 2), [1, 2, 3], bn), TypeError, "bias has dtype int64"),
        (lambda bn: cbn.fuse_linear_bn(ones(3, 2), ones(2), bn), ValueError, r"bias has shape \(2,\); expected \(3,\)"),
        (lambda bn: cbn.fuse_linear_bn(ones(3), None, bn), ValueError, r"shape \(3,\); a linear layer's is \(out_fea"),
        (lambda bn: cbn.fuse_linear_bn(ones(2, 3), None, bn), ValueError, "bn has 3 channels, and there are 2 outputs"),
        (lambda bn: cbn.fuse_linear_bn(ones(3, 2), None, "bn"), TypeError, "must be a layer of cbn, not str"),
        (lambda bn: cbn.fuse_linear_bn(ones(3, 2), None, bn.train()), ValueError, "bn is in training mode"),
        (lambda bn: cbn.fuse_conv_bn(ones(3, 2), None, bn), ValueError, "a convolution's is"),
        (
            lambda bn: cbn.fuse_conv_bn(ones(3, 2), None, bn, transpose=True),
            ValueError,
            "a transposed convolution",
        ),
        (lambda bn: cbn.fuse_conv_bn(ones(3, 2, 1), None, bn, groups=2), ValueError, "groups is 2, which does not"),
        (lambda bn: cbn.fuse_conv_bn(ones(3, 2, 1), None, bn, groups=0), ValueError, "groups is 0"),
        (lambda bn: cbn.fuse_conv_bn(ones(3, 2, 1), None, bn, groups=1.5), TypeError, "groups must be a number"),
        (lambda bn: cbn.fuse_conv_bn(ones(3, 2, 1), None, bn, transpose=1), TypeError, "transpose must be a bool"),
        (
            lambda bn: cbn.fuse_bn_linear(bn, ones(2, 3, 1), None),
            ValueError,
            "say how it pads; padding=0 if",
        ),
        (lambda bn: cbn.fuse_bn_linear(bn, ones(2, 3, 1), None, padding=1), ValueError, "the zeros around the input"),
        (lambda bn: cbn.fuse_bn_linear(bn, ones(2, 3, 1), None, padding="same"), ValueError, "padding='same'"),
        (lambda bn: cbn.fuse_bn_linear(bn, ones(2, 2), None), ValueError, "and there are 2 in_channels of weight"),
        (lambda bn: cbn.fuse_bn_linear(bn, ones(2, 3), ones(3)), ValueError, r"bias has shape \(3,\); expected \(2,\)"),
        (
            lambda _: cbn.fuse_linear_bn(ones(3, 2), None, cbn.BatchNorm(3, track_running_stats=False).eval()),
            ValueError,
            "running_mean must be defined in evaluation mode",
        ),
    ],
)
def test_what_folding_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call(cbn.BatchNorm(3).eval())
