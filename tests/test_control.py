"""What a call of a layer does, by mode, switches, options and controls, against the rules written out in numpy."""

import copy
import io
import itertools
import pickle
import threading

import numpy as np
import pytest

import cbn
from cbn import reference

EPS = 1e-5
UNSET = (None, True, False)


def batch(rng, shape=(6, 3), dtype=np.float64):
    return (rng.standard_normal(shape) * 2 + 3).astype(dtype)


def layer_of(rng, n=3, **kwargs):
    """A float64 layer whose arrays all differ from their defaults."""
    bn = cbn.BatchNorm(n, dtype=np.float64, **kwargs)
    bn.weight[:], bn.bias[:] = rng.standard_normal((2, n))
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal(n), rng.random(n) + 0.5
    return bn


def normalized(x, mean, var, bn):
    return (x - mean) / np.sqrt(var + bn.eps) * bn.weight + bn.bias


def moved(bn, x, momentum=0.1):
    """The running statistics after a batch."""
    return ((1 - momentum) * bn.running_mean + momentum * x.mean(0),
            (1 - momentum) * bn.running_var + momentum * x.var(0, ddof=1))  # fmt: skip


def state(bn):
    return {name: a.tobytes() for name, a in bn.state_dict().items()}


# ---- the switches, all combinations ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("use", "update", "trains"), list(itertools.product(UNSET, repeat=3)))
def test_every_combination_of_switches(rng, training, use, update, trains):
    """The table in docs/features.md, by its rules: what is None follows the mode."""
    for update_stats in UNSET:
        bn = layer_of(rng).train(training)
        bn.use_batch_stats, bn.update_running_stats, bn.train_parameters = use, update, trains
        x, dy = batch(rng), batch(rng)
        batch_statistics = training if use is None else use
        moves = next((v for v in (update_stats, update) if v is not None), training)
        remembers = training or trains is True
        case = f"{training=} {use=} {update=} {trains=} {update_stats=}"
        mean, var = (x.mean(0), x.var(0)) if batch_statistics else (bn.running_mean.copy(), bn.running_var.copy())
        running = moved(bn, x) if moves else (bn.running_mean.copy(), bn.running_var.copy())
        y = bn(x, update_stats=update_stats)
        np.testing.assert_allclose(y, normalized(x, mean, var, bn), rtol=1e-12, atol=1e-12, err_msg=case)
        np.testing.assert_allclose(bn.running_mean, running[0], rtol=1e-14, err_msg=case)
        np.testing.assert_allclose(bn.running_var, running[1], rtol=1e-13, err_msg=case)
        assert bn.num_batches_tracked == int(moves), case
        assert bn.frozen == (use is False and update is False), case
        if not remembers:
            with pytest.raises(RuntimeError, match="evaluation mode, which keeps nothing"):
                bn.backward(dy)
            continue
        bn.backward(dy)
        xhat = (x - mean) / np.sqrt(var + EPS)
        expected = 0 if trains is False else (dy * xhat).sum(0)
        np.testing.assert_allclose(bn.weight_grad, expected, rtol=1e-11, atol=1e-12, err_msg=case)
        assert trains is not False or not bn.bias_grad.any(), case


def test_switches_are_checked_and_kept(rng):
    bn = layer_of(rng)
    for name in ("use_batch_stats", "update_running_stats", "train_parameters"):
        with pytest.raises(TypeError, match=f"{name}, if not None, must be a bool, not 1"):
            setattr(bn, name, 1)
    with pytest.raises(TypeError, match="update_stats, if not None, must be a bool"):
        bn(batch(rng), update_stats="no")
    bn.use_batch_stats, bn.train_parameters, bn.nonfinite, bn.on_single = True, False, "skip", "zero"
    bn.renorm = (3, 5)
    file = io.BytesIO()
    bn.save(file)
    others = copy.deepcopy(bn), pickle.loads(pickle.dumps(bn)), cbn.load(io.BytesIO(file.getvalue()))
    for other in others:
        assert (other.use_batch_stats, other.update_running_stats, other.train_parameters) == (True, None, False)
        assert (other.nonfinite, other.on_single, other.renorm) == ("skip", "zero", (3.0, 5.0))
        assert repr(other) == repr(bn)
    assert repr(bn).endswith(
        "nonfinite='skip', on_single='zero', renorm=(3.0, 5.0)) with use_batch_stats=True, train_parameters=False"
    )
    assert repr(cbn.BatchNorm1d(3).freeze()).endswith(").freeze()")


