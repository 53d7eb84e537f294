"""The functional forms: values, types, `out`, memory order, and what a call may change."""

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward

from .paths import DTYPES, INPUT_DTYPES, LAYOUTS, LIMIT, agree, in_memory_order


def test_training_updates_the_buffers_with_the_unbiased_variance():
    """The example of the specification: x = [[0], [4]], momentum 0.1 gives 1.7, not 1.3."""
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    y = batch_norm(np.array([[0.0], [4.0]], np.float32), mean, var, training=True)
    np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-5)
    np.testing.assert_allclose(mean, [0.2], rtol=1e-6)
    np.testing.assert_allclose(var, [1.7], rtol=1e-6)


def test_evaluation_changes_nothing(rng):
    x = rng.standard_normal((8, 3))
    mean, var = rng.standard_normal(3), rng.uniform(1, 2, 3)
    before = mean.copy(), var.copy(), x.copy()
    y, save_mean, save_invstd = native_batch_norm(x, None, None, mean, var, False, 0.1, 1e-5)
    agree(y, reference.normalize(x, mean, var), 1e-14)
    assert save_mean.shape == save_invstd.shape == (0,)
    assert save_mean.dtype == save_invstd.dtype == np.float64
    for a, b in zip((mean, var, x), before, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("momentum", [0, 0.25, 1, np.float32(0.5)])
def test_momentum(rng, momentum):
    x = rng.standard_normal((8, 3))
    mean, var = rng.standard_normal(3), rng.uniform(1, 2, 3)
    _, exact_mean, exact_var = reference.batch_norm(x, mean, var, training=True, momentum=float(momentum))
    batch_norm(x, mean, var, training=True, momentum=momentum)
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-14)
    np.testing.assert_allclose(var, exact_var, rtol=1e-14)


@pytest.mark.parametrize("which", ["weight", "bias", "both", "neither"])
@pytest.mark.parametrize("training", [True, False])
def test_absent_parameters(rng, which, training):
    x = rng.standard_normal((8, 3, 5))
    mean, var = rng.standard_normal(3), rng.uniform(1, 2, 3)
    weight = rng.standard_normal(3) if which in ("weight", "both") else None
    bias = rng.standard_normal(3) if which in ("bias", "both") else None
    exact, *_ = reference.batch_norm(x, mean, var, weight, bias, training)
    agree(batch_norm(x, mean, var, weight, bias, training), exact, 1e-13)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", DTYPES)
def test_mixed_types_compute_in_the_wider_one(isa, rng, x_dtype, parameter_dtype):
    x = rng.standard_normal((64, 3, 7)).astype(x_dtype)
    dy = rng.standard_normal((64, 3, 7)).astype(x_dtype)
    weight, bias = rng.standard_normal((2, 3)).astype(parameter_dtype)
    mean, var = np.zeros(3, parameter_dtype), np.ones(3, parameter_dtype)
    exact, exact_mean, exact_var = reference.batch_norm(x, mean, var, weight, bias, True)
    y, *saved = native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    assert y.dtype == x_dtype
    assert mean.dtype == var.dtype == parameter_dtype
    if np.float64 in (x_dtype, parameter_dtype):
        # As good as rounding the exact result once
        assert np.abs(y - exact).max() <= np.finfo(x_dtype).eps * np.abs(exact).max() * (
            0.5 if x_dtype == np.float32 else 8
        )
    dx, dweight, dbias = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5)
    assert dx.dtype == x_dtype
    assert dweight.dtype == dbias.dtype == parameter_dtype
    assert native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)[1].dtype == x_dtype
    limit = LIMIT[np.dtype(parameter_dtype)]
    assert np.abs(mean - exact_mean).max() <= limit * np.abs(exact_mean).max()
    assert np.abs(var - exact_var).max() <= limit * np.abs(exact_var).max()


def test_gradient_of_another_type(rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    dy = rng.standard_normal((16, 3))
    n, mean, m2 = reference.moments(x)
    _, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    gradients = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)
    assert gradients[0].dtype == np.float32
    for gradient, exact in zip(gradients, reference.backward(dy, x, mean, m2 / n), strict=True):
        agree(gradient, exact, 1e-6)
    out = np.empty_like(x)
    assert native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, out=out)[0] is out
    assert np.array_equal(out, gradients[0])


