"""PyTorch as a live oracle: values, state after calls, errors and their words."""

import itertools

import numpy as np
import pytest

from . import peer

torch = peer("torch")

import cbn  # noqa: E402
from cbn.functional import batch_norm, native_batch_norm, native_batch_norm_backward  # noqa: E402
from cbn.inputs import as_input  # noqa: E402

SHAPES = {1: [(8, 3), (4, 3, 7)], 2: [(4, 3, 5, 6)], 3: [(2, 3, 4, 5, 6)]}
TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-5}, "float64": {"rtol": 1e-11, "atol": 1e-12}}


def pair(dims, dtype="float64", **kwargs):
    """The same layer of cbn and of PyTorch, with drawn parameters."""
    ours = getattr(cbn, f"BatchNorm{dims}d")(3, dtype=dtype, **kwargs)
    theirs = getattr(torch.nn, f"BatchNorm{dims}d")(3, dtype=getattr(torch, dtype), **kwargs)
    rng = np.random.default_rng(dims)
    for name in ("weight", "bias"):
        if getattr(ours, name) is not None:
            getattr(ours, name)[:] = rng.standard_normal(3)
            getattr(theirs, name).data = torch.from_numpy(getattr(ours, name).copy())
    return ours, theirs


def same_state(ours, theirs, **tolerance):
    state = theirs.state_dict()
    assert list(state) == list(ours.state_dict())
    for name, value in ours.state_dict().items():
        np.testing.assert_allclose(value, state[name].numpy(), err_msg=name, **tolerance)


SWITCHES = [
    dict(zip(("affine", "bias", "track_running_stats", "momentum"), values, strict=True))
    for values in itertools.product([True, False], [True, False], [True, False], [0.1, 0.7, None])
]


