"""One test per row of the table of errors: type, words, and that nothing has changed."""

import re

import numpy as np
import pytest

import cbn
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward


def f32(*shape):
    return np.ones(shape, np.float32)


def snapshot(layer):
    return {name: None if a is None else a.copy() for name, a in vars(layer).items() if isinstance(a, np.ndarray)}


def refused(layer, x, kind, words, **kwargs):
    """The call is refused in these words, and the layer and `out` are as before."""
    before = snapshot(layer)
    out = kwargs.get("out")
    out_before = out.copy() if isinstance(out, np.ndarray) else None
    saved = layer._saved
    with pytest.raises(kind, match=re.escape(words)) as caught:
        layer(x, **kwargs)
    after = snapshot(layer)
    assert after.keys() == before.keys()
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
    assert layer._saved is saved
    if out_before is not None:
        assert np.array_equal(out, out_before, equal_nan=True)
    return caught.value


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (cbn.BatchNorm1d, (2, 3, 4, 4), "expected 2D or 3D input (got 4D input)"),
        (cbn.BatchNorm1d, (3,), "expected 2D or 3D input (got 1D input)"),
        (cbn.BatchNorm2d, (2, 3, 4), "expected 4D input (got 3D input)"),
        (cbn.BatchNorm2d, (2, 3, 4, 4, 4), "expected 4D input (got 5D input)"),
        (cbn.BatchNorm3d, (2, 3, 4, 4), "expected 5D input (got 4D input)"),
        (cbn.BatchNorm, (3,), "expected at least 2D input (got 1D input)"),
        (cbn.BatchNorm, (), "expected at least 2D input (got 0D input)"),
    ],
)
def test_rank(layer, shape, words):
    refused(layer(3), f32(*shape), ValueError, words)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
@pytest.mark.parametrize("tracked", [True, False])
def test_one_value_per_channel(shape, tracked):
    words = f"Expected more than 1 value per channel when training, got input size {shape}"
    refused(cbn.BatchNorm1d(3, track_running_stats=tracked), f32(*shape), ValueError, words, out=f32(*shape))
    if not tracked:  # evaluation uses the batch's statistics too
        refused(cbn.BatchNorm1d(3, track_running_stats=False).eval(), f32(*shape), ValueError, words)
    with pytest.raises(ValueError, match=re.escape(words)):
        batch_norm(f32(*shape), None, None, training=True)
    assert cbn.BatchNorm1d(3).eval()(f32(*shape)).shape == shape
    assert cbn.BatchNorm1d(1)(f32(2, 1)).shape == (2, 1)


@pytest.mark.parametrize("train", [True, False])
def test_number_of_channels(train):
    def layer(**kwargs):
        return cbn.BatchNorm1d(4, **kwargs).train(train)

    for words, kwargs in (
        ("running_mean should contain 3 elements not 4", {}),
        ("weight should contain 3 elements not 4", {"track_running_stats": False}),
        ("num_features is 4, but axis 1 of the input, of size (2, 3), has 3",
         {"track_running_stats": False, "affine": False}),
    ):  # fmt: skip
        error = refused(layer(**kwargs), f32(2, 3), ValueError, words, out=f32(2, 3))
        assert isinstance(error, RuntimeError)  # as in PyTorch
    bias_only = layer(track_running_stats=False)
    bias_only.weight = None
    refused(bias_only, f32(2, 3), RuntimeError, "bias should contain 3 elements not 4")


def test_evaluation_without_statistics():
    x = f32(2, 3)
    for buffers, words in (
        ((None, None), "running_mean must be defined in evaluation mode"),
        ((None, f32(3)), "running_mean must be defined in evaluation mode"),
        ((f32(3), None), "running_var must be defined in evaluation mode"),
    ):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match=words):
                batch_norm(x, *buffers)
            with pytest.raises(kind, match=words):
                native_batch_norm_backward(x, x, None, *buffers, None, None, False, 1e-5)
    layer = cbn.BatchNorm1d(3).eval()
    layer.running_var = None
    refused(layer, x, RuntimeError, "running_var must be defined in evaluation mode")
    with pytest.raises(RuntimeError, match="running_var must be defined"):
        layer.freeze()
    with pytest.raises(RuntimeError, match="save_mean and save_invstd must be defined"):
        native_batch_norm_backward(x, x, None, None, None, None, None, True, 1e-5)


