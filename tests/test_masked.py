"""Masks, lengths and weights of samples: against a dense layer of what counts, and against formulas in float64."""

import copy

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.kernels import engine

from .paths import DTYPES, GRADIENT_LIMIT, INPUT_DTYPES, KNOBS, LARGE_RANGE, LIMIT, PARAMETERS, PATH_SHAPES, agree


def layer(rng, n, **kwargs):
    bn = cbn.BatchNorm(n, dtype=np.float64, **kwargs)
    bn.weight[:], bn.bias[:] = rng.uniform(0.5, 1.5, n), rng.standard_normal(n)
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal(n), rng.random(n) + 0.5
    return bn


def tolerance(dtype):
    return {2: 2e-2, 4: 2e-6, 8: 1e-12}[np.dtype(dtype).itemsize]


def dense_of(a, counts, axis):
    """(M, C): the rows of values that count, of all channels."""
    return np.ascontiguousarray(np.moveaxis(a, axis, -1)[counts])


LAYOUTS = [((9, 3), 1), ((6, 3, 11), 1), ((6, 11, 3), -1), ((4, 3, 5, 6), 1), ((3, 7, 5), 0)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1)])
@pytest.mark.parametrize("training", [True, False])
def test_masks_equal_the_dense_layer(rng, isa, dtype, shape, axis, activation, training):
    """Forward and backward, statistics and gradients; NaN where nothing counts reach nothing."""
    x, dy, residual = ((rng.standard_normal(shape) + 2).astype(dtype) for _ in range(3))
    without = tuple(n for i, n in enumerate(shape) if i != axis % len(shape))
    counts = rng.random(without) < 0.6
    full = np.broadcast_to(np.expand_dims(counts, axis), shape)
    for a in (x, dy, residual):
        a[~full] = np.nan
    bn = layer(rng, shape[axis], channel_axis=axis, activation=activation).train(training)
    dense = copy.deepcopy(bn)
    dense._channel_axis = -1
    if not training:
        bn.train_parameters = dense.train_parameters = True
    y = bn(x, mask=counts, residual=residual)
    expected = dense(dense_of(x, counts, axis), residual=dense_of(residual, counts, axis))
    at = tolerance(dtype)

    def same(found, wanted):
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        np.testing.assert_allclose(found, wanted, rtol=at, atol=at)

    same(dense_of(y, counts, axis), expected)
    assert not y[~full].any()
    for name in ("running_mean", "running_var"):
        same(getattr(bn, name), getattr(dense, name))
    assert bn.num_batches_tracked == dense.num_batches_tracked == int(training)
    (dx, dz), wanted = bn.backward(dy), dense.backward(dense_of(dy, counts, axis))
    for found, part in zip((dx, dz), wanted, strict=True):
        same(dense_of(found, counts, axis), part)
        assert not found[~full].any()
        assert found.dtype == dtype
    same(bn.weight_grad, dense.weight_grad)
    same(bn.bias_grad, dense.bias_grad)


@pytest.mark.parametrize("given", ["mask", "lengths", "sample_weight", "all"])
def test_ones_give_the_unmasked_bits(rng, given):
    x = rng.standard_normal((5, 3, 8)).astype(np.float32)
    ones = {"mask": np.ones((5, 8), bool), "lengths": np.full(5, 8), "sample_weight": np.ones(5)}
    bn, plain = layer(rng, 3), None
    plain = copy.deepcopy(bn)
    kwargs = ones if given == "all" else {given: ones[given]}
    np.testing.assert_array_equal(bn(x, **kwargs), plain(x))
    np.testing.assert_array_equal(bn.backward(x), plain.backward(x))
    assert all(np.array_equal(a, plain.state_dict()[name]) for name, a in bn.state_dict().items())


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 11), 1), ((6, 11, 3), -1), ((4, 3, 5, 6), 1), ((3, 7, 5), 0)])
def test_lengths_are_masks(rng, shape, axis):
    x, dy = rng.standard_normal(shape), rng.standard_normal(shape)
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    lengths = rng.integers(0, rest[1] + 1, rest[0])
    lengths[0] = 3
    mask = (np.arange(rest[1]) < lengths[:, None]).reshape(*rest[:2], *[1] * (len(rest) - 2))
    bn = layer(rng, shape[axis], channel_axis=axis)
    other = copy.deepcopy(bn)
    at = {"rtol": 1e-13, "atol": 1e-14}  # the order of the additions differs
    np.testing.assert_allclose(bn(x, lengths=lengths.tolist()), other(x, mask=mask), **at)
    np.testing.assert_allclose(bn.backward(dy), other.backward(dy), **at)


