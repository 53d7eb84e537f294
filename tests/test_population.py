"""Running statistics as Moments: there and back, merged over clients, refusals."""

import numpy as np
import pytest

import cbn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("convention", ["unbiased", "biased"])
def test_running_moments_and_back(rng, dtype, convention):
    layer = cbn.BatchNorm1d(4, dtype=dtype, running_var=convention)
    layer(rng.normal(3, 2, (50, 4)))
    counts = np.array([2, 10, 100.5, 1e9])
    for count in (37, counts):
        m = layer.running_moments(count)
        assert isinstance(m, cbn.Moments)
        assert np.array_equal(m.mean, layer.running_mean.astype(float))
        np.testing.assert_allclose(m.var(int(convention == "unbiased")), layer.running_var, rtol=1e-15)
        other = cbn.BatchNorm1d(4, dtype=dtype, running_var=convention)
        mean = other.running_mean
        assert other.set_running_moments(m) is None
        assert other.running_mean is mean, "in place"
        assert np.array_equal(mean, layer.running_mean)
        np.testing.assert_allclose(other.running_var, layer.running_var, rtol=1e-15)
        assert other.num_batches_tracked == 0


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
def test_clients_average_with_the_variance_between_them(rng, convention):
    """Merged statistics are those of all data in one array, which an average of variances is not."""
    data = [rng.normal(3 + 2 * i, 1 + i, (n, 4)) for i, n in enumerate((40, 300, 75))]
    clients = [cbn.BatchNorm1d(4, momentum=1, dtype=np.float64, running_var=convention) for _ in data]
    for client, x in zip(clients, data, strict=True):
        client(x)
    merged = cbn.Moments.merge([c.running_moments(len(x)) for c, x in zip(clients, data, strict=True)])
    server = cbn.BatchNorm1d(4, dtype=np.float64, running_var=convention)
    server.set_running_moments(merged)
    whole = np.concatenate(data)
    np.testing.assert_allclose(server.running_mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(server.running_var, whole.var(axis=0, ddof=int(convention == "unbiased")), rtol=1e-12)
    assert server.num_batches_tracked == 0
    weights = np.array([len(x) for x in data]) / sum(map(len, data))
    assert np.all(server.running_var > 1.1 * weights @ np.array([c.running_var for c in clients]))


def same_after(layer, error, words, call):
    before = {name: a.tobytes() for name, a in vars(layer).items() if isinstance(a, np.ndarray)}
    with pytest.raises(error, match=words):
        call()
    assert {name: a.tobytes() for name, a in vars(layer).items() if isinstance(a, np.ndarray)} == before


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (1, ValueError, r"more than 1, because the layer tracks the unbiased variance m2/\(count - 1\), but got 1"),
        (0, ValueError, "more than 1"),
        (-3, ValueError, "more than 1"),
        (np.nan, ValueError, "finite"),
        (np.inf, ValueError, "finite"),
        ([2, 3], ValueError, r"count has shape \(2,\); expected \(3,\) or one number"),
        ([2, 1, 3], ValueError, "but got 1"),
        ("many", TypeError, "count must be an array, not str"),
        (None, TypeError, "count must be an array, not None"),
    ],
)
def test_refused_counts(count, error, words):
    layer = cbn.BatchNorm1d(3)
    same_after(layer, error, words, lambda: layer.running_moments(count))


def test_a_biased_layer_takes_a_count_of_one():
    layer = cbn.BatchNorm1d(3, running_var="biased")
    assert np.array_equal(layer.running_moments(1).m2, np.ones(3))
    layer.set_running_moments(cbn.Moments(1, [1.0, 2.0, 3.0], np.zeros(3)))
    assert np.array_equal(layer.running_var, np.zeros(3))
    with pytest.raises(ValueError, match="more than 0, but got 0"):
        layer.running_moments(0)


def test_refused_statistics():
    layer = cbn.BatchNorm1d(3)
    layer.running_var[1] = -1e-9
    same_after(layer, ValueError, "running_var is negative in channel 1", lambda: layer.running_moments(9))
    layer.running_mean[:] = np.nan
    words = "running_mean is not finite in channels 0, 1 and 2"
    same_after(layer, ValueError, words, lambda: layer.running_moments(9))


ZEROS = np.zeros(3)


@pytest.mark.parametrize(
    ("m", "error", "words"),
    [
        (cbn.Moments(9, np.zeros(4), np.zeros(4)), ValueError, "the moments have 4 channels; expected 3"),
        (cbn.Moments(1, ZEROS, ZEROS), ValueError, r"more than 1.*but is 1 in channels 0, 1 and 2"),
        (cbn.Moments([9, 1, 9], ZEROS, ZEROS), ValueError, r"but is 1 in channel 1"),
        (cbn.Moments(np.inf, ZEROS, ZEROS), ValueError, "must be finite"),
        (cbn.Moments(9, [0, np.nan, 0], ZEROS), ValueError, "the mean of the moments is not finite in channel 1"),
        (cbn.Moments(9, ZEROS, [0, 0, np.inf]), ValueError, "the variance of the moments is not finite in channel 2"),
        (cbn.Moments(9, [0, 1e39, 0], ZEROS), ValueError, "1e[+]39 in channel 1, is beyond the range of float32"),
        (cbn.RunningMoments(3), TypeError, r"expected Moments, not RunningMoments; its moments\(\) are"),
        ((9, ZEROS, ZEROS), TypeError, "expected Moments, not tuple"),
    ],
    ids=str,
)
def test_refused_moments(m, error, words):
    layer = cbn.BatchNorm1d(3)
    same_after(layer, error, words, lambda: layer.set_running_moments(m))


def test_refused_layers_of_moments():
    bare, m = cbn.BatchNorm1d(3, track_running_stats=False), cbn.Moments(9, ZEROS, ZEROS)
    for call in (lambda: bare.set_running_moments(m), lambda: bare.running_moments(9)):
        same_after(bare, ValueError, r"BatchNorm1d\(3\) has no running_mean and no running_var", call)
    layer = cbn.BatchNorm1d(3)
    layer.running_var.flags.writeable = False
    same_after(layer, ValueError, "running_var is read-only", lambda: layer.set_running_moments(m))
    layer = cbn.BatchNorm1d(3)
    layer.running_mean.shape = (3, 1)
    same_after(layer, ValueError, "running_mean has become an array", lambda: layer.set_running_moments(m))
