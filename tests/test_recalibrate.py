"""recalibrate: values, what is left alone, interruptions, refusals."""

import copy
import functools
import io
import pickle
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn import recalibrate as function
from cbn.population import HOOKS

from .test_atomic import Interrupted, before_instruction

SIZES = (64, 7, 1, 128, 33)


def uneven(rng, shape=(4,), sizes=SIZES, dtype=np.float64, axis=1):
    """Batches of several sizes, whose distributions differ, with their channels along `axis`."""
    drawn = [rng.normal(3 + 2 * i, 1 + i, (n, *shape)) for i, n in enumerate(sizes)]
    return [np.moveaxis(x, 1, axis).astype(dtype) for x in drawn]


def state(layer):
    """Everything of a layer, as bytes and by identity."""
    return {
        name: (id(value), value.tobytes() if isinstance(value, np.ndarray) else value)
        for name, value in vars(layer).items()
    }


def expect(layer, x, batches, rtol=1e-12):
    """The layer has the statistics of one array, channels last."""
    ddof = int("biased" not in repr(layer))
    np.testing.assert_allclose(layer.running_mean, x.mean(axis=0), rtol=rtol)
    np.testing.assert_allclose(layer.running_var, x.var(axis=0, ddof=ddof), rtol=rtol)
    assert layer.num_batches_tracked == batches
    assert HOOKS.isdisjoint(vars(layer))


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
def test_one_layer_gets_the_statistics_of_all_data(rng, convention):
    layer = cbn.BatchNorm1d(4, dtype=np.float64, running_var=convention)
    batches = uneven(rng)
    found = cbn.recalibrate(layer, batches)
    whole = np.concatenate(batches)
    expect(layer, whole, len(SIZES))
    assert found.batches == len(SIZES)
    assert np.all(found.moments.count == sum(SIZES))
    np.testing.assert_allclose(found.moments.mean, whole.mean(axis=0), rtol=1e-14)


def test_a_network_of_two_layers(rng):
    """Each layer has the statistics of all its inputs, which the batch's statistics of the layer below normalize."""
    first, second = cbn.BatchNorm1d(4, dtype=np.float64), cbn.BatchNorm1d(3, dtype=np.float64)
    weights = rng.standard_normal((4, 3))
    batches = uneven(rng, sizes=(64, 7, 128, 33))
    reached = []

    def forward(x):
        reached.append(np.maximum(first(x), 0) @ weights)
        return second(reached[-1])

    found = cbn.recalibrate([first, second], iter(batches), forward=forward)
    expect(first, np.concatenate(batches), 4)
    inner = [np.maximum((x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5), 0) @ weights for x in batches]
    expect(second, np.concatenate(inner), 4)
    np.testing.assert_allclose(np.concatenate(reached), np.concatenate(inner), rtol=1e-10, atol=1e-12)
    assert [one.batches for one in found] == [4, 4]
    assert found[0].layer == "BatchNorm1d(4)"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_statistics_are_those_of_moments_to_the_bit(rng, dtype):
    layer = cbn.BatchNorm2d(3)
    batches = uneven(rng, (3, 5, 6), dtype=dtype)
    found = cbn.recalibrate(layer, batches)
    total = cbn.Moments.merge([cbn.moments(x) for x in batches])
    assert np.array_equal(found.moments.mean, total.mean)
    assert np.array_equal(found.moments.m2, total.m2)
    assert np.array_equal(layer.running_mean, total.mean.astype(np.float32))
    assert np.array_equal(layer.running_var, total.var(1).astype(np.float32))
    again = cbn.BatchNorm2d(3)
    other = cbn.recalibrate(again, [x for x in batches if len(x) > 0], forward=again)
    assert np.array_equal(other.moments.m2, total.m2)


