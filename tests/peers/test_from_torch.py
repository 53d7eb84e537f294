"""Layers from PyTorch, against the modules that they are from."""

import numpy as np
import pytest

import cbn

from . import peer

torch = peer("torch")


def fill(rng, module):
    """Parameters and statistics that are no defaults."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            if getattr(module, name) is not None:
                getattr(module, name).copy_(torch.from_numpy(rng.normal(size=module.num_features)))
        if module.running_var is not None:
            module.running_var.copy_(torch.from_numpy(rng.uniform(0.1, 3, module.num_features)))
            module.num_batches_tracked += 7
    return module


@pytest.mark.parametrize("cls", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"eps": 1e-2, "momentum": None}, {"momentum": 0.3}])
def test_from_torch(rng, cls, kwargs):
    module = fill(rng, getattr(torch.nn, cls)(5, **kwargs)).eval()
    bn = cbn.from_torch(module)
    assert type(bn).__name__ == cls.replace("Sync", "")
    assert (bn.eps, bn.momentum, bn.training, int(bn.num_batches_tracked)) == (module.eps, module.momentum, False, 7)
    x = rng.normal(size=(4, 5, *[3] * {"BatchNorm1d": 0, "BatchNorm3d": 3}.get(cls, 2))).astype(np.float32)
    np.testing.assert_allclose(bn(x), module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    if cls != "SyncBatchNorm":  # which does not train on a CPU
        y = module.train()(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(bn.train()(x), y, atol=1e-5)
        np.testing.assert_allclose(bn.running_var, module.running_var.numpy(), rtol=1e-5)


def test_from_torch_takes_the_type_and_the_mode(rng):
    module = fill(rng, torch.nn.BatchNorm2d(3))
    assert cbn.from_torch(module.double()).dtype == np.float64
    assert cbn.from_torch(module.double()).training
    half = cbn.from_torch(module.bfloat16())
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half.weight, module.weight.detach().float().numpy())
    assert cbn.from_torch(torch.nn.BatchNorm1d(3, track_running_stats=False)).running_mean is None


def test_from_torch_copies(rng):
    module = fill(rng, torch.nn.BatchNorm1d(3))
    bn = cbn.from_torch(module)
    before = bn.weight.copy()
    with torch.no_grad():
        module.weight += 1
    np.testing.assert_array_equal(bn.weight, before)


def test_from_torch_refuses(rng):
    with pytest.raises(TypeError, match=r"expected a batch norm of torch.nn, not torch.nn.modules.linear.Linear"):
        cbn.from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LazyBatchNorm1d has no parameters before its first input"):
        cbn.from_torch(torch.nn.LazyBatchNorm1d())


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"dtype": np.float64}, {"track_running_stats": False}])
def test_to_torch_state(rng, kwargs):
    bn = cbn.BatchNorm2d(4, **kwargs)
    bn(rng.normal(size=(3, 4, 5, 5)))
    flags = {k: v for k, v in kwargs.items() if k != "dtype"}
    module = torch.nn.BatchNorm2d(4, dtype=torch.float64 if "dtype" in kwargs else torch.float32, **flags)
    state = cbn.to_torch_state(bn)
    assert not module.load_state_dict(state).missing_keys
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(getattr(module, name).detach().numpy(), value)
    if bn.running_mean is not None:
        state["running_mean"] += 1
        assert not np.array_equal(bn.running_mean, state["running_mean"].numpy())


# ---- the same values, or a refusal -----------------------------------------------------------------------------------


def same(module, bn, rng, shape=(6, 3, 4, 5)):
    """y and running statistics in the module's mode, then in both; the module moves, and its layer beside it."""
    for mode in (module.training, True, False):
        module.train(mode)
        bn.train(mode)
        x = rng.normal(1, 2, size=shape).astype(np.float32)
        with torch.no_grad():
            y = module(torch.from_numpy(x.copy())).numpy()
        np.testing.assert_allclose(bn(x), y, atol=2e-5)
        for name in ("running_mean", "running_var"):
            theirs = [b.numpy() for n, b in module.named_buffers() if n.rsplit(".", 1)[-1] == name]
            if theirs:
                np.testing.assert_allclose(getattr(bn, name), theirs[0], rtol=1e-4, atol=1e-5)


class WithActivation(torch.nn.BatchNorm2d):
    """As timm's: its values are known by module and name alone."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, n, act, drop=None):
        super().__init__(n)
        self.drop = torch.nn.Identity() if drop is None else drop
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))

    forward.__module__ = __module__


class Frozen2d(torch.nn.Module):
    """As torchvision's."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, n, eps):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        w, b, m, v = (a.reshape(1, -1, 1, 1) for a in (self.weight, self.bias, self.running_mean, self.running_var))
        return (x - m) * (w * (v + self.eps).rsqrt()) + b

    forward.__module__ = __module__


