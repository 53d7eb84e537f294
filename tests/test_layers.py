"""The layers: state, modes, gradients, state dicts, copies."""

import copy
import io
import itertools
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import reference

from .paths import DTYPES, agree


def batch(rng, shape=(8, 3, 5), dtype=np.float32):
    return (2 * rng.standard_normal(shape) + 1).astype(dtype)


def test_a_fresh_layer():
    bn = cbn.BatchNorm1d(3)
    assert np.array_equal(bn.weight, np.ones(3, np.float32))
    assert np.array_equal(bn.running_var, np.ones(3, np.float32))
    for a in (bn.bias, bn.running_mean, bn.weight_grad, bn.bias_grad):
        assert np.array_equal(a, np.zeros(3, np.float32))
        assert a.dtype == np.float32
    assert bn.num_batches_tracked.dtype == np.int64
    assert bn.num_batches_tracked.shape == ()
    assert bn.num_batches_tracked == 0
    assert bn.training
    assert not bn.frozen


@pytest.mark.parametrize(("affine", "bias", "track"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_switches(rng, affine, bias, track, dtype):
    bn = cbn.BatchNorm1d(3, affine=affine, bias=bias, track_running_stats=track, dtype=dtype)
    assert (bn.weight is not None) == affine == (bn.weight_grad is not None)
    assert (bn.bias is not None) == (affine and bias) == (bn.bias_grad is not None)
    for a in (bn.running_mean, bn.running_var, bn.num_batches_tracked):
        assert (a is not None) == track
    if affine:
        bn.weight[:] = rng.standard_normal(3)
    if affine and bias:
        bn.bias[:] = rng.standard_normal(3)
    mean, var = (np.zeros(3), np.ones(3)) if track else (None, None)
    for _ in range(3):
        x = batch(rng, dtype=dtype)
        exact, mean, var = reference.batch_norm(x, mean, var, bn.weight, bn.bias, True)
        agree(bn(x), exact, 1e-6)
    if track:
        agree(bn.running_mean, mean, 1e-6)
        agree(bn.running_var, var, 1e-6)
        assert bn.num_batches_tracked == 3
    bn.eval()
    x = batch(rng, dtype=dtype)
    exact, *_ = reference.batch_norm(x, mean, var, bn.weight, bn.bias, not track)
    agree(bn(x), exact, 1e-6)
    assert len(list(bn.parameters())) == affine + (affine and bias)
    assert len(bn.state_dict()) == affine + (affine and bias) + 3 * track


def test_cumulative_average(rng):
    """momentum=None: after k batches of one size the running mean is the mean of the k means."""
    bn = cbn.BatchNorm1d(3, momentum=None, dtype=np.float64)
    means, variances = [], []
    for _ in range(5):
        x = batch(rng, dtype=np.float64)
        bn(x)
        n, mean, m2 = reference.moments(x)
        means.append(mean)
        variances.append(m2 / (n - 1))
    np.testing.assert_allclose(bn.running_mean, np.mean(means, axis=0), rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, np.mean(variances, axis=0), rtol=1e-14)
    bn.num_batches_tracked = None  # PyTorch's factor is then 0
    before = bn.running_mean.copy()
    bn(x)
    assert np.array_equal(bn.running_mean, before)


def test_biased_running_variance():
    for kind, expected in (("unbiased", 1.7), ("biased", 1.3)):
        bn = cbn.BatchNorm1d(1, running_var=kind, dtype=np.float64)
        bn(np.array([[0.0], [4.0]]))
        assert bn.running_var[0] == pytest.approx(expected, rel=1e-14)


def test_flipping_track_running_stats(rng):
    """Train uses batch statistics and leaves buffers and counter alone; eval still uses what is stored."""
    bn = cbn.BatchNorm1d(3)
    bn(batch(rng))
    bn.track_running_stats = False
    before = bn.state_dict()
    x = batch(rng)
    agree(bn(x), reference.batch_norm(x, None, None, training=True)[0], 1e-6)
    assert all(np.array_equal(before[k], v) for k, v in bn.state_dict().items())
    exact, *_ = reference.batch_norm(x, bn.running_mean, bn.running_var)
    agree(bn.eval()(x), exact, 1e-6)


def test_affine_has_no_effect_after_construction(rng):
    bn = cbn.BatchNorm1d(3)
    bn.weight[:] = 5
    bn.affine = False
    assert np.abs(bn(batch(rng))).max() > 5


def test_frozen_layer(rng):
    bn = cbn.BatchNorm1d(3, dtype=np.float64)
    bn(batch(rng))
    assert bn.freeze() is bn
    state = bn.state_dict()
    x, dy = batch(rng, dtype=np.float64), rng.standard_normal((8, 3, 5))
    for mode in (True, False):
        assert bn.train(mode) is bn
        assert bn.frozen
        exact, *_ = reference.batch_norm(x, bn.running_mean, bn.running_var)
        agree(bn(x), exact, 1e-12)
        assert all(np.array_equal(state[k], v) for k, v in bn.state_dict().items())
    bn.train()(x)
    dx = bn.backward(dy)
    exact = reference.backward(dy, x, bn.running_mean, bn.running_var, bn.weight, train=False)
    for a, e in zip((dx, bn.weight_grad, bn.bias_grad), exact, strict=True):
        agree(a, e, 1e-12)
    bn.unfreeze()(x)
    assert bn.num_batches_tracked == 2
    assert cbn.BatchNorm1d(3).freeze()(np.ones((1, 3), np.float32)).shape == (1, 3)  # one value is enough


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_backward_by_central_differences(rng, frozen, axis):
    bn = cbn.BatchNorm(3, dtype=np.float64, channel_axis=axis)
    bn.weight[:], bn.bias[:] = rng.standard_normal((2, 3))
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal(3), rng.uniform(1, 2, 3)
    if frozen:
        bn.freeze()
    x, dy = rng.standard_normal((2, *((4, 3, 5) if axis == 1 else (4, 5, 3))))
    bn(x)
    dx = bn.backward(dy)
    for array, gradient in ((x, dx), (bn.weight, bn.weight_grad), (bn.bias, bn.bias_grad)):
        for index in np.ndindex(array.shape):
            values = []
            for step in (1e-6, -2e-6):
                array[index] += step
                values.append((copy.deepcopy(bn)(x) * dy).sum())
            array[index] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[index], rel=1e-5, abs=1e-7)


def test_gradients_are_added_and_zeroed_in_place(rng):
    bn = cbn.BatchNorm1d(3)
    grads = bn.weight_grad, bn.bias_grad
    bn(batch(rng))
    dy = batch(rng)
    first = bn.backward(dy)
    once = [g.copy() for g in grads]
    assert np.array_equal(bn.backward(dy), first)  # again for the same forward
    for g, o in zip(grads, once, strict=True):
        np.testing.assert_allclose(g, 2 * o, rtol=1e-6)
    bn.zero_grad()
    assert bn.weight_grad is grads[0]
    assert not any(g.any() for g in grads)
    bn.weight_grad = None  # switched off: not accumulated
    bn.backward(dy)
    assert bn.weight_grad is None
    assert np.array_equal(bn.bias_grad, once[1])


def another_weight(bn):
    bn.weight = np.full(3, 7, np.float32)


def weight_and_bias_in_place(bn):
    bn.weight *= 7
    bn.bias -= 1


def statistics_in_place(bn):
    bn.running_mean += 1
    bn.running_var *= 2


CHANGES = {
    "assignment": another_weight,
    "in place": weight_and_bias_in_place,
    "statistics": statistics_in_place,
    "load_state_dict": lambda bn: bn.load_state_dict({k: a + 1 for k, a in bn.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_uses_the_parameters_of_its_forward(rng, change, frozen, activation):
    """Whatever has been written to them since: the gradient is that of the forward, in training and frozen alike."""
    bn = cbn.BatchNorm1d(3, activation=activation)
    if frozen:
        bn.freeze()
    bn(batch(rng))
    dy = batch(rng)
    dx = bn.backward(dy)
    change(bn)
    assert np.array_equal(bn.backward(dy), dx)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_inputs_changed_before_backward_are_noticed_where_asked(rng, frozen, order, dtype):
    x, z = (batch(rng, (4, 3, 6)).astype(dtype, order=order) for _ in range(2))
    bn = cbn.BatchNorm1d(3, activation="relu")
    if frozen:
        bn.freeze()
    before = cbn.set_check_inputs(True)
    try:
        assert cbn.set_check_inputs(True) is True
        bn(x, residual=z)
        gradients = bn.backward(x)
        x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation: the input of the last forward"):
            bn.backward(x)
        grads = bn.weight_grad.copy()
        bn(x, residual=z)
        z[0, 0, 0] += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation: the residual of the last"):
            bn.backward(x)
        assert np.array_equal(bn.weight_grad, grads)
        bn(x)
        bn.backward(x)
    finally:
        cbn.set_check_inputs(before)
    assert len(gradients) == 2
    with pytest.raises(TypeError, match="check must be a bool, not 1"):
        cbn.set_check_inputs(1)


def test_backward_in_place_of_dy(rng):
    bn, x, dy = cbn.BatchNorm1d(3), batch(rng), batch(rng)
    bn(x)
    expected = bn.backward(dy)
    assert bn.backward(dy, out=dy) is dy
    assert np.array_equal(dy, expected)


def test_in_place_forward(rng):
    for mode in (True, False):
        x = batch(rng)
        bn = cbn.BatchNorm1d(3).train(mode)
        expected = copy.deepcopy(bn)(x)
        assert bn(x, out=x) is x
        assert np.array_equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)])
def test_an_empty_batch_changes_nothing(shape):
    for layer in (cbn.BatchNorm1d(3), cbn.BatchNorm1d(3).freeze(), cbn.BatchNorm1d(3, momentum=None)):
        before = layer.state_dict()
        x = np.empty(shape, np.float32)
        y = layer(x)
        assert y.shape == shape
        assert y.dtype == np.float32
        assert all(np.array_equal(before[k], v) for k, v in layer.state_dict().items())
        assert layer.backward(np.empty(shape, np.float32)).shape == shape
        assert not layer.weight_grad.any()
        assert layer.eval()(x, out=x) is x
    y, mean, invstd = cbn.functional.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    assert np.array_equal(mean, np.zeros(3))
    assert np.array_equal(invstd, np.zeros(3))
    dx, dweight, dbias = cbn.functional.native_batch_norm_backward(x, x, None, None, None, mean, invstd, True, 1e-5)
    assert dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("shape", [(8, 3, 50), (150, 3)])
@pytest.mark.parametrize("where", [0, 7])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_stay_in_their_channel(rng, shape, where, value):
    x = batch(rng, shape)
    clean = cbn.BatchNorm1d(3)
    expected = clean(x)
    dirty = x.copy()
    dirty[where, 1] = value
    bn = cbn.BatchNorm1d(3)
    y = bn(dirty)
    for c in (0, 2):
        assert np.array_equal(y[:, c], expected[:, c])
        assert bn.running_mean[c] == clean.running_mean[c]
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(bn.running_var[1])
    # as PyTorch: the mean of a channel with one infinity is that infinity
    assert np.array_equal(bn.running_mean[1], np.float32(value), equal_nan=True)
    dx = bn.backward(np.ones_like(x))
    assert np.isfinite(dx[:, [0, 2]]).all()
    assert np.isnan(dx[:, 1]).all()


def test_infinite_running_statistics_in_evaluation():
    bn = cbn.BatchNorm1d(3).eval()
    bn.running_mean[:] = [np.inf, 0, 0]
    bn.running_var[:] = [1, np.inf, 1]
    y = bn(np.ones((4, 3), np.float32))
    assert np.array_equal(y[0, :2], [-np.inf, 0])
    assert y[0, 2] == pytest.approx(1, rel=1e-5)


def test_the_hosts_error_state_does_not_matter():
    """A program that turns numpy's warnings into errors gets the same results, and no half-done call."""
    x = np.array([[1e-160, np.inf, 1e200], [-1e-160, 1.0, -1e200]])
    bn, expected = cbn.BatchNorm1d(3, dtype=np.float64), cbn.BatchNorm1d(3, dtype=np.float64)
    y = expected(x)
    with np.errstate(all="raise"):
        assert np.array_equal(bn(x), y, equal_nan=True)
        dx = bn.backward(x)
        bn.eval()(x)
        cbn.moments(x).var(1)
    assert np.array_equal(dx, expected.backward(x), equal_nan=True)
    for name, value in expected.state_dict().items():
        assert np.array_equal(getattr(bn, name), value, equal_nan=True)


def test_values_beyond_float32_statistics():
    """Running statistics go to infinity where float32 ends; the output does not care."""
    rng = np.random.default_rng(0)
    bn, x = cbn.BatchNorm1d(2), (rng.standard_normal((64, 2)) * 1e30).astype(np.float32)
    y = bn(x)
    n, mean, m2 = reference.moments(x)
    agree(y, reference.normalize(x, mean, m2 / n), 1e-6)
    assert np.isinf(bn.running_var).all()


def test_state_dict_is_a_copy_and_loads_in_place(rng):
    bn = cbn.BatchNorm1d(3)
    bn(batch(rng))
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    other = cbn.BatchNorm1d(3)
    weight = other.weight
    assert other.load_state_dict(state) == ([], [])
    assert other.weight is weight
    state["weight"][:] = 9
    assert (other.weight == 1).all()
    for name, value in bn.state_dict().items():
        assert np.array_equal(value, getattr(other, name))
    del state["num_batches_tracked"]  # as files of PyTorch before 0.4.1
    other.num_batches_tracked.fill(41)
    other.load_state_dict(state)
    assert other.num_batches_tracked == 41


def test_load_state_dict_not_strict():
    bn = cbn.BatchNorm1d(2)
    result = bn.load_state_dict({"weight": np.array([2.0, 3.0]), "extra": np.zeros(1)}, strict=False)
    assert result == (["bias", "running_mean", "running_var"], ["extra"])
    assert np.array_equal(bn.weight, [2, 3])
    with pytest.raises(ValueError, match="weight has shape"):
        bn.load_state_dict({"weight": np.zeros(3)}, strict=False)


def test_resets(rng):
    bn = cbn.BatchNorm1d(3)
    bn(batch(rng))
    bn.weight[:], bn.bias[:] = 3, 4
    arrays = bn.running_mean, bn.weight
    bn.reset_running_stats()
    assert bn.num_batches_tracked == 0
    assert (bn.weight == 3).all()
    bn.reset_parameters()
    fresh = cbn.BatchNorm1d(3).state_dict()
    assert all(np.array_equal(fresh[k], v) for k, v in bn.state_dict().items())
    assert (bn.running_mean, bn.weight) == arrays or bn.weight is arrays[1]
    cbn.BatchNorm1d(3, affine=False, track_running_stats=False).reset_parameters()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(rng, protocol):
    bn = cbn.BatchNorm1d(3, momentum=None, activation=("leaky_relu", 0.5))
    bn(batch(rng))
    for copied in (bn.eval(), bn.train().freeze()):
        other = pickle.loads(pickle.dumps(copied, protocol))
        assert type(other) is cbn.BatchNorm1d
        assert (other.training, other.frozen, repr(other)) == (bn.training, bn.frozen, repr(bn))
        assert all(np.array_equal(getattr(other, k), v) for k, v in bn.state_dict().items())


def by_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle])
def test_copies_keep_all_but_the_remembered_forward(rng, duplicate):
    bn = cbn.BatchNorm2d(3, eps=1e-3, momentum=None, dtype=np.float64, channel_axis=-1, running_var="biased").freeze()
    x = batch(rng, (2, 4, 4, 3))
    bn.unfreeze()(x)
    bn.backward(x)
    bn.freeze().eval()
    other = duplicate(bn)
    assert type(other) is cbn.BatchNorm2d
    assert repr(other) == repr(bn)
    assert other.frozen
    assert not other.training
    assert other.channel_axis == -1
    assert np.array_equal(other.weight_grad, bn.weight_grad)
    assert all(np.array_equal(getattr(other, k), v) for k, v in bn.state_dict().items())
    assert (other.weight is bn.weight) == (duplicate is copy.copy)
    with pytest.raises(RuntimeError, match="training mode first"):
        other.backward(x)
    assert np.array_equal(other(x), bn(x))