def test_a_large_mean_costs_no_digits(rng):
    layer = cbn.BatchNorm1d(2, dtype=np.float64)
    batches = [1e6 + x for x in uneven(rng, (2,))]
    cbn.recalibrate(layer, batches)
    whole = np.concatenate(batches).astype(np.longdouble)
    np.testing.assert_allclose(layer.running_var, whole.var(axis=0, ddof=1).astype(float), rtol=1e-14)


def test_channels_last(rng):
    layer = cbn.BatchNorm(3, channel_axis=-1, dtype=np.float64)
    batches = uneven(rng, (3, 5, 6), axis=-1)
    cbn.recalibrate([layer], batches)
    expect(layer, np.concatenate(batches).reshape(-1, 3), len(SIZES))


MODES = {
    "training": lambda bn: bn,
    "evaluation": lambda bn: bn.eval(),
    "frozen": lambda bn: bn.freeze(),
    "frozen evaluation": lambda bn: bn.freeze().eval(),
}


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_momentum_do_not_matter_and_stay(rng, mode, momentum):
    layer = MODES[mode](cbn.BatchNorm1d(4, momentum=momentum, dtype=np.float64))
    batches = uneven(rng, sizes=(64, 7, 128, 33))
    before = repr(layer)
    outputs = []
    cbn.recalibrate(layer, batches, forward=lambda x: outputs.append(layer(x)))
    expect(layer, np.concatenate(batches), 4)
    assert repr(layer) == before
    for x, y in zip(batches, outputs, strict=True):
        assert np.array_equal(y, cbn.BatchNorm1d(4, dtype=np.float64)(x))


def test_every_way_to_call_a_layer_is_recorded(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64).eval()
    x = rng.standard_normal((50, 4))
    for _ in range(3):
        layer(x)  # has a plan now
    bound = layer.forward
    ways = [layer, bound, layer.forward, functools.partial(cbn.BatchNorm1d.forward, layer), layer.__call__]
    batches = uneven(rng, sizes=(64, 7, 128, 33, 20))
    calls = iter(ways)
    cbn.recalibrate(layer, batches, forward=lambda x: next(calls)(x))
    expect(layer, np.concatenate(batches), 5)
    y = layer(x)
    np.testing.assert_allclose(y, (x - layer.running_mean) / np.sqrt(layer.running_var + 1e-5), rtol=1e-12, atol=1e-14)


def test_a_plan_of_before_answers_with_the_new_statistics(rng):
    layer = cbn.BatchNorm1d(4).eval()
    x = rng.standard_normal((50, 4)).astype(np.float32)
    layer(x), layer(x)
    plans = layer._plans
    cbn.recalibrate(layer, [x + 5], forward=layer)
    expected = copy.copy(layer)(x)
    assert np.array_equal(layer(x), expected)
    layer(x)
    assert layer._plans == plans + 1, "evaluation has a plan again"


def test_calls_with_out_and_residual(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64, activation="relu")
    batches = uneven(rng, sizes=(64, 7, 128))
    kept = [x.copy() for x in batches]
    cbn.recalibrate(layer, batches, forward=lambda x: layer(x, out=x, residual=np.ones_like(x)))
    expect(layer, np.concatenate(kept), 3)
    expected = cbn.BatchNorm1d(4, dtype=np.float64, activation="relu")(kept[0], residual=np.ones((64, 4)))
    assert np.array_equal(batches[0], expected)


def test_several_calls_and_several_shapes_in_one_batch(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64)
    pairs = [(rng.normal(i, 1, (5 + i, 4)), rng.normal(-i, 2, (3, 4, 2 + i))) for i in range(4)]
    found = cbn.recalibrate(layer, pairs, forward=lambda pair: [layer(x) for x in pair])
    whole = np.concatenate([x if x.ndim == 2 else x.transpose(0, 2, 1).reshape(-1, 4) for pair in pairs for x in pair])
    expect(layer, whole, 4)
    assert found.batches == 4


