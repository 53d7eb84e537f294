"""cbn behind the interfaces of its hosts, compared with the hosts where they are installed, and with float64."""

import copy
import functools
import importlib.util
import pickle
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

import cbn

from . import peer

for package in ("sklearn", "matplotlib", "tqdm"):
    peer(package)

from examples import hosts  # noqa: E402
from examples.hosts import anemoi_, cases, fast_array_utils_, formulas, lerobot_, scanpy_  # noqa: E402
from examples.hosts.reading import readable  # noqa: E402
from examples.hosts.running_mean_std import RunningMeanStd  # noqa: E402

from ..test_examples import png_size  # noqa: E402

HARD = cases.normal(20_000, 5)  # float32 N(1000, 1), of which squares and long sums lose the variance


def host(module, name=None):
    """A module of a host, or what it has under the name; a skip if the host is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hosts' own dependencies
        found = pytest.importorskip(module, reason=f"{module} is not installed; .[hosts] has most hosts")
    return found if name is None else getattr(found, name)


def either(formula, *paths):
    """Parameters: the formula of a contract, and each host that keeps it."""
    return [pytest.param(lambda: formula, id="formula")] + [
        pytest.param(functools.partial(host, *path), id=path[0].split(".")[0]) for path in paths
    ]


def error(var, exact):
    return np.max(np.abs(np.asarray(var, np.float64) / exact - 1))


# ---- RunningMeanStd of gymnasium and stable-baselines3 -------------------------------------------------------------

RUNNING = either(
    formulas.RunningMeanStd,
    ("gymnasium.wrappers.utils", "RunningMeanStd"),
    ("stable_baselines3.common.running_mean_std", "RunningMeanStd"),
)


def batches(rng, shape, dtype):
    return [(rng.standard_normal((n, *shape)) * 3 + 20).astype(dtype) for n in (5, 1, 40, 8)]


def parts(rms):
    return rms.mean, rms.var, rms.count


@pytest.mark.parametrize("theirs", RUNNING)
@pytest.mark.parametrize("epsilon", [1e-4, 0.0, 3.0])
@pytest.mark.parametrize("shape", [(), (17,), (3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
def test_running_mean_std(rng, theirs, epsilon, shape, dtype):
    ours, same, exact = (cls(epsilon, shape) for cls in (RunningMeanStd, theirs(), formulas.RunningMeanStd))
    for rms in (ours, same):
        assert np.array_equal(rms.mean, np.zeros(shape))
        assert np.array_equal(rms.var, np.ones(shape))
    for x in batches(rng, shape, dtype):
        for rms in (ours, same):
            rms.update(x)
        exact.update(x.astype(np.float64))
    for found, expected, true in zip(parts(ours), parts(same), parts(exact), strict=True):
        assert np.shape(found) == np.shape(expected)
        np.testing.assert_allclose(found, true, rtol=1e-13)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("theirs", RUNNING)
def test_running_mean_std_keeps_digits(theirs):
    exact = cases.statistics(HARD).var
    ours, same = (cls(shape=(5,)) for cls in (RunningMeanStd, theirs()))
    for rms in (ours, same):
        rms.update(HARD)
    assert error(same.var, exact) > 1e-6
    assert error(ours.var, exact) < 1e-11


@pytest.mark.parametrize("theirs", RUNNING)
def test_running_mean_std_of_batches_without_an_axis(rng, theirs):
    """Their first axis is the batch's, and the statistics broadcast: stable-baselines3's own tests do it."""
    ours, same = (cls(shape=(3, 4)) for cls in (RunningMeanStd, theirs()))
    for rms in (ours, same):
        rms.update(np.arange(12.0).reshape(3, 4))
        rms.update_from_moments(2.0, 1.5, 7)
    for found, expected in zip(parts(ours), parts(same), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("theirs", RUNNING)
def test_running_mean_std_takes_over_the_hosts(rng, theirs):
    """Its pickles, other objects to combine with, and assigned attributes."""
    first, second = batches(rng, (4,), np.float64)[:2]
    same, ours = theirs()(shape=(4,)), RunningMeanStd(shape=(4,))
    same.update(first)
    loaded = RunningMeanStd.__new__(RunningMeanStd)
    loaded.__setstate__(vars(same).copy())
    ours.combine(same)
    for rms in (loaded, ours, same):
        rms.update(second)
    np.testing.assert_allclose(loaded.var, same.var, rtol=1e-13)
    assert loaded.count == same.count
    assert ours.count == same.count + 1e-4
    ours.mean, ours.var, ours.count = parts(same)
    for found, expected in zip(parts(ours), parts(same), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_running_mean_std_is_copied_and_pickled(rng):
    ours = RunningMeanStd(shape=(2, 3))
    ours.update(rng.standard_normal((5, 2, 3)))
    ours.update(np.full((1, 2, 3), np.nan))  # also what no new object could start with
    for other in (ours.copy(), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(map(functools.partial(np.array_equal, equal_nan=True), parts(other), parts(ours)))
        other.update(np.zeros((1, 2, 3)))
        assert other.count == ours.count + 1
    with pytest.raises(ValueError, match="input has shape"):
        ours.update(np.zeros((5, 3, 2)))


# ---- environments --------------------------------------------------------------------------------------------------


@pytest.fixture
def cart_poles():
    """Makes the same vector of environments again and again."""
    gymnasium = host("gymnasium")
    made = []

    def make():
        made.append(gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync"))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def played(envs, n_steps=60):
    first, _ = envs.reset(seed=1)
    actions = np.random.default_rng(2).integers(0, 2, (n_steps, 3))
    return np.array([first] + [envs.step(a)[0] for a in actions])


def test_gymnasiums_normalize_observation(cart_poles):
    theirs = host("gymnasium.wrappers.vector", "NormalizeObservation")
    from examples.hosts.gymnasium_ import NormalizeObservation

    ours, same = NormalizeObservation(cart_poles()), theirs(cart_poles())
    raw, found, expected = played(cart_poles()), played(ours), played(same)
    assert found.dtype == expected.dtype == np.float32
    assert ours.observation_space == same.observation_space
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    exact = cases.statistics(raw)
    np.testing.assert_allclose(ours.obs_rms.var, exact.var, rtol=1e-13)
    np.testing.assert_allclose(found[-1], exact.normalize(raw[-1].astype(np.float64), 1e-8), rtol=1e-6, atol=1e-6)

    ours.update_running_mean = False
    played(ours, 2)
    assert ours.obs_rms.count == exact.count
    with pytest.raises(host("gymnasium.error", "InvalidBound"), match="strictly positive"):
        NormalizeObservation(cart_poles(), 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
@pytest.mark.parametrize("shape", [(4,), (5, 6, 3)])
def test_gymnasiums_observations_of_other_spaces(rng, dtype, shape):
    gymnasium = host("gymnasium")
    theirs = host("gymnasium.wrappers.vector", "NormalizeObservation")
    from examples.hosts.gymnasium_ import NormalizeObservation

    class Still(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, shape, dtype)
        action_space = gymnasium.spaces.Discrete(2)

    wrappers = [wrap(gymnasium.vector.SyncVectorEnv([Still] * 6)) for wrap in (NormalizeObservation, theirs)]
    for x in (rng.random((7, 6, *shape)) * 255).astype(dtype):
        found, same = (wrapper.observations(x) for wrapper in wrappers)
        assert found.dtype == same.dtype == np.float32
        np.testing.assert_allclose(found, same, rtol=2e-5, atol=2e-5)


@pytest.fixture
def dummies():
    """(their class, ours, a maker of vectors of environments)."""
    vec_env = host("stable_baselines3.common.vec_env")
    gymnasium = host("gymnasium")
    from examples.hosts.stable_baselines3_ import VecNormalize

    def make(space=None):
        class Dictionary(gymnasium.Env):
            action_space = gymnasium.spaces.Discrete(2)

            def __init__(self):
                # Two, as VecNormalize replaces the spaces of images in the one that it gets
                self.observation_space, self.samples = copy.deepcopy(space), copy.deepcopy(space)
                self.samples.seed(3)

            def reset(self, *, seed=None, options=None):
                return self.samples.sample(), {}

            def step(self, action):
                return self.samples.sample(), 1.0 * action, False, False, {}

        envs = vec_env.DummyVecEnv([Dictionary if space else lambda: gymnasium.make("CartPole-v1")] * 2)
        envs.seed(1)
        return envs

    return vec_env.VecNormalize, VecNormalize, make


def stepped(envs, n_steps=60):
    found = [(envs.reset(), np.zeros(2, np.float32))]
    for action in np.random.default_rng(2).integers(0, 2, (n_steps, 2)):
        obs, reward, _, infos = envs.step(action)
        found.append((obs, reward))
        found += [(info["terminal_observation"], reward) for info in infos if "terminal_observation" in info]
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_obs": 0.5, "clip_reward": 1}, {"clip_obs": np.inf}, {"norm_obs": False}, {"norm_reward": False}],
    ids=str,
)
def test_stable_baselines3s_vec_normalize(dummies, options):
    theirs, ours, make = dummies
    envs, same = ours(make(), **options), theirs(make(), **options)
    for (obs, reward), (expected, expected_reward) in zip(stepped(envs), stepped(same), strict=True):
        assert obs.dtype == expected.dtype
        assert reward.dtype == expected_reward.dtype == np.float32
        np.testing.assert_allclose(obs, expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(reward, expected_reward, rtol=2e-5, atol=2e-5)
    obs, reward = envs.get_original_obs(), envs.get_original_reward()
    kept = obs.copy()
    envs.normalize_obs(obs)[...] = 7
    assert np.array_equal(obs, kept)
    np.testing.assert_allclose(envs.normalize_obs(obs[0]), same.normalize_obs(obs[0]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(envs.normalize_reward(reward[0]), same.normalize_reward(reward[0]), rtol=1e-5)
    if "clip_obs" not in options:
        np.testing.assert_allclose(envs.unnormalize_obs(envs.normalize_obs(obs)), obs, rtol=1e-4, atol=1e-5)
    envs.training = False
    before = envs.ret_rms.count
    stepped(envs, 2)
    assert envs.ret_rms.count == before


def test_stable_baselines3s_dictionaries(dummies):
    theirs, ours, make = dummies
    spaces = host("gymnasium.spaces")
    space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (8, 9, 3), np.uint8),
            "state": spaces.Box(900, 1100, (4,), np.float32),
            "number": spaces.Discrete(3),
        }
    )
    options = {"norm_obs_keys": ["image", "state"]}
    envs, same = ours(make(space), **options), theirs(make(space), **options)
    for (obs, _), (expected, _) in zip(stepped(envs, 20), stepped(same, 20), strict=True):
        assert obs.keys() == expected.keys()
        for key in obs:
            assert obs[key].dtype == expected[key].dtype
            np.testing.assert_allclose(obs[key], expected[key], rtol=2e-4, atol=2e-4)


def test_stable_baselines3s_files(dummies, tmp_path):
    _, ours, make = dummies
    envs = ours(make())
    stepped(envs)
    envs.save(tmp_path / "envs.pkl")
    loaded = ours.load(tmp_path / "envs.pkl", make())
    assert type(loaded) is ours
    assert all(map(np.array_equal, parts(loaded.obs_rms), parts(envs.obs_rms)))
    assert all(map(np.array_equal, parts(loaded.ret_rms), parts(envs.ret_rms)))


# ---- fast-array-utils and scanpy -----------------------------------------------------------------------------------

MEAN_VAR = either(formulas.mean_var, ("fast_array_utils.stats", "mean_var"))


@pytest.mark.parametrize("theirs", MEAN_VAR)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("shape", [(50,), (50, 7), (1, 7), (7, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_mean_var(rng, theirs, dtype, shape, order):
    x = np.asarray((rng.random(shape) * 20).astype(dtype), order=order)
    for axis in (None, 0, 1) if x.ndim == 2 else (None,):
        for correction in (0, 1):
            found, same = (f(x, axis=axis, correction=correction) for f in (fast_array_utils_.mean_var, theirs()))
            n = x.size if axis is None else x.shape[axis]
            exact = x.mean(axis, dtype=float), x.astype(float).var(axis, ddof=correction if n > 1 else 0)
            for a, b, true in zip(found, same, exact, strict=True):
                assert (np.shape(a), np.asarray(a).dtype) == (np.shape(b), np.float64)
                np.testing.assert_allclose(a, true, rtol=1e-14, atol=1e-14)
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theirs", MEAN_VAR)
def test_mean_var_keeps_digits(theirs):
    for x in (HARD, np.clip(HARD - 800, 0, 255).astype(np.uint8)):  # squares of 8 bits wrap around
        found, same = (f(x, axis=0)[1] for f in (fast_array_utils_.mean_var, theirs()))
        exact = x.var(axis=0, dtype=np.float64)
        assert error(same, exact) > 1e-5
        assert error(found, exact) < 1e-12


@pytest.mark.parametrize("theirs", MEAN_VAR)
def test_mean_var_of_nan(theirs):
    x = np.array([[1.0, np.nan], [2.0, 5.0]])
    for found, same in zip(fast_array_utils_.mean_var(x, axis=0), theirs()(x, axis=0), strict=True):
        np.testing.assert_allclose(found, same)


SCALE = either(formulas.scale, ("scanpy.preprocessing._scale", "scale_array"))


def scaled_by(theirs, x, **options):
    scale = theirs()
    return scale(x, **options, **({} if scale is formulas.scale else {"return_mean_std": True}))


@pytest.mark.parametrize("theirs", SCALE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
@pytest.mark.parametrize("zero_center", [True, False])
@pytest.mark.parametrize("max_value", [None, 1.5])
@pytest.mark.parametrize("copy", [True, False])
def test_scale(rng, theirs, dtype, zero_center, max_value, copy):
    x = (rng.standard_normal((60, 9)) * 4).astype(dtype)
    x[:, 3], x[:, 4] = 0, 2  # genes that do not vary
    options = {"zero_center": zero_center, "max_value": max_value, "copy": copy}
    a, b = x.copy(), x.copy()
    found, same = scanpy_.scale(a, **options), scaled_by(theirs, b, **options)
    for ours, theirs in zip(found, same, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    in_place = not copy and np.dtype(dtype).kind == "f"
    assert (found[0] is a) == in_place
    assert np.array_equal(a, x) != in_place
    wide = x.astype(np.float64)
    std = wide.std(axis=0, ddof=1)
    exact = (wide - wide.mean(axis=0) * zero_center) / np.where(std == 0, 1, std)
    if max_value:
        exact = exact.clip(-max_value if zero_center else None, max_value)
    np.testing.assert_allclose(found[0], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theirs", SCALE)
def test_scale_keeps_genes_that_do_not_vary(theirs):
    """E[x²] - E[x]² of equal values is not always 0, and its root makes large numbers of rounding errors."""
    x = np.full((1000, 3), [0.1, 1000.7, 3e5], np.float32)
    found, mean, std = scanpy_.scale(x, copy=True)
    assert not found.any()
    assert np.array_equal(mean, x[0])
    assert np.array_equal(std, np.ones(3))
    with np.errstate(invalid="ignore"):
        assert not np.array_equal(scaled_by(theirs, x, copy=True)[2], np.ones(3))


# ---- lerobot and openpi --------------------------------------------------------------------------------------------


class Stats:
    """lerobot's class with the methods that are compared; images as float64, which all its versions square right."""

    def __init__(self):
        self.stats = host("lerobot.datasets.compute_stats", "RunningQuantileStats")()

    def update(self, batch):
        self.stats.update(batch.astype(np.float64) if batch.dtype.kind in "iu" else batch)

    def get_statistics(self):
        return self.stats.get_statistics()


