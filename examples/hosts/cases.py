"""What the table of `examples.hosts` runs: for each host one call, of its own code and of cbn behind its interface."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from examples.hosts import anemoi_, fast_array_utils_, formulas, lerobot_, running_mean_std, scanpy_


class Case(NamedTuple):
    """A host's operation. ``use(implementation)`` returns the call to time, and the result that has an error."""

    host: str
    what: str
    theirs: Any
    ours: Any
    use: Callable[[Any], tuple[Callable[[], Any], Any]]
    exact: Any  # what the result is in float64: a variance, or values with variance 1
    is_variance: bool = True

    def error(self, result):
        """Largest relative error of a variance, or largest error of values."""
        error = np.abs(np.asarray(result, np.float64) - self.exact)
        return float(np.max(error / self.exact if self.is_variance else error))


class LeftOut(Exception):  # noqa: N818  a case without its package is no error
    """Why a case does not run."""


def attribute(module, name):
    """An attribute of a module, None if that cannot be imported. Hosts warn of their own dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            return None


def host(package, module, name, formula=None):
    """(title with the version, attribute), or the formula, and the title says so."""
    found = attribute(module, name)
    if found is not None:
        return f"{package} {importlib.metadata.version(package)}", found
    if formula is None:
        raise LeftOut(f"{package} cannot be imported")
    return f"{package}, its formula", formula


def normal(*shape):
    """float32 N(1000, 1), of which E[x²] - E[x]² has no digits left in float32."""
    return np.random.default_rng(0).normal(1000, 1, shape).astype(np.float32)


def exactly(x, ddof=0):
    """(mean, variance) of every channel, axis 1, in float64: of runs, whose sums numpy makes pairwise."""
    runs = np.ascontiguousarray(x.swapaxes(0, 1), np.float64).reshape(x.shape[1], -1)
    return np.nanmean(runs, axis=1), np.nanvar(runs, axis=1, ddof=ddof)


def statistics(x):
    """RunningMeanStd of all observations in float64."""
    observations = x.reshape(-1, x.shape[-1])
    exact = formulas.RunningMeanStd(shape=x.shape[-1:])
    exact.update_from_moments(*exactly(observations), len(observations))
    return exact


def still(n_features):
    """An environment that has spaces and does nothing."""
    import gymnasium

    class Still(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (n_features,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

    return Still()


def gymnasium_update(n):
    title, theirs = host("gymnasium", "gymnasium.wrappers.utils", "RunningMeanStd", formulas.RunningMeanStd)
    x = normal(n, 8, 17)

    def use(implementation):
        rms = implementation(shape=(17,), dtype=np.float32)  # as NormalizeObservation makes it
        for batch in x:
            rms.update(batch)
        return lambda: rms.update(x[0]), rms.var

    ours = running_mean_std.RunningMeanStd
    return Case(title, f"update (8, 17), {n:,} times", theirs, ours, use, statistics(x).var)


def gymnasium_observations(n):
    title, theirs = host("gymnasium", "gymnasium.wrappers.vector", "NormalizeObservation")
    from gymnasium.vector import SyncVectorEnv

    from examples.hosts.gymnasium_ import NormalizeObservation

    x = normal(n, 8, 17)

    def use(implementation):
        envs = implementation(SyncVectorEnv([lambda: still(17)] * 8))
        for batch in x:
            y = envs.observations(batch)
        return lambda: envs.observations(x[0]), y

    exact = statistics(x).normalize(x[-1].astype(np.float64), 1e-8)
    return Case(title, "observations (8, 17)", theirs, NormalizeObservation, use, exact, False)


def stable_baselines3_update(n):
    module = "stable_baselines3.common.running_mean_std"
    title, theirs = host("stable-baselines3", module, "RunningMeanStd", formulas.RunningMeanStd)
    x = normal(n, 17)

    def use(implementation):
        rms = implementation(shape=(17,))
        rms.update(x)
        return lambda: rms.update(x), rms.var

    return Case(title, f"update ({n:,}, 17)", theirs, running_mean_std.RunningMeanStd, use, statistics(x).var)


def stable_baselines3_observations():
    title, theirs = host("stable-baselines3", "stable_baselines3.common.vec_env", "VecNormalize")
    from stable_baselines3.common.vec_env import DummyVecEnv

    from examples.hosts.stable_baselines3_ import VecNormalize

    x = normal(64, 376)

    def use(implementation):
        envs = implementation(DummyVecEnv([lambda: still(376)]))
        envs.obs_rms.update(x)
        return lambda: envs.normalize_obs(x), envs.normalize_obs(x)

    exact = statistics(x).normalize(x.astype(np.float64), 1e-8, 10)
    return Case(title, "normalize_obs (64, 376)", theirs, VecNormalize, use, exact, False)


def fast_array_utils(n):
    title, theirs = host("fast-array-utils", "fast_array_utils.stats", "mean_var", formulas.mean_var)
    x = normal(n, 64)

    def use(mean_var):
        return lambda: mean_var(x, axis=0), mean_var(x, axis=0)[1]

    return Case(title, f"mean_var ({n:,}, 64)", theirs, fast_array_utils_.mean_var, use, exactly(x)[1])


def scanpy(n):
    title, theirs = host("scanpy", "scanpy.preprocessing._scale", "scale_array", formulas.scale)
    if theirs is not formulas.scale:
        theirs = functools.partial(theirs, return_mean_std=True)
    x = normal(n, 500)

    def use(scale):
        return lambda: scale(x, max_value=10, copy=True), scale(x, copy=True)[2] ** 2

    exact = exactly(x, ddof=1)[1]
    return Case(title, f"scale ({n:,}, 500), max_value", theirs, scanpy_.scale, use, exact)


def scikit_learn(n):
    title, theirs = host("scikit-learn", "sklearn.preprocessing", "StandardScaler")
    ours = attribute("cbn.sklearn", "StandardScaler")
    if ours is None:
        raise LeftOut("cbn.sklearn cannot be imported")
    x = normal(n, 64)

    def use(implementation):
        return lambda: implementation().fit(x), implementation().fit(x).var_

    return Case(title, f"StandardScaler.fit ({n:,}, 64)", theirs, ours, use, exactly(x)[1])


def lerobot(n):
    x = np.random.default_rng(0).normal(250, 2, (n, 3, 96, 96)).round().clip(0, 255).astype(np.uint8)

    def use(get_feature_stats):
        def call():
            return get_feature_stats(x, (0, 2, 3), True)

        return call, call()["std"].ravel() ** 2

    exact = exactly(x)[1]
    what = f"get_feature_stats ({n}, 3, 96, 96), uint8 of 250 ± 2"
    return Case("lerobot, its formula", what, formulas.get_feature_stats, lerobot_.get_feature_stats, use, exact)


def openpi(n):
    x = normal(n, 16, 32)

    def use(implementation):
        stats = implementation()
        for batch in x:
            stats.update(batch)
        return lambda: stats.update(x[0]), stats.get_statistics()["std"] ** 2

    what = f"update (16, 32), {n:,} times"
    exact = exactly(x.reshape(-1, 32))[1]
    return Case("openpi, its formula", what, formulas.RunningStats, lerobot_.RunningStats, use, exact)


def anemoi(n):
    title, theirs = host("anemoi-datasets", "anemoi.datasets.create.statistics", "_Collector", formulas.Collector)
    x = normal(n, 40, 1, 500)
    x[np.random.default_rng(1).random(x.shape) < 0.05] = np.nan

    def use(implementation):
        collector = implementation([str(c) for c in range(40)])
        collector.update(x)
        return lambda: collector.update(x), collector.statistics()["stdev"] ** 2

    exact = exactly(x)[1]
    return Case(title, f"update ({n}, 40, 1, 500), 5 % NaN", theirs, anemoi_.Collector, use, exact)


def batch_normalization(training, **attributes):
    """An ONNX model of one node."""
    from onnx import TensorProto, helper

    names = list("xsbmv"), ["y", "running_mean", "running_var"][: 3 if training else 1]
    node = helper.make_node("BatchNormalization", *names, training_mode=int(training), **attributes)
    infos = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in side] for side in names]
    return helper.make_model(helper.make_graph([node], "one", *infos), opset_imports=[helper.make_opsetid("", 15)])


def onnx(n, training):
    title, evaluator = host("onnx", "onnx.reference", "ReferenceEvaluator")
    from examples.hosts.onnx_ import BatchNormalization

    x = normal(n, 64, 28, 28)
    one = np.ones(64, np.float32)
    inputs = {"x": x, "s": one, "b": 0 * one, "m": 1000 * one, "v": one}

    def use(new_ops):
        session = evaluator(batch_normalization(training), new_ops=new_ops)
        return lambda: session.run(None, inputs), session.run(None, inputs)[0]

    mean, var = exactly(x) if training else (1000.0, 1.0)
    exact = (x - np.reshape(mean, (-1, 1, 1))) / np.sqrt(np.reshape(var, (-1, 1, 1)) + 1e-5)
    what = f"BatchNormalization ({n}, 64, 28, 28), {'training' if training else 'evaluation'}"
    return Case(title, what, [], [BatchNormalization], use, exact, False)


def dask_ml(n):
    title, theirs = host("dask-ml", "dask_ml.preprocessing", "StandardScaler")
    import dask.array as da

    from examples.hosts.dask_ml_ import StandardScaler

    x = normal(n, 64)
    lazy = da.from_array(x, chunks=(n // 16, 64))

    def use(scaler):
        return lambda: scaler().fit(lazy), scaler().fit(lazy).var_

    return Case(title, f"fit ({n:,}, 64), 16 chunks", theirs, StandardScaler, use, exactly(x)[1])


# With the sizes of the table, and those of --quick
CASES = [
    (gymnasium_update, (2000,), (20,)),
    (gymnasium_observations, (2000,), (20,)),
    (stable_baselines3_update, (100_000,), (1000,)),
    (stable_baselines3_observations, (), ()),
    (fast_array_utils, (100_000,), (1000,)),
    (scanpy, (10_000,), (100,)),
    (scikit_learn, (100_000,), (1000,)),
    (dask_ml, (800_000,), (1600,)),
    (lerobot, (32,), (2,)),
    (openpi, (2000,), (20,)),
    (anemoi, (100,), (2,)),
    (onnx, (16, False), (2, False)),
    (onnx, (16, True), (2, True)),
]