def test_batches_that_pass_a_layer_by_do_not_count(rng):
    first, second = (cbn.BatchNorm1d(4, dtype=np.float64) for _ in range(2))
    batches = uneven(rng, sizes=(20, 30, 40))
    found = cbn.recalibrate((first, second), batches, forward=lambda x: (first(x), second(x) if len(x) > 20 else None))
    expect(first, np.concatenate(batches), 3)
    expect(second, np.concatenate(batches[1:]), 2)
    assert [one.batches for one in found] == [3, 2]


def test_empty_batches_do_not_count(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64)
    batches = uneven(rng, sizes=(0, 20, 0, 30))
    for forward in (None, layer):
        assert cbn.recalibrate(layer, batches, forward=forward).batches == 2
        expect(layer, np.concatenate(batches), 2)


def test_a_subclass_with_a_forward_of_its_own(rng):
    class Doubled(cbn.BatchNorm1d):
        def forward(self, x, **options):
            return 3 * super().forward(2 * x, **options)

    layer = Doubled(4, dtype=np.float64)
    batches = uneven(rng, sizes=(20, 30, 40))
    cbn.recalibrate(layer, batches, forward=layer)
    expect(layer, 2 * np.concatenate(batches), 3)


def test_a_patched_instance(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64)
    plain = layer.forward
    layer.forward = lambda x: plain(x - 1)
    batches = uneven(rng, sizes=(20, 30, 40))
    cbn.recalibrate(layer, batches, forward=layer)
    expect(layer, np.concatenate(batches) - 1, 3)
    assert "forward" in vars(layer)


def test_layers_without_affine_and_counter(rng):
    layer = cbn.BatchNorm1d(4, affine=False, dtype=np.float64)
    layer.num_batches_tracked = None
    batches = uneven(rng, sizes=(20, 30))
    cbn.recalibrate(layer, batches, forward=layer)
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(axis=0), rtol=1e-14)
    assert layer.num_batches_tracked is None


def test_threads_that_call_a_layer(rng):
    layer = cbn.BatchNorm1d(4, dtype=np.float64)
    parts = [rng.normal(i, 1, (40, 4)) for i in range(8)]

    def forward(some):
        threads = [threading.Thread(target=layer, args=(x,)) for x in some]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]

    cbn.recalibrate(layer, [parts[:4], parts[4:]], forward=forward)
    expect(layer, np.concatenate(parts), 2)


# ---- standard errors -------------------------------------------------------------------------------------------------


def test_errors_of_equal_batches_are_the_textbooks(rng):
    layer = cbn.BatchNorm1d(5, dtype=np.float64, running_var="biased")
    batches = [rng.normal(rng.normal(0, 1, 5), 1, (30, 5)) for _ in range(12)]
    found = cbn.recalibrate(layer, batches)
    means = np.array([x.mean(axis=0) for x in batches])
    about = np.array([((x - layer.running_mean) ** 2).mean(axis=0) for x in batches])
    np.testing.assert_allclose(found.mean_error, means.std(axis=0, ddof=1) / np.sqrt(12), rtol=1e-10)
    np.testing.assert_allclose(found.var_error, about.std(axis=0, ddof=1) / np.sqrt(12), rtol=1e-10)
    np.testing.assert_allclose(found.relative_mean_error, found.mean_error / np.concatenate(batches).std(axis=0))
    np.testing.assert_allclose(found.relative_var_error, found.var_error / np.concatenate(batches).var(axis=0))


def test_errors_of_unequal_batches_are_the_formula(rng):
    batches = uneven(rng)
    found = cbn.recalibrate(cbn.BatchNorm1d(4), batches)
    whole = np.concatenate(batches)
    b, n = len(batches), len(whole)
    weights = np.array([len(x) for x in batches])[:, None] / n
    for error, total, of, scale in (
        (found.mean_error, whole.mean(axis=0), lambda x: x.mean(axis=0), 1),
        (found.var_error, whole.var(axis=0), lambda x: ((x - whole.mean(axis=0)) ** 2).mean(axis=0), n / (n - 1)),
    ):
        a = np.array([of(x) for x in batches])
        expected = scale * np.sqrt(b / (b - 1) * (weights**2 * (a - total) ** 2).sum(axis=0))
        np.testing.assert_allclose(error, expected, rtol=1e-10)