LEROBOT = [
    pytest.param(lambda: formulas.RunningStats, id="formula"),
    pytest.param(lambda: host("lerobot") and Stats, id="lerobot"),
]


@pytest.mark.parametrize("theirs", LEROBOT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
@pytest.mark.parametrize("leading", [(6,), (5, 4), (2, 3, 8)])
def test_running_stats(rng, theirs, dtype, leading):
    parts = [(rng.random((*leading, 3)) * 255).astype(dtype) for _ in range(4)]
    ours, same = lerobot_.RunningStats(), theirs()()
    for x in parts:
        ours.update(x)
        same.update(x)
    found, expected = ours.get_statistics(), same.get_statistics()
    whole = np.concatenate(parts).reshape(-1, 3).astype(np.float64)
    exact = {
        "min": whole.min(0),
        "max": whole.max(0),
        "mean": whole.mean(0),
        "std": whole.std(0),
        "count": [len(whole)],
    }
    assert found.keys() == exact.keys()
    for name in found:
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-14)
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize("theirs", LEROBOT)
def test_running_stats_keep_digits(theirs):
    ours, same = lerobot_.RunningStats(), theirs()()
    for x in np.split(HARD, 20):
        ours.update(x)
        same.update(x)
    exact = HARD.var(axis=0, dtype=np.float64)
    assert error(same.get_statistics()["std"] ** 2, exact) > 0.01
    assert error(ours.get_statistics()["std"] ** 2, exact) < 1e-12