def test_arguments_are_attributes():
    bn = cbn.BatchNorm1d(3, 1e-3, None, False, False, dtype=np.float64, channel_axis=-1)
    assert (bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats) == (3, 1e-3, None, False, False)
    assert (bn.dtype, bn.channel_axis, bn.activation) == (np.float64, -1, None)
    with pytest.raises(AttributeError):
        bn.num_features = 4
    bn.momentum = 0.5
    assert bn.momentum == 0.5


def test_repr():
    assert repr(cbn.BatchNorm3d(8, momentum=None, affine=False)) == (
        "BatchNorm3d(8, eps=1e-05, momentum=None, affine=False, bias=False, track_running_stats=True)"
    )
    layer = cbn.BatchNorm2d(
        3, 1e-3, bias=False, dtype=np.float64, channel_axis=-1, running_var="biased", activation=("leaky_relu", 0.01)
    )
    assert repr(layer.freeze().eval()) == (
        "BatchNorm2d(3, eps=0.001, momentum=0.1, affine=True, bias=False, track_running_stats=True, dtype='float64', "
        "channel_axis=-1, running_var='biased', activation=('leaky_relu', 0.01)).freeze().eval()"
    )


KINDS_OF_LAYERS = {
    "fresh": lambda: cbn.BatchNorm1d(3),
    "other class": lambda: cbn.BatchNorm2d(3),
    "other number": lambda: cbn.BatchNorm1d(4),
    "eps": lambda: cbn.BatchNorm1d(3, eps=1e-3),
    "eps, int": lambda: cbn.BatchNorm1d(3, eps=1),
    "eps of float32": lambda: cbn.BatchNorm1d(3, eps=np.float32(1e-5)),
    "momentum": lambda: cbn.BatchNorm1d(3, momentum=0.2),
    "momentum of float32": lambda: cbn.BatchNorm1d(3, momentum=np.float32(0.1)),
    "no momentum": lambda: cbn.BatchNorm1d(3, momentum=None),
    "affine": lambda: cbn.BatchNorm1d(3, affine=False),
    "bias": lambda: cbn.BatchNorm1d(3, bias=False),
    "untracked": lambda: cbn.BatchNorm1d(3, track_running_stats=False),
    "dtype": lambda: cbn.BatchNorm1d(3, dtype=np.float64),
    "channel_axis": lambda: cbn.BatchNorm1d(3, channel_axis=-1),
    "channel_axis 0": lambda: cbn.BatchNorm1d(3, channel_axis=np.int64(0)),
    "running_var": lambda: cbn.BatchNorm1d(3, running_var="biased"),
    "relu": lambda: cbn.BatchNorm1d(3, activation="relu"),
    "leaky relu": lambda: cbn.BatchNorm1d(3, activation=["leaky_relu", 0.2]),
    "leaky relu of float32": lambda: cbn.BatchNorm1d(3, activation=("leaky_relu", np.float32(0.2))),
    "evaluation": lambda: cbn.BatchNorm1d(3).eval(),
    "frozen": lambda: cbn.BatchNorm1d(3).freeze(),
    "frozen evaluation": lambda: cbn.BatchNorm1d(3).eval().freeze(),
    "all": lambda: cbn.BatchNorm(
        3, 1e-3, None, dtype="float64", channel_axis=2, running_var="biased", activation="relu"
    ).freeze(),
}