def test_errors_say_how_far_the_statistics_are_off():
    """Over many recalibrations with unequal batches of dependent values, the deviations are as the errors say."""
    rng = np.random.default_rng(1)
    off, errors = [], []
    for _ in range(400):
        sizes = rng.integers(5, 60, 25)
        batches = [rng.normal(rng.normal(0, 1, 3), 1, (n, 3)) for n in sizes]  # of variance 1 + 1
        layer = cbn.BatchNorm1d(3, dtype=np.float64)
        found = cbn.recalibrate(layer, batches)
        off.append([layer.running_mean, layer.running_var - 2])
        errors.append([found.mean_error, found.var_error])
    rms = [np.sqrt((np.array(a) ** 2).mean(axis=(0, 2))) for a in (off, errors)]
    np.testing.assert_allclose(rms[1], rms[0], rtol=0.15)


def test_identical_batches_have_no_error(rng):
    x = rng.normal(100, 1, (50, 3))
    found = cbn.recalibrate(cbn.BatchNorm1d(3), [x] * 5)
    assert np.all(found.relative_mean_error < 1e-14)
    assert np.all(found.relative_var_error < 1e-12)
    found = cbn.recalibrate(cbn.BatchNorm1d(3), [np.ones((4, 3))] * 5)
    assert np.array_equal(found.relative_var_error, np.zeros(3))


def test_the_text_of_a_result(rng):
    x = rng.standard_normal((60, 3))
    text = repr(cbn.recalibrate(cbn.BatchNorm1d(3), np.split(x, 6)))
    assert text.startswith("Recalibration of BatchNorm1d(3): 6 batches, 60 values per channel\n")
    assert "worst" in text
    one = cbn.recalibrate(cbn.BatchNorm1d(3), [x])
    assert repr(one).endswith("1 batch, 60 values per channel; one batch has no standard errors")
    assert np.all(np.isnan(one.mean_error))


# ---- nothing changes before the end ----------------------------------------------------------------------------------


def trained(rng, mode="training"):
    """A layer that remembers a forward, with other statistics than at first."""
    layer = cbn.BatchNorm1d(4, dtype=np.float64)
    layer(rng.standard_normal((20, 4)) + 1)
    return MODES[mode](layer)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_leaves_the_layers_as_they_were(rng, mode, error):
    layers = [trained(rng, mode), trained(rng)]
    before = [state(layer) for layer in layers]

    def forward(x):
        for layer in layers:
            layer(x)
        if len(x) == 7:
            raise error

    with pytest.raises(error):
        cbn.recalibrate(layers, uneven(rng, sizes=(64, 7, 30)), forward=forward)
    assert [state(layer) for layer in layers] == before


def test_an_exception_of_the_iterable_too(rng):
    layer = trained(rng)
    before = state(layer)

    def batches():
        yield rng.standard_normal((20, 4))
        raise KeyboardInterrupt

    for forward in (None, layer):
        with pytest.raises(KeyboardInterrupt):
            cbn.recalibrate(layer, batches(), forward=forward)
        assert state(layer) == before


def test_statistics_stay_while_it_runs_and_backward_after_it(rng):
    layer = trained(rng)
    twin = copy.deepcopy(layer)
    x, dy = rng.standard_normal((2, 9, 4))
    layer(x), twin(x)
    expected = twin.backward(dy)
    seen = []
    cbn.recalibrate(
        layer, uneven(rng, sizes=(64, 7, 30)), forward=lambda x: (layer(x), seen.append(layer.running_var.copy()))
    )
    assert all(np.array_equal(var, twin.running_var) for var in seen)
    assert np.array_equal(layer.backward(dy), expected)