def test_running_stats_of_one_vector():
    stats = lerobot_.RunningStats()
    for _ in range(2):
        with pytest.raises(ValueError, match="less than 2 vectors"):
            stats.get_statistics()
        stats.update(np.zeros((1, 3)))
    assert stats.get_statistics()["count"] == [2]


def test_feature_stats_of_images(rng):
    x = rng.integers(0, 256, (4, 3, 11, 13), np.uint8)
    found, same = (module.get_feature_stats(x, (0, 2, 3), True) for module in (lerobot_, formulas))
    assert found["count"] == [4]
    assert np.array_equal(found["std"], np.sqrt(cbn.moments(x).var()).reshape(1, 3, 1, 1))
    for name, a in found.items():
        assert a.shape == same[name].shape
        np.testing.assert_allclose(a, same[name], rtol=1e-4)


@pytest.mark.parametrize("shape", [(20, 3, 5, 4), (20,), (20, 6), (1, 6), (7, 5, 6)])
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_lerobots_feature_stats(rng, shape, keepdims, dtype):
    theirs = host("lerobot.datasets.compute_stats", "get_feature_stats")
    x = (rng.random(shape) * 100).astype(dtype)
    axis = (0, 2, 3) if len(shape) == 4 else 0
    found, same = lerobot_.get_feature_stats(x, axis, keepdims), theirs(x, axis, keepdims)
    assert found.keys() == {name for name in same if not name.startswith("q")}
    for name, a in found.items():
        assert a.shape == same[name].shape, name
        np.testing.assert_allclose(a, same[name], rtol=1e-4)


