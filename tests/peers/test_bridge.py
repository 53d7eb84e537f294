"""`cbn.torch` against PyTorch's own modules: values, gradients of every order, errors, and all that holds a module."""

import copy
import itertools
import os
import pickle

import numpy as np
import pytest

from cbn import config
from cbn.checks import NO_ACT, Act
from cbn.kernels import engine

from . import peer

torch = peer("torch")
import cbn.torch  # noqa: E402
from cbn.torch.autograd import DTYPES, as_array, batch_norm, followed  # noqa: E402

nn = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch itself uses it

SHAPES = {"BatchNorm1d": ((6, 5), (4, 5, 7)), "BatchNorm2d": ((4, 5, 6, 7),), "BatchNorm3d": ((2, 5, 3, 4, 5),)}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
LIMITS = {torch.float32: 2e-6, torch.float64: 2e-14, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RELU = Act(0.0, -np.inf, np.inf)
ACTS = {"none": NO_ACT, "relu": RELU, "leaky": Act(0.1, -np.inf, np.inf), "clip": Act(1.0, -0.5, 0.7)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def both(name, *args, dtype=torch.float32, train=True, **kwargs):
    """PyTorch's module and cbn's, with the same parameters and statistics."""
    theirs, ours = (getattr(of, name)(*args, **kwargs).to(dtype).train(train) for of in (nn, cbn.torch))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
        if theirs.running_mean is not None:
            theirs.running_mean.normal_()
            theirs.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def agree(ours, theirs, limit, case):
    """The same type, strides and values."""
    assert ours.dtype == theirs.dtype, case
    assert ours.shape == theirs.shape, case
    assert ours.stride() == theirs.stride(), case
    if theirs.numel():
        error = (ours.double() - theirs.double()).abs().max() / max(theirs.double().abs().max(), 1e-6)
        assert error <= limit, (case, float(error))


def steps_agree(theirs, ours, xs, limit):
    """A forward and a backward of each input: y, all gradients, all buffers."""
    for i, x in enumerate(xs):
        a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
        y_a, y_b = theirs(a), ours(b)
        agree(y_b, y_a, limit, ("y", i))
        dy = torch.randn_like(y_a)
        y_a.backward(dy)
        y_b.backward(dy)
        agree(b.grad, a.grad, 4 * limit, ("dx", i))
    for (name, p), (_, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        agree(q.grad, p.grad, 4 * limit, name)
    for (name, p), (_, q) in zip(theirs.named_buffers(), ours.named_buffers(), strict=True):
        agree(q, p, limit, name)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, shapes in SHAPES.items() for s in shapes])
@pytest.mark.parametrize("train", [True, False])
def test_modules_equal_pytorchs(name, shape, dtype, train):
    """Both layouts, and what lies otherwise; parameters of x's type and of float32; every switch."""
    for affine, tracks, momentum, layout in itertools.product(
        (True, False), (True, False), (0.1, None, 0.0), ("first", "last", "transposed")
    ):
        for parameters in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
            theirs, ours = both(name, 5, 1e-4, momentum, affine, tracks, dtype=parameters, train=train)
            xs = [2 * torch.randn(shape).to(dtype) + 1 for _ in range(2)]
            if layout == "last" and len(shape) in FORMATS:
                xs = [x.contiguous(memory_format=FORMATS[len(shape)]) for x in xs]
            elif layout == "transposed":
                xs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in xs]
            steps_agree(theirs, ours, xs, LIMITS[dtype])


