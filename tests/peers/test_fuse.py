"""Folding, checked by PyTorch's own convolutions and linear layers over random ones."""

import numpy as np
import pytest

import cbn

from . import peer

torch = peer("torch")

SPATIAL = {1: (19,), 2: (11, 9), 3: (7, 6, 5)}


def random_bn(rng, n):
    bn = cbn.BatchNorm(n, eps=10 ** rng.uniform(-8, -2)).eval()
    bn.weight[:], bn.bias[:], bn.running_mean[:] = rng.normal(size=(3, n))
    bn.running_var[:] = rng.uniform(0.05, 5, n)
    return bn


def as_torch(bn, rank):
    module = getattr(torch.nn, f"BatchNorm{max(rank, 1)}d")(bn.num_features, eps=bn.eps, dtype=torch.float64).eval()
    module.load_state_dict(cbn.to_torch_state(bn))
    return module.double()


def with_parameters(layer, weight, bias):
    """A copy of the layer with these parameters, in float64."""
    kwargs = {
        k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups", "output_padding") if hasattr(layer, k)
    }
    if isinstance(layer, torch.nn.Linear):
        copy = torch.nn.Linear(layer.in_features, layer.out_features)
    else:
        if not isinstance(layer, torch.nn.modules.conv._ConvTransposeNd):
            kwargs.pop("output_padding")
        copy = type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, **kwargs)
    copy = copy.double()
    with torch.no_grad():
        copy.weight.copy_(torch.from_numpy(weight))
        copy.bias.copy_(torch.from_numpy(bias))
    return copy


def assert_same(actual, expected):
    actual, expected = actual.detach().numpy(), expected.detach().numpy()
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


def parameters_of(layer):
    return layer.weight.detach().numpy(), None if layer.bias is None else layer.bias.detach().numpy()


@pytest.mark.parametrize("seed", range(30))
def test_convolutions(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rank, groups, transpose = 1 + seed % 3, int(rng.choice([1, 2, 4])), bool(rng.integers(2))
    n_in, n_out = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
    cls = getattr(torch.nn, f"Conv{'Transpose' if transpose else ''}{rank}d")
    kwargs = {
        "stride": int(rng.integers(1, 3)),
        "dilation": int(rng.integers(1, 3)),
        "padding": int(rng.integers(0, 2)),
    }
    conv = cls(n_in, n_out, int(rng.integers(1, 4)), groups=groups, bias=bool(rng.integers(2)), **kwargs)
    x = torch.from_numpy(rng.normal(size=(3, n_in, *SPATIAL[rank])))

    bn = random_bn(rng, n_out)
    folded = cbn.fuse_conv_bn(*parameters_of(conv), bn, transpose=transpose, groups=groups)
    assert folded[0].dtype == np.float32
    assert_same(with_parameters(conv, *folded)(x), as_torch(bn, rank)(conv.double()(x)))


@pytest.mark.parametrize("seed", range(15))
def test_a_batch_norm_before_a_convolution(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rank, groups = 1 + seed % 3, int(rng.choice([1, 2, 4]))
    n_in, n_out = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
    conv = getattr(torch.nn, f"Conv{rank}d")(n_in, n_out, 3, groups=groups, bias=bool(rng.integers(2)))
    x = torch.from_numpy(rng.normal(size=(3, n_in, *SPATIAL[rank])))
    bn = random_bn(rng, n_in)
    folded = cbn.fuse_bn_linear(bn, *parameters_of(conv), padding=conv.padding, groups=groups)
    assert_same(with_parameters(conv, *folded)(x), conv.double()(as_torch(bn, rank)(x)))


@pytest.mark.parametrize("seed", range(10))
def test_linear(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    linear = torch.nn.Linear(int(rng.integers(1, 30)), int(rng.integers(1, 30)), bias=bool(rng.integers(2)))
    x = torch.from_numpy(rng.normal(size=(8, linear.in_features)))
    after, before = random_bn(rng, linear.out_features), random_bn(rng, linear.in_features)
    first = cbn.fuse_linear_bn(*parameters_of(linear), after)
    second = cbn.fuse_bn_linear(before, *parameters_of(linear))
    assert_same(with_parameters(linear, *first)(x), as_torch(after, 0)(linear.double()(x)))
    assert_same(with_parameters(linear, *second)(x), linear(as_torch(before, 0)(x)))


def test_why_a_padded_convolution_is_refused(rng):
    """The border of what a fold would give is wrong, and only the border."""
    conv = torch.nn.Conv1d(2, 2, 3, padding=1).double()
    bn = random_bn(rng, 2)
    with pytest.raises(ValueError, match="cannot be folded into it: the zeros around the input stand behind the batch"):
        cbn.fuse_bn_linear(bn, *parameters_of(conv), padding=conv.padding)
    folded = with_parameters(conv, *cbn.fuse_bn_linear(bn, *parameters_of(conv), padding=0))
    x = torch.from_numpy(rng.normal(size=(1, 2, 9)))
    off = (folded(x) - conv(as_torch(bn, 1)(x))).abs().detach().numpy()[0]
    assert off[:, 1:-1].max() < 1e-6
    assert off[:, [0, -1]].max() > 1e-3