def test_feature_stats_of_other_axes():
    with pytest.raises(ValueError, match="Unsupported axis"):
        lerobot_.get_feature_stats(np.zeros((3, 4)), (1,), False)


# ---- anemoi-datasets -----------------------------------------------------------------------------------------------

ANEMOI = either(formulas.Collector, ("anemoi.datasets.create.statistics", "_Collector"))


def fields(rng, shape, dtype):
    x = (rng.standard_normal(shape) * 3 + 280).astype(dtype)
    x[rng.random(shape) < 0.2] = np.nan
    x[:, 1] = np.nan  # nothing is seen of this one
    x[:, 2] = 5
    return x


@pytest.mark.parametrize("theirs", ANEMOI)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(30, 4), (6, 4, 1, 50), (3, 4, 2, 5, 7)])
def test_collector(rng, theirs, dtype, shape):
    names = list("abcd")
    ours, same = anemoi_.Collector(names), theirs()(names)
    parts = [fields(rng, shape, dtype) for _ in range(3)] + [np.empty((0, *shape[1:]), dtype)]
    for x in parts:
        ours.update(x)
        same.update(x)
    found, expected = ours.statistics(), same.statistics()
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)
    whole = np.concatenate(parts).astype(np.float64)[:, [0, 2, 3]].swapaxes(0, 1).reshape(3, -1)
    np.testing.assert_allclose(found["stdev"][[0, 2, 3]], np.nanstd(whole, axis=1), rtol=1e-13)


