"""load_state_dict: prefixes, types of arrays and tensors, and the words where a state does not fit."""

import ml_dtypes
import numpy as np
import pytest

import cbn

NAMES = ("weight", "bias", "running_mean", "running_var")


def trained(rng, n=3, **kwargs):
    bn = cbn.BatchNorm1d(n, **kwargs)
    bn(rng.standard_normal((16, n)))
    bn.weight[...], bn.bias[...] = rng.standard_normal((2, n))
    return bn


def same(a, b):
    return all(np.array_equal(value, b[name]) for name, value in a.items()) and a.keys() == b.keys()


def refused(state, layer=None, kind=ValueError, **kwargs):
    """The words of a refusal that changes nothing."""
    layer = layer or cbn.BatchNorm1d(3)
    before = layer.state_dict()
    with pytest.raises(kind) as caught:
        layer.load_state_dict(state, **kwargs)
    assert same(before, layer.state_dict())
    return str(caught.value)


# ---- prefixes ------------------------------------------------------------------------------------------------------


def model(rng):
    """The state of a model: two batch norms, something else, and a key that is no string."""
    first, second = trained(rng), trained(rng, 5)
    state = {"bn1." + name: a for name, a in first.state_dict().items()}
    state |= {"layer1.0.bn1." + name: a for name, a in second.state_dict().items()}
    return {**state, "fc.weight": np.zeros((2, 5)), 7: None}, first, second


def test_a_prefix_selects_the_layer_in_the_state_of_a_model(rng):
    state, first, second = model(rng)
    for expected, prefix in ((first, "bn1."), (second, "layer1.0.bn1.")):
        layer = cbn.BatchNorm1d(expected.num_features)
        assert layer.load_state_dict(state, prefix=prefix) == ([], [])
        assert same(layer.state_dict(), expected.state_dict())


def test_with_a_prefix_keys_are_named_as_the_state_has_them(rng):
    state, first, _ = model(rng)
    del state["bn1.bias"]
    state |= {"bn1.extra": 1, "bn1.weight": np.zeros(4)}
    words = refused(state, prefix="bn1.")
    for expected in (
        "missing entry 'bn1.bias' (Missing key(s) in state_dict)",
        "unexpected entry 'bn1.extra' (Unexpected key(s) in state_dict)",
        "bn1.weight has shape (4,); expected (3,)",
    ):
        assert expected in words
    assert "layer1" not in words
    state["bn1.weight"] = np.ones(3)
    layer = cbn.BatchNorm1d(3)
    assert layer.load_state_dict(state, False, prefix="bn1.") == (["bn1.bias"], ["bn1.extra"])
    assert np.array_equal(layer.running_mean, first.running_mean)


@pytest.mark.parametrize("prefix", [None, 1, b"bn1.", ["bn1."]])
def test_a_prefix_is_a_string(prefix):
    assert "prefix must be a string, not" in refused(cbn.BatchNorm1d(3).state_dict(), kind=TypeError, prefix=prefix)


def test_a_missing_counter_keeps_the_layers_with_a_prefix_too(rng):
    state = {"bn." + name: a for name, a in trained(rng).state_dict().items() if name != "num_batches_tracked"}
    layer = trained(rng)
    assert layer.load_state_dict(state, prefix="bn.") == ([], [])
    assert layer.num_batches_tracked == 1


# ---- hints ---------------------------------------------------------------------------------------------------------


def test_the_prefix_that_fits_is_named(rng):
    state, *_ = model(rng)
    for kwargs in ({}, {"prefix": "bn1"}, {"prefix": "layer2."}):
        words = refused(state, **kwargs)
        assert words.endswith("; the state has such entries with prefix='bn1.'"), words
    assert refused(state, cbn.BatchNorm1d(5)).endswith("with prefix='layer1.0.bn1.'")
    # No layer of this size: those that are there
    assert refused(state, cbn.BatchNorm1d(6)).endswith("with prefix='bn1.' or prefix='layer1.0.bn1.'")


def test_data_parallel_and_many_layers(rng):
    state = trained(rng).state_dict()
    assert refused({"module." + name: a for name, a in state.items()}).endswith("with prefix='module.'")
    many = {f"blocks.{i}.{name}": a for i in range(9) for name, a in state.items()}
    words = refused(many)
    assert words.endswith("with prefix='blocks.0.' or prefix='blocks.1.' or prefix='blocks.2.' and 6 more")
    assert "unexpected entry 'blocks.3.num_batches_tracked' and 25 more (Unexpected key(s) in state_dict)" in words