WithActivation.__qualname__ = WithActivation.__name__ = "BatchNormAct2d"
Frozen2d.__qualname__ = Frozen2d.__name__ = "FrozenBatchNorm2d"
BNReLU2d = torch.ao.nn.intrinsic.BNReLU2d


@pytest.mark.parametrize(
    ("build", "activation"),
    [
        (lambda bn: torch.nn.Sequential(bn, torch.nn.ReLU()), "relu"),
        (lambda bn: torch.nn.Sequential(bn, torch.nn.LeakyReLU(0.2)), ("leaky_relu", 0.2)),
        (lambda bn: torch.nn.Sequential(torch.nn.Sequential(bn), torch.nn.Identity()), None),
        (lambda bn: BNReLU2d(bn, torch.nn.ReLU()), "relu"),
    ],
    ids=["relu", "leaky", "identity", "intrinsic"],
)
def test_known_activations_become_the_layers(rng, build, activation):
    module = build(fill(rng, torch.nn.BatchNorm2d(3)))
    bn = cbn.from_torch(module)
    assert bn.activation == activation
    same(module, bn, rng)


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        (torch.nn.ReLU(inplace=True), "relu"),
        (torch.nn.LeakyReLU(0.1), ("leaky_relu", 0.1)),
        (torch.nn.Identity(), None),
    ],
    ids=["relu", "leaky", "identity"],
)
def test_timms_batch_norm_with_an_activation(rng, act, activation):
    module = fill(rng, WithActivation(3, act))
    bn = cbn.from_torch(module)
    assert (type(bn), bn.activation) == (cbn.BatchNorm2d, activation)
    same(module, bn, rng)


def test_frozen_classes_are_frozen(rng):
    module = Frozen2d(3, 0.01)
    bn = cbn.from_torch(module)
    assert (bn.frozen, bn.training, bn.eps) == (True, True, 0.01)
    same(module, bn, rng)


class Renamed(torch.nn.BatchNorm2d):
    """Redefines nothing of what is computed."""

    def __init__(self, n, note):
        super().__init__(n)
        self.note = note

    def extra_repr(self):
        return self.note

    def describe(self):
        return "a method of its own"


def untracked(bn):
    bn.track_running_stats = False
    return bn


@pytest.mark.parametrize(
    "build",
    [
        lambda: Renamed(3, "mine"),
        lambda: untracked(torch.nn.BatchNorm2d(3)),
        lambda: torch.nn.BatchNorm2d(3, bias=False, momentum=None),
        lambda: torch.nn.BatchNorm2d(3, track_running_stats=False),
    ],
    ids=["subclass", "untracked later", "cumulative", "untracked"],
)
def test_both_modes_are_the_modules(rng, build):
    module = fill(rng, build())
    same(module, cbn.from_torch(module), rng)
    if module.running_mean is not None and not module.track_running_stats:
        assert int(module.num_batches_tracked) == 7


def test_what_compile_makes_is_followed(rng):
    module = fill(rng, torch.nn.BatchNorm2d(3))
    np.testing.assert_array_equal(
        cbn.from_torch(torch.compile(module, backend="eager")).running_var, module.running_var
    )
    module.compile(backend="eager")
    np.testing.assert_array_equal(cbn.from_torch(module).running_var, module.running_var)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float64)], ids=str)
def test_parameters_and_statistics_of_two_types(rng, dtypes):
    module = fill(rng, torch.nn.BatchNorm2d(3))
    parameters, statistics = dtypes
    module.weight.data, module.bias.data = module.weight.data.to(parameters), module.bias.data.to(parameters)
    module.running_mean, module.running_var = module.running_mean.to(statistics), module.running_var.to(statistics)
    bn = cbn.from_torch(module)
    assert bn.dtype == (np.float64 if statistics == torch.float64 else np.float32)
    np.testing.assert_array_equal(bn.weight, module.weight.detach().to(torch.float64).numpy())
    np.testing.assert_array_equal(bn.running_var, module.running_var.numpy())


class Doubled(torch.nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Anything(torch.nn.BatchNorm2d):
    def _check_input_dim(self, input):
        pass


class AlwaysEval(torch.nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Mixin:
    def __call__(self, x):
        return 2 * super().__call__(x)


class Mixed(Mixin, torch.nn.BatchNorm2d):
    pass


class Halved(torch.nn.BatchNorm2d):
    @property
    def eps(self):
        return 0.5

    @eps.setter
    def eps(self, value):
        pass


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (Doubled, "forward"),
        (Anything, "_check_input_dim"),
        (AlwaysEval, "train"),
        (Mixed, "__call__"),
        (Halved, "eps"),
    ],
)
def test_subclasses_that_may_compute_something_else_are_refused(cls, name):
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} redefines {name} of BatchNorm2d, so its values may be others"
    ):
        cbn.from_torch(cls(3))


