"""Layers with several sets of running statistics, against as many layers with one each."""

import copy
import io
import pickle

import numpy as np
import pytest

import cbn

D = 3


def layers(rng, n=4, **kwargs):
    """A layer with domains, and a layer for each of them with the same arrays."""
    bn = cbn.BatchNorm(n, num_domains=D, dtype=np.float64, **kwargs)
    bn.weight[:], bn.bias[:] = rng.standard_normal((2, n))
    bn.running_mean[:], bn.running_var[:] = rng.standard_normal((D, n)), rng.random((D, n)) + 0.5
    bn.num_batches_tracked[:] = [0, 3, 7]
    singles = []
    for d in range(D):
        one = cbn.BatchNorm(n, dtype=np.float64, **kwargs)
        one.weight, one.bias = bn.weight.copy(), bn.bias.copy()
        one.running_mean, one.running_var = bn.running_mean[d].copy(), bn.running_var[d].copy()
        one.num_batches_tracked[...] = bn.num_batches_tracked[d]
        singles.append(one)
    return bn, singles


def same_statistics(bn, singles):
    for d, one in enumerate(singles):
        np.testing.assert_array_equal(bn.running_mean[d], one.running_mean)
        np.testing.assert_array_equal(bn.running_var[d], one.running_var)
        assert bn.num_batches_tracked[d] == one.num_batches_tracked


@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"activation": "relu", "running_var": "biased"},
                                    {"ghost_batch_size": 2}, {"renorm": (2, 1)}])  # fmt: skip
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("axis", "shape"), [(1, (12, 4)), (1, (12, 4, 5)), (-1, (12, 5, 4)), (0, (4, 12, 3))])
def test_as_many_layers(rng, kwargs, mixed, axis, shape):
    bn, singles = layers(rng, channel_axis=axis, **kwargs)
    samples = 1 if axis == 0 else 0
    domain = np.array([0, 2, 0, 1, 1, 2, 2, 0, 1, 2, 0, 0]) if mixed else np.full(12, 1)
    for training in (True, True, False):
        bn.train(training)
        x, dy, residual = (rng.standard_normal(shape) for _ in range(3))
        y = bn(x, domain=domain if mixed else 1, residual=residual)
        dx = bn.backward(dy) if training else None
        for d, one in enumerate(singles):
            at = np.flatnonzero(domain == d)
            if not at.size:
                continue
            one.train(training)
            of_x, of_dy, of_residual, of_y = (np.take(a, at, samples) for a in (x, dy, residual, y))
            np.testing.assert_array_equal(of_y, one(of_x, residual=of_residual))
            if training:
                for found, part in zip(dx, one.backward(of_dy), strict=True):
                    np.testing.assert_array_equal(np.take(found, at, samples), part)
        same_statistics(bn, singles)
    for name in ("weight_grad", "bias_grad"):
        total = sum(getattr(one, name) for one in singles)
        np.testing.assert_allclose(getattr(bn, name), total, rtol=1e-12, atol=1e-12)


def test_mixtures_switches_and_in_place(rng):
    bn, singles = layers(rng)
    bn.eval()
    x, domain = rng.standard_normal((6, 4)), np.array([0, 0, 1, 1, 2, 2])
    y = bn(x, domain=domain, mix=0.3)
    for d, one in enumerate(singles):
        np.testing.assert_array_equal(y[domain == d], one.eval()(x[domain == d], mix=0.3))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        bn.backward(x)
    same_statistics(bn, singles)
    bn.train()
    expected = copy.deepcopy(bn)(x, domain=domain)
    bn(x, domain=domain, update_stats=False)
    same_statistics(bn, singles)
    np.testing.assert_array_equal(bn(x, domain=domain, out=x), expected)
    bn.freeze()
    same = bn(x, domain=domain.tolist())
    assert np.array_equal(same[:2], bn(x[:2], domain=0))


