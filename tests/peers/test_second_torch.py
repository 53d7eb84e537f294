"""Second derivatives and forward mode against PyTorch's autograd, in float64."""

import itertools

import numpy as np
import pytest

from cbn.functional import (
    batch_norm_jvp,
    native_batch_norm,
    native_batch_norm_backward,
    native_batch_norm_double_backward,
)

from . import peer

torch = peer("torch")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # forward mode uses it

SHAPES = {"NC": (12, 3), "NCL": (4, 3, 7), "NCHW": (3, 3, 4, 5)}


def array(t):
    return None if t is None else t.detach().numpy()


def tensors(*given):
    return [None if a is None else torch.from_numpy(np.array(a)) for a in given]


class Backward(torch.autograd.Function):
    """cbn's backward pass, and the backward pass through it."""

    @staticmethod
    def forward(ctx, dy, x, weight, mean, var, saved, train):
        ctx.save_for_backward(dy, x, weight)
        ctx.rest = mean, var, *saved, train, 1e-5
        found = native_batch_norm_backward(array(dy), array(x), array(weight), *ctx.rest)
        return tuple(tensors(*found))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ggI, ggG, ggB):
        dy, x, weight = map(array, ctx.saved_tensors)
        found = native_batch_norm_double_backward(array(ggI), array(ggG), array(ggB), dy, x, weight, *ctx.rest)
        return *tensors(*found), None, None, None, None


class BatchNorm(torch.autograd.Function):
    """cbn's forward pass; its backward pass is a Function too, and it has a forward mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, train):
        y, *saved = native_batch_norm(array(x), array(weight), array(bias), mean, var, train, 0.0, 1e-5)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.rest = mean, var, saved, train
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = Backward.apply(dy, x, weight, *ctx.rest)
        return dx, None if weight is None else dweight, None if weight is None else dbias, None, None, None

    @staticmethod
    def jvp(ctx, x_t, weight_t, bias_t, *_):
        x, weight = ctx.saved_tensors
        mean, var, saved, train = ctx.rest
        y_t = batch_norm_jvp(
            array(x_t), array(weight_t), array(bias_t), array(x), array(weight), None, mean, var, *saved, train, 1e-5
        )
        return torch.from_numpy(y_t)


def arguments(rng, shape, affine):
    x, dy, ggI = (rng.standard_normal((3, *shape)).T * np.array([2.0, 1.0, 1.5])).T + 0.5
    weight, bias, mean, ggG, ggB = rng.standard_normal((5, 3))
    return x, dy, ggI, *((weight, bias) if affine else (None, None)), mean, rng.uniform(1, 2, 3), ggG, ggB


def close(found, exact):
    assert np.abs(found - exact).max() <= 1e-12 * max(np.abs(exact).max(), 1e-3)


@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_double_backward_is_that_of_autograd(rng, shape, train, affine, given):
    x, dy, ggI, weight, bias, mean, var, ggG, ggB = arguments(rng, shape, affine)
    if not affine:
        ggG = ggB = None  # PyTorch has no gradients of what is not there
    ggI, ggG, ggB = (a if there else None for a, there in zip((ggI, ggG, ggB), given, strict=True))
    t_x, t_dy, t_weight, t_bias = (None if t is None else t.requires_grad_() for t in tensors(x, dy, weight, bias))
    y = torch.native_batch_norm(t_x, t_weight, t_bias, *tensors(mean, var), train, 0.1, 1e-5)[0]
    inputs = [t for t in (t_x, t_weight, t_bias) if t is not None]
    first = torch.autograd.grad(y, inputs, t_dy, create_graph=True)
    cotangents = tensors(ggI, ggG, ggB)
    loss = sum((a * b).sum() for a, b in zip(first, cotangents, strict=False) if b is not None)
    wanted = [t for t in (t_dy, t_x, t_weight) if t is not None]
    exact = [torch.zeros_like(t) for t in wanted]
    if not isinstance(loss, int) and loss.requires_grad:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        exact = [e if t is None else t for t, e in zip(found, exact, strict=True)]
    saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)[1:]
    ours = native_batch_norm_double_backward(ggI, ggG, ggB, dy, x, weight, mean, var, *saved, train, 1e-5)
    assert (ours[2] is None) == (weight is None)
    for a, e in zip(ours, exact, strict=False):
        close(a, e.numpy())


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_batch_norm_with_update"), reason="PyTorch 2.4 and newer have it")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_double_backward_is_that_of_the_operator(rng, shape, train):
    """`_batch_norm_with_update`, whose backward pass is an operator of its own. It needs a weight."""
    x, dy, ggI, weight, bias, mean, var, ggG, ggB = arguments(rng, shape, True)
    operator = torch.ops.aten._batch_norm_with_update if train else torch.ops.aten._batch_norm_no_update
    t_x, t_dy, t_weight, t_bias = (t.requires_grad_() for t in tensors(x, dy, weight, bias))
    y = operator(t_x, t_weight, t_bias, *tensors(mean, var), 0.1, 1e-5)[0]
    first = torch.autograd.grad(y, (t_x, t_weight, t_bias), t_dy, create_graph=True)
    loss = sum((a * b).sum() for a, b in zip(first, tensors(ggI, ggG, ggB), strict=True))
    exact = torch.autograd.grad(loss, (t_dy, t_x, t_weight))
    saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)[1:]
    ours = native_batch_norm_double_backward(ggI, ggG, ggB, dy, x, weight, mean, var, *saved, train, 1e-5)
    for a, e in zip(ours, exact, strict=True):
        close(a, e.numpy())


@pytest.mark.parametrize(
    ("affine", "given"),
    [(True, given) for given in list(itertools.product([True, False], repeat=3))[:-1]]
    + [(False, (True, False, False))],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_jvp_is_that_of_forward_mode(rng, shape, train, affine, given):
    x, _, x_t, weight, bias, mean, var, weight_t, bias_t = arguments(rng, shape, affine)
    x_t, weight_t, bias_t = (a if there else None for a, there in zip((x_t, weight_t, bias_t), given, strict=True))
    with torch.autograd.forward_ad.dual_level():
        duals = [
            t if tangent is None else torch.autograd.forward_ad.make_dual(t, tangent)
            for t, tangent in zip(tensors(x, weight, bias), tensors(x_t, weight_t, bias_t), strict=True)
        ]
        y = torch.native_batch_norm(*duals, *tensors(mean, var), train, 0.1, 1e-5)[0]
        exact = torch.autograd.forward_ad.unpack_dual(y).tangent
    saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)[1:]
    close(batch_norm_jvp(x_t, weight_t, bias_t, x, weight, bias, mean, var, *saved, train, 1e-5), exact.numpy())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradcheck_and_gradgradcheck(rng, shape, train, affine):
    x, _, _, weight, bias, mean, var, *_ = arguments(rng, shape, affine)
    inputs = [None if t is None else t.requires_grad_() for t in tensors(x, weight, bias)]

    def normalized(*inputs):
        return BatchNorm.apply(*inputs, mean.copy(), var.copy(), train)

    assert torch.autograd.gradcheck(normalized, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normalized, inputs)