def test_patches_are_refused(monkeypatch):
    module = torch.nn.BatchNorm2d(3)
    module.forward = lambda x: x
    with pytest.raises(TypeError, match="redefines forward"):
        cbn.from_torch(module)
    timms = WithActivation(3, torch.nn.ReLU())
    timms.forward = lambda x: x
    with pytest.raises(TypeError, match="has a forward of its own"):
        cbn.from_torch(timms)
    for cls in (torch.nn.BatchNorm2d, torch.nn.modules.batchnorm._BatchNorm):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", lambda self, x: x)
            with pytest.raises(TypeError, match="redefines forward"):
                cbn.from_torch(torch.nn.BatchNorm2d(3))
    assert cbn.from_torch(torch.nn.BatchNorm2d(3)).num_features == 3


@pytest.mark.parametrize(
    "cls", [torch.nn.Sequential, torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.Identity, WithActivation]
)
def test_patches_of_what_follows_are_refused(monkeypatch, cls):
    norm = torch.nn.BatchNorm2d(3)
    module = (
        WithActivation(3, torch.nn.ReLU())
        if cls is WithActivation
        else torch.nn.Sequential(norm, torch.nn.ReLU() if cls is torch.nn.Sequential else cls())
    )
    assert cbn.from_torch(module).num_features == 3
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * x)
    with pytest.raises(TypeError, match=rf"the forward of \S+{cls.__name__} has been replaced, so its values may be"):
        cbn.from_torch(module)


@pytest.mark.parametrize("where", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("build", [torch.nn.BatchNorm2d, lambda n: torch.nn.Sequential(torch.nn.BatchNorm2d(n))])
def test_hooks_are_refused(where, build):
    module = build(3)
    handle = getattr(module, f"register_{where}_hook")(lambda *_: None)
    with pytest.raises(ValueError, match=r"has a hook that may change its values, <lambda> in \w+_hooks; remove it"):
        cbn.from_torch(module)
    handle.remove()
    assert cbn.from_torch(module).num_features == 3


@pytest.mark.parametrize("where", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_are_refused(where):
    handle = getattr(torch.nn.modules.module, f"register_module_{where}_hook")(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="a hook of all modules"):
            cbn.from_torch(torch.nn.BatchNorm2d(3))
    finally:
        handle.remove()
    assert cbn.from_torch(torch.nn.BatchNorm2d(3)).num_features == 3


def test_computed_weights_are_refused():
    from torch.nn.utils import parametrize, prune

    module = torch.nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", torch.nn.Softplus(), unsafe=True)
    with pytest.raises(ValueError, match=r"weight is parametrized; call .*remove_parametrizations\(module, \"weight"):
        cbn.from_torch(module)
    module = prune.random_unstructured(torch.nn.BatchNorm2d(3), "weight", 0.5)
    with pytest.raises(ValueError, match=r"RandomUnstructured in forward_pre_hooks; remove it first.*prune\.remove"):
        cbn.from_torch(module)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: WithActivation(3, torch.nn.GELU()), ValueError, "activation .*GELU is not supported"),
        (lambda: WithActivation(3, torch.nn.ReLU(), torch.nn.Dropout()), ValueError, "has a drop layer, .*Dropout"),
        (lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.SiLU()), ValueError, "SiLU is not supported"),
        (
            lambda: torch.nn.Sequential(BNReLU2d(torch.nn.BatchNorm2d(3), torch.nn.ReLU()), torch.nn.ReLU()),
            ValueError,
            "has an activation already",
        ),
        (lambda: torch.nn.Sequential(), TypeError, "of a batch norm and an activation, not of 0 modules"),
        (lambda: torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(3)), TypeError, "not .*ReLU"),
        (lambda: torch.nn.InstanceNorm2d(3), TypeError, "expected a batch norm of torch.nn, not .*InstanceNorm2d"),
        (lambda: torch.nn.DataParallel(torch.nn.BatchNorm2d(3)), TypeError, "DataParallel; pass its .module"),
        (lambda: torch.ao.nn.quantized.BatchNorm2d(3), TypeError, "not torch.ao.nn.quantized"),
        (lambda: torch.nn.BatchNorm2d(3, device="meta"), ValueError, "weight is on the meta device"),
        (lambda: torch.nn.BatchNorm2d(3, momentum=1.5), ValueError, "momentum must be in .0, 1., but got 1.5"),
        (lambda: torch.nn.BatchNorm2d(3, dtype=torch.complex64), TypeError, "weight has dtype complex64"),
    ],
)
def test_what_is_not_the_same_is_refused(build, error, words):
    with pytest.raises(error, match=words.replace("momentum must be in .0, 1.,", r"momentum must be in \[0, 1\].*,")):
        cbn.from_torch(build())


def test_synchronized_with_other_processes_is_refused(monkeypatch):
    module = torch.nn.SyncBatchNorm(3)
    assert type(cbn.from_torch(module)) is cbn.BatchNorm
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"takes its statistics from 2 processes.*load_state_dict"):
        cbn.from_torch(module)