def test_repr_tells_layers_apart_and_makes_them_again():
    told = {name: repr(made()) for name, made in KINDS_OF_LAYERS.items()}
    assert len(set(told.values())) == len(told)
    for name, text in told.items():
        again, layer = eval(text, {"np": np, **vars(cbn)}), KINDS_OF_LAYERS[name]()
        assert type(again) is type(layer), name
        for attribute in (
            "num_features", "eps", "momentum", "affine", "track_running_stats", "dtype", "channel_axis", "_unbiased",
            "activation", "training", "frozen",
        ):  # fmt: skip
            assert getattr(again, attribute) == getattr(layer, attribute), (name, attribute)
        assert (again.bias is None) == (layer.bias is None), name


def test_repr_names_arrays_that_are_not_as_constructed():
    told = {repr(cbn.BatchNorm1d(3))}
    for names, words in (
        (["weight"], ", bias=True, track_running_stats=True) without weight"),
        (["bias"], ", bias=False, track_running_stats=True)"),
        (["weight", "bias"], ", bias=False, track_running_stats=True) without weight"),
        (["weight_grad"], " without weight_grad"),
        (["weight_grad", "bias_grad"], " without weight_grad, bias_grad"),
        (["running_mean"], " without running_mean"),
        (["running_mean", "running_var", "num_batches_tracked"],
         " without running_mean, running_var, num_batches_tracked"),
        (["num_batches_tracked"], " without num_batches_tracked"),
    ):  # fmt: skip
        layer = cbn.BatchNorm1d(3)
        for name in names:
            setattr(layer, name, None)
        assert repr(layer).endswith(words), names
        told.add(repr(layer))
    assert len(told) == 9
    untracked = cbn.BatchNorm1d(3)
    untracked.track_running_stats = untracked.affine = False
    assert repr(untracked.eval()) == (
        "BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=False, bias=False, track_running_stats=False).eval() "
        "with weight, bias, running_mean, running_var, num_batches_tracked"
    )
    mixed = cbn.BatchNorm1d(3, affine=False)
    mixed.bias, mixed.running_mean = np.zeros(3, np.float32), None
    assert repr(mixed).endswith(
        "affine=False, bias=False, track_running_stats=True) without bias_grad, running_mean with bias"
    )


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (1e-5, "1e-05"),
        (1e-12, "1e-12"),
        (0, "0.0"),
        (0.5, "0.5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e10, "10000000000.0"),
        (1e300, "1e+300"),
        (np.float64(1e-3), "0.001"),
        (np.float32(0.5), "0.5"),
        (np.float32(1e-3), "np.float32(0.001)"),
        (9.999999747378752e-06, "np.float32(1e-05)"),  # what ONNX files hold
        (np.float16(0.25), "0.25"),
    ],
)
def test_repr_has_eps_as_given(eps, text):
    assert f"(3, eps={text}, momentum" in repr(cbn.BatchNorm1d(3, eps=eps))


