"""What is passed as an array, a shape or a number and is none: each is named for what it is; and each is read once."""

import fractions
import re
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward

from .test_errors import f32, refused

# ---- what is no array of floating point numbers ----------------------------------------------------------------------


class OnlyDLPack:
    """An array of a library that numpy reads by `numpy.from_dlpack` alone."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **kwargs):
        return self.a.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


class Sparse:
    """As scipy's: no `__array__`, but a method that makes an array."""

    def toarray(self):
        return f32(2, 3)


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("lies on another device")


class RequiresGrad(Unreadable):
    requires_grad = True


class GivesMasked:
    def __array__(self, dtype=None, copy=None):
        return np.ma.masked_less(f32(2, 3), 2)


# name -> (object, what is said of it after the argument's name)
NO_FLOATS = {
    "None": (None, " must be an array, not None"),
    "dict": ({"a": 1.0}, " must be an array, not dict"),
    "set": ({1.0}, " must be an array, not set"),
    "generator": ((i for i in [1.0]), " must be an array, not generator"),
    "object": (object(), " must be an array, not object"),
    "function": (len, " must be an array, not builtin_function_or_method"),
    "sparse": (Sparse(), " must be an array, not Sparse; {}.toarray() makes one"),
    "DLPack": (OnlyDLPack(f32(2, 3)), " must be an array, not OnlyDLPack; numpy.from_dlpack({}) makes one"),
    "str": ("hello", " must be an array, not str"),
    "bytes": (b"hello", " must be an array, not bytes"),
    "unreadable": (Unreadable(), " is a Unreadable, which numpy cannot read as an array: lies on another device"),
    "requires grad": (RequiresGrad(), " is a RequiresGrad that requires grad; expected {}.detach()"),
    "masked": (np.ma.masked_less(f32(2, 3), 2), " is a masked array"),
    "gives masked": (GivesMasked(), " is a masked array"),
    "list of masked": ([np.ma.masked_less(f32(3), 2), f32(3)], " is a masked array"),
    "lists of masked": ([[np.ma.masked_less(f32(3), 2)]], " is a masked array"),
    "bfloat16 of numpy.load": (np.zeros((2, 3), "V2"), " has dtype |V2; expected"),
    "strings": ([["1", "2", "3"]], " has dtype <U1; expected"),
    "dates": (np.full((2, 3), "2015-02-11", "M8[D]"), " has dtype datetime64[D]; expected"),
    "durations": (np.ones((2, 3), "m8[s]"), " has dtype timedelta64[s]; expected"),
    "objects": ([[1.0, None]], " has dtype object; expected"),
    "structured": (np.zeros((2, 3), [("a", "f4"), ("b", "f8")]), " has dtype [('a', '<f4'), ('b', '<f8')]; expected"),
    "complex": (np.ones((2, 3), complex), " has dtype complex128; expected"),
}
LATER_WORDS = {
    "objects": "it holds objects that are no numbers, such as None",
    "structured": "it is structured, with fields a, b",
    "bfloat16 of numpy.load": "it may be bfloat16: x.view(ml_dtypes.bfloat16)",
}


def entries(value):
    """Every way in for an array: argument -> call with `value` in its place."""
    x, v = f32(2, 3), np.ones(3)
    trained = cbn.BatchNorm1d(3)
    trained(np.eye(3, dtype=np.float32))
    evaluated = cbn.BatchNorm1d(3).eval()
    fused = cbn.BatchNorm1d(2).eval()
    plan = evaluated.plan((2, 3))
    saved = (None, None, None, v, v, True, 1e-5)
    return {
        "input": [
            lambda: cbn.BatchNorm1d(3)(value),
            lambda: evaluated(value),
            lambda: plan(value),
            lambda: cbn.moments(value),
            lambda: batch_norm(value, v, v),
            lambda: batch_norm(value, None, None, training=True),
            lambda: native_batch_norm(value, None, None, v, v, False, 0.1, 1e-5),
            lambda: native_batch_norm_backward(x, value, *saved),
        ],
        "residual": [
            lambda: cbn.BatchNorm1d(3)(x, residual=value),
            lambda: plan(x, residual=value),
            lambda: batch_norm(x, v, v, residual=value),
        ],
        "dy": [lambda: trained.backward(value), lambda: native_batch_norm_backward(value, x, *saved)],
        "running_mean": [lambda: batch_norm(x, value, v)],
        "running_var": [lambda: native_batch_norm_backward(x, x, None, v, value, None, None, False, 1e-5)],
        "weight": [lambda: batch_norm(x, v, v, value), lambda: cbn.fuse_linear_bn(value, None, fused)],
        "bias": [lambda: batch_norm(x, v, v, None, value), lambda: cbn.fuse_linear_bn(f32(2, 3), value, fused)],
        "save_mean": [lambda: native_batch_norm_backward(x, x, None, None, None, value, v, True, 1e-5)],
        "count": [lambda: cbn.Moments(value, v, v)],
        "mean": [lambda: cbn.Moments(1, value, v)],
        "m2": [lambda: cbn.Moments(1, v, value)],
    }