def test_pytorchs_own_samples():
    """The inputs that PyTorch tests its function with, and its modules."""
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest: pip install -e '.[peers]'")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    (op,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
    for dtype in (torch.float32, torch.float64):
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            exact, expected, found = runs = [], [], []
            for to, function, of in zip(
                runs, (nn.functional.batch_norm,) * 2 + (batch_norm,), (torch.float64, dtype, dtype), strict=True
            ):
                args = [None if a is None else a.detach().to(of, copy=True) for a in (sample.input, *sample.args)]
                for a in (args[0], *args[3:]):
                    if a is not None:
                        a.requires_grad_()
                y = function(*args, **sample.kwargs)
                y.backward(torch.arange(1.0, y.numel() + 1, dtype=of).sin().reshape(y.shape))
                to += [y, *(a.grad for a in args if a is not None and a.requires_grad), *args[1:3]]
            for a, b, c in zip(found, expected, exact, strict=True):
                if b is not None and b.numel():
                    assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
                    ours, theirs = ((t.double() - c).abs().max() / c.abs().max().clamp(1e-6) for t in (a, b))
                    assert ours <= max(10 * LIMITS[dtype], theirs), (sample.summary(), ours, theirs)
        for module in [m for m in module_db if m.name.startswith("nn.BatchNorm")]:
            for train in (True, False):
                for given in module.module_inputs_func(
                    module, device="cpu", dtype=dtype, requires_grad=False, training=train
                ):
                    made = given.constructor_input
                    theirs, ours = both(module.name[3:], *made.args, dtype=dtype, train=train, **made.kwargs)
                    steps_agree(theirs, ours, [given.forward_input.args[0]], LIMITS[dtype])


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_every_order(train, act):
    """By finite differences: backward, its backward, and forward mode, with residual and activation."""
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    given = [torch.randn(n).double().requires_grad_() for n in ((4, 3, 5), 3, 3, (4, 3, 5))]

    def function(x, weight, bias, residual):
        running = (None, None) if train else (mean, var)
        residual = None if act == "none" else residual
        return batch_norm(x, *running, weight, bias, train, 0.1, 1e-5, residual, ACTS[act])

    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("act", list(ACTS))
def test_residual_and_activation_in_one_pass(dtype, act):
    """Against the sum and the activation as PyTorch's operators; with a double backward too."""
    parameters = torch.float32 if dtype.itemsize == 2 else dtype
    for train, second in itertools.product((True, False), (True, False)):
        mean, var = torch.randn(4).to(parameters), torch.rand(4).to(parameters) + 0.5
        grads = []
        given = [
            torch.randn(n).to(t) for n, t in (((6, 4, 5), dtype), (4, parameters), (4, parameters), ((6, 4, 5), dtype))
        ]
        dy = torch.randn(6, 4, 5).to(dtype)
        for fused in (True, False):
            x, weight, bias, residual = leaves = [t.clone().requires_grad_() for t in given]
            running = mean.clone(), var.clone()
            if fused:
                y = batch_norm(x, *running, weight, bias, train, 0.1, 1e-5, residual, ACTS[act])
            else:
                y = nn.functional.batch_norm(x, *running, weight, bias, train, 0.1, 1e-5)
                y = followed(y, residual, ACTS[act])
            found = torch.autograd.grad(y, leaves, dy, create_graph=second)
            if second:
                more = torch.autograd.grad(found[0].square().sum(), (x, weight), allow_unused=True)
                found += tuple(torch.zeros(1) if g is None else g for g in more)
            grads.append((y, *found, *running))
        for i, (a, b) in enumerate(zip(*grads, strict=True)):
            distance = (a.double() - b.double()).abs().mean() / b.double().abs().mean().clamp(1e-6)
            assert distance.item() <= 10 * LIMITS[dtype], (i, train, second, distance.item())


ERRORS = [
    ("BatchNorm1d", (3,), {}, torch.randn(4, 5, 6, 7)),
    ("BatchNorm2d", (3,), {}, torch.randn(4, 3, 5)),
    ("BatchNorm3d", (3,), {}, torch.randn(4, 3)),
    ("BatchNorm1d", (3,), {}, torch.randn(4, 5)),
    ("BatchNorm1d", (3,), {}, torch.randn(1, 3)),
    ("BatchNorm2d", (3,), {}, torch.randn(1, 3, 1, 1)),
    ("BatchNorm1d", (3,), {}, torch.randn(4, 3).double()),
    ("BatchNorm1d", (3,), {}, torch.randint(5, (4, 3))),
    ("BatchNorm1d", (3,), {"eps": 0.0}, torch.randn(4, 3)),
    ("BatchNorm1d", (3,), {"eps": -1.0}, torch.randn(4, 3)),
    ("BatchNorm1d", (3,), {}, torch.randn(4, 3).to_sparse()),
    ("BatchNorm1d", (3,), {}, [[1.0]]),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "x"), ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("train", [True, False])