def test_frozen_is_both_switches(rng):
    bn = layer_of(rng).freeze()
    assert (bn.use_batch_stats, bn.update_running_stats, bn.train_parameters) == (False, False, None)
    bn.unfreeze()
    assert (bn.use_batch_stats, bn.update_running_stats) == (None, None)
    bn.use_batch_stats = False
    assert not bn.frozen
    bn.update_running_stats = False
    assert bn.frozen
    bn.train_parameters = False
    file = io.BytesIO()
    bn.save(file)
    other = cbn.load(io.BytesIO(file.getvalue()))
    assert other.frozen
    assert other.train_parameters is False


def test_a_plan_does_not_outlive_a_switch(rng):
    bn, x = layer_of(rng).eval(), batch(rng)
    for _ in range(3):
        fixed = bn(x)
    bn.use_batch_stats = True
    assert not np.array_equal(bn(x), fixed)
    bn.use_batch_stats = None
    assert np.array_equal(bn(x), fixed)
    for _ in range(3):
        bn(x)
    assert not np.array_equal(bn(x, mix=0.5), fixed)  # an option, of a layer that has a plan
    bn.update_running_stats = True
    before = state(bn)
    bn(x)
    assert state(bn) != before


@pytest.mark.parametrize("kwargs", [{}, {"nonfinite": "skip"}, {"renorm": (2, 1)}, {"ghost_batch_size": 3}])
def test_statistics_that_are_no_longer_tracked_stay(rng, kwargs):
    bn, x = layer_of(rng, **kwargs), batch(rng)
    bn.track_running_stats = False
    before = state(bn)
    bn(x)
    bn(x, mask=np.arange(6) != 1)
    assert state(bn) == before
    bn(x, update_stats=True)
    assert state(bn) != before


def test_no_running_statistics_to_update(rng):
    bn = cbn.BatchNorm(3, track_running_stats=False)
    bn.update_running_stats = True
    with pytest.raises(ValueError, match="update_running_stats is True, but the layer has no running statistics"):
        bn(batch(rng))
    bn.update_running_stats = None
    with pytest.raises(ValueError, match="update_stats is True, but the layer has no running statistics"):
        bn(batch(rng), update_stats=True)


def test_in_place_and_measured_first(rng):
    """Running statistics that move by a batch which they normalize in place: it is measured before."""
    bn, x = layer_of(rng), batch(rng)
    bn.use_batch_stats = False
    running, expected = moved(bn, x), normalized(x, bn.running_mean, bn.running_var, bn)
    bn(x, out=x)
    np.testing.assert_allclose(x, expected, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, running[1], rtol=1e-13)


