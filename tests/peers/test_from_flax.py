"""Layers from Flax, against the modules that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

jax = peer("jax")
linen = peer("flax.linen")
nnx = peer("flax.nnx")


def test_from_flax(rng):
    linen = peer("flax.linen")
    jax = peer("jax")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return linen.BatchNorm(use_running_average=not train, epsilon=0.1, use_bias=False)(x)

    x = rng.normal(1, 2, size=(6, 4, 3)).astype(np.float32)
    model = Model()
    variables = model.init(jax.random.key(0), x, train=False)
    y, variables_after = model.apply(variables, x, train=True, mutable=["batch_stats"])
    first = cbn.from_flax(variables, name="BatchNorm_0", momentum=0.9)
    second = cbn.from_flax(variables, name="BatchNorm_1", epsilon=0.1)
    assert (first.momentum, second.momentum, second.bias) == (0.1, 0.01, None)
    np.testing.assert_allclose(second.train()(first.train()(x)), np.asarray(y), atol=2e-5)
    for bn, name in ((first, "BatchNorm_0"), (second, "BatchNorm_1")):
        after = variables_after["batch_stats"][name]
        np.testing.assert_allclose(bn.running_mean, np.asarray(after["mean"]), atol=1e-5)
        np.testing.assert_allclose(bn.running_var, np.asarray(after["var"]), rtol=1e-4)
    y = model.apply({**variables, **variables_after}, x, train=False)
    np.testing.assert_allclose(second.eval()(first.eval()(x)), np.asarray(y), atol=2e-5)


class Model(nnx.Module):
    def __init__(self):
        self.first = nnx.BatchNorm(3, momentum=0.9, epsilon=0.01, rngs=nnx.Rngs(0))
        self.rest = nnx.List([nnx.BatchNorm(3, use_bias=False, rngs=nnx.Rngs(0))])


def filled(rng, module):
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable[...] = jax.numpy.asarray(rng.uniform(0.5, 2, variable.shape), variable.dtype)
    return module


def same(module, bn, rng, x):
    """y in both modes, and the running statistics after a training step."""
    for training in (True, False):
        y = np.asarray(module(x, use_running_average=not training).astype(np.float32))
        np.testing.assert_allclose(bn.train(training)(np.asarray(x)), y, atol=2e-5)
        np.testing.assert_allclose(bn.running_mean, np.asarray(module.mean[...]), atol=1e-5)
        np.testing.assert_allclose(bn.running_var, np.asarray(module.var[...]), rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"axis": 1}, {"use_scale": False, "use_bias": False}, {"use_bias": False}])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_from_flax_nnx(rng, kwargs, param_dtype):
    module = nnx.BatchNorm(3, momentum=0.8, epsilon=0.1, param_dtype=param_dtype, rngs=nnx.Rngs(0), **kwargs)
    filled(rng, module)
    bn = cbn.from_flax(module)
    assert (bn.eps, bn.momentum, bn.training, bn.channel_axis) == (0.1, 0.2, True, kwargs.get("axis", -1))
    same(module, bn, rng, rng.normal(1, 2, size=(6, 3, 3)).astype(np.float32))


def test_modes_of_nnx(rng):
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert [cbn.from_flax(m).training for m in (module, nnx.view(module, use_running_average=True))] == [True, False]
    module.use_running_average = None
    assert not cbn.from_flax(module).training


def test_models_and_states_of_nnx(rng):
    model = filled(rng, Model())
    x = rng.normal(1, 2, size=(6, 4, 3)).astype(np.float32)
    state = nnx.state(model)
    for source in (state, nnx.to_pure_dict(state)):
        bn = cbn.from_flax(source, name="first", momentum=0.9, epsilon=0.01)
        np.testing.assert_array_equal(bn.weight, np.asarray(model.first.scale[...]))
        assert cbn.from_flax(source, name="rest/0").bias is None
    same(model.rest[0], cbn.from_flax(model, name="rest/0"), rng, x)
    same(model.first, cbn.from_flax(model, name="first"), rng, x)
    with pytest.raises(ValueError, match="name one of 'first', 'rest/0'"):
        cbn.from_flax(model)
    with pytest.raises(ValueError, match="there is no batch norm 'last'; there are 'first', 'rest/0'"):
        cbn.from_flax(state, name="last")
    with pytest.raises(ValueError, match=r"no parameters 'first'; there are none\. .*pass use_scale=False, use_bias=F"):
        cbn.from_flax(nnx.state(model, nnx.BatchStat), name="first")


def test_nnx_that_may_compute_something_else_is_refused(rng):
    class Doubled(nnx.BatchNorm):
        def __call__(self, x, use_running_average=None, *, mask=None):
            return 2 * super().__call__(x, use_running_average, mask=mask)

    class Plain(nnx.BatchNorm):
        def describe(self):
            return "a method of its own"

    assert cbn.from_flax(Plain(3, rngs=nnx.Rngs(0))).num_features == 3
    with pytest.raises(TypeError, match="Doubled redefines __call__ of BatchNorm"):
        cbn.from_flax(Doubled(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"from all devices of axis_name='batch', which cbn does not do"):
        cbn.from_flax(nnx.BatchNorm(3, axis_name="batch", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has a promote_dtype of its own"):
        cbn.from_flax(nnx.BatchNorm(3, promote_dtype=lambda args, dtype=None: args, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the module has its own epsilon; leave the argument out"):
        cbn.from_flax(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), epsilon=0.1)
    with pytest.raises(ValueError, match=r"axis is .*, statistics of several axes"):
        cbn.from_flax(nnx.BatchNorm(3, axis=(1, 2), rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"expected an nnx.BatchNorm or a module that has some, not .*Linear"):
        cbn.from_flax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"not flax\.linen\.normalization\.BatchNorm; pass its variables"):
        cbn.from_flax(linen.BatchNorm())


def test_statistics_of_several_axes_or_layers_are_refused(rng):
    x = rng.normal(size=(6, 4, 3)).astype(np.float32)
    variables = linen.BatchNorm(axis=(1, 2)).init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match=r"scale has shape \(4, 3\); expected one value for each channel"):
        cbn.from_flax(variables)


def test_parameters_of_linen_in_a_box(rng):
    scale = linen.with_partitioning(jax.nn.initializers.constant(2.0), ("model",))
    x = rng.normal(size=(6, 3)).astype(np.float32)
    module = linen.BatchNorm(scale_init=scale, use_running_average=True)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_allclose(cbn.from_flax(variables)(x), np.asarray(module.apply(variables, x)), atol=1e-5)