@pytest.mark.parametrize("kwargs", SWITCHES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_life_of_a_layer(kwargs, dtype, dims, rng):
    """Train, evaluate, train again: outputs, gradients, statistics and counters agree at every step."""
    ours, theirs = pair(dims, dtype, **kwargs)
    for shape in SHAPES[dims]:
        for training in (True, True, False, True):
            ours.train(training), theirs.train(training)
            x, dy = (rng.standard_normal((2, *shape)) * 2 + 1).astype(dtype)
            t = torch.from_numpy(x.copy()).requires_grad_()
            expected = theirs(t)
            np.testing.assert_allclose(ours(x), expected.detach().numpy(), **TOLERANCE[dtype])
            same_state(ours, theirs, **TOLERANCE[dtype])
            if training:
                expected.backward(torch.from_numpy(dy))
                np.testing.assert_allclose(ours.backward(dy), t.grad.numpy(), **TOLERANCE[dtype])
                for name in ("weight", "bias"):
                    if getattr(ours, name) is not None:
                        np.testing.assert_allclose(
                            getattr(ours, name + "_grad"), getattr(theirs, name).grad.numpy(), **TOLERANCE[dtype]
                        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("train", [True, False])
def test_memory_formats(rng, isa, memory_format, train):
    x = torch.from_numpy(rng.standard_normal((4, 16, 5, 6))).contiguous(memory_format=memory_format)
    mean, var = rng.standard_normal(16), rng.uniform(1, 2, 16)
    expected = torch.nn.functional.batch_norm(
        x, torch.from_numpy(mean.copy()), torch.from_numpy(var.copy()), training=train
    )
    y = batch_norm(x.numpy(), mean, var, training=train)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-11, atol=1e-12)
    assert y.strides == tuple(8 * s for s in expected.stride())


@pytest.mark.parametrize("train", [True, False])
def test_native_functions(rng, train):
    x, dy = rng.standard_normal((2, 6, 3, 7))
    weight, bias, mean = rng.standard_normal((3, 3))
    var = rng.uniform(1, 2, 3)
    as_torch = [torch.from_numpy(a.copy()) for a in (x, weight, bias, mean, var)]
    expected = torch.native_batch_norm(*as_torch, train, 0.1, 1e-5)
    result = native_batch_norm(x, weight, bias, mean, var, train, 0.1, 1e-5)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean, as_torch[3].numpy(), rtol=1e-12)
    np.testing.assert_allclose(var, as_torch[4].numpy(), rtol=1e-12)
    for mask in itertools.product([True, False], repeat=3):
        expected_gradients = torch.ops.aten.native_batch_norm_backward(
            torch.from_numpy(dy), as_torch[0], as_torch[1], as_torch[3], as_torch[4], expected[1], expected[2], train,
            1e-5, list(mask),
        )  # fmt: skip
        gradients = native_batch_norm_backward(dy, x, weight, mean, var, result[1], result[2], train, 1e-5, mask)
        for wanted, ours, theirs in zip(mask, gradients, expected_gradients, strict=True):
            assert (ours is None) == (not wanted)
            if wanted:
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kwargs", SWITCHES[::3], ids=str)
def test_state_dicts_travel_both_ways(rng, kwargs):
    _, theirs = pair(2, "float32", **kwargs)
    for _ in range(3):
        theirs(torch.from_numpy(rng.standard_normal((4, 3, 5, 5)).astype(np.float32)))
    fresh, _ = pair(2, "float32", **kwargs)
    assert fresh.load_state_dict(theirs.state_dict()) == ([], [])
    same_state(fresh, theirs, rtol=0, atol=0)
    other = torch.nn.BatchNorm2d(3, **kwargs)
    fresh(rng.standard_normal((4, 3, 5, 5)).astype(np.float32))
    other.load_state_dict({name: torch.from_numpy(a) for name, a in fresh.state_dict().items()})
    same_state(fresh, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2"])
def test_a_models_state_of_any_type_with_gradients(rng, dtype):
    """As `state_dict(keep_vars=True)`, or a dict of parameters, has it."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model(torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.3, 1.7, -2.1]))
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert state["1.weight"].requires_grad
    bn = cbn.BatchNorm1d(3)
    assert bn.load_state_dict(state, prefix="1.") == ([], [])
    for name, value in bn.state_dict().items():
        assert np.array_equal(value, state["1." + name].detach().to(torch.float32).numpy())
    with pytest.raises(ValueError, match=r"with prefix='1\.'$"):
        bn.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(3, device="meta"), "weight cannot be read as an array .*no data"),
        (lambda: torch.ones(3).to_sparse(), "weight cannot be read as an array .*to_dense"),
        (lambda: torch.ones(3, dtype=torch.complex64), "weight has dtype complex64; expected float32"),
        (lambda: torch.nn.UninitializedParameter(), "weight cannot be read as an array .*uninitialized"),
        (lambda: torch._neg_view(torch.ones(3)), "weight cannot be read as an array .*negative bit"),
    ],
    ids=["meta", "sparse", "complex", "uninitialized", "negative bit"],
)
def test_tensors_that_hold_no_plain_numbers(make, words):
    bn = cbn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=words):
        bn.load_state_dict({**bn.state_dict(), "weight": make()})
    assert np.array_equal(bn.weight, [1, 1, 1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_variance_a_little_below_zero_evaluates_as_theirs(rng, dtype):
    ours, theirs = pair(2, dtype)
    for running_var in (ours.running_var, theirs.running_var.numpy()):
        running_var[...] = (-9e-6, -1e-9, 1)
    x = rng.standard_normal((4, 3, 5, 5)).astype(dtype)
    y = ours.eval()(x)
    np.testing.assert_allclose(y, theirs.eval()(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert np.isfinite(y).all()


def test_repr_is_theirs():
    for kwargs in SWITCHES:
        ours, theirs = pair(1, "float32", **kwargs)
        assert repr(ours) == repr(theirs)


def functions():
    """Calls that both refuse: name -> (ours, theirs)."""
    z, a = torch.zeros, np.zeros

    def layer(dims, *shape, **kwargs):
        return (
            lambda: getattr(cbn, f"BatchNorm{dims}d")(4, **kwargs)(a(shape, np.float32)),
            lambda: getattr(torch.nn, f"BatchNorm{dims}d")(4, **kwargs)(z(shape)),
        )

    def function(mean, var, **kwargs):
        return (
            lambda: batch_norm(a((2, 3)), mean and a(mean), var and a(var), **kwargs),
            lambda: torch.nn.functional.batch_norm(z(2, 3), mean and z(mean), var and z(var), **kwargs),
        )

    return {
        "rank 1d": layer(1, 2, 4, 4, 4),
        "rank 2d": layer(2, 2, 4, 4),
        "rank 3d": layer(3, 2, 4, 4, 4),
        "one value": layer(1, 1, 4),
        "channels": layer(1, 2, 3),
        "channels, untracked": layer(1, 2, 3, track_running_stats=False),
        "no statistics": function(None, None),
        "no variance": function(3, None),
        "one buffer": function(3, None, training=True),
        "eps zero": function(None, None, training=True, eps=0.0),
        "eps negative": function(3, 3, eps=-1.0),
    }


@pytest.mark.parametrize("name", functions())
def test_refusals_have_the_same_type_and_words(name):
    ours, theirs = functions()[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs()
    words = str(expected.value).replace("torch.Size([1, 4])", "(1, 4)")
    with pytest.raises(type(expected.value)) as caught:
        ours()
    assert str(caught.value) == words
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_poison_as_in_pytorch(rng, value):
    ours, theirs = pair(1)
    x = rng.standard_normal((8, 3, 5))
    x[3, 1, 2] = value
    expected = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours(x), expected, rtol=1e-11, atol=1e-12)
    same_state(ours, theirs, rtol=1e-12, atol=0)


def test_frozen_statistics_train_as_pytorch_in_evaluation(rng):
    """PyTorch's layer in eval() still has gradients; ours has them when frozen."""
    ours, theirs = pair(1)
    x, dy = rng.standard_normal((2, 8, 3, 5))
    ours(x), theirs(torch.from_numpy(x))
    ours.freeze(), theirs.eval()
    t = torch.from_numpy(x.copy()).requires_grad_()
    theirs(t).backward(torch.from_numpy(dy))
    ours(x)
    np.testing.assert_allclose(ours.backward(dy), t.grad.numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(ours.weight_grad, theirs.weight.grad.numpy(), rtol=1e-11)


def test_tensors_are_read_without_a_copy(rng):
    t = torch.from_numpy(rng.standard_normal((8, 3)).astype(np.float32))
    inp = as_input(t, 1)
    assert inp.x.ctypes.data == t.data_ptr()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_activation_and_residual_as_separate_calls(rng, dtype, activation, with_residual, dims):
    ours, theirs = pair(dims, dtype)
    ours.activation = activation
    act = {None: lambda a: a, "relu": torch.relu}.get(activation, lambda a: torch.nn.functional.leaky_relu(a, 0.1))
    for shape in SHAPES[dims]:
        arrays = [rng.standard_normal(shape).astype(dtype) for _ in range(3)]
        x, z = (torch.from_numpy(a.copy()).requires_grad_() for a in arrays[:2])
        expected = act(theirs(x) + z if with_residual else theirs(x))
        theirs.zero_grad()
        expected.backward(torch.from_numpy(arrays[2]))
        y = ours(arrays[0], residual=arrays[1] if with_residual else None)
        ours.zero_grad()
        gradients = ours.backward(arrays[2])
        np.testing.assert_allclose(y, expected.detach().numpy(), **TOLERANCE[dtype])
        for got, want in zip(gradients if with_residual else [gradients], (x, z), strict=False):
            np.testing.assert_allclose(got, want.grad.numpy(), **TOLERANCE[dtype])
        np.testing.assert_allclose(ours.weight_grad, theirs.weight.grad.numpy(), **TOLERANCE[dtype])
        np.testing.assert_allclose(ours.bias_grad, theirs.bias.grad.numpy(), **TOLERANCE[dtype])


def test_relu_passes_nan_as_theirs_does():
    x = np.array([[np.nan, 1.0], [-np.inf, -1.0], [np.inf, 0.0]])
    y = batch_norm(x, np.zeros(2), np.ones(2), eps=0, activation="relu")
    np.testing.assert_array_equal(y, torch.relu(torch.from_numpy(x)).numpy())