# ---- on_single ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_value_per_channel(rng, shape, activation):
    x, dy, residual = (batch(rng, shape) for _ in range(3))

    def act(a):
        return np.maximum(a, 0) if activation else a

    for given in (None, residual):
        z = 0 if given is None else given
        bn = layer_of(rng, on_single="running", activation=activation)
        before, ndim = state(bn), (3,) + (1,) * (len(shape) - 2)
        mean, var, weight, bias = (a.reshape(ndim) for a in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        a = (x - mean) / np.sqrt(var + EPS) * weight + bias + z
        np.testing.assert_allclose(bn(x, residual=given), act(a), rtol=1e-12)
        dx = bn.backward(dy)
        dx = dx if given is None else dx[0]
        kept = (a > 0) if activation else True
        np.testing.assert_allclose(dx, dy * kept * weight / np.sqrt(var + EPS), rtol=1e-12)
        assert state(bn) == before

        bn = layer_of(rng, on_single="zero", activation=activation)
        before, bias = state(bn), bn.bias.reshape(ndim)
        assert np.array_equal(bn(x, residual=given), np.broadcast_to(act(bias + z), shape))
        dx = bn.backward(dy)
        assert not (dx if given is None else dx[0]).any()
        assert not bn.weight_grad.any()
        kept = (bias + z > 0) if activation else True
        np.testing.assert_allclose(bn.bias_grad, (dy * kept).reshape(3))
        assert state(bn) == before


def test_one_value_is_an_error_by_default(rng):
    for kwargs in ({}, {"on_single": "error"}):
        bn = layer_of(rng, **kwargs)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            bn(batch(rng, (1, 3)))
    with pytest.raises(ValueError, match="on_single must be 'error', 'running' or 'zero', not 'skip'"):
        cbn.BatchNorm1d(3, on_single="skip")
    bn = cbn.BatchNorm(3, track_running_stats=False, on_single="running")
    with pytest.raises(ValueError, match="running_mean must be defined in evaluation mode"):
        bn(batch(rng, (1, 3)))
    assert cbn.BatchNorm(3, on_single="zero")(np.empty((0, 3))).shape == (0, 3)


# ---- nonfinite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_skip_leaves_bad_channels_alone(rng, bad, dtype):
    bn, plain = layer_of(rng, nonfinite="skip"), layer_of(rng)
    plain.load_state_dict(bn.state_dict())
    x = batch(rng, dtype=dtype)
    x[2, 1] = bad
    before = bn.running_mean.copy(), bn.running_var.copy()
    np.testing.assert_array_equal(bn(x), plain(x))
    for name, old in zip(("running_mean", "running_var"), before, strict=True):
        found, all_moved = getattr(bn, name), getattr(plain, name)
        assert found[1] == old[1]
        assert not np.isfinite(all_moved[1])
        np.testing.assert_array_equal(found[[0, 2]], all_moved[[0, 2]])
    assert bn.num_batches_tracked == 1
    assert bn.num_batches_skipped.tolist() == [0, 1, 0]
    bn(batch(rng))
    assert bn.num_batches_skipped.tolist() == [0, 1, 0]
    assert plain.num_batches_skipped is None


def test_raise_changes_nothing(rng):
    bn, x = layer_of(rng, nonfinite="raise"), batch(rng)
    plain = copy.deepcopy(bn)
    plain.nonfinite = "propagate"
    np.testing.assert_array_equal(bn(x), plain(x))
    assert state(bn) == state(plain)
    x[1, 2], x[3, 0] = np.nan, np.inf
    before, out = state(bn), np.zeros_like(x)
    for error in (ValueError, FloatingPointError):
        with pytest.raises(error, match='the batch is not finite in channels 0 and 2, and nonfinite is "raise"'):
            bn(x, out=out)
    assert state(bn) == before
    assert not out.any()
    bn.use_batch_stats = False
    with pytest.raises(ValueError, match="not finite in channels 0 and 2"):
        bn(x)
    bn.eval()
    assert np.isnan(bn(x)[1, 2])  # nothing is measured


# ---- num_features=None --------------------------------------------------------------------------------------------


def test_channels_are_learnt_at_the_first_call(rng):
    lazy, x = cbn.BatchNorm1d(None, bias=False, dtype=np.float64), batch(rng)
    assert lazy.num_features is None
    assert lazy.weight is None
    assert repr(lazy).startswith("BatchNorm1d(None, eps=1e-05, momentum=0.1, affine=True, bias=False")
    with pytest.raises(ValueError, match="num_features is not known before the first call"):
        lazy.weight = np.ones(3)
    with pytest.raises(ValueError, match="not known before the first call, so there is nothing to save"):
        lazy.save(io.BytesIO())
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        lazy(np.ones((2, 3, 4, 5)))
    assert lazy.num_features is None
    known = cbn.BatchNorm1d(3, bias=False, dtype=np.float64)
    for bn in (lazy, pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)):
        assert np.array_equal(bn(x), known(x))
        assert bn.num_features == 3
        assert state(bn) == state(known)
        assert repr(bn) == repr(known)
        assert np.array_equal(bn.backward(x), known.backward(x))
        known = cbn.BatchNorm1d(3, bias=False, dtype=np.float64)
    assert cbn.BatchNorm(None).eval()(np.ones((2, 5, 4), np.float32)).shape == (2, 5, 4)


def test_channels_are_learnt_from_a_state(rng):
    known = layer_of(rng)
    lazy = cbn.BatchNorm1d(None)
    with pytest.raises(ValueError, match=r"has no array of channels under 'bn.weight' or 'bn.running_mean'"):
        lazy.load_state_dict(known.state_dict(), prefix="bn.")
    with pytest.raises(ValueError, match=r"not finite|missing"):
        lazy.load_state_dict({"weight": np.ones(3)})
    assert lazy.num_features is None
    lazy.load_state_dict(known.state_dict())
    np.testing.assert_array_equal(lazy.running_var, known.running_var.astype(np.float32))


def test_first_calls_of_many_threads_count(rng):
    bn, x = cbn.BatchNorm1d(None), batch(rng)
    start = threading.Barrier(8)

    def call():
        start.wait()
        bn(x)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bn.num_batches_tracked == 8


# ---- given statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("unbiased", ["unbiased", "biased"])
def test_given_moments_of_the_batch_give_its_bits(rng, dtype, unbiased):
    x, dy = batch(rng, (6, 3, 5), dtype), batch(rng, (6, 3, 5), dtype)
    bn = layer_of(rng, running_var=unbiased)
    other = copy.deepcopy(bn)
    assert np.array_equal(bn(x), other(x, moments=cbn.moments(x)))
    assert state(bn) == state(other)
    assert np.array_equal(bn.backward(dy), other.backward(dy))
    np.testing.assert_array_equal(bn.weight_grad, other.weight_grad)