def formulas(bn, x, dy, w):
    """(y, dx, dweight, dbias, n, mean, m2) in float64; w broadcasts to x, whose channels are axis 1."""
    n, mean, m2, _, _ = reference.counted_moments(x, w)
    y = np.where(np.broadcast_to(w, x.shape) > 0, reference.normalize(x, mean, m2 / n, bn.weight, bn.bias), 0)
    return y, *reference.counted_backward(dy, x, w, bn.weight), n, mean, m2


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_and_masks_of_channels(rng, shape, per_channel, dtype):
    x, dy = (rng.standard_normal(shape).astype(dtype) + 3 for _ in range(2))
    weight = rng.uniform(0.2, 3, 8)
    weight[[1, 4]] = 0
    mask = rng.random(shape) < 0.8 if per_channel else None
    w = weight.reshape(-1, *[1] * (len(shape) - 1)) * (1 if mask is None else mask)
    x[np.broadcast_to(w == 0, shape)] = np.inf
    bn = layer(rng, 3)
    before = bn.running_mean.copy(), bn.running_var.copy()
    with np.errstate(invalid="ignore"):
        y, dx, dweight, dbias, n, mean, m2 = formulas(bn, x.astype(np.float64), dy.astype(np.float64), w)
    at = {"rtol": tolerance(dtype), "atol": tolerance(dtype)}
    np.testing.assert_allclose(bn(x, sample_weight=weight, mask=mask), y, **at)
    np.testing.assert_allclose(bn.backward(dy), dx, **at)
    np.testing.assert_allclose(bn.weight_grad, dweight.ravel(), rtol=1e-9)
    np.testing.assert_allclose(bn.bias_grad, dbias.ravel(), rtol=1e-12)
    np.testing.assert_allclose(bn.running_mean, 0.9 * before[0] + 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, 0.9 * before[1] + 0.1 * m2 / (n - 1), rtol=1e-12)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_samples_that_share_a_run(rng, activation, training):
    """Channels come first: x is arranged anew, and y and dx lie as x did."""
    for shape in ((3, 8), (3, 8, 5)):
        x, dy, z = rng.standard_normal((3, *shape))
        weight = rng.uniform(0, 2, 8) * (rng.random(8) < 0.7)
        weight[:2] = 1
        bn = layer(rng, 3, channel_axis=0, activation=activation).train(training)
        bn.train_parameters = True
        other = copy.deepcopy(bn)
        other._channel_axis = 1
        places = (1, 0, *range(2, len(shape)))
        x_, dy_, z_ = (np.ascontiguousarray(a.transpose(places)) for a in (x, dy, z))
        y = bn(x, sample_weight=weight, residual=z)
        expected = other(x_, sample_weight=weight, residual=z_)
        np.testing.assert_array_equal(y, expected.transpose(places))
        assert y.flags.c_contiguous
        out = np.empty_like(x)
        assert bn(x, sample_weight=weight, residual=z, out=out) is out
        np.testing.assert_array_equal(out, y)
        for found, part in zip(bn.backward(dy), other.backward(dy_), strict=True):
            np.testing.assert_allclose(found, part.transpose(places), rtol=1e-13, atol=1e-14)
        other(x_, sample_weight=weight, residual=z_)
        np.testing.assert_allclose(bn.running_var, other.running_var, rtol=1e-14)