def test_one_buffer_alone():
    words = "running_mean and running_var must either both be None or neither be None"
    for buffers in ((f32(3), None), (None, f32(3))):
        before = [None if b is None else b.copy() for b in buffers]
        with pytest.raises(ValueError, match=words):
            batch_norm(f32(2, 3), *buffers, training=True)
        assert all(b is None or np.array_equal(a, b) for a, b in zip(before, buffers, strict=True))
    layer = cbn.BatchNorm1d(3)
    layer.running_mean = None
    refused(layer, f32(2, 3), ValueError, words)


def test_eps():
    x, buffers = f32(2, 3), (f32(3), f32(3))
    for eps in (0, 0.0, -1.0, -5e-324):
        with pytest.raises(ValueError, match=f"batch_norm eps must be positive during training, but got {float(eps)}"):
            batch_norm(x, *buffers, training=True, eps=eps)
    with pytest.raises(ValueError, match=r"batch_norm eps must be non-negative, but got -1\.0"):
        batch_norm(x, *buffers, eps=-1.0)
    assert np.isfinite(batch_norm(x, *buffers, eps=0)).all()
    for eps in (np.nan, np.inf):
        for training in (True, False):
            with pytest.raises(ValueError, match="eps must be finite"):
                batch_norm(x, *buffers, training=training, eps=eps)
        with pytest.raises(ValueError, match="eps must be finite"):
            cbn.BatchNorm1d(3, eps=eps)
    with pytest.raises(ValueError, match="eps must be finite and non-negative"):
        cbn.BatchNorm1d(3, eps=-1e-300)
    for eps in ("1", None, True, 1j):
        with pytest.raises(TypeError, match="eps must be a number"):
            cbn.BatchNorm1d(3, eps=eps)
    layer = cbn.BatchNorm1d(3, eps=0)
    refused(layer, x, ValueError, "batch_norm eps must be positive during training, but got 0.0")
    assert np.array_equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (np.ones((2, 3), int), "int64"),
        (np.ones((2, 3), np.uint8), "uint8"),
        (np.ones((2, 3), bool), "bool"),
        (np.ones((2, 3), complex), "complex128"),
        (np.ones((2, 3), object), "object"),
        (np.full((2, 3), "a"), "<U1"),
        (np.ones((2, 3), np.longdouble), "longdouble" if np.dtype(np.longdouble).name == "longdouble" else "float128"),
        ([[1, 2, 3], [4, 5, 6]], "int64"),
    ],
)
def test_dtype_of_the_input(x, dtype):
    words = f"input has dtype {dtype}"
    error = refused(cbn.BatchNorm1d(3), x, TypeError, words)
    assert "expected float32, float64, float16 or bfloat16 (of ml_dtypes)" in str(error)
    with pytest.raises(TypeError, match=dtype):
        batch_norm(x, None, None, training=True)
    if dtype not in ("uint8", "bool"):
        with pytest.raises(TypeError, match=dtype):
            cbn.moments(x)
    with pytest.raises(TypeError, match="dy has dtype"):
        native_batch_norm_backward(x, f32(2, 3), None, None, None, f32(3), f32(3), True, 1e-5)


def test_masked_arrays():
    x = np.ma.masked_less(f32(2, 3), 0)
    refused(cbn.BatchNorm1d(3), x, TypeError, "input is a masked array")
    with pytest.raises(TypeError, match="masked array"):
        cbn.moments(x)


def test_another_float_type_is_accepted(rng):
    for layer_dtype, x_dtype in ((np.float32, np.float64), (np.float64, np.float32)):
        layer = cbn.BatchNorm1d(3, dtype=layer_dtype)
        y = layer(rng.standard_normal((8, 3)).astype(x_dtype))
        assert y.dtype == x_dtype
        assert layer.backward(y.astype(layer_dtype)).dtype == x_dtype
        assert layer.running_mean.dtype == layer.weight_grad.dtype == layer_dtype