def test_given_moments_of_more_than_the_batch(rng):
    x = batch(rng, (12, 3))
    bn, whole = layer_of(rng), None
    whole = copy.deepcopy(bn)
    m = cbn.moments(x)
    parts = [copy.deepcopy(bn)(part, moments=m) for part in (x[:5], x[5:])]
    np.testing.assert_allclose(np.concatenate(parts), whole(x), rtol=1e-13)
    bn(x[:5], moments=m)
    assert state(bn) == state(whole)
    with pytest.raises(RuntimeError, match=r"stand for more than its batch.*batch_norm_backward_reduce"):
        bn.backward(x[:5])
    # Counts that differ from channel to channel
    m = cbn.Moments([4, 5, 6], [0, 1, 2], [3, 8, 15])
    bn = layer_of(rng)
    expected = 0.9 * bn.running_var + 0.1 * np.array([1, 2, 3])
    bn(x, moments=m)
    np.testing.assert_allclose(bn.running_var, expected, rtol=1e-14)


def test_refused_moments_and_mixtures(rng):
    bn, x = layer_of(rng), batch(rng)
    before = state(bn)
    for kwargs, kind, words in (
        ({"moments": (1, 2, 3)}, TypeError, "moments must be cbn.Moments, not tuple"),
        ({"moments": cbn.Moments(2, [0, 0], [1, 1])}, ValueError, "moments are of 2 channels; expected 3"),
        ({"moments": cbn.Moments([2, 1, 2], [0] * 3, [1] * 3)}, ValueError, "got moments with count 1 in channel 1"),
        ({"mix": 0.5}, ValueError, "mix is for evaluation"),
        ({"mix": 2}, ValueError, "mix must be between 0 and 1, but got 2"),
        ({"mix": np.nan}, ValueError, "mix must be between 0 and 1"),
        ({"mix": "a"}, TypeError, "mix must be a number"),
        ({"mix": 0.1, "moments": cbn.moments(x)}, ValueError, "pass one of them"),
    ):
        with pytest.raises(kind, match=words):
            bn(x, **kwargs)
    bn.eval()
    with pytest.raises(ValueError, match="moments take the place of the batch's statistics, but this call uses"):
        bn(x, moments=cbn.moments(x))
    assert state(bn) == before


# ---- mixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 40), (40, 3, 40, 30)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mix", [0, 0.25, 1])
def test_mixtures(rng, shape, dtype, mix, isa):
    bn, x = layer_of(rng, activation="relu").eval(), batch(rng, shape, dtype)
    before, residual = state(bn), batch(rng, shape, dtype)
    rest, one = tuple(a for a in range(x.ndim) if a != 1), (3,) + (1,) * (x.ndim - 2)
    mean_b, var_b = x.mean(rest, np.float64), x.var(rest, np.float64)
    mean, var = reference.mixture(mean_b, var_b, bn.running_mean, bn.running_var, mix)
    mean, var, weight, bias = (a.reshape(one) for a in (mean, var, bn.weight, bn.bias))
    expected = np.maximum((x.astype(np.float64) - mean) / np.sqrt(var + EPS) * weight + bias + residual, 0)
    found = {n: bn(x, mix=mix, residual=residual) for n in (1, 2) for _ in [cbn.set_num_threads(n)]}
    cbn.set_num_threads(None)
    np.testing.assert_allclose(found[1], expected, rtol=1e-5 if dtype == np.float32 else 1e-12, atol=1e-6)
    assert np.array_equal(found[1], found[2])
    assert state(bn) == before
    if mix == 0:
        assert np.array_equal(found[1], bn(x, residual=residual))


def test_a_mixture_of_extremes(rng):
    """The pass's bound of what may overflow is that of the batch's own statistics; a mixture has another."""
    bn = cbn.BatchNorm(1, affine=False, activation=("leaky_relu", 1e-30)).eval()
    bn.running_mean[:], bn.running_var[:] = -1e30, 1e-30
    x = np.full((64, 1), -1e38, np.float32)
    y = bn(x, mix=0)
    assert np.isfinite(y).all()


# ---- batch renormalization ------------------------------------------------------------------------------------------