def test_ranks_of_the_general_layer(rng):
    for shape in ((4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2), (2, 3, 1, 2, 2, 2)):
        x = rng.standard_normal(shape)
        agree(cbn.BatchNorm(3)(x), reference.batch_norm(x, None, None, training=True)[0], 1e-12)


def test_forward_is_the_call(rng):
    x = batch(rng)
    assert np.array_equal(cbn.BatchNorm1d(3).forward(x), cbn.BatchNorm1d(3)(x))


def reshaped(x):
    x.shape = (-1,)


def retyped(x):
    x.dtype = np.complex64


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype):DeprecationWarning")
@pytest.mark.parametrize("change", [reshaped, retyped])
def test_backward_goes_through_the_input_as_it_was_given(rng, change):
    """The values are remembered by reference; shape and dtype of the caller's array object are his own affair."""
    x, dy = batch(rng, (8, 3, 6)), batch(rng, (8, 3, 6))
    bn = cbn.BatchNorm1d(3)
    bn(x)
    expected = bn.backward(dy)
    change(x)
    assert np.array_equal(bn.backward(dy), expected)
    with pytest.raises(ValueError, match=r"expected \(8, 3, 6\)"):
        bn.backward(dy.ravel())


def resized(a):
    a.resize(1, refcheck=False)