MAY_BE_NONE = ("residual", "running_mean", "running_var", "weight", "bias", "save_mean")


@pytest.mark.parametrize("kind", NO_FLOATS)
def test_what_is_no_array_of_floats_is_named(kind):
    value, words = NO_FLOATS[kind]
    for name, calls in entries(value).items():
        for i, call in enumerate(calls):
            if value is None and name in MAY_BE_NONE and (name, i) != ("weight", 1):
                continue
            with pytest.raises(TypeError) as caught:
                call()
            said = str(caught.value)
            assert said.startswith(name + words.format("x" if name == "input" else name)), (name, i, said)
            assert LATER_WORDS.get(kind, "") in said, (name, i, said)
            assert "astype" not in said, (name, i, said)
            assert "asarray" not in said, (name, i, said)


@pytest.mark.parametrize("value", [[[1.0, 2.0, 3.0], [1.0]], ([1.0], 2.0), [f32(2, 3), f32(2, 4)]], ids=repr)
def test_ragged_lists_are_named(value):
    for name, calls in entries(value).items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name} is a {type(value).__name__} whose parts differ in shape"):
                call()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("kind", NO_FLOATS)
def test_statistics_to_be_updated_are_named_too(kind, name):
    value, words = NO_FLOATS[kind]
    if value is None:
        return  # another test's: one of the two alone
    buffers = {"running_mean": np.zeros(3), "running_var": np.ones(3), name: value}
    with pytest.raises(TypeError) as caught:
        batch_norm(f32(2, 3), **buffers, training=True)
    if isinstance(value, np.ndarray):
        assert str(caught.value).startswith(name + words)
    elif "masked" not in kind:
        assert str(caught.value) == f"{name} is updated in place and must be a numpy array, not {type(value).__name__}"


@pytest.mark.parametrize("kind", [k for k in NO_FLOATS if k != "None"])
def test_out_is_named_by_its_type(kind):
    value = NO_FLOATS[kind][0]
    words = "out has dtype" if type(value) is np.ndarray else f"out must be a numpy array, not {type(value).__name__}"
    x, v = f32(2, 3), np.ones(3)
    plan = cbn.BatchNorm1d(3).eval().plan((2, 3))
    for call in (cbn.BatchNorm1d(3), cbn.BatchNorm1d(3).eval(), plan, lambda x, out: batch_norm(x, v, v, out=out)):
        with pytest.raises(TypeError, match=re.escape(words)):
            call(x, out=value)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((2, 3), int),
        np.ones((2, 3), np.uint8),
        np.ones((2, 3), bool),
        np.ones((2, 3), np.longdouble),
        np.ones((2, 3), ml_dtypes.float8_e4m3fn),
        [[1, 2, 3], [4, 5, 7]],
        [range(3), range(2, 5)],
    ],
    ids=lambda x: str(np.asarray(x).dtype),
)
def test_advice_works(x):
    """Where a conversion is advised, what is advised is accepted."""
    v = np.ones(3)
    for variable, call in {
        "x": cbn.BatchNorm1d(3),
        "dy": lambda dy: native_batch_norm_backward(dy, f32(2, 3), None, None, None, v, v, True, 1e-5),
    }.items():
        with pytest.raises(TypeError, match="has dtype") as caught:
            call(x)
        advice = re.search(r"as in ([^;]*)", str(caught.value))[1]
        assert call(eval(advice, {"numpy": np, variable: x})) is not None