@pytest.mark.parametrize("mask", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
@pytest.mark.parametrize("train", [True, False])
def test_output_mask(rng, mask, train):
    x, dy = rng.standard_normal((2, 8, 3, 5))
    weight, mean, var = rng.standard_normal(3), rng.standard_normal(3), rng.uniform(1, 2, 3)
    _, *saved = native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    exact_mean, exact_var = (reference.moments(x)[1], reference.moments(x)[2] / 40) if train else (mean, var)
    exact = reference.backward(dy, x, exact_mean, exact_var, weight, train=train)
    gradients = native_batch_norm_backward(dy, x, weight, mean, var, *saved, train, 1e-5, mask)
    for wanted, gradient, e in zip(mask, gradients, exact, strict=True):
        assert (gradient is not None) == wanted
        if wanted:
            agree(gradient, e, 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_any_memory_order(rng, layout, dtype):
    shape, axis, order = LAYOUTS[layout]
    x = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    dy = rng.standard_normal(shape).astype(dtype)
    expected, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis)
    expected_dx = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, channel_axis=axis)[0]
    assert expected.strides == x.strides == expected_dx.strides
    big = np.zeros(tuple(2 * s for s in shape), dtype)
    for out in (
        np.empty(shape, dtype),
        np.asfortranarray(np.empty(shape, dtype)),
        np.empty(shape[::-1], dtype).T,
        big[tuple(slice(None, None, 2) for _ in shape)],
        np.empty(shape, dtype)[::-1],
        np.empty(shape, dtype)[..., ::-1],
        np.frombuffer(bytearray(x.nbytes + 1), np.uint8)[1:].view(dtype).reshape(shape),  # misaligned
        x.copy(order="K"),
    ):
        y, *_ = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis, out=out)
        assert y is out
        assert np.array_equal(y, expected)
        dx, *_ = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, channel_axis=axis, out=out)
        assert dx is out
        assert np.array_equal(dx, expected_dx)
    assert not big[tuple(slice(1, None, 2) for _ in shape)].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shift", [-31, -8, -1, 0, 1, 8, 31])
@pytest.mark.parametrize("last", [False, True])
def test_overlap_gives_what_a_copy_of_the_input_gives(rng, training, shift, last):
    memory = rng.standard_normal(4 * 6 * 50 + 62).astype(np.float32)
    shape, axis = ((4, 50, 6), 2) if last else ((4, 6, 50), 1)
    x = memory[31 : 31 + 1200].reshape(shape)
    out = memory[31 + shift : 31 + shift + 1200].reshape(shape)
    mean, var = np.zeros(6), np.ones(6)
    expected = batch_norm(x.copy(), mean.copy(), var.copy(), training=training, channel_axis=axis)
    y = batch_norm(x, mean, var, training=training, channel_axis=axis, out=out)
    assert y is out
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("which", ["dy", "x", "dy shifted", "x shifted", "x reversed"])
def test_overlap_in_backward(rng, which):
    x, dy = rng.standard_normal((2, 4, 6, 50))
    _, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    expected = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)
    memory = np.empty(1210)
    inputs = {"dy": dy, "x": x}
    a = memory[:1200].reshape(4, 6, 50)
    a[...] = inputs[which.split()[0]]
    inputs[which.split()[0]] = a
    out = memory[7:1207].reshape(4, 6, 50) if "shifted" in which else a[::-1] if "reversed" in which else a
    result = native_batch_norm_backward(inputs["dy"], inputs["x"], None, None, None, *saved, True, 1e-5, out=out)
    for r, e in zip(result, expected, strict=True):
        assert np.array_equal(r, e)


def test_out_may_overlap_parameters(rng):
    memory = rng.standard_normal(60)
    x = rng.standard_normal((10, 6))
    weight = memory[:6]
    expected = batch_norm(x, None, None, weight.copy(), weight.copy(), True)
    assert np.array_equal(batch_norm(x, None, None, weight, weight, True, out=memory.reshape(10, 6)), expected)


def test_out_may_overlap_running_statistics(rng):
    memory = rng.uniform(1, 2, 60)
    x = rng.standard_normal((10, 6))
    mean, var = memory[:6], memory[6:12]
    _, new_mean, new_var = reference.batch_norm(x, mean.copy(), var.copy(), training=True)
    batch_norm(x, mean, var, training=True, out=memory.reshape(10, 6))
    np.testing.assert_allclose(mean, new_mean, rtol=1e-12)
    np.testing.assert_allclose(var, new_var, rtol=1e-12)