def two_dimensional(a):
    a.shape = (2, 2)


@pytest.mark.filterwarnings("ignore:Setting the (shape|dtype):DeprecationWarning")
@pytest.mark.parametrize("change", [resized, two_dimensional, retyped])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_that_is_changed_past_the_layer_is_an_error_and_no_crash(rng, change, name, dtype):
    """Its shape or dtype, in place: no byte beyond it is read."""
    bn = cbn.BatchNorm1d(4, dtype=dtype)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    for _ in range(3):
        bn.eval()(x)
    change(getattr(bn, name))
    words = rf"{name} has become an array of \w+ of shape \S+( \S+)?; expected \(4,\) floats"
    for call in (
        *(lambda: bn.eval()(x), lambda: bn.train()(x), lambda: bn.freeze()(x), lambda: bn.plan((8, 4), np.float32)),
        *(bn.state_dict, lambda: copy.deepcopy(bn), lambda: pickle.dumps(bn), lambda: bn.save(io.BytesIO())),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        bn.unfreeze()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle])
def test_what_a_user_has_added_to_a_layer_is_copied_too(duplicate):
    bn = cbn.BatchNorm1d(3)
    bn.table, bn.words, bn.inner = np.arange(6).reshape(2, 3), np.array([[1, 2], None], object), [cbn.BatchNorm1d(2)]
    bn.itself = bn
    other = duplicate(bn)
    assert np.array_equal(other.table, bn.table)
    assert other.words.tolist() == bn.words.tolist()
    assert repr(other.inner) == repr(bn.inner)
    if duplicate is not copy.copy:
        assert other.itself is other
        assert other.inner[0] is not bn.inner[0]
        assert not np.shares_memory(other.table, bn.table)
        assert not np.shares_memory(other.weight, bn.weight)