@pytest.mark.parametrize("forward", [False, True])
def test_interrupted_anywhere_all_layers_are_old_or_all_are_new(forward):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 2)).astype(np.float32)
    batches = [x, x + 1]
    k, old, new, more = 0, 0, 0, True
    while more:
        layers = [cbn.BatchNorm1d(2), cbn.BatchNorm1d(2)][: 1 + forward]
        before = [state(layer) for layer in layers]

        def interrupt():
            raise Interrupted

        def call(layers=layers):
            how = (lambda x: [layer(x) for layer in layers]) if forward else None
            cbn.recalibrate(layers, batches, forward=how, progress=False)

        more = before_instruction(k, call, interrupt)
        k += 1 if k < 40 else 5
        counts = {int(layer.num_batches_tracked) for layer in layers}
        assert len(counts) == 1
        assert all(HOOKS.isdisjoint(vars(layer)) for layer in layers)
        if counts == {0}:
            assert [state(layer) for layer in layers] == before
            old += 1
        else:
            assert all(np.all(layer.running_mean != 0) for layer in layers)
            new += 1
    assert old > 50
    assert new >= 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(error, words, layers, batches, **options):
    """The call is refused, and nothing has changed."""
    known = [
        layer
        for layer in (layers if isinstance(layers, (list, tuple)) else [layers])
        if isinstance(layer, cbn.BatchNorm)
    ]
    before = [state(layer) for layer in known]
    with pytest.raises(error, match=words):
        cbn.recalibrate(layers, batches, **options)
    assert [state(layer) for layer in known] == before


def test_refused_arguments(rng):
    layer, x = trained(rng), rng.standard_normal((20, 4))
    refused(TypeError, "layers must be a layer of cbn or a list of layers, not dict", {}, [x])
    refused(ValueError, "layers is empty", [], [x])
    refused(TypeError, r"layers\[1\] must be a layer of cbn, not int", [layer, 3], [x])
    refused(ValueError, r"layers\[1\] is layers\[0\]: BatchNorm1d", [layer, layer], [x], forward=layer)
    refused(TypeError, "several layers need forward=", [layer, trained(rng)], [x])
    refused(TypeError, "forward must be callable, not int", layer, [x], forward=3)
    refused(TypeError, r"an iterable of inputs, not an array; a list of it, \[x\]", layer, x)
    refused(TypeError, "an iterable of inputs, not int", layer, 3)
    refused(TypeError, "progress must be a bool", layer, [x], progress=1)
    for forward in (None, layer):
        refused(ValueError, "batches is empty", layer, [], forward=forward)
        refused(ValueError, "batches is empty", layer, iter(()), forward=forward)


def test_refused_layers(rng):
    x = rng.standard_normal((20, 4))
    bare = cbn.BatchNorm1d(4, track_running_stats=False)
    refused(ValueError, r"BatchNorm1d\(4\) has no running_mean and no running_var", bare, [x])
    layer = trained(rng)
    layer.running_var.flags.writeable = False
    read = []
    refused(ValueError, "running_var is read-only", layer, (read.append(i) or x for i in range(3)))
    assert not read, "before any data"


@pytest.mark.parametrize("forward", [False, True])
def test_refused_inputs(rng, forward):
    layer, x = trained(rng), rng.standard_normal((20, 4))
    options = {"forward": layer} if forward else {}
    refused(ValueError, "4", layer, [x, x[:, :3]], **options)
    refused(ValueError, r"expected 2D or 3D input \(got 1D input\)", layer, [x, x[0]], **options)
    refused(TypeError, "input has dtype int64", layer, [x, x.astype(int)], **options)
    for bad in (np.nan, np.inf):
        wrong = x.copy()
        wrong[3, 2] = bad
        words = r"layers\[0\], BatchNorm1d\(4, .*\): an input of batch 1 is not finite in channel 2"
        refused(ValueError, words, layer, [x, wrong], **options)
    small = cbn.BatchNorm1d(4)
    refused(ValueError, r"layers\[0\].*variance of the moments, .* is beyond the range of float32", small, [x * 1e30])
    refused(ValueError, r"because the layer tracks the unbiased variance", layer, [x[:1]])