def test_images_are_told_of_scales():
    for x in (np.ones((2, 3), np.uint8), np.ones((2, 3), np.int8)):
        with pytest.raises(TypeError, match="evaluation takes it as it is, with x_scale=1/255"):
            cbn.BatchNorm1d(3)(x)
        with pytest.raises(TypeError, match="x_scale=1/255"):
            batch_norm(x, f32(3), f32(3))
        with pytest.raises(TypeError, match=r"dy has dtype u?int8; (?!.*x_scale)"):
            native_batch_norm_backward(x, f32(2, 3), None, None, None, f32(3), f32(3), True, 1e-5)


# ---- channels on another axis ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "words"),
    [
        ((8, 5, 6, 3), 1, "5 elements not 3; input has shape (8, 5, 6, 3), whose axis 3 has 3: channel_axis=-1?"),
        ((8, 3, 5, 6), -1, "6 elements not 3; input has shape (8, 3, 5, 6), whose axis 1 has 3: channel_axis=1?"),
        ((3, 5, 3, 6), 1, "5 elements not 3; input has shape (3, 5, 3, 6), whose axis 2 has 3: channel_axis=2?"),
        ((8, 5, 6, 4), 1, "5 elements not 3"),  # PyTorch's words alone
    ],
)
def test_channels_on_another_axis(shape, axis, words):
    x, v, words = f32(*shape), np.ones(3), "should contain " + words
    for name, layer in (
        ("running_mean", cbn.BatchNorm2d(3, channel_axis=axis)),
        ("running_mean", cbn.BatchNorm2d(3, channel_axis=axis).eval()),
        ("weight", cbn.BatchNorm2d(3, channel_axis=axis, track_running_stats=False)),
    ):
        error = refused(layer, x, RuntimeError, f"{name} {words}")
        assert str(error) == f"{name} {words}"
    for name, call in (
        ("running_mean", lambda: cbn.BatchNorm2d(3, channel_axis=axis).eval().plan(shape)),
        ("running_mean", lambda: batch_norm(x, v, v, channel_axis=axis)),
        ("running_mean", lambda: batch_norm(x, v, v, training=True, channel_axis=axis)),
        ("running_mean", lambda: batch_norm(x.astype(np.uint8), v, v, x_scale=1, channel_axis=axis)),
        ("weight", lambda: batch_norm(x, None, None, v, training=True, channel_axis=axis)),
        ("bias", lambda: native_batch_norm(x, None, v, None, None, True, 0.1, 1e-5, channel_axis=axis)),
        ("save_mean", lambda: native_batch_norm_backward(x, x, *(None,) * 3, v, v, True, 1e-5, channel_axis=axis)),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert str(caught.value) == f"{name} {words}"
    bare = cbn.BatchNorm2d(3, affine=False, track_running_stats=False, channel_axis=axis)
    error = refused(bare, x, ValueError, "num_features is 3, but axis")
    assert str(error).endswith(words[words.index(";") :] if ";" in words else f"has {shape[axis]}")


# ---- shapes and numbers that are none --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ((None, 3), TypeError, "shape must be a sequence of integers, as x.shape is, not (None, 3)"),
        ((2.5, 3), TypeError, "shape must be a sequence of integers, as x.shape is, not (2.5, 3)"),
        ((True, 3), TypeError, "shape must be a sequence of integers, as x.shape is, not (True, 3)"),
        ((2, "3"), TypeError, "shape must be a sequence of integers, as x.shape is, not (2, '3')"),
        (3, TypeError, "shape must be a sequence of integers, as x.shape is, not 3"),
        (None, TypeError, "shape must be a sequence of integers, as x.shape is, not None"),
        ("23", TypeError, "shape must be a sequence of integers, as x.shape is, not '23'"),
        ({2, 3}, TypeError, "shape must be a sequence of integers, as x.shape is, not {2, 3}"),
        ({2: 0, 3: 0}, TypeError, "shape must be a sequence of integers, as x.shape is, not {2: 0, 3: 0}"),
        (f32(2, 3), TypeError, "shape must be a sequence of integers, as x.shape is, not array("),
        ((-1, 3), ValueError, "shape must not have negative sizes, but got (-1, 3)"),
        ((2**62, 2**62, 3), ValueError, "has more elements than memory can have"),
        ((2**60, 3), ValueError, "has more elements than memory can have"),
        ((10**400, 3), ValueError, "a size must be an integer of 64 bits"),
        ((), ValueError, "expected 2D or 3D input (got 0D input)"),
        ((3,), ValueError, "expected 2D or 3D input (got 1D input)"),
    ],
    ids=str,
)
def test_shapes_of_plans(shape, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        cbn.BatchNorm1d(3).eval().plan(shape)


def test_plans_of_any_sequence_of_integers():
    layer = cbn.BatchNorm1d(3).eval()
    for shape in ([2, 3], np.array([2, 3]), (np.int8(2), 3), range(2, 4)):
        assert layer.plan(shape).shape == (2, 3)


def test_a_plan_takes_no_memory_for_its_shape():
    """Of a shape that no memory holds there is a plan, or a MemoryError that names it; no memory is touched."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer = cbn.BatchNorm1d(3).eval()
    for n in (10**8, 10**12):
        try:
            assert layer.plan((n, 3)).shape == (n, 3)
        except MemoryError as error:
            assert f"({n}, 3)" in str(error)  # noqa: PT017
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; 10^8 samples are 1.2 GB


@pytest.mark.parametrize(
    "huge", [10**400, -(10**400), fractions.Fraction(10**400)], ids=["int", "negative", "fraction"]
)
def test_numbers_beyond_float64(huge):
    x, v = np.eye(3), np.ones(3)
    layer = cbn.BatchNorm1d(3)
    for name, call in (
        ("eps", lambda: cbn.BatchNorm1d(3, eps=huge)),
        ("eps", lambda: setattr(layer, "eps", huge)),
        ("eps", lambda: batch_norm(x, v, v, eps=huge)),
        ("eps", lambda: native_batch_norm(x, None, None, None, None, True, 0.1, huge)),
        ("eps", lambda: native_batch_norm_backward(x, x, None, None, None, v, v, True, huge)),
        ("momentum", lambda: cbn.BatchNorm1d(3, momentum=huge)),
        ("momentum", lambda: batch_norm(x, v, v, training=True, momentum=huge)),
        ("the slope of leaky_relu", lambda: cbn.BatchNorm1d(3, activation=("leaky_relu", huge))),
        ("the slope of leaky_relu", lambda: batch_norm(x, v, v, activation=("leaky_relu", huge))),
        ("x_scale", lambda: batch_norm(x.astype(np.uint8), v, v, x_scale=huge)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a number.* that float64 holds"):
            call()
    assert layer.eps == 1e-5


@pytest.mark.parametrize("huge", [10**400, -(10**400), 10**5000, 2**63], ids=["400", "-400", "5000", "2**63"])
def test_integers_beyond_64_bits(huge):
    x, v = np.eye(3), np.ones(3)
    for name, call in (
        ("num_features", lambda: cbn.BatchNorm1d(huge)),
        ("channel_axis", lambda: cbn.BatchNorm1d(3, channel_axis=huge)),
        ("channel_axis", lambda: cbn.moments(x, channel_axis=huge)),
        ("channel_axis", lambda: batch_norm(x, v, v, channel_axis=huge)),
        ("x_zero_point", lambda: batch_norm(x.astype(np.uint8), v, v, x_scale=1, x_zero_point=huge)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a.* of 64 bits, but got one of {huge.bit_length()}"):
            call()


def test_numbers_are_no_arrays():
    for value in (np.ones(1), np.ones((1, 1)), [1.0]):
        with pytest.raises(TypeError, match="eps must be a number, not"):
            cbn.BatchNorm1d(3, eps=value)
    assert cbn.BatchNorm1d(3, eps=np.array(0.5)).eps == 0.5


def test_output_mask_and_parts_of_a_merge():
    x, v = np.eye(3), np.ones(3)
    with pytest.raises(TypeError, match="output_mask must be three bools, for dx, dweight and dbias, not None"):
        native_batch_norm_backward(x, x, None, None, None, v, v, True, 1e-5, None)
    m = cbn.moments(x)
    for parts, words in ((m, "several Moments"), (None, "several Moments, .* not NoneType"), ([m, x], "not ndarray")):
        with pytest.raises(TypeError, match=words):
            cbn.Moments.merge(parts)


# ---- objects that make an array at each look -------------------------------------------------------------------------


class Counting:
    """An object whose `__array__` counts: it may be slow, or give other values the next time."""

    def __init__(self, a):
        self.a, self.count = a, 0

    def __array__(self, dtype=None, copy=None):
        self.count += 1
        return self.a


def calls_with_counting():
    x, v = np.eye(3) + 1, np.ones(3)
    layer = cbn.BatchNorm1d(3)
    layer(x)
    residual = cbn.BatchNorm1d(3, activation="relu")
    evaluated = cbn.BatchNorm1d(3).eval()
    plan = evaluated.plan((3, 3), np.float64)
    linear = np.ones((3, 2))
    return {
        "call": (cbn.BatchNorm1d(3), [x], {}),
        "call again": (evaluated, [x], {}),
        "residual": (residual, [x], {"residual": x}),
        "plan": (plan, [x], {"residual": x}),
        "backward": (layer.backward, [x], {}),
        "moments": (cbn.moments, [x], {}),
        "moments of what counts": (cbn.moments, [x], {"mask": np.ones(3, bool), "weights": v}),
        "running": (cbn.RunningMoments(3).update, [x], {"mask": np.ones(3, bool), "weights": v}),
        "Moments": (cbn.Moments, [v, v, v], {}),
        "batch_norm, evaluation": (batch_norm, [x, v, v, v, v], {"residual": x}),
        "batch_norm, training": (batch_norm, [x, None, None, v, v, True], {"residual": x}),
        "batch_norm, bytes": (batch_norm, [x.astype(np.uint8), v, v, v, v], {"x_scale": 1.0}),
        "native, evaluation": (native_batch_norm, [x, v, v, v, v, False, 0.1, 1e-5], {}),
        "native, training": (native_batch_norm, [x, v, v, None, None, True, 0.1, 1e-5], {}),
        "gradients, training": (native_batch_norm_backward, [x, x, v, None, None, v, v, True, 1e-5], {}),
        "gradients, evaluation": (native_batch_norm_backward, [x, x, v, v, v, None, None, False, 1e-5], {}),
        "linear": (cbn.fuse_linear_bn, [linear, v, evaluated], {}),
        "convolution": (cbn.fuse_conv_bn, [np.ones((3, 2, 1)), v, evaluated], {}),
        "after": (cbn.fuse_bn_linear, [evaluated, linear.T, np.ones(2)], {}),
        "state": (lambda w: cbn.BatchNorm1d(3).load_state_dict({"weight": w}, strict=False), [v], {}),
    }


@pytest.mark.parametrize("name", calls_with_counting())
def test_every_argument_is_made_an_array_once(name):
    function, arguments, keywords = calls_with_counting()[name]
    arguments = [Counting(a) if isinstance(a, np.ndarray) else a for a in arguments]
    keywords = {k: Counting(a) if isinstance(a, np.ndarray) else a for k, a in keywords.items()}
    function(*arguments, **keywords)
    counted = [a for a in (*arguments, *keywords.values()) if isinstance(a, Counting)]
    assert [a.count for a in counted] == [1] * len(counted)


def test_bfloat16_by_its_name():
    """numpy knows it once ml_dtypes has been imported, which a user who names it need not have done."""
    code = (
        "import sys, cbn, numpy as np; assert 'ml_dtypes' not in sys.modules; "
        "bn = cbn.BatchNorm1d(3).eval(); print(bn.plan((2, 3), 'bfloat16').dtype, "
        "bn(np.ones((2, 3), np.uint8), x_scale=1, out_dtype='bfloat16').dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "bfloat16 bfloat16\n", done.stderr
    code = "import sys; sys.modules['ml_dtypes'] = None; import cbn; cbn.BatchNorm1d(3).plan((2, 3), 'bfloat16')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: bfloat16 needs the ml_dtypes package: pip install "cbn[bfloat16]"' in done.stderr


@pytest.mark.parametrize("value", [None, {}, np.ones(3)])
def test_what_is_no_layer_has_no_state_for_torch(value):
    with pytest.raises(TypeError, match=f"bn must be a layer of cbn, not {type(value).__name__}"):
        cbn.to_torch_state(value)