@pytest.mark.parametrize("value", [np.array(2**63, np.uint64), np.array(-1), np.array(2**64 - 1, np.uint64)])
def test_a_counter_out_of_range_is_refused(value):
    bn = cbn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"num_batches_tracked must be an integer from 0 to 2\^63 - 1, but got"):
        bn.num_batches_tracked = value
    assert bn.num_batches_tracked == 0


def test_a_subclass_may_override_forward(rng):
    class Twice(cbn.BatchNorm1d):
        def forward(self, x, **kwargs):
            return 2 * super().forward(x, **kwargs)

    x = batch(rng)
    assert np.array_equal(Twice(3)(x), 2 * cbn.BatchNorm1d(3)(x))


def test_batches_are_counted_without_buffers(rng):
    """As in PyTorch: the counter moves in training with tracking, whether or not there are buffers."""
    bn = cbn.BatchNorm1d(3)
    bn.running_mean = bn.running_var = None
    bn(batch(rng))
    assert bn.num_batches_tracked == 1


def test_a_float64_layer_computes_in_float64(rng):
    """Also where it has no parameters, and through frozen statistics."""
    x, dy = batch(rng, (500, 3)), batch(rng, (500, 3))
    for frozen in (False, True):
        bn = cbn.BatchNorm1d(3, affine=False, dtype=np.float64)
        bn.running_mean[:] = 1 / 3
        bn.running_var[:] = 5 / 3
        if frozen:
            bn.freeze()
        mean, var = bn.running_mean.copy(), bn.running_var.copy()
        if not frozen:
            n, mean, m2 = reference.moments(x)
            var = m2 / n
        y, dx = bn(x), bn.backward(dy)
        exact_y = reference.normalize(x, mean, var)
        exact_dx, *_ = reference.backward(dy, x, mean, var, train=not frozen)
        for a, e in ((y, exact_y), (dx, exact_dx)):
            # a float64 result, rounded once: never more than half a unit in the last place off
            assert (np.abs(a - e) <= 0.500001 * np.spacing(np.abs(a))).all()