def test_collectors_are_pickled_and_merged(rng):
    x = fields(rng, (20, 4, 1, 9), np.float32)
    whole, *halves = (anemoi_.Collector(list("abcd")) for _ in range(3))
    whole.update(x)
    for collector, part in zip(halves, (x[:7], x[7:]), strict=True):
        collector.update(part)
    first, second = (pickle.loads(pickle.dumps(collector)) for collector in halves)
    before = first.statistics()
    merged = first.merge(second).statistics()
    for name, a in whole.statistics().items():
        np.testing.assert_allclose(merged[name], a, rtol=1e-13)
        np.testing.assert_array_equal(first.statistics()[name], before[name])
    with pytest.raises(ValueError, match="different column names"):
        first.merge(anemoi_.Collector(list("abc")))


def test_anemois_statistics_with_our_collector(rng):
    StatisticsCollector = host("anemoi.datasets.create.statistics", "StatisticsCollector")
    names, x = list("abcd"), fields(rng, (20, 4, 1, 9), np.float32)
    collectors = [
        StatisticsCollector(names, True, _collector=collector) for collector in (anemoi_.Collector(names), None)
    ]
    for collector in collectors:
        collector.collect(x, np.arange(20))
    found, same = (collector.merge(copy.deepcopy(collector)).statistics() for collector in collectors)
    for name in found:
        np.testing.assert_allclose(found[name], same[name], rtol=1e-12)


