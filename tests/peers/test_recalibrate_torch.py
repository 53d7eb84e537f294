"""recalibrate beside PyTorch's update_bn, which averages over batches."""

import copy

import numpy as np
import pytest

from . import peer

torch = peer("torch")

import cbn  # noqa: E402


def pair(convention="unbiased"):
    """A network of two batch norms, of PyTorch and of cbn: (model, its layers, forward)."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
    ).double()
    weight, bias = (p.detach().numpy() for p in theirs[2].parameters())
    ours = [cbn.BatchNorm1d(n, dtype=np.float64, running_var=convention) for n in (4, 3)]
    return theirs, ours, lambda x: ours[1](np.maximum(ours[0](x), 0) @ weight.T + bias)


def draw(sizes):
    rng = np.random.default_rng(0)
    return [rng.normal(i, 1 + i, (n, 4)) for i, n in enumerate(sizes)]


def inputs_of(model, batches):
    """All inputs of both norms in training mode, each as one array."""
    model, seen = copy.deepcopy(model).train(), ([], [])
    for layer, found in zip((model[0], model[3]), seen, strict=True):
        layer.register_forward_pre_hook(lambda module, args, found=found: found.append(args[0].detach().numpy()))
    for x in batches:
        model(torch.from_numpy(x))
    return [np.concatenate(found) for found in seen]


def update(model, batches):
    torch.optim.swa_utils.update_bn([torch.from_numpy(x) for x in batches], model)
    return model[0], model[3]


@pytest.mark.parametrize("sizes", [(32,) * 6, (32, 32, 32, 5)], ids=["equal", "uneven"])
def test_the_statistics_are_those_of_all_data(sizes):
    theirs, ours, forward = pair()
    batches = draw(sizes)
    cbn.recalibrate(ours, batches, forward=forward)
    for layer, x in zip(ours, inputs_of(theirs, batches), strict=True):
        np.testing.assert_allclose(layer.running_mean, x.mean(axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(layer.running_var, x.var(axis=0, ddof=1), rtol=1e-12)


def test_means_of_equal_batches_are_those_of_update_bn():
    theirs, ours, forward = pair()
    batches = draw((32,) * 6)
    cbn.recalibrate(ours, batches, forward=forward)
    for layer, expected in zip(ours, update(theirs, batches), strict=True):
        np.testing.assert_allclose(layer.running_mean, expected.running_mean.numpy(), rtol=1e-10, atol=1e-13)
        assert layer.num_batches_tracked == expected.num_batches_tracked


def test_update_bn_lacks_the_variance_between_the_batches():
    theirs, ours, forward = pair()
    batches = draw((32,) * 6)
    cbn.recalibrate(ours, batches, forward=forward)
    expected = np.concatenate(batches).var(axis=0, ddof=1)
    np.testing.assert_allclose(ours[0].running_var, expected, rtol=1e-12)
    assert np.all(update(theirs, batches)[0].running_var.numpy() < 0.95 * expected)


def test_update_bn_is_off_for_uneven_batches():
    """A small last batch has the weight of a full one in it."""
    theirs, ours, forward = pair()
    batches = draw((32, 32, 32, 5))
    cbn.recalibrate(ours, batches, forward=forward)
    expected = np.concatenate(batches).mean(axis=0)
    np.testing.assert_allclose(ours[0].running_mean, expected, rtol=1e-12)
    assert np.all(np.abs(update(theirs, batches)[0].running_mean.numpy() - expected) > 0.1)


def test_evaluation_in_pytorch_with_the_statistics(rng):
    """The state goes over: PyTorch evaluates with it as cbn does."""
    theirs, ours, forward = pair()
    batches = draw((32, 32, 5))
    cbn.recalibrate(ours, batches, forward=forward)
    for module, layer in zip((theirs[0], theirs[3]), ours, strict=True):
        module.load_state_dict(cbn.to_torch_state(layer))
        layer.eval()
    theirs.eval()
    x = rng.standard_normal((7, 4))
    np.testing.assert_allclose(forward(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-10, atol=1e-12)