def test_errors_are_pytorchs(name, args, kwargs, x, train):
    """The same type and text; or no error, and the same values."""
    theirs, ours = both(name, *args, train=train, **kwargs)
    found = []
    for module in (theirs, ours):
        try:
            found.append(module(x))
        except Exception as error:
            found.append((type(error), str(error)))
    if isinstance(found[0], torch.Tensor):
        torch.testing.assert_close(*found)
    else:
        assert found[0] == found[1]
    assert ours.num_batches_tracked == theirs.num_batches_tracked


def test_a_change_in_place_is_noticed():
    for train in (True, False):
        _, ours = both("BatchNorm1d", 3, train=train)
        x = torch.randn(4, 3, requires_grad=True).clone()
        y = ours(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = ours(torch.randn(4, 3, requires_grad=True))
        with torch.no_grad():
            ours.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_context_belongs_to_the_call():
    """A layer twice in one graph, a graph kept for a second backward, checkpoints, other modes between."""
    from torch.utils.checkpoint import checkpoint

    weights = torch.randn(8, 3)

    def loss(module, x):
        first = module(x)
        module.eval()
        with torch.no_grad():
            module(x * 5)
        module.train()
        return (module(torch.sin(first)) * weights).sum()

    theirs, ours = both("BatchNorm1d", 3)
    x = torch.randn(8, 3)
    found = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        y = loss(module, given)
        y.backward(retain_graph=True)
        y.backward()
        for reentrant in (True, False):
            checkpoint(loss, module, given, use_reentrant=reentrant).backward()
        found.append((given.grad, module.weight.grad, module.bias.grad, module.running_mean, module.running_var))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        agree(b, a, 2e-5, i)


def test_all_that_holds_a_module():
    """State dicts both ways, pickles, copies, hooks, parametrizations, types, repr, averages, folding."""
    theirs, ours = both("BatchNorm2d", 4)
    assert isinstance(ours, nn.BatchNorm2d)
    assert repr(ours) == repr(theirs)
    assert ours._version == theirs._version == 2
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 4, 5, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is cbn.torch.BatchNorm2d
        torch.testing.assert_close(other(x), copy.deepcopy(ours)(x))
    seen = []
    ours.register_forward_hook(lambda *_: seen.append("forward"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    for module in (theirs, ours):
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        module = cbn.torch.BatchNorm2d(4).to(dtype)
        assert module(x.to(dtype)).dtype == dtype
        assert module.running_var.dtype == dtype
    convolution = nn.Conv2d(3, 4, 3).eval()
    norm = both("BatchNorm2d", 4, train=False)[1]
    image = torch.randn(2, 3, 6, 6)
    fused = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
    torch.testing.assert_close(fused(image), norm(convolution(image)), atol=1e-5, rtol=1e-5)
    model = nn.Sequential(cbn.torch.BatchNorm2d(3))
    torch.optim.swa_utils.update_bn([image, image + 1], model)
    torch.testing.assert_close(model[0].running_mean, (image + 0.5).mean((0, 2, 3)))


VARIANTS = {
    "mask": ({}, {"mask": torch.arange(48).reshape(8, 6) % 5 > 0}),
    "lengths": ({}, {"lengths": torch.tensor([6, 1, 3, 4, 6, 2, 5, 3])}),
    "sample_weight": ({"activation": "relu"}, {"sample_weight": torch.linspace(0.5, 2, 8)}),
    "ghost": ({"ghost_batch_size": 4}, {}),
    "domain": ({"num_domains": 3}, {"domain": torch.tensor([0, 1, 1, 0, 2, 2, 1, 0])}),
}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_variants_are_those_of_the_layers(name, dtype):
    """The bits of cbn.BatchNorm, in both modes; a change in place is noticed; copies hold them.

    In evaluation ghost batches are nothing special: the module calls a function, whose bits may differ from a layer's.
    """
    options, given = VARIANTS[name]
    parameters = DTYPES[dtype]
    module = cbn.torch.BatchNorm1d(3, **options).to(parameters)
    layer = cbn.BatchNorm1d(3, dtype=str(parameters)[6:], **options)
    layer.train_parameters = True
    module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert all(f"{key}={value!r}" in repr(module) for key, value in options.items())
    for train in (True, True, False):
        module.train(train), layer.train(train)
        x, dy = (torch.randn(8, 3, 6).to(dtype) for _ in range(2))
        x.requires_grad_()
        y = module(x, **given)
        y.backward(dy)
        expected = layer(as_array(x.detach()), **{key: value.numpy() for key, value in given.items()})
        layer.zero_grad()
        dx = layer.backward(as_array(dy))
        pairs = [(y.detach(), expected), (x.grad, dx), (module.weight.grad, layer.weight_grad)]
        pairs += [(getattr(module, key), getattr(layer, key)) for key in ("running_mean", "running_var")]
        plain = name == "ghost" and not train
        for ours, theirs in pairs:
            a, b = (np.asarray(v, np.float64) for v in (as_array(ours), theirs))
            np.testing.assert_allclose(a, b, rtol=0, atol=10 * LIMITS[dtype] if plain else 0)
        assert np.array_equal(module.num_batches_tracked.numpy(), layer.num_batches_tracked)
        module.zero_grad()
    y = module(x, **given)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
    module.half()
    with pytest.raises(TypeError, match="need parameters and statistics of"):
        module.train()(x, **given)


def test_variants_refuse(rng):
    with pytest.raises(ValueError, match="ghost_batch_size"):
        cbn.torch.BatchNorm1d(3, ghost_batch_size=0)
    with pytest.raises(ValueError, match="the layer has num_domains=2: pass domain="):
        cbn.torch.BatchNorm1d(3, num_domains=2)(torch.randn(4, 3))
    with pytest.raises(TypeError, match="need a floating CPU tensor"):
        cbn.torch.BatchNorm1d(3)(torch.ones(4, 3, dtype=torch.int64), sample_weight=torch.ones(4) / 2)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype):
    parameters = torch.float32 if dtype.itemsize == 2 else dtype
    x, residual = (torch.randn(4, 3, 5).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(3).to(parameters).requires_grad_() for _ in range(2))
    mean, var = torch.randn(3).to(parameters), torch.rand(3).to(parameters)
    for of_channels, z, train, act in (
        ((weight, bias, mean, var), None, True, NO_ACT),
        ((weight, None, mean, var), None, False, RELU),
        ((None, None, None, None), residual, True, RELU),
    ):
        args = (x, *of_channels[:2], z, *of_channels[2:], train, 1e-5, *act)
        torch.library.opcheck(torch.ops.cbn.batch_norm.default, args)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("train", [True, False])
def test_compiled_modules(backend, train):
    """One graph without breaks, and the bits of the eager module in the running statistics."""
    torch.compiler.reset()
    x = torch.randn(4, 3, 10, 10)
    plain = network().train(train)
    eager = cbn.torch.convert(copy.deepcopy(plain))
    held = cbn.torch.convert(copy.deepcopy(plain))
    compiled = torch.compile(held, fullgraph=True, backend=backend)
    dy = None
    for model in (plain, eager, compiled):
        y = model(x)
        dy = torch.randn_like(y) if dy is None else dy
        y.backward(dy)
    for other in (plain, eager):
        for (name, p), q in zip(other.named_parameters(), held.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4, msg=name)
    for p, q in zip(eager.buffers(), held.buffers(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-6)


def test_exported_traced_and_mapped_modules():
    x = torch.randn(4, 3, 10, 10)
    model = cbn.torch.convert(network().eval())
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    with pytest.warns(DeprecationWarning, match="jit.trace"):
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    many = torch.vmap(model[1])(torch.randn(5, 4, 8, 2, 2))
    assert many.shape == (5, 4, 8, 2, 2)
    of_sample = torch.func.vmap(torch.func.grad(lambda x: model[1](x[None]).sum()))(torch.randn(5, 8, 2, 2))
    assert of_sample.shape == (5, 8, 2, 2)


def test_transforms_of_parameters_and_what_they_leave_over():
    of_pytorch = network().eval()
    x, y, found, left = torch.randn(4, 3, 10, 10), torch.randn(4, 8, 2, 2), [], []
    for model in (of_pytorch, cbn.torch.convert(copy.deepcopy(of_pytorch))):
        buffers = dict(model.named_buffers())

        def loss(parameters, x, model=model, buffers=buffers):
            left.append(parameters["1.weight"])
            return torch.func.functional_call(model, (parameters, buffers), (x[None],)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
        batch_norm = torch.nn.functional.batch_norm if model is of_pytorch else cbn.torch.autograd.batch_norm
        found[-1]["left"] = batch_norm(y, None, None, left[-1], training=True)
    for name, of_model in found[0].items():
        torch.testing.assert_close(found[1][name], of_model, msg=name)


# ---- conversion ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Of a residual network, with what it adds computed after the batch norm that it is added to."""

    def __init__(self, n, m):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(n, m, 3, 1, 1), nn.BatchNorm2d(m), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1), nn.BatchNorm2d(m)
        self.down = nn.Sequential(nn.Conv2d(n, m, 1), nn.BatchNorm2d(m)) if n != m else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return torch.relu(y)


def residual_network():
    stem = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.2)
    return nn.Sequential(*stem, Block(6, 6), Block(6, 8), *head)


def losses(model, n=8):
    """Of some steps of training, and of an evaluation."""
    torch.manual_seed(3)
    x, t = torch.randn(8, 3, 12, 12), torch.arange(8) % 5
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = []
    for _ in range(n):
        loss = nn.functional.cross_entropy(model(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    with torch.no_grad():
        return [*found, *model.eval()(x).flatten().tolist()]


def test_converted_and_fused_models_train_as_before():
    model = residual_network()
    names = list(model.state_dict())
    expected = losses(copy.deepcopy(model))
    converted = cbn.torch.convert(copy.deepcopy(model))
    fused = cbn.torch.convert(copy.deepcopy(model), fuse=True)
    assert list(fused.state_dict()) == names
    text = str(cbn.torch.report(fused))
    assert text.endswith("7 of 7 batch norms by cbn")
    with_what = {line.name: line.state for line in cbn.torch.report(fused)}
    assert with_what == {
        "1": "cbn, with ('clip', 0.0, 6.0)",
        "3.bn1": "cbn, with relu", "3.bn2": "cbn, with residual and relu",
        "4.bn1": "cbn, with relu", "4.bn2": "cbn, with residual and relu", "4.down.1": "cbn",
        "8": "cbn, with ('leaky_relu', 0.2)",
    }  # fmt: skip
    back = cbn.torch.revert(copy.deepcopy(fused))
    assert not any(type(m).__module__.startswith("cbn") for m in back.modules())
    assert "cbn" not in back.code
    for other in (converted, fused, back):
        np.testing.assert_allclose(losses(other), expected, rtol=2e-4, atol=2e-4)


# Networks of articles about batch norm in PyTorch, on random data of their shapes
ARTICLES = {
    "binary classifier": (
        lambda norms: nn.Sequential(nn.Linear(10, 5), norms.BatchNorm1d(5), nn.Linear(5, 1)),
        (64, 10), nn.BCEWithLogitsLoss(), 0.01),
    "binary classifier with ReLU": (
        lambda norms: nn.Sequential(nn.Linear(10, 5), nn.ReLU(), norms.BatchNorm1d(5), nn.Linear(5, 1)),
        (64, 10), nn.BCEWithLogitsLoss(), 0.01),
    "binary classifier with sigmoid": (
        lambda norms: nn.Sequential(nn.Linear(10, 5), norms.BatchNorm1d(5), nn.Linear(5, 1), nn.Sigmoid()),
        (64, 10), nn.BCELoss(), 0.01),
    "hidden layer": (
        lambda norms: nn.Sequential(nn.Linear(100, 50), norms.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10)),
        (32, 100), nn.CrossEntropyLoss(), 1e-3),
    "convolutions": (
        lambda norms: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norms.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                                    nn.Linear(16 * 32 * 32, 10)),
        (8, 3, 32, 32), nn.CrossEntropyLoss(), 1e-4),
    "CIFAR-10 MLP": (
        lambda norms: nn.Sequential(nn.Flatten(), nn.Linear(32 * 32 * 3, 64), norms.BatchNorm1d(64), nn.ReLU(),
                                    nn.Linear(64, 32), norms.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
        (10, 3, 32, 32), nn.CrossEntropyLoss(), 1e-4),
    **{f"sequences of {c}": (
        lambda norms, c=c: nn.Sequential(norms.BatchNorm1d(c), nn.Flatten(), nn.LazyLinear(10)),
        (n, c, length), nn.CrossEntropyLoss(), 1e-3) for n, c, length in ((4, 1, 10), (8, 3, 15), (4, 2, 20))},
}  # fmt: skip


@pytest.mark.parametrize("name", list(ARTICLES))
def test_networks_of_articles_train_as_with_pytorch(name):
    """Losses of 50 steps of Adam, and of an evaluation after them."""
    make, shape, criterion, rate = ARTICLES[name]
    found = []
    for norms in (nn, cbn.torch):
        torch.manual_seed(42)
        model = make(norms)
        optimizer, losses = None, []
        for _ in range(50):
            x = torch.randn(shape)
            t = torch.randint(2, (shape[0], 1)).float() if "binary" in name else torch.randint(10, shape[:1])
            loss = criterion(model(x), t)
            optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=rate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        losses.append(criterion(model.eval()(x), t).item())
        found.append(losses)
    np.testing.assert_allclose(found[1][:50], found[0][:50], rtol=1e-5)
    # A bias before a batch norm has a gradient of rounding errors, which Adam makes steps of: the batch's mean takes
    # them out again, the running one follows them late
    np.testing.assert_allclose(found[1][50], found[0][50], rtol=1e-3)


class Special(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_is_named_and_unchanged():
    shared, hooked = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    parametrized = nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus())
    calls = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), hooked, nn.ReLU(), parametrized, Special(4),
                          nn.LazyBatchNorm2d(), nn.InstanceNorm2d(4), nn.SyncBatchNorm(4))  # fmt: skip
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = torch.randn(4, 4, 3, 3)
    assert cbn.torch.convert(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    found = {line.name: (line.state, line.why) for line in cbn.torch.report(model)}
    assert {name for name, (state, _) in found.items() if state == "cbn"} == {"0", "4", "6", "10"}
    assert found["7"][1].endswith("Special is a class of its own, whose forward may be another")
    assert found["8"][1] == "lazy: convert after the first forward"
    assert found["9"][1] == "an instance norm"
    assert model[2] is model[0]
    model(x)
    assert calls == [1]
    cbn.torch.convert(model)
    assert type(model[8]) is cbn.torch.BatchNorm2d
    with pytest.warns(UserWarning, match="torch.fx cannot trace the model, so nothing is fused"):
        assert cbn.torch.convert(model, fuse=True) is model
    fused = cbn.torch.convert(copy.deepcopy(model[:6]), fuse=True)
    states = {line.name: line.state for line in cbn.torch.report(fused)}
    assert states["0"] == states["4"] == "cbn"  # called twice, and looked at by a hook
    cbn.torch.revert(model)
    assert [type(m).__module__ for m in model.modules() if "cbn" in type(m).__module__] == []
    assert not any("_channels" in m.__dict__ for m in model.modules())  # nothing of cbn's in its pickles
    own = cbn.torch.BatchNorm1d(3, activation="relu")
    assert type(cbn.torch.revert(own)) is cbn.torch.BatchNorm1d  # PyTorch's has no activation
    assert type(cbn.torch.convert(nn.BatchNorm1d(3))) is cbn.torch.BatchNorm1d


def test_a_second_openmp_runtime_is_named(monkeypatch, recwarn):
    """With a remedy, and only if PyTorch and cbn call different ones: a third library's own is no matter of theirs."""
    runtime = config.openmp_of(engine.__file__)
    if not runtime:
        pytest.skip("built without OpenMP, or linked statically")
    assert runtime in map(os.path.realpath, config.openmp_runtime())
    cbn.torch._check_runtimes()
    theirs = config.openmp_of(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    assert bool(recwarn.list) == (theirs != runtime)
    monkeypatch.setattr(cbn.torch, "openmp_of", lambda path: f"/lib/of/{os.path.basename(path)}")
    with pytest.warns(RuntimeWarning, match="one serves both if Python starts with LD_PRELOAD=/lib/of/libtorch_cpu.so"):
        cbn.torch._check_runtimes()
    assert config.openmp_of("/no/such/library.so") == ""


# ---- several ranks ---------------------------------------------------------------------------------------------------


def rank(index, sizes, folder, dtype, shape):
    """One process of a group: a step on its part of a batch."""
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=index, world_size=len(sizes))
    x, dy, module = joined(sizes, dtype, cbn.torch.SyncBatchNorm, shape)
    part = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
    given = x[part].clone().requires_grad_()
    y = module(given)
    y.backward(dy[part])
    grads = given.grad, module.weight.grad, module.bias.grad
    assert not given.numel() or y.stride() == given.grad.stride() == given.stride()
    torch.save([y.detach(), *grads, module.running_mean, module.running_var], f"{folder}/{index}")
    distributed.barrier()
    distributed.destroy_process_group()


def joined(sizes, dtype, cls, shape):
    """With four dimensions in channels last."""
    torch.manual_seed(5)
    x, dy = (torch.randn(sum(sizes), *shape, dtype=dtype) for _ in range(2))
    if len(shape) == 3:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    module = cls(5).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    return x + 3, dy, module


@pytest.mark.parametrize(
    ("sizes", "dtype", "shape"),
    [
        ((6, 3), torch.float32, (5, 7)),
        ((1, 5), torch.float64, (5, 7)),
        ((0, 4, 2), torch.float32, (5, 7)),
        ((3, 2), torch.float32, (5, 4, 3)),
    ],
    ids=str,
)
def test_ranks_equal_one_process(sizes, dtype, shape, tmp_path):
    """Uneven batches, one of one sample, an empty one; the same bits of the statistics on every rank."""
    torch.multiprocessing.spawn(rank, (sizes, str(tmp_path), dtype, shape), len(sizes))
    found = [torch.load(tmp_path / str(i)) for i in range(len(sizes))]
    x, dy, module = joined(sizes, dtype, nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d, shape)
    x.requires_grad_()
    y = module(x)
    y.backward(dy)
    limit = 1e-6 if dtype is torch.float32 else 1e-14
    agree(torch.cat([part[0] for part in found]), y, limit, "y")
    agree(torch.cat([part[1] for part in found]), x.grad, limit, "dx")
    for k, p in ((2, module.weight.grad), (3, module.bias.grad)):
        agree(sum(part[k] for part in found), p, 2 * limit, k)
    for k, p in ((4, module.running_mean), (5, module.running_var)):
        agree(found[0][k], p, limit, k)
        assert all(torch.equal(part[k], found[0][k]) for part in found)