def test_all_or_nothing(rng):
    bn, singles = layers(rng)
    x = rng.standard_normal((5, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bn(x, domain=[0, 0, 1, 1, 2])  # the last domain has one value
    same_statistics(bn, singles)
    bn.on_single = "running"
    y = bn(x, domain=[0, 0, 1, 1, 2])
    np.testing.assert_array_equal(y[4:], singles[2].eval()(x[4:]))
    assert bn.num_batches_tracked.tolist() == [1, 4, 7]
    assert bn(np.empty((0, 4)), domain=np.empty(0, int)).shape == (0, 4)


def test_nonfinite_skip_counts(rng):
    bn, _ = layers(rng, nonfinite="skip")
    x = rng.standard_normal((4, 4))
    x[0, 2] = np.nan
    before = bn.running_var[:, 2].copy()
    bn(x, domain=[0, 0, 1, 1])
    assert bn.running_var[0, 2] == before[0]
    assert bn.running_var[1, 2] != before[1]
    assert bn.num_batches_skipped.tolist() == [0, 0, 1, 0]


def test_state_files_and_copies(rng, tmp_path):
    bn, singles = layers(rng)
    state = bn.state_dict()
    assert state["running_mean"].shape == (D, 4)
    assert state["num_batches_tracked"].tolist() == [0, 3, 7]
    other = cbn.BatchNorm(4, num_domains=D, dtype=np.float64)
    assert other.load_state_dict(state) == ([], [])
    file = io.BytesIO()
    bn.save(file)
    lazy = cbn.BatchNorm(None, num_domains=D, dtype=np.float64)
    lazy.load_state_dict(state)
    for same in (other, cbn.load(io.BytesIO(file.getvalue())), pickle.loads(pickle.dumps(bn)), copy.deepcopy(bn), lazy):
        same_statistics(same, singles)
        assert repr(same) == repr(bn)
        assert same.num_domains == D
    bn.save(tmp_path / "bn.npz")
    same_statistics(cbn.load(tmp_path / "bn.npz"), singles)
    bn.reset_running_stats()
    assert not bn.running_mean.any()
    assert not bn.num_batches_tracked.any()
    assert (bn.running_var == 1).all()
    with pytest.raises(ValueError, match=r"running_mean has shape \(4,\); expected \(3, 4\)"):
        bn.load_state_dict(singles[0].state_dict())
    bad = dict(state, running_var=-state["running_var"])
    with pytest.raises(ValueError, match="running_var is negative"):
        bn.load_state_dict(bad)


def test_refusals(rng):
    bn, _ = layers(rng)
    x = rng.standard_normal((4, 4))
    for domain, kind, words in (
        (None, ValueError, "the layer has num_domains=3: pass domain=, a number or one for each sample"),
        (3, ValueError, "domain must be from 0 to 2, but got 3"),
        (-1, ValueError, "domain must be from 0 to 2, but got -1"),
        (1.0, TypeError, "domain must be an integer, or one for each sample"),
        ([0, 1], ValueError, r"domain has shape \(2,\); expected \(4,\), one for each sample"),
        ([0, 1, 2, 3], ValueError, "domain must be from 0 to 2, but got 3 for sample 3"),
        ([0.0, 1, 2, 2], TypeError, "domain has dtype float64; expected integers"),
    ):
        with pytest.raises(kind, match=words):
            bn(x, domain=domain)
    with pytest.raises(ValueError, match="domain is for layers with num_domains"):
        cbn.BatchNorm(4)(x, domain=0)
    for value, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="num_domains must be"):
            cbn.BatchNorm(4, num_domains=value)
    with pytest.raises(ValueError, match=r"running_mean has shape \(4,\); expected \(3, 4\), a row for each domain"):
        bn.running_mean = np.zeros(4)
    with pytest.raises(TypeError, match=r"num_batches_tracked must be an integer array of shape \(3,\)"):
        bn.num_batches_tracked = np.array(3)
    for call in (
        lambda: bn.plan((4, 4)), lambda: bn.running_moments(3), lambda: bn.check(), lambda: cbn.recalibrate(bn, [x]),
        lambda: cbn.fuse_linear_bn(np.ones((4, 4)), None, bn.eval()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="needs one set of running statistics, and the layer has num_domains=3"):
            call()