def test_state_dict_lists_everything_and_changes_nothing():
    layer = cbn.BatchNorm1d(3)
    before = snapshot(layer)
    state = {
        "weight": f32(4),
        "bias": np.array([1, np.nan, 2], np.float32),
        "running_var": np.array([1.0, -1.0, 1.0]),
        "num_batches_tracked": np.array(-1),
        "momentum": f32(3),
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layer.load_state_dict(state)
    for words in (
        "cannot load the state into BatchNorm1d(3)", "missing entry 'running_mean'", "unexpected entry 'momentum'",
        "weight has shape (4,); expected (3,)", "bias is not finite", "running_var is negative",
        "num_batches_tracked is negative",
    ):  # fmt: skip
        assert words in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    after = snapshot(layer)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("momentum", [-0.1, -5e-324, 1.1, np.nextafter(1, 2), np.nan, np.inf])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        cbn.BatchNorm1d(3, momentum=momentum)
    mean, var = f32(3), f32(3)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
            batch_norm(f32(2, 3), mean, var, training=training, momentum=momentum)
    assert np.array_equal(mean, f32(3))
    layer = cbn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="momentum"):
        layer.momentum = momentum
    assert layer.momentum == 0.1
    with pytest.raises(TypeError, match="momentum must be a number"):
        batch_norm(f32(2, 3), mean, var, training=True, momentum=None)


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"num_features": 0}, ValueError, "num_features must be 1 or more, but got 0"),
        ({"num_features": -3}, ValueError, "num_features must be 1 or more"),
        ({"num_features": 2.5}, TypeError, "num_features must be a number of channels, not 2.5"),
        ({"num_features": True}, TypeError, "num_features must be a number of channels"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, not float16"),
        ({"dtype": int}, TypeError, "dtype must be float32 or float64, not int64"),
        ({"dtype": "nonsense"}, TypeError, "dtype must be float32 or float64"),
        ({"running_var": "sample"}, ValueError, "running_var must be 'unbiased' or 'biased'"),
        ({"channel_axis": 3}, ValueError, "channel_axis 3 is out of range"),
        ({"channel_axis": -4}, ValueError, "channel_axis -4 is out of range"),
        ({"channel_axis": 1.0}, TypeError, "channel_axis must be an integer, not 1.0"),
        ({"channel_axis": None}, TypeError, "channel_axis must be an integer, not None"),
        ({"dtype": None}, TypeError, "dtype must be float32 or float64, not None"),
        ({"running_var": np.ones(3)}, ValueError, "running_var must be 'unbiased' or 'biased'"),
        ({"affine": 1}, TypeError, "affine must be a bool, not 1"),
        ({"track_running_stats": "yes"}, TypeError, "track_running_stats must be a bool, not 'yes'"),
    ],
)
def test_constructor(kwargs, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        cbn.BatchNorm1d(**{"num_features": 3, **kwargs})


def test_channel_axis_beyond_the_input():
    refused(cbn.BatchNorm1d(3, channel_axis=2), f32(2, 3), ValueError, "channel_axis 2 is out of range")
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"channel_axis {axis} is out of range for an input of 2 dimensions"):
            cbn.moments(f32(2, 3), channel_axis=axis)


@pytest.mark.parametrize("train", [True, False])
def test_out(train):
    layer, x = cbn.BatchNorm1d(3).train(train), f32(4, 3)
    refused(layer, x, ValueError, "out has shape (3, 4); expected (4, 3)", out=f32(3, 4))
    refused(layer, x, ValueError, "out has shape (4, 3, 1)", out=f32(4, 3, 1))
    refused(layer, x, TypeError, "out has dtype '<f8'; expected '<f4'", out=np.ones((4, 3)))
    refused(layer, x, TypeError, "out has dtype '>f4'; expected '<f4'", out=np.ones((4, 3), ">f4"))
    refused(layer, x, TypeError, "out must be a numpy array, not list", out=[[0.0] * 3] * 4)
    read_only = f32(4, 3)
    read_only.flags.writeable = False
    refused(layer, x, ValueError, "out is read-only", out=read_only)
    for bad, kind in ((f32(3, 4), ValueError), (np.ones((4, 3)), TypeError), (read_only, ValueError), ([1], TypeError)):
        with pytest.raises(kind, match="out"):
            batch_norm(x, f32(3), f32(3), training=train, out=bad)
        with pytest.raises(kind, match="out"):
            native_batch_norm_backward(x, x, None, f32(3), f32(3), f32(3), f32(3), train, 1e-5, out=bad)
    with pytest.raises(ValueError, match="output_mask leaves out dx"):
        native_batch_norm_backward(x, x, None, f32(3), f32(3), f32(3), f32(3), train, 1e-5, (False, True, True), out=x)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_read_only_statistics(name):
    layer = cbn.BatchNorm1d(3)
    getattr(layer, name).flags.writeable = False
    refused(layer, f32(4, 3), ValueError, f"{name} is read-only", out=f32(4, 3))
    assert layer.eval()(f32(4, 3)).shape == (4, 3)  # only read there


@pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
def test_read_only_gradients(name):
    layer = cbn.BatchNorm1d(3)
    layer(np.eye(3, dtype=np.float32))
    getattr(layer, name).flags.writeable = False
    out = f32(3, 3)
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        layer.backward(f32(3, 3), out=out)
    assert np.array_equal(out, f32(3, 3))
    assert not layer.weight_grad.any()
    assert not layer.bias_grad.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_per_channel_arguments(training, name):
    def call(value):
        arguments = {"running_mean": f32(3), "running_var": f32(3), "weight": f32(3), "bias": f32(3)}
        arguments[name] = value
        before = {k: np.array(v, copy=True) for k, v in arguments.items()}
        out = f32(4, 3)
        try:
            batch_norm(np.eye(4, 3, dtype=np.float32), **arguments, training=training, out=out)
        finally:
            assert np.array_equal(out, f32(4, 3))
            for k, v in arguments.items():
                assert np.array_equal(np.asarray(v), before[k])

    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=f"{name} should contain 3 elements not 4"):
            call(f32(4))
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (3, 1)")):
        call(f32(3, 1))
    with pytest.raises(TypeError, match=f"{name} has dtype int64"):
        call(np.ones(3, int))
    if training and name.startswith("running"):
        with pytest.raises(TypeError, match=f"{name} has dtype float16; expected float32 or float64"):
            call(np.ones(3, np.float16))
        read_only = f32(3)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match=f"{name} is read-only"):
            call(read_only)
        with pytest.raises(TypeError, match=f"{name} is updated in place and must be a numpy array, not list"):
            call([1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["weight", "bias", "weight_grad", "bias_grad", "running_mean", "running_var"])
def test_assignment_of_arrays(name):
    layer = cbn.BatchNorm1d(3)
    before = getattr(layer, name)
    for value, kind, words in (
        ([1.0, 2.0, 3.0], TypeError, f"{name} must be a numpy array or None, not list"),
        (1.0, TypeError, f"{name} must be a numpy array or None, not float"),
        (f32(4), ValueError, f"{name} has shape (4,); expected (3,)"),
        (f32(3, 1), ValueError, f"{name} has shape (3, 1); expected (3,)"),
        (np.ones(3, int), TypeError, f"{name} has dtype int64"),
    ):
        with pytest.raises(kind, match=re.escape(words)):
            setattr(layer, name, value)
        assert getattr(layer, name) is before
    own = f32(3)
    setattr(layer, name, own)
    assert getattr(layer, name) is own
    setattr(layer, name, np.ones(3))
    assert getattr(layer, name).dtype == np.float32
    setattr(layer, name, None)
    assert getattr(layer, name) is None


def test_assignment_of_the_counter():
    layer = cbn.BatchNorm1d(3)
    for value, kind in (
        (3, TypeError),
        (np.ones(1, int), TypeError),
        (np.array(1.0), TypeError),
        (np.array(-1), ValueError),
    ):
        with pytest.raises(kind, match="num_batches_tracked"):
            layer.num_batches_tracked = value
    layer.num_batches_tracked = np.array(7, np.int32)
    layer(np.eye(3, dtype=np.float32))
    assert layer.num_batches_tracked == 8
    assert layer.num_batches_tracked.dtype == np.int64
    layer.num_batches_tracked = None
    layer(np.eye(3, dtype=np.float32))


def test_backward_says_why_not():
    layer, x = cbn.BatchNorm1d(3), np.eye(3, dtype=np.float32)
    with pytest.raises(RuntimeError, match="call the layer in training mode first"):
        layer.backward(x)
    layer.eval()(x)
    with pytest.raises(
        RuntimeError, match=r"evaluation mode.*freeze\(\).*native_batch_norm_backward\(\.\.\., train=False"
    ):
        layer.backward(x)
    layer.train()(x, out=x)
    with pytest.raises(RuntimeError, match="the input or the residual of the last forward has been overwritten"):
        layer.backward(x)
    layer(x)
    layer.backward(x)
    layer.backward(x, out=x)
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(x)


def test_backward_refuses_what_does_not_fit():
    layer, x = cbn.BatchNorm1d(3), np.eye(3, dtype=np.float32)
    layer(x)
    for dy, kind, words in (
        (f32(3, 4), ValueError, "dy has shape (3, 4); expected (3, 3), as the input"),
        (f32(3), ValueError, "dy has shape (3,)"),
        (np.ones((3, 3), int), TypeError, "dy has dtype int64"),
    ):
        with pytest.raises(kind, match=re.escape(words)):
            layer.backward(dy)
    for out, kind in ((f32(3, 4), ValueError), (np.ones((3, 3)), TypeError)):
        with pytest.raises(kind, match="out has"):
            layer.backward(x, out=out)
    assert not layer.weight_grad.any()
    assert not layer.bias_grad.any()


def test_train_wants_a_bool():
    layer = cbn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        layer.train("yes")
    assert layer.training
    assert native_batch_norm(f32(2, 3), None, None, f32(3), f32(3), False, 0.1, 1e-5)[0].shape == (2, 3)


@pytest.mark.parametrize("name", ["training", "affine", "track_running_stats"])
def test_flags_are_bools(name):
    layer = cbn.BatchNorm1d(3)
    with pytest.raises(TypeError, match=f"{name} must be a bool, not 0"):
        setattr(layer, name, 0)
    setattr(layer, name, np.False_)
    assert getattr(layer, name) is False


def test_masked_arrays_per_channel():
    masked = np.ma.masked_less(f32(3), 0)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments = {"running_mean": f32(3), "running_var": f32(3), name: masked}
        for training in (True, False):
            with pytest.raises(TypeError, match=f"{name} is a masked array"):
                batch_norm(f32(4, 3), **arguments, training=training)
        with pytest.raises(TypeError, match=f"{name} is a masked array"):
            setattr(cbn.BatchNorm1d(3), name, masked)
        with pytest.raises(ValueError, match=f"{name} cannot be read.*masked array"):
            cbn.BatchNorm1d(3).load_state_dict({**cbn.BatchNorm1d(3).state_dict(), name: masked})


@pytest.mark.parametrize("state", [[], "abc", None, 1])
def test_a_state_is_a_mapping(state):
    with pytest.raises(TypeError, match="state must be a mapping"):
        cbn.BatchNorm1d(3).load_state_dict(state)


def test_an_output_mask_that_is_none_is_refused():
    x = f32(4, 3)
    for mask, kind in (((True, True), ValueError), ((1, 1, 1), TypeError)):
        with pytest.raises(kind, match="output_mask"):
            native_batch_norm_backward(x, x, None, None, None, f32(3), f32(3), True, 1e-5, mask)


def test_strings_are_named():
    with pytest.raises(TypeError, match="input has dtype"):
        cbn.moments(np.array([["a"], ["b"]], dtype=np.dtypes.StringDType()))


@pytest.mark.parametrize("name", ["running_var", "num_batches_tracked", "bias_grad"])
def test_resets_are_all_or_nothing(name):
    layer = cbn.BatchNorm1d(3)
    layer(np.eye(3, dtype=np.float32))
    layer.backward(np.eye(3, dtype=np.float32))
    getattr(layer, name).flags.writeable = False
    before = snapshot(layer)
    for reset in (layer.zero_grad,) if name == "bias_grad" else (layer.reset_running_stats, layer.reset_parameters):
        with pytest.raises(ValueError, match=f"{name} is read-only"):
            reset()
        assert all(np.array_equal(before[k], v) for k, v in snapshot(layer).items())