def test_batches_of_one_value_are_refused_as_in_training(rng):
    layer, x = trained(rng), rng.standard_normal((20, 4))
    refused(ValueError, "Expected more than 1 value per channel when training", layer, [x, x[:1]], forward=layer)
    refused(
        ValueError,
        "8-bit input cannot be recorded",
        layer.eval(),
        [x],
        forward=lambda x: layer(x.astype(np.int8), x_scale=1),
    )


def test_a_layer_that_no_batch_reached_is_named(rng):
    layers, x = [trained(rng), trained(rng, "frozen")], rng.standard_normal((20, 4))
    words = r"no batch reached layers\[1\], BatchNorm1d\(4, .*\)\.freeze\(\)"
    refused(ValueError, words, layers, [x, x], forward=layers[0])
    refused(ValueError, "no batch reached", layers[0], [x[:0]])


def test_a_call_within_a_call(rng):
    layer, x = trained(rng), rng.standard_normal((20, 4))
    words = r"layers\[0\], BatchNorm1d\(4.*, is being recalibrated already"
    refused(RuntimeError, words, layer, [x], forward=lambda x: cbn.recalibrate(layer, [x], forward=layer))


# ---- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(rng, monkeypatch):
    pytest.importorskip("tqdm")
    layer, x = trained(rng), rng.standard_normal((20, 4))
    for stream, options, shown in (
        (Terminal(), {}, True), (Terminal(), {"progress": False}, False), (io.StringIO(), {}, False), (None, {}, False),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stderr", stream)
        cbn.recalibrate(layer, [x] * 3, **options)
        if stream is not None:
            assert ("3/3" in stream.getvalue()) == shown
            assert ("recalibrate" in stream.getvalue()) == shown


def test_no_bar_without_tqdm(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cbn.recalibrate(trained(rng), [rng.standard_normal((20, 4))]).batches == 1
    assert stream.getvalue() == ""


def test_the_module_and_the_function_have_one_name():
    assert function is cbn.recalibrate
    assert callable(cbn.recalibrate)


def test_copies_of_a_layer_that_records_record_nothing(rng):
    layer = trained(rng)
    copies, x = [], rng.standard_normal((20, 4))

    def forward(x):
        layer(x)
        copies.extend([copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))])

    cbn.recalibrate(layer, [x], forward=forward)
    for one in copies:
        assert vars(one).keys() == vars(layer).keys()
        before = one.num_batches_tracked.copy()
        one(x)
        assert one.num_batches_tracked == before + 1


def test_controls_do_not_matter_meanwhile(rng):
    """Switches, ghost batches, renormalization: while recorded, a layer normalizes with the batch, as in training."""
    batches = [rng.normal(3, 2, (n, 4)) for n in (8, 5, 9)]
    expected = cbn.BatchNorm1d(4, dtype=np.float64)
    second = cbn.BatchNorm1d(4, dtype=np.float64)
    cbn.recalibrate([expected, second], batches, forward=lambda x: second(expected(x) ** 2))
    for kwargs, switches in (
        ({"ghost_batch_size": 2}, {}),
        ({"renorm": (1.1, 0.1), "nonfinite": "skip"}, {"use_batch_stats": False}),
        ({"nonfinite": "raise"}, {"use_batch_stats": True, "update_running_stats": True, "train_parameters": False}),
    ):
        bn, after = cbn.BatchNorm1d(4, dtype=np.float64, **kwargs), cbn.BatchNorm1d(4, dtype=np.float64)
        for name, on in switches.items():
            setattr(bn, name, on)
        words = repr(bn)
        cbn.recalibrate([bn, after], batches, forward=lambda x, bn=bn, after=after: after(bn(x) ** 2))
        assert repr(bn) == words
        for one, other in ((bn, expected), (after, second)):
            assert np.array_equal(one.running_mean, other.running_mean)
            assert np.array_equal(one.running_var, other.running_var)