def renormalized(bn, x, r_max, d_max):
    """(y, r, d) in float64: Ioffe 2017, algorithm 1."""
    r, d = reference.renormalization(x.mean(0), x.var(0), bn.running_mean, bn.running_var, r_max, d_max, EPS)
    return ((x - x.mean(0)) / np.sqrt(x.var(0) + EPS) * r + d) * bn.weight + bn.bias, r, d


@pytest.mark.parametrize(("r_max", "d_max"), [(1, 0), (1.2, 0.3), (3, 5), (np.inf, np.inf)])
def test_renorm(rng, r_max, d_max):
    bn = layer_of(rng, renorm=(r_max, d_max))
    for _ in range(10):
        x, dy = batch(rng, (8, 3)), batch(rng, (8, 3))
        expected, r, d = renormalized(bn, x, r_max, d_max)
        running = moved(bn, x)
        bn.zero_grad()
        np.testing.assert_allclose(bn(x), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(bn.running_var, running[1], rtol=1e-13)
        dx = bn.backward(dy)
        invstd = 1 / np.sqrt(x.var(0) + EPS)
        xhat = (x - x.mean(0)) * invstd
        np.testing.assert_allclose(bn.weight_grad, (dy * (xhat * r + d)).sum(0), rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(bn.bias_grad, dy.sum(0), rtol=1e-11, atol=1e-12)
        expected = (dy - dy.mean(0) - xhat * (dy * xhat).mean(0)) * invstd * r * bn.weight
        np.testing.assert_allclose(dx, expected, rtol=1e-10, atol=1e-12)


def test_renorm_as_a_function_of_the_counter(rng):
    seen = []

    def bounds(n):
        seen.append(n)
        return (1, 0) if n < 2 else (3, 5)

    bn, plain = layer_of(rng, renorm=bounds), layer_of(rng)
    plain.load_state_dict(bn.state_dict())
    for _ in range(3):
        x = batch(rng)
        y = bn(x)
        if len(seen) < 3:
            np.testing.assert_allclose(y, plain(x), rtol=1e-12)
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="renorm is a function, which no file holds"):
        bn.save(io.BytesIO())
    bn.renorm = lambda n: 3
    with pytest.raises(TypeError, match="renorm must be None, a pair"):
        bn(batch(rng))


def test_renorm_is_refused(rng):
    for value, kind, words in (
        (3, TypeError, "renorm must be None, a pair .r_max, d_max. or a function that returns one, not 3"),
        ((0.5, 1), ValueError, "renorm must have r_max >= 1 and d_max >= 0, but got 0.5 and 1"),
        ((2, -1), ValueError, "r_max >= 1 and d_max >= 0"),
        ((np.nan, 1), ValueError, "r_max >= 1 and d_max >= 0"),
        (("a", 1), TypeError, "r_max of renorm must be a number"),
    ):
        with pytest.raises(kind, match=words):
            cbn.BatchNorm1d(3, renorm=value)
    bn = cbn.BatchNorm(3, track_running_stats=False, renorm=(3, 5))
    with pytest.raises(ValueError, match="renorm needs running statistics, and the layer has none"):
        bn(batch(rng))
    bn = layer_of(rng, renorm=(3, 5))
    with pytest.raises(ValueError, match="renorm corrects the batch's statistics"):
        bn(batch(rng), moments=cbn.moments(batch(rng)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("axis", [1, -1])
def test_renorm_with_an_epilogue_in_large_arrays(rng, dtype, axis, isa, parallel):
    """The pipeline's solve, tile by tile; the activation's gradient with the weight that has r in it."""
    shape = (4, 5, 6000) if axis == 1 else (4, 6000, 5)
    x, dy, residual = (batch(rng, shape, dtype) for _ in range(3))
    bn = layer_of(rng, 5, renorm=(1.5, 0.5), activation="relu", channel_axis=axis)
    plain = cbn.BatchNorm(5, dtype=np.float64, activation="relu", channel_axis=axis)
    flat = np.moveaxis(x, axis, -1).reshape(-1, 5).astype(np.float64)
    _, r, d = renormalized(bn, flat, 1.5, 0.5)
    plain.weight[:], plain.bias[:] = bn.weight * r, bn.bias + bn.weight * d
    y, expected = bn(x, residual=residual), plain(x, residual=residual)
    np.testing.assert_allclose(
        y.astype(np.float64), expected.astype(np.float64), rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-3
    )
    dx, expected_dx = bn.backward(dy)[0], plain.backward(dy)[0]
    np.testing.assert_allclose(dx.astype(np.float64), expected_dx.astype(np.float64), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(bn.weight_grad, r * plain.weight_grad + d * plain.bias_grad, rtol=1e-2, atol=1)
