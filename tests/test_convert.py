"""Converters, as far as they need no other package: refusals, mappings of arrays, what is missing and how to get it."""

import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cbn
from cbn.convert import common


def variables(**more):
    """Of a Linen model with one batch norm."""
    return {
        "params": {"bn": {"scale": np.full(3, 2.0, np.float32), "bias": np.ones(3, np.float32)}, **more},
        "batch_stats": {"bn": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}},
    }


# ---- packages that are missing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "package"),
    [(lambda: cbn.from_onnx(b""), "onnx"), (lambda: cbn.to_torch_state(cbn.BatchNorm1d(3)), "torch")],
)
def test_a_missing_package_says_which_extra_to_install(monkeypatch, call, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs the {package} package: pip install "cbn\[{package}\]"'):
        call()


def test_the_extras_that_errors_name_exist():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("onnx", "torch"):
        assert re.search(rf'^{name} = \["{name}>=', text, re.M), name


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (cbn.from_torch, r"a batch norm of torch\.nn"),
        (cbn.from_keras, r"keras\.layers\.BatchNormalization"),
        (cbn.from_mlx, r"mlx\.nn\.BatchNorm"),
        (lambda a: cbn.from_equinox(a, None), r"equinox\.nn\.BatchNorm"),
    ],
)
@pytest.mark.parametrize("a", [3, None, "bn", np.ones(3), cbn.BatchNorm1d(3)], ids=lambda a: type(a).__name__)
def test_other_objects_are_named(convert, expected, a):
    with pytest.raises(TypeError, match=rf"expected {expected}, not \w+\.(\w+\.)*{type(a).__name__}"):
        convert(a)


def test_converters_are_all_exported():
    from cbn import convert

    assert set(convert.__all__) <= set(cbn.__all__)
    assert "torch" not in vars(cbn)


# ---- a layer from arrays ---------------------------------------------------------------------------------------------


def test_arrays_that_do_not_fit_are_blamed_one_by_one():
    good = {name: np.ones(3, np.float32) for name in common.ARRAYS}
    for name in common.ARRAYS:
        with pytest.raises(ValueError, match=rf"^{name} has shape \(4,\); expected \(3,\)$"):
            common.layer_of(cbn.BatchNorm, {**good, name: np.ones(4, np.float32)}, eps=0, momentum=0.1)
        with pytest.raises(TypeError, match=f"^{name} has dtype int64; expected a floating type"):
            common.layer_of(cbn.BatchNorm, {**good, name: np.ones(3, np.int64)}, eps=0, momentum=0.1)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ">f2", ">f4"])
def test_narrow_parameters_become_float32(dtype):
    arrays = {name: np.arange(1, 4).astype(dtype) for name in common.ARRAYS}
    bn = common.layer_of(cbn.BatchNorm, arrays, eps=0, momentum=0.1)
    assert bn.dtype == np.float32
    np.testing.assert_array_equal(bn.running_var, [1, 2, 3])


def test_one_statistic_without_the_other_stays_so():
    bn = common.layer_of(cbn.BatchNorm, {"running_mean": np.zeros(3, np.float32)}, eps=0, momentum=0.1)
    assert (bn.running_var, bn.weight, bn.bias) == (None, None, None)
    with pytest.raises(ValueError, match="running_var must be defined in evaluation mode"):
        bn(np.ones((2, 3), np.float32))


# ---- Flax ------------------------------------------------------------------------------------------------------------


def test_flax_parameters_under_another_path():
    other = variables()
    other["params"] = {"wrapped": {"norm": other["params"]["bn"]}}
    with pytest.raises(ValueError, match=r"no parameters 'bn'; there are 'wrapped/norm' \(params= takes their"):
        cbn.from_flax(other)
    np.testing.assert_array_equal(cbn.from_flax(other, params="wrapped/norm").weight, [2, 2, 2])
    with pytest.raises(ValueError, match=r"there are no parameters 'norm'; there are 'wrapped/norm'"):
        cbn.from_flax(other, params="norm")


def test_flax_modules_without_parameters_are_named_as_such():
    bare = variables()
    del bare["params"]
    with pytest.raises(ValueError, match=r"there are none .*pass use_scale=False, use_bias=False"):
        cbn.from_flax(bare)
    assert cbn.from_flax(bare, use_scale=False, use_bias=False).weight is None
    with pytest.raises(ValueError, match="use_bias is False, but 'bn' has a bias"):
        cbn.from_flax(variables(), use_bias=False)
    with pytest.raises(ValueError, match="use_scale is True, but 'bn' has no scale"):
        cbn.from_flax(bare, use_scale=True)