def test_bias_switched_off_gets_no_gradient(rng):
    bn = cbn.BatchNorm1d(3)
    bn.bias = None
    bn(batch(rng))
    bn.backward(batch(rng))
    assert not bn.bias_grad.any()
    assert bn.weight_grad.any()


def test_gradients_add_up_without_warnings():
    """inf - inf is NaN, whatever is made of warnings: an error in between would leave half of the gradients added."""
    bn = cbn.BatchNorm1d(2)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    dy = np.ones_like(x)
    dy[0, 0] = np.inf
    bn.bias_grad[...] = -np.inf
    with np.errstate(all="raise"):
        bn(x)
        bn.backward(dy)
    assert np.isnan(bn.bias_grad[0])
    assert bn.bias_grad[1] == -np.inf


def test_no_floating_point_errors_of_numpy(rng):
    """Casts of gradients and parameters say nothing, whatever the caller has made of numpy's errors."""
    x = rng.standard_normal((4, 2)).astype(np.float16)
    with np.errstate(all="raise"):
        bn = cbn.BatchNorm1d(2)
        bn(x)
        bn.backward(np.full((4, 2), 1e-30, np.float32))
        for name in ("running_mean", "running_var", "weight", "bias"):
            bn = cbn.BatchNorm1d(2).eval()
            getattr(bn, name).view(np.uint32)[0] = 0x7F800001  # a signaling NaN
            y = bn(x)
            assert np.isnan(y[:, 0]).all()
            assert np.isfinite(y[:, 1]).all()


class Liar(np.ndarray):
    """A subclass that says of itself what is not so."""

    shape = property(lambda self: (300, 4))
    dtype = property(lambda self: np.dtype(np.float32))
    flags = property(lambda self: np.empty(1).flags)

    def __array_function__(self, *args):
        return True

    def view(self, *args):
        return self


class Changing:
    """An argument that changes the output while it is read."""

    def __init__(self, out, shape, values):
        self.out, self.new, self.values = out, shape, values

    def __array__(self, dtype=None, copy=None):
        self.out.shape = self.new
        return self.values


