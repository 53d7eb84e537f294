"""StandardScaler against scikit-learn's: its own tests, its checks of estimators, values, refusals, pickles."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cbn

from . import peer

sklearn = peer("sklearn")

from scipy import sparse  # noqa: E402
from sklearn import clone, config_context  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler as Theirs  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from cbn.sklearn import StandardScaler  # noqa: E402

ROOT = Path(__file__).parents[2]
STATISTICS = ("mean_", "var_", "scale_", "n_samples_seen_")

# Before the module of tests imports the name, so that it is the new class in parametrizations too
PLUGIN = """
import inspect
import sklearn.preprocessing
from cbn.sklearn import StandardScaler
sklearn.preprocessing.StandardScaler = StandardScaler

def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if "StandardScaler" in inspect.getsource(item.function)]
"""


@parametrize_with_checks([StandardScaler(), StandardScaler(with_mean=False), StandardScaler(with_std=False)])
def test_checks_of_estimators(estimator, check):
    check(estimator)


def test_scikit_learns_own_tests(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # and not ours, whose warnings are errors
    options = ["-p", "plugin", "-p", "no:cacheprovider", "-c", "pytest.ini", "-q", "-rs"]
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--pyargs", "sklearn.preprocessing.tests.test_data"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""},  # options of this run are not theirs
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200, done.stdout


# ---- values ----------------------------------------------------------------------------------------------------------


def fitted(cls, batches, weights=None, **parameters):
    scaler = cls(**parameters)
    for i, x in enumerate(batches):
        scaler.partial_fit(x, sample_weight=None if weights is None else weights[i])
    return scaler


def agree(found, exact, rtol=1e-12):
    """Fail unless both have the same attributes, with statistics that differ by no more than rounding."""
    assert set(vars(found)) == set(vars(exact))
    for name in STATISTICS:
        if getattr(exact, name) is None:
            assert getattr(found, name) is None, name
            continue
        assert np.shape(getattr(found, name)) == np.shape(getattr(exact, name)), name
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=rtol, atol=1e-14, err_msg=name)


@pytest.fixture
def batches(rng):
    return [rng.normal(3, rng.uniform(1, 5, 7), (n, 7)) for n in (50, 1, 33)]


@pytest.fixture
def alone(monkeypatch):
    """scikit-learn's own methods are not called."""
    for name in ("partial_fit", "transform", "inverse_transform"):
        monkeypatch.delattr(Theirs, name)


PARAMETERS = [
    {"with_mean": mean, "with_std": std, "copy": copy}
    for mean in (True, False)
    for std in (True, False)
    for copy in (True, False)
]