def test_flax_modules_that_are_others():
    for tree, key in (("params", "kernel"), ("batch_stats", "steps")):
        other = variables()
        other[tree]["bn"][key] = np.ones(3, np.float32)
        with pytest.raises(ValueError, match=f"'bn' has {key}, so it is no BatchNorm of Flax"):
            cbn.from_flax(other)
    stacked = {tree: {"bn": {k: np.stack([a, a]) for k, a in node["bn"].items()}} for tree, node in variables().items()}
    with pytest.raises(ValueError, match=r"scale has shape \(2, 3\); expected one value for each channel: \(C,\)"):
        cbn.from_flax(stacked)
    with pytest.raises(TypeError, match=r"variables must be a mapping .*, not builtins\.int"):
        cbn.from_flax(3)
    with pytest.raises(ValueError, match="there is no batch norm in the variables"):
        cbn.from_flax({"params": {}})
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\] \(the weight of the old.*, but got 1\.5"):
        cbn.from_flax(variables(), momentum=1.5)


def test_flax_wrong_statistics_are_blamed():
    wrong = variables()
    wrong["batch_stats"]["bn"]["mean"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"^mean has shape \(4,\); expected \(3,\)$"):
        cbn.from_flax(wrong)


# ---- Haiku -----------------------------------------------------------------------------------------------------------


def haiku(shape=(1, 3), counter=5000):
    ema = {"counter": counter, "hidden": np.ones(shape, np.float32), "average": np.ones(shape, np.float32)}
    params = {"bn": {"scale": np.full(shape, 2, np.float32), "offset": np.zeros(shape, np.float32)}}
    return params, {"bn/~/mean_ema": ema, "bn/~/var_ema": ema}


def test_haiku_axes():
    assert cbn.from_haiku(*haiku((1, 1, 1, 3)), decay_rate=0.9).channel_axis == -1
    assert cbn.from_haiku(*haiku((1, 3, 1, 1)), decay_rate=0.9, data_format="channels_first").channel_axis == 1
    with pytest.raises(ValueError, match=r"scale has shape \(1, 3, 1, 1\); with 'channels_last' only axis -1 may be"):
        cbn.from_haiku(*haiku((1, 3, 1, 1)), decay_rate=0.9)
    with pytest.raises(
        ValueError, match=r"data_format must be one of 'N\.\.\.C', 'NC\.\.\.', 'channels_first', 'channels_l"
    ):
        cbn.from_haiku(*haiku(), decay_rate=0.9, data_format="NHWC")


def test_haiku_refuses():
    params, state = haiku()
    with pytest.raises(TypeError, match="params must be a mapping of module names to mappings, not int"):
        cbn.from_haiku(3, state, decay_rate=0.9)
    with pytest.raises(ValueError, match="there is no batch norm 'other'; there are 'bn'"):
        cbn.from_haiku(params, state, decay_rate=0.9, name="other")
    with pytest.raises(ValueError, match=r"decay_rate must be in \[0, 1\] .*but got 2"):
        cbn.from_haiku(params, state, decay_rate=2)
    with pytest.raises(ValueError, match=r"no parameters 'bn'; there are 'renamed'\. .*create_scale=False, create_off"):
        cbn.from_haiku({"renamed": params["bn"]}, state, decay_rate=0.9)


# ---- Keras 2, by a stand-in ------------------------------------------------------------------------------------------


class BatchNormalization:
    """What from_keras reads of a layer of Keras 2."""

    class Variable:
        def __init__(self, value):
            self.value = np.full(3, value, np.float32)

        def numpy(self):
            return self.value

    axis, epsilon, momentum, built, trainable, scale, center = [3], 1e-3, 0.99, True, True, True, True
    gamma, beta, moving_mean, moving_variance = map(Variable, (2, 1, 0, 3))

    def call(self, inputs):
        raise NotImplementedError


BatchNormalization.__module__ = BatchNormalization.call.__module__ = "tf_keras.src.layers.normalization"


def keras_2(**attributes):
    layer = BatchNormalization()
    vars(layer).update(attributes)
    return layer


def test_the_fused_kernel_of_keras_2_tracks_the_unbiased_variance(rng):
    x = rng.normal(size=(2, 2, 1, 3)).astype(np.float32)
    found = {}
    for fused in (True, False, None):
        bn = cbn.from_keras(keras_2(fused=fused)).train()
        bn(x)
        found[fused] = bn.running_var
    batch = x.reshape(-1, 3).var(axis=0)
    np.testing.assert_allclose(found[True], 0.99 * 3 + 0.01 * batch * 4 / 3, rtol=1e-6)
    for fused in (False, None):
        np.testing.assert_allclose(found[fused], 0.99 * 3 + 0.01 * batch, rtol=1e-6)
    bn = cbn.from_keras(keras_2(fused=True), running_var="biased").train()
    bn(x)
    np.testing.assert_array_equal(bn.running_var, found[False])


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"renorm": True}, r"batch renormalization \(renorm=True\), which cbn does not do"),
        ({"virtual_batch_size": 2}, r"by parts of a batch \(virtual_batch_size\), which cbn does not do"),
        ({"synchronized": True}, r"from all replicas \(synchronized\), which cbn does not do"),
        ({"adjustment": len}, "has an adjustment, which may change its values"),
        ({"axis": [1, 2]}, r"normalizes over the axes \[1, 2\]; expected one"),
    ],
)
def test_keras_2_options(attributes, words):
    with pytest.raises(ValueError, match=words):
        cbn.from_keras(keras_2(**attributes))