@pytest.mark.parametrize("key", ["state_dict", "model", "module", 0])
def test_a_wrapper_is_named(rng, key):
    state = trained(rng).state_dict()
    for other in ({}, {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}):
        assert refused({**other, key: state}).endswith(f"; the entries seem to be in state[{key!r}]")
        wrapped = {**other, key: {"module.bn." + name: a for name, a in state.items()}}
        assert refused(wrapped).endswith(f"; the entries seem to be in state[{key!r}], with prefix='module.bn.'")


def test_no_hint_without_a_reason(rng):
    state = trained(rng).state_dict()
    del state["running_mean"]
    assert refused(state).endswith("missing entry 'running_mean' (Missing key(s) in state_dict)")
    assert refused({**state, "fc.weight": np.zeros(3), "optimizer": {"lr": 1}}).endswith(
        "(Unexpected key(s) in state_dict)"
    )


def test_something_with_a_state_dict_is_no_state(rng):
    words = refused(trained(rng), kind=TypeError)
    assert words == "state must be a mapping of names to arrays, not BatchNorm1d; its state_dict() is one"


# ---- types ---------------------------------------------------------------------------------------------------------

FLOATS = (np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("dtype", [*FLOATS, ml_dtypes.float8_e4m3fn, ">f4"], ids=lambda d: np.dtype(d).str)
@pytest.mark.parametrize("own", [np.float32, np.float64])
def test_any_floating_dtype(rng, dtype, own):
    state = {name: rng.uniform(0.5, 2, 3).astype(dtype) for name in NAMES}
    state["num_batches_tracked"] = np.array(6).astype(dtype)  # as where a whole state has been cast
    layer = cbn.BatchNorm1d(3, dtype=own)
    assert layer.load_state_dict(state) == ([], [])
    for name in NAMES:
        assert np.array_equal(getattr(layer, name), state[name].astype(own))
        assert getattr(layer, name).dtype == own
    assert layer.num_batches_tracked == 6
    assert layer.num_batches_tracked.dtype == np.int64


@pytest.mark.parametrize("value", [1.5, np.nan, np.inf, 2.0**63, np.uint64(2**63), ml_dtypes.bfloat16(0.5), -(2.0**70)])
def test_a_counter_is_a_whole_number(rng, value):
    state = {**trained(rng).state_dict(), "num_batches_tracked": np.array(value)}
    assert "num_batches_tracked is" in refused(state)
    assert "expected an integer of 64 bits" in refused(state)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "weight is a NoneType, which numpy does not read as numbers"),
        ({"a": 1}, "weight is a dict, which"),
        ((i for i in (1, 2, 3)), "weight is a generator, which"),
        ("abc", "weight has dtype <U3; expected float32"),
        (np.ones(3, bool), "weight has dtype bool; expected float32"),
        (np.ones(3, complex), "weight has dtype complex128; expected float32"),
        (np.ones(3, ml_dtypes.int4), "weight has dtype int4; expected float32"),
        (np.ones(3, "V2"), "weight has dtype |V2; expected float32"),
        ([[1, 2], [3]], "weight cannot be read as an array"),
        (np.full(3, 1e300), "weight is not finite"),
        (np.full(3, np.nan, ml_dtypes.bfloat16), "weight is not finite"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_array_of_numbers(rng, value, words, strict):
    assert words in refused({**trained(rng).state_dict(), "weight": value}, strict=strict)


def test_a_negative_variance_is_named_with_its_channel(rng):
    state = trained(rng).state_dict()
    state["running_var"][1] = -1e-9
    assert "running_var is negative: -1e-09 in channel 1" in refused(state)


class Tensor:
    """What cbn uses of PyTorch's tensors; the real ones are in tests/peers/test_torch.py."""

    def __init__(self, values, grad=True, known=True):
        self.values, self.grad, self.known = values, grad, known

    def detach(self):
        return Tensor(self.values, False, self.known)

    def cpu(self):
        return self

    def is_floating_point(self):
        return True

    def float(self):
        return Tensor(self.values, self.grad)

    def __array__(self, dtype=None, copy=None):
        if self.grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if not self.known:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return np.asarray(self.values, np.float32)


@pytest.mark.parametrize("known", [True, False])
def test_tensors_that_require_grad_or_have_a_type_of_their_own(rng, known):
    state = trained(rng).state_dict()
    layer = cbn.BatchNorm1d(3)
    assert layer.load_state_dict({**state, "weight": Tensor(state["weight"], known=known)}) == ([], [])
    assert same(layer.state_dict(), state)