@pytest.mark.parametrize("kind", ["values", "NaN", "weights", "NaN and weights", "constant features"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_values(rng, batches, parameters, kind):
    weights = [rng.integers(0, 4, len(x)) + 0.5 for x in batches] if "weights" in kind else None
    if "NaN" in kind:
        batches[0][3:9, 2] = batches[2][4:, 5] = np.nan
    if kind == "constant features":
        for x in batches:
            x[:, 1], x[:, 4], x[:, 6] = 0, 0.1, 1e9
            x[::2, 6] += 1e-7
    found, exact = (fitted(cls, batches, weights, **parameters) for cls in (StandardScaler, Theirs))
    agree(found, exact)
    x = np.concatenate(batches)
    y = found.transform(x.copy())
    np.testing.assert_allclose(y, exact.transform(x.copy()), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.inverse_transform(y.copy()), exact.inverse_transform(y.copy()), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_dense_arrays_do_not_reach_scikit_learn(alone, rng, batches, dtype, weighted):
    weights = [rng.integers(0, 3, len(x)) for x in batches] if weighted else None
    if weighted:
        weights[1][:] = 1
    batches = [x.astype(dtype) for x in batches]
    batches[0][2, 3] = np.nan
    scaler = fitted(StandardScaler, batches, weights)
    x = np.concatenate(batches)
    for a in (x, np.asfortranarray(x), x[::2, ::-1], np.where(np.isnan(x), 0, 1e30).astype(dtype)):
        y = scaler.transform(a)
        assert y.dtype == dtype
        back = scaler.inverse_transform(y)
        np.testing.assert_allclose(back, a, rtol=1e-5, atol=1e-5)
    ones = scaler.transform(np.ones((1, 7), np.int8))
    assert ones.dtype == np.float64
    np.testing.assert_allclose(ones[0], (1 - scaler.mean_) / scaler.scale_)


def test_float32_keeps_the_digits_of_a_large_mean(rng):
    x = rng.normal(1000, 1, (500, 20)).astype(np.float32)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    errors = [np.abs(cls().fit_transform(x) - exact).max() for cls in (StandardScaler, Theirs)]
    assert errors[0] < 5e-7
    assert errors[0] < errors[1] * 2  # a hundredth of it from scikit-learn 1.8 on, about the same before


@pytest.mark.parametrize("weighted", [False, True])
def test_batches_are_as_good_as_all_at_once(rng, batches, weighted):
    weights = [rng.uniform(0.5, 2, len(x)) for x in batches] if weighted else None
    batches[1][0, 3] = batches[2][5, 2] = np.nan  # all there is of a feature, and one value of many
    batches[0][:, 4] = np.nan
    whole = StandardScaler().fit(np.concatenate(batches), sample_weight=np.concatenate(weights) if weighted else None)
    agree(fitted(StandardScaler, batches, weights), whole)


def test_a_feature_without_values():
    x = np.array([[1.0, np.nan], [3.0, np.nan]])
    scaler = StandardScaler().fit(x)
    for name, first in (("mean_", 2), ("var_", 1), ("scale_", 1)):
        np.testing.assert_array_equal(getattr(scaler, name), [first, np.nan])
    np.testing.assert_array_equal(scaler.n_samples_seen_, [2, 0])
    np.testing.assert_array_equal(scaler.transform([[1.0, 2.0]]), [[-1, np.nan]])


def test_numbers_of_samples(batches):
    scaler = StandardScaler().fit(batches[0])
    assert scaler.n_samples_seen_ == 50
    assert scaler.n_samples_seen_.dtype == np.int64
    scaler.partial_fit(batches[2], sample_weight=0.25)
    assert scaler.n_samples_seen_ == 58.25
    assert scaler.partial_fit(batches[0]).n_samples_seen_ == 108.25
    assert scaler.fit(batches[0], sample_weight=2).n_samples_seen_.dtype == np.float64


def test_a_negative_variance_counts_as_0(batches):
    scaler = StandardScaler().fit(batches[0])
    scaler.var_[0] = -1e-30
    assert scaler.partial_fit(batches[2]).var_[0] > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_keep_their_signs(dtype):
    x = np.array([[0.0, -0.0], [2.0, 3.0]], dtype)
    scaler = StandardScaler(with_mean=False).fit(x)
    for method in (scaler.transform, scaler.inverse_transform):
        np.testing.assert_array_equal(np.signbit(method(x)), np.signbit(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_threads_gives_the_same_bits(parallel, rng, dtype):
    x = rng.normal(5, 2, (3000, 40)).astype(dtype)
    x[rng.random(x.shape) < 0.01] = np.nan
    found = []
    for n in (1, 2, 3):
        with cbn.num_threads(n):
            scaler = fitted(StandardScaler, [x[:1700], x[1700:]])
            y = scaler.transform(x)
            found.append([scaler.mean_, scaler.var_, scaler.scale_, y, scaler.inverse_transform(y)])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- what comes in, what goes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_copies(batches, method, order):
    x = np.asarray(batches[0], order=order)
    before = x.copy()
    scaler = StandardScaler().fit(x)
    y = getattr(scaler, method)(x)
    assert not np.may_share_memory(y, x)
    np.testing.assert_array_equal(x, before)
    assert y.flags.f_contiguous == (order == "F")
    fixed = x.copy(order="K")
    fixed.flags.writeable = False
    for copy in (False, True):
        np.testing.assert_array_equal(getattr(scaler, method)(fixed, copy=copy), y)
    np.testing.assert_array_equal(fixed, before)
    assert getattr(scaler, method)(x, copy=False) is x
    np.testing.assert_array_equal(x, y)
    scaler.set_params(copy=False)
    every_other = before[::2]
    y = getattr(scaler, method)(every_other, copy=True)
    assert getattr(scaler, method)(every_other) is every_other
    np.testing.assert_array_equal(before[::2], y)


def outcomes(cls, call):
    """What a call raises for a fitted object and for a new one, and what they are afterwards."""
    found = []
    for scaler in (cls().fit(np.arange(6.0).reshape(3, 2)), cls()):
        try:
            found.append(call(scaler) is scaler)
        except (TypeError, ValueError) as error:
            found.append((type(error), str(error)))
        found.append({name: np.array(value).tolist() for name, value in vars(scaler).items()})
    return found


REFUSED = {
    "infinity": np.array([[1, np.inf], [3, 4]]),
    "infinity, float32": np.array([[1, -np.inf], [np.nan, 4]], np.float32),
    "infinity in a list": [[1, 2], [-np.inf, 4]],
    "strings": [["a", "b"]],
    "complex numbers": np.ones((2, 2), complex),
    "one dimension": np.ones(2),
    "three dimensions": np.ones((2, 2, 2)),
    "no sample": np.ones((0, 2)),
    "no feature": np.ones((2, 0)),
    "more features": np.ones((2, 3)),
    "fewer features": np.ones((2, 1)),
    "more features with an infinity": np.array([[1, np.inf, 2]]),
    "sparse": sparse.csr_array(np.eye(2)),
}


@pytest.mark.parametrize("method", ["fit", "partial_fit", "transform", "inverse_transform"])
@pytest.mark.parametrize("x", REFUSED.values(), ids=REFUSED)
def test_refusals(x, method):
    found, exact = (outcomes(cls, lambda scaler: getattr(scaler, method)(x)) for cls in (StandardScaler, Theirs))
    assert found == exact


@pytest.mark.parametrize(
    "weights",
    [[1.0], [[1.0, 2.0]], [1.0, np.nan], [0.0, np.inf], [0.0, 0.0], ["a", "b"], "text", {}],
    ids=str,
)
def test_refused_weights(weights):
    x = np.array([[1.0, 2.0], [4.0, 8.0]])
    with np.errstate(all="ignore"):  # scikit-learn before 1.9 takes weights of which none is positive
        found, exact = (
            outcomes(cls, lambda s: s.partial_fit(x, sample_weight=weights)) for cls in (StandardScaler, Theirs)
        )
    assert found[::2] == exact[::2]


def test_infinities_without_weight_are_refused():
    x = np.array([[1.0, 2.0], [np.inf, 8.0]])
    with pytest.raises(ValueError, match="Input X contains infinity"):
        StandardScaler().fit(x, sample_weight=[1, 0])


def test_negative_weights_are_scikit_learns(batches):
    weights = np.where(np.arange(50) == 3, -0.5, 2)
    found, exact = (cls().fit(batches[0], sample_weight=weights) for cls in (StandardScaler, Theirs))
    agree(found, exact, 0)


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_a_refused_call_in_place_changes_nothing(batches, method):
    scaler = StandardScaler(copy=False).fit(batches[0])
    batches[0][-1, -1] = np.inf
    before = batches[0].copy()
    with pytest.raises(ValueError, match="contains infinity"):
        getattr(scaler, method)(batches[0])
    np.testing.assert_array_equal(batches[0], before)


def test_assume_finite(alone, batches):
    scaler = StandardScaler().fit(batches[0])
    batches[0][3, 2] = np.inf
    with config_context(assume_finite=True):
        assert scaler.transform(batches[0])[3, 2] == np.inf


def test_parameters_are_checked(batches):
    for scaler in (StandardScaler(with_mean="no"), StandardScaler(with_std=2)):
        with pytest.raises(ValueError, match=r"The 'with_\w+' parameter of StandardScaler must be"):
            scaler.fit(batches[0])


@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csc_array, sparse.csr_matrix])
@pytest.mark.parametrize("std", [True, False])
def test_sparse_data_is_scikit_learns(rng, container, std):
    x = container(rng.normal(size=(30, 4)) * (rng.random((30, 4)) < 0.3))
    found, exact = (fitted(cls, [x, x[:9]], with_mean=False, with_std=std) for cls in (StandardScaler, Theirs))
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(found, name), getattr(exact, name))
    for method in ("transform", "inverse_transform"):
        results = [getattr(scaler, method)(x) for scaler in (found, exact)]
        assert type(results[0]) is type(results[1])
        np.testing.assert_array_equal(*[y.toarray() for y in results])
    if std:
        agree(found.partial_fit(x.toarray()), exact.partial_fit(x.toarray()))
        np.testing.assert_allclose(found.transform(x.toarray()), exact.transform(x.toarray()), rtol=1e-14)


def test_float16_is_scikit_learns(batches):
    x = batches[0].astype(np.float16)
    found, exact = (cls().fit(x) for cls in (StandardScaler, Theirs))
    agree(found, exact, 0)
    for method in ("transform", "inverse_transform"):
        results = [getattr(scaler, method)(x) for scaler in (found, exact)]
        assert results[0].dtype == np.float16
        np.testing.assert_array_equal(*results)


def test_statistics_that_are_missing(batches):
    """After parameters have changed, scikit-learn decides."""

    def call(scaler):
        scaler.set_params(with_mean=False, with_std=False).fit(batches[0])
        return scaler.set_params(with_mean=True, with_std=True).partial_fit(batches[0])

    found, exact = (outcomes(cls, call) for cls in (StandardScaler, Theirs))
    assert found == exact
    assert found[0][0] is TypeError


# ---- as an estimator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_nan", [False, True])
def test_pickles_both_ways(batches, with_nan):
    if with_nan:
        batches[0][0, 0] = np.nan
    found, exact = (cls(copy=False).fit(batches[0]) for cls in (StandardScaler, Theirs))
    copy = pickle.loads(pickle.dumps(found))
    assert type(copy) is StandardScaler
    agree(copy, found, 0)
    version = "_sklearn_version"  # which scikit-learn keeps for its own classes
    ours, theirs = StandardScaler(), Theirs()
    ours.__setstate__({name: value for name, value in exact.__getstate__().items() if name != version})
    theirs.__setstate__(found.__getstate__() | {version: sklearn.__version__})
    agree(ours.partial_fit(batches[2]), found.partial_fit(batches[2]))
    agree(theirs.partial_fit(batches[2]), exact.partial_fit(batches[2]))


def test_it_is_scikit_learns_class(batches):
    scaler = StandardScaler(with_std=False)
    assert isinstance(scaler, Theirs)
    assert scaler.get_params() == Theirs(with_std=False).get_params()
    copy = clone(scaler.fit(batches[0]))
    assert type(copy) is StandardScaler
    assert vars(copy) == vars(StandardScaler(with_std=False))
    assert repr(scaler) == "StandardScaler(with_std=False)"
    assert "StandardScaler" in scaler._repr_html_()


def test_weights_are_routed(batches):
    x, weights = batches[0], np.arange(50.0)
    with config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        pipeline = make_pipeline(scaler, StandardScaler().set_fit_request(sample_weight=False))
        pipeline.fit(x, sample_weight=weights)
    np.testing.assert_allclose(pipeline[0].mean_, np.average(x, axis=0, weights=weights))


def test_frames(rng):
    pd = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    frame = pd.DataFrame(rng.normal(3, 2, (9, 3)), columns=list("abc"), index=range(5, 14))
    found, exact = (cls().set_output(transform="pandas").fit(frame) for cls in (StandardScaler, Theirs))
    agree(found, exact)
    assert list(found.get_feature_names_out()) == list("abc")
    pd.testing.assert_frame_equal(found.transform(frame), exact.transform(frame))
    pd.testing.assert_frame_equal(found.fit_transform(frame), exact.fit_transform(frame))
    mixed = frame.assign(b=range(9))
    pd.testing.assert_frame_equal(found.transform(mixed), exact.transform(mixed))
    for x, message in ((frame[["a", "c", "b"]], "feature names should match"), (frame[["a"]], "feature names")):
        with pytest.raises(ValueError, match=message):
            found.transform(x)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        found.transform(frame.to_numpy())


def test_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import cbn; import cbn.sklearn"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 'ImportError: cbn.sklearn needs scikit-learn 1.6 or newer: pip install "cbn[sklearn]"' in done.stderr