# ---- onnx ----------------------------------------------------------------------------------------------------------


def evaluated(model, inputs, *new_ops):
    evaluator = host("onnx.reference", "ReferenceEvaluator")
    return evaluator(model, new_ops=list(new_ops)).run(None, inputs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(20, 3), (4, 3, 6), (4, 3, 6, 5), (2, 3, 4, 3, 5), (1, 3)])
@pytest.mark.parametrize("attributes", [{}, {"epsilon": 0.01, "momentum": 0.25}], ids=["defaults", "given"])
def test_batch_normalization(rng, training, dtype, shape, attributes):
    host("onnx")
    from examples.hosts.onnx_ import BatchNormalization

    model = cases.batch_normalization(training, **attributes)
    values = [rng.standard_normal(shape) + 2, rng.random(3) + 0.5, *rng.standard_normal((2, 3)), rng.random(3) + 0.5]
    inputs = {name: a.astype(dtype) for name, a in zip("xsbmv", values, strict=True)}
    x, scale, bias, mean, var = (a.astype(np.float64) for a in inputs.values())
    eps, momentum = np.float32(attributes.get("epsilon", 1e-5)), np.float32(attributes.get("momentum", 0.9))
    exact = []
    if training:
        axes = (0, *range(2, x.ndim))
        own = x.mean(axes), x.var(axes)
        exact = [momentum * a + (1 - momentum) * b for a, b in zip((mean, var), own, strict=True)]
        mean, var = own
    exact.insert(0, cbn.reference.normalize(x, mean, var, scale, bias, float(eps)))

    found, same = evaluated(model, inputs, BatchNormalization), evaluated(model, inputs)
    limit = {np.float16: 1e-2, np.float32: 1e-5, np.float64: 1e-13}[dtype]
    for a, b, true in zip(found, same, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=limit, atol=limit)
        np.testing.assert_allclose(a, true, rtol=max(2 * np.finfo(dtype).eps, 1e-7), atol=np.finfo(dtype).eps * 4)


def test_batch_normalization_keeps_digits():
    host("onnx")
    from examples.hosts.onnx_ import BatchNormalization

    x = HARD.reshape(1000, 5, 20)
    ones = np.ones(5, np.float32)
    inputs = dict(zip("xsbmv", (x, ones, 0 * ones, 0 * ones, 0 * ones), strict=True))
    model = cases.batch_normalization(True, momentum=0.0)
    exact = x.var(axis=(0, 2), dtype=np.float64)
    assert (
        error(evaluated(model, inputs, BatchNormalization)[2], exact) < 1e-7 < error(evaluated(model, inputs)[2], exact)
    )


# ---- the table -----------------------------------------------------------------------------------------------------


def test_readable():
    for dtype in (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float16, np.float32, np.float64):
        x = np.zeros(3, dtype)
        assert readable(x) is x
    for dtype in (np.int64, np.uint32, np.uint64):
        assert readable(np.ones(3, dtype)).dtype == np.float64


@pytest.mark.parametrize("installed", [True, False])
def test_the_table(installed, monkeypatch, tmp_path, capsys):
    if not installed:
        monkeypatch.setattr(cases, "attribute", lambda module, name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the hosts warn of is theirs
        hosts.main(["--quick", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    left_out = set(re.findall("left out: (.*), as", text))  # a line a host, which may have several cases
    assert len(rows) == sum(make.__name__.replace("_", " ") not in left_out for make, _, _ in cases.CASES)
    for *_, ours, _, _, _ in rows:
        assert float(ours) < 1e-6
    assert (tmp_path / "hosts.md").read_text(encoding="utf-8") == text.rstrip("\n") + "\n"
    assert png_size(tmp_path / "hosts.png")[0] > 1000


def test_a_missing_host_is_left_out_or_its_formula(monkeypatch):
    monkeypatch.setattr(cases, "attribute", lambda module, name: None)
    assert cases.gymnasium_update(2).host == "gymnasium, its formula"
    assert cases.gymnasium_update(2).theirs is formulas.RunningMeanStd
    with pytest.raises(cases.LeftOut, match="gymnasium cannot be imported"):
        cases.gymnasium_observations(2)


def test_the_table_runs_by_itself(tmp_path):
    script = importlib.util.find_spec("examples.hosts.__main__").origin
    ran = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--quick" in ran.stdout