def test_integer_weights_are_repeats(rng):
    x = rng.standard_normal((6, 3))
    times = np.array([1, 2, 0, 3, 1, 1])
    bn = layer(rng, 3)
    repeated = copy.deepcopy(bn)
    y = bn(x, sample_weight=times)
    expected = repeated(np.repeat(x, times, axis=0))
    np.testing.assert_allclose(np.repeat(y, times, axis=0), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(bn.running_var, repeated.running_var, rtol=1e-13)


KINDS = ("lengths", "weights", "mask", "mask of channels", "all")


def counting(rng, kind, shape, axis):
    """Arguments of a call, and the weights of all values."""
    rest = [n for i, n in enumerate(shape) if i != axis]
    mask = rng.random(shape if "channels" in kind else rest) < 0.7
    of_samples = rng.uniform(0.5, 2, rest[0]) * (rng.random(rest[0]) < 0.9)
    of_samples[:2] = 1
    mask[0] = True
    mask[1] |= mask.ndim == 1
    lengths = rng.integers(0, rest[-1] + 1, rest[0]) if len(rest) > 1 else None
    given = {}
    w = np.ones(shape)
    if kind.startswith("mask") or kind == "all":
        given["mask"] = mask
        w *= mask if mask.shape == shape else np.expand_dims(mask, axis)
    if kind in ("weights", "all"):
        given["sample_weight"] = of_samples
        w *= of_samples.reshape(-1, *[1] * (len(shape) - 1))
    if kind in ("lengths", "all") and lengths is not None:
        lengths[:2] = rest[-1]
        given["lengths"] = lengths
        w *= np.expand_dims(np.arange(rest[-1]) < lengths[:, None], axis)
    return given, w


def every_path():
    """Each shape with each type and each kind, of which a fifth are quick."""
    for i, (name, shape) in enumerate(PATH_SHAPES.items()):
        for j, dtype in enumerate(INPUT_DTYPES):
            for k, kind in enumerate(KINDS):
                if np.prod(shape) > 1e5 and dtype not in DTYPES:
                    continue
                quick = (i + j + k) % len(KINDS) == 0 and np.prod(shape) < 1e5
                marks = () if quick else pytest.mark.slow
                yield pytest.param(shape, dtype, kind, marks=marks, id=f"{name}-{np.dtype(dtype)}-{kind}")


@pytest.mark.parametrize(("shape", "dtype", "kind"), list(every_path()))
def test_every_path_gives_the_same_bits(isa, parallel, rng, dtype, shape, kind):
    """Those of the reference; what does not count is NaN. One channel has its samples far out, one needs float64."""
    for axis in {1, len(shape) - 1}:
        given, w = counting(rng, kind, shape, axis)
        x, dy, z = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
        at = (slice(None),) * axis
        x[(0, *[slice(None)] * (axis - 1), slice(None, None, 5))] += 50
        if dtype in LARGE_RANGE:
            x[(*at, 3)] *= dtype(1e34)
        for a in (x, dy, z):
            a[w == 0] = np.nan
        n = shape[axis]
        weight, bias = rng.standard_normal((2, n))

        def results(offset, activation, axis=axis, given=given, x=x, dy=dy, z=z, weight=weight, bias=bias):
            bn = cbn.BatchNorm(x.shape[axis], dtype=PARAMETERS[x.dtype.type], channel_axis=axis, activation=activation)
            bn.weight[:], bn.bias[:] = weight, bias
            memory = np.empty(2 * x.size + 128, x.dtype)
            y, dx = (memory[i : i + x.size].reshape(x.shape) for i in (offset, x.size + 64 + offset))
            residual = None if activation is None else z
            with np.errstate(all="ignore"):
                bn(x, out=y, residual=residual, **given)
                found = bn.backward(dy, out=dx)
                in_place = copy.copy(x)
                bn.eval()(in_place, out=in_place, **given)
            dz = found[1] if activation else dx
            return y, dx, dz, in_place, bn.running_mean, bn.running_var, bn.weight_grad, bn.bias_grad

        for activation in (None, "relu"):
            engine.tune(bytes_per_thread=1 << 40, **KNOBS["two passes"])
            expected = results(0, activation)
            for name, knobs in KNOBS.items():
                engine.tune(bytes_per_thread=1, **{"nontemporal_bytes": 1 << 40, "prefetch": True} | knobs)
                for n_threads, offset in ((1, 0), (2, 3), (1, 8)):
                    with cbn.num_threads(n_threads):
                        for a, b in zip(results(offset, activation), expected, strict=True):
                            assert a.tobytes() == b.tobytes(), (name, n_threads, offset, activation)
            if activation is None:
                y, dx, *_, mean, _, dweight, dbias = expected
                count, mean_, m2, *_ = reference.counted_moments(x, w, False, axis)
                own = PARAMETERS[dtype]
                with np.errstate(all="ignore"):
                    of_y = reference.normalize(
                        x, mean_, m2 / count, weight.astype(own), bias.astype(own), channel_axis=axis
                    )
                    of_dx, of_weight, of_bias = reference.counted_backward(dy, x, w, weight.astype(own), 1e-5, axis)
                agree(y, np.where(w > 0, of_y, 0), LIMIT[np.dtype(dtype)], kind, axis)
                agree(dx, of_dx, GRADIENT_LIMIT[np.dtype(dtype)], kind, axis)
                agree(mean, 0.1 * mean_, 100 * LIMIT[np.dtype(own)])  # beside a spread 1e4 times as large
                agree(dweight, of_weight, GRADIENT_LIMIT[np.dtype(own)])
                agree(dbias, of_bias, GRADIENT_LIMIT[np.dtype(own)])


def test_with_the_other_controls(rng):
    x, dy = rng.standard_normal((8, 3, 5)), rng.standard_normal((8, 3, 5))
    mask = rng.random((8, 5)) < 0.7
    mask[:, :2] = True
    counts = np.broadcast_to(mask[:, None], x.shape)
    rows, rows_dy = dense_of(x, mask, 1), dense_of(dy, mask, 1)
    at = {"rtol": 1e-11, "atol": 1e-12}
    for kwargs, options in (({"renorm": (1.2, 0.3)}, {}), ({}, {"update_stats": False}),
                            ({}, {"moments": cbn.moments(rows)})):  # fmt: skip
        bn = layer(rng, 3, **kwargs)
        dense = copy.deepcopy(bn)
        np.testing.assert_allclose(dense_of(bn(x, mask=mask, **options), mask, 1), dense(rows, **options), **at)
        np.testing.assert_allclose(dense_of(bn.backward(dy), mask, 1), dense.backward(rows_dy), **at)
        np.testing.assert_allclose(bn.weight_grad, dense.weight_grad, **at)
        np.testing.assert_allclose(bn.running_var, dense.running_var, **at)
    bn = layer(rng, 3).eval()
    np.testing.assert_allclose(dense_of(bn(x, mask=mask, mix=0.4), mask, 1), bn(rows, mix=0.4), **at)
    # Ghost batches and domains: each part by its own
    bn = layer(rng, 3, ghost_batch_size=3)
    plain = copy.deepcopy(bn)
    plain.ghost_batch_size = None
    y, dx = bn(x, mask=mask), bn.backward(dy)
    for a, b in ((0, 3), (3, 6), (6, 8)):
        np.testing.assert_allclose(y[a:b], plain(x[a:b], mask=mask[a:b]), **at)
        np.testing.assert_allclose(dx[a:b], plain.backward(dy[a:b]), **at)
    whole = cbn.moments(x, mask=mask)
    fresh = layer(np.random.default_rng(1), 3, ghost_batch_size=3)
    before = fresh.running_var.copy()
    fresh(x, mask=mask)
    np.testing.assert_allclose(fresh.running_var, 0.9 * before + 0.1 * whole.var(1), rtol=1e-13)
    bn = cbn.BatchNorm(3, num_domains=2, dtype=np.float64)
    one = cbn.BatchNorm(3, dtype=np.float64)
    domain = np.array([0, 1, 0, 1, 1, 0, 0, 1])
    y, dx = bn(x, mask=mask, domain=domain), bn.backward(dy)
    np.testing.assert_allclose(y[domain == 0], one(x[domain == 0], mask=mask[domain == 0]), **at)
    np.testing.assert_allclose(dx[domain == 0], one.backward(dy[domain == 0]), **at)
    assert not y[~counts].any()
    # In place
    bn = layer(rng, 3)
    expected = copy.deepcopy(bn)(x, mask=mask)
    np.testing.assert_array_equal(bn(x, mask=mask, out=x), expected)
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(dy)


def test_recalibration_counts_what_counts(rng):
    batches = [(rng.standard_normal((n, 3, 6)), rng.integers(1, 7, n)) for n in (5, 8, 3)]
    first, second = cbn.BatchNorm1d(3, dtype=np.float64), cbn.BatchNorm1d(3, dtype=np.float64)
    cbn.recalibrate([first, second], batches, forward=lambda b: second(first(b[0], lengths=b[1]), lengths=b[1]))
    rows = np.concatenate([x[i, :, :n].T for x, lengths in batches for i, n in enumerate(lengths)])
    np.testing.assert_allclose(first.running_mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.running_var, rows.var(0, ddof=1), rtol=1e-12)


def test_refusals(rng):
    bn, x = layer(rng, 3), rng.standard_normal((4, 3, 5))
    before = {name: a.tobytes() for name, a in bn.state_dict().items()}
    few = np.zeros((4, 5), bool)
    few[0, 0] = True
    for kwargs, kind, words in (
        ({"mask": np.ones((4, 5))}, TypeError, "mask has dtype float64; expected bool"),
        ({"mask": np.ones((4, 3), bool)}, ValueError, r"mask has shape \(4, 3\), which broadcasts neither to \(4, 5\)"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths has shape \(3,\); expected \(4,\), one for each sample"),
        ({"lengths": [1, 2, 3, 6]}, ValueError, "lengths must be from 0 to 5, but got 6 for sample 3"),
        ({"lengths": [1, -2, 3, 5]}, ValueError, "lengths must be from 0 to 5, but got -2 for sample 1"),
        ({"lengths": [1.0, 2, 3, 5]}, TypeError, "lengths has dtype float64; expected integers"),
        ({"sample_weight": [1, 2]}, ValueError, r"sample_weight has shape \(2,\); expected \(4,\)"),
        ({"sample_weight": [1, -1, 1, 1]}, ValueError, "sample_weight must be finite and not negative, but got -1"),
        ({"sample_weight": [1, np.nan, 1, 1]}, ValueError, "sample_weight must be finite"),
        (
            {"mask": few},
            ValueError,
            "Expected more than 1 value per channel when training, got weights that add up to 1",
        ),
        ({"sample_weight": [0.1] * 4, "mask": few}, ValueError, "add up to 0.1 in channel 0"),
    ):
        with pytest.raises(kind, match=words):
            bn(x, **kwargs)
    with pytest.raises(ValueError, match="lengths are for inputs with an axis after the samples"):
        bn(x[:, :, 0], lengths=[1] * 4)
    assert {name: a.tobytes() for name, a in bn.state_dict().items()} == before
    bn.eval()
    assert not bn(x, mask=np.zeros((4, 5), bool)).any()
    with pytest.raises(ValueError, match="mask, lengths and sample_weight need floating input"):
        bn(x.astype(np.uint8), x_scale=1, mask=few)


@pytest.mark.parametrize("training", [True, False])
def test_the_function(rng, training):
    x = rng.standard_normal((5, 3, 7)).astype(np.float32)
    lengths, weight = [7, 2, 0, 5, 6], [1, 0.5, 2, 0, 3]
    bn = layer(rng, 3, activation="relu").train(training)
    mean, var = bn.running_mean.copy(), bn.running_var.copy()
    options = {"lengths": lengths, "sample_weight": weight, "residual": x}
    y = cbn.functional.batch_norm(x, mean, var, bn.weight, bn.bias, training, activation="relu", **options)
    np.testing.assert_array_equal(y, bn(x, **options))
    np.testing.assert_allclose(mean, bn.running_mean, rtol=1e-15)
    np.testing.assert_allclose(var, bn.running_var, rtol=1e-15)
    with pytest.raises(ValueError, match="need floating input, not 8-bit"):
        cbn.functional.batch_norm(x.astype(np.uint8), mean, var, x_scale=1, lengths=lengths)
    with pytest.raises(ValueError, match="lengths must be from 0 to 7"):
        cbn.functional.batch_norm(x, mean, var, lengths=[8] * 5)