def test_inputs_of_every_kind_are_accepted(rng):
    x = rng.standard_normal((6, 4, 10)).astype(np.float32)
    big = np.zeros((12, 8, 20), np.float32)
    big[::2, ::2, ::2] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    misaligned = np.frombuffer(bytearray(x.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(x.shape)
    misaligned[...] = x
    assert not misaligned.flags.aligned
    field = np.zeros(x.shape, [("a", "i1"), ("x", "f4")])
    field["x"] = x
    expected = batch_norm(x, None, None, training=True)
    for name, a in {
        "every second": big[::2, ::2, ::2],
        "reversed": x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
        "Fortran": np.asfortranarray(x),
        "read-only": read_only,
        "misaligned": misaligned,
        "field": field["x"],
        "byte-swapped": x.astype(">f4"),
        "list": x.astype(float).tolist(),
    }.items():
        y = batch_norm(a, None, None, training=True)
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-7, err_msg=name)
        assert y.dtype == (np.float64 if name == "list" else np.float32)
        assert y.dtype.isnative
    constant = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None], (6, 4, 10))
    assert np.array_equal(batch_norm(constant, None, None, training=True), np.zeros((6, 4, 10)))


def test_buffers_of_any_strides(rng):
    x = rng.standard_normal((8, 3))
    buffers = np.zeros((3, 2), np.float32)
    buffers[:, 1] = 1
    batch_norm(x, buffers[:, 0], buffers[::-1, 1][::-1], training=True)
    _, mean, var = reference.batch_norm(x, np.zeros(3), np.ones(3), training=True)
    np.testing.assert_allclose(buffers, np.stack([mean, var], 1), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_any_channel_axis(rng, axis):
    x = rng.standard_normal((3, 4, 5, 6))
    exact = reference.batch_norm(x, None, None, training=True, channel_axis=axis)[0]
    agree(batch_norm(x, None, None, training=True, channel_axis=axis), exact, 1e-13)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((4, 2, 3), 2)])
def test_gradients_by_central_differences(rng, shape, axis, train):
    """An oracle that knows no formula of the backward pass."""
    x, upstream = rng.standard_normal((2, *shape))
    weight, bias, running_mean = rng.standard_normal((3, shape[axis]))
    running_var = rng.uniform(1, 2, shape[axis])

    def loss(x, weight, bias):
        mean, var = running_mean.copy(), running_var.copy()
        return (batch_norm(x, mean, var, weight, bias, train, channel_axis=axis) * upstream).sum()

    saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, channel_axis=axis)[1:]
    gradients = native_batch_norm_backward(
        upstream, x, weight, running_mean, running_var, *saved, train, 1e-5, channel_axis=axis
    )
    for k, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = [x.copy(), weight.copy(), bias.copy()]
                moved[k][index] += step
                values.append(loss(*moved))
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[index], rel=1e-5, abs=1e-7)


def test_import_of_the_package_names():
    names = {name for name in vars(cbn.functional) if "batch_norm" in name and not name.startswith("_")}
    assert set(cbn.functional.__all__) == names


@pytest.mark.parametrize("x_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("dy_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.25)])
@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 50)])
def test_gradients_of_a_dy_of_any_dtype(rng, x_dtype, dy_dtype, activation, shape):
    """Both are taken as float64, so they are those of a dy that has been widened before."""
    x, z = rng.standard_normal((2, *shape)).astype(x_dtype)
    dy = rng.standard_normal(shape).astype(dy_dtype)
    for frozen, residual in ((False, None), (False, z), (True, None), (True, z)):
        results = []
        for gradient in (dy, dy.astype(np.float64)):
            bn = cbn.BatchNorm1d(3, activation=activation, dtype=np.float64)
            if frozen:
                bn.freeze()
            bn(x, residual=residual)
            found = bn.backward(gradient)
            results.append([*(found if residual is not None else (found,)), bn.weight_grad, bn.bias_grad])
        case = x_dtype, dy_dtype, activation, frozen, residual is not None
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            # A dy of x's own dtype is not widened: it has other roundings
            limit = 1e-12 if x_dtype == np.float64 else 2e-2 if np.dtype(x_dtype).itemsize == 2 else 1e-5
            agree(found, expected, limit, case)