LIES = {
    "shape": (np.zeros((3, 4), np.float32), r"out has shape \(3, 4\); expected \(300, 4\)"),
    "dtype": (np.zeros((300, 4), np.float16), "out has dtype '<f2'; expected '<f4'"),
    "flags": (np.frombuffer(bytes(4800), np.float32).reshape(300, 4), "out is read-only"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_output_is_what_it_is_and_not_what_it_says(lie):
    a, words = LIES[lie]
    out, x = a.view(Liar), np.ones((300, 4), np.float32)
    trained, bn = cbn.BatchNorm1d(4), cbn.BatchNorm1d(4).eval()
    trained(x)
    plan, v = bn.plan(x.shape), np.ones(4)
    for call in (
        lambda: bn(x, out=out),
        lambda: cbn.BatchNorm1d(4)(x, out=out),
        lambda: trained.backward(x, out=out),
        lambda: plan(x, out=out),
        lambda: cbn.functional.batch_norm(x, v, v, out=out),
        lambda: cbn.functional.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, out=out),
        lambda: cbn.functional.native_batch_norm_backward(x, x, None, None, None, v, v, True, 1e-5, out=out),
        lambda: bn(np.ones((300, 4), np.uint8), x_scale=1, out=out),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()
    assert not np.asarray(a).any()


def test_an_output_of_a_subclass_that_overlaps_is_written_as_any(rng):
    memory = rng.standard_normal((301, 4)).astype(np.float32)
    expected = cbn.BatchNorm1d(4).eval()(memory[:-1].copy())
    out = memory[1:].view(Liar)
    assert cbn.BatchNorm1d(4).eval()(memory[:-1], out=out) is out
    assert np.array_equal(memory[1:], expected)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_an_output_that_changes_its_shape_meanwhile(rng):
    """A call writes into the memory that it was given, as it was then."""
    x = rng.standard_normal((1000, 100)).astype(np.float32)
    bn = cbn.BatchNorm1d(100).eval()
    for call in (
        lambda out, z: bn(x, out=out, residual=z),
        lambda out, z: bn.plan(x.shape)(x, out=out, residual=z),
        lambda out, z: cbn.functional.batch_norm(x, np.zeros(100), np.ones(100), out=out, residual=z),
    ):
        out = np.zeros_like(x)
        assert call(out, Changing(out, (1, 100000), np.zeros_like(x))) is out
        assert out.shape == (1, 100000)
        assert np.allclose(out.reshape(x.shape), x, atol=1e-4)
    out = np.zeros_like(x)
    dy = Changing(out, (1, 100000), x)
    v = np.ones(100)
    assert cbn.functional.native_batch_norm_backward(dy, x, None, v, v, None, None, False, 1e-5, out=out)[0] is out
    assert np.allclose(out.reshape(x.shape), x, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("name", ["weight", "running_mean", "bias_grad"])
def test_a_shape_that_changes_while_it_is_read(name):
    """As another thread or a signal handler can, wherever Python code runs; here at the end of each numpy.shape."""
    bn = cbn.BatchNorm1d(5000)
    a, calls = getattr(bn, name), []

    def change(frame, event, _):
        if event == "return" and frame.f_code.co_name == "shape":
            calls.append(frame)
            a.shape = (1, 5000)
        return change

    for call in (bn.state_dict, lambda: pickle.dumps(bn)):
        if call == bn.state_dict and name == "bias_grad":
            continue  # is not read
        calls.clear()
        before = sys.gettrace()
        sys.settrace(change)
        try:
            with pytest.raises(ValueError, match=r"resized while it was read|become one of float32 of shape \(1, 5000"):
                call()
        finally:
            sys.settrace(before)
        assert calls
        a.shape = (5000,)


def test_a_counter_of_a_subclass_is_kept_as_what_it_is():
    class Wide(np.ndarray):
        dtype = property(lambda self: np.dtype(np.int64))

    bn = cbn.BatchNorm1d(2)
    bn.num_batches_tracked = np.array(7, np.int32).view(Wide)
    assert type(bn.num_batches_tracked) is np.ndarray
    assert bn.num_batches_tracked.dtype == np.int64
    assert bn.num_batches_tracked == 7


def test_backward_follows_the_forward_and_not_what_has_been_switched_off_since(rng):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    bn = cbn.BatchNorm1d(3)
    bn(x)
    bn.weight = bn.bias = None
    bn.backward(np.ones_like(x))
    assert np.array_equal(bn.bias_grad, np.full(3, 6, np.float32))
    assert np.abs(bn.weight_grad).max() < 1e-5
    bn = cbn.BatchNorm1d(3, affine=False)
    bn(x)
    bn.weight = bn.bias = np.ones(3, np.float32)
    bn.weight_grad = bn.bias_grad = np.zeros(3, np.float32)
    bn.backward(np.ones_like(x))
    assert not bn.bias_grad.any()
