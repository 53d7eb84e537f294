"""The example that serves a PyTorch network: the same answers in every form and from any number of threads."""

import csv
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cbn

from . import peer

torch = peer("torch")
for package in ("sklearn", "matplotlib", "tqdm"):
    peer(package)

from cbn.batchnorm import EvalPlan  # noqa: E402
from examples import __main__ as demo  # noqa: E402
from examples import digits_mlp, pipeline  # noqa: E402
from examples.training import Data  # noqa: E402

ROOT = Path(pipeline.__file__).resolve().parents[1]
SHORT = ["--epochs", "1", "--rounds", "1", "--milliseconds", "2"]
WAYS = {
    "folded and fused": {},
    "fused": {"fold": ("head",)},
    "layer by layer": {"fold": (), "norm": pipeline.Apart},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread_each():
    with pipeline.one_thread_each():
        yield


@pytest.fixture(scope="module")
def images():
    return digits_mlp.digits().x_test.reshape(-1, 8, 8, 1)


@pytest.fixture(scope="module")
def net():
    """Statistics and parameters of the batch norms are far from 0 and 1, so that a slip in any of them shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = pipeline.network()
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eps = 0.1
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 3)
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    return net


def in_torch(net, x):
    with torch.inference_mode():
        return net(torch.from_numpy(np.ascontiguousarray(x)).reshape(-1, 1, 8, 8)).numpy()


def error(y, exact):
    return np.abs(y - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_pytorchs(net, images, way, batch):
    serve = pipeline.Server(net, **WAYS[way])
    x = images[:batch]
    before = x.copy()
    for _ in range(2):  # plans are made at the first call
        y = serve(x)
        assert y.shape == (batch, 10)
        assert y.dtype == np.float32
        assert error(y, in_torch(net, x)) < 1e-5
    np.testing.assert_array_equal(x, before)


def test_answers_after_training(images):
    whole = digits_mlp.digits()
    few = Data(whole.x_train[:192], whole.y_train[:192], whole.x_test, whole.y_test)
    state = torch.random.get_rng_state()
    net = pipeline.train(few, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not net.training
    assert int(net.stem_bn.num_batches_tracked) == 6
    assert error(pipeline.Server(net)(images), in_torch(net, images)) < 1e-5


def test_training_learns(images):
    data = digits_mlp.digits()
    net = pipeline.train(data, epochs=2)
    assert np.mean(in_torch(net, images).argmax(axis=1) == data.y_test) > 0.9


def test_forms(net):
    forms = {way: pipeline.Server(net, **settings).forms() for way, settings in WAYS.items()}
    assert list(forms["fused"].values()) == ["fused", "fused", "fused", "fused", "folded"]
    assert set(forms["layer by layer"].values()) == {"apart"}
    assert forms["folded and fused"] == dict(stem="folded", first="folded", second="fused", last="fused", head="folded")
    assert list(forms["folded and fused"]) == list(pipeline.PARTS)


def test_folded_weights_and_fused_passes_are_used(net, images, monkeypatch):
    serve = pipeline.Server(net)
    weight, bias = cbn.fuse_conv_bn(
        net.first.weight.detach().numpy(), None, cbn.from_torch(net.first_bn), flush_subnormals=False
    )
    np.testing.assert_array_equal(serve.first.matrix, weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)))
    np.testing.assert_array_equal(serve.first.bias, bias)
    weight, bias = cbn.fuse_bn_linear(cbn.from_torch(net.head_bn), *pipeline.arrays(net.head))
    np.testing.assert_array_equal(serve.head_weight, weight)
    np.testing.assert_array_equal(serve.head_bias, bias)

    passes = []

    def counted(self, *args, **kwargs):
        passes.append(kwargs.get("residual") is not None)
        return fused(self, *args, **kwargs)

    fused = pipeline.Fused.__call__
    monkeypatch.setattr(pipeline.Fused, "__call__", counted)
    serve(images[:2])
    assert passes == [True, False]  # the end of the residual block, the start of the pre-activation
    for norm in (serve.second_end, serve.last_start):
        assert norm.bn.activation == "relu"
        assert list(norm.plans) == [(2, 8, 8, 16)]
        assert isinstance(norm.plans[2, 8, 8, 16], EvalPlan)


def test_a_fused_pass_is_one_in_place(net):
    rng = np.random.default_rng(0)
    y, skip = rng.normal(size=(2, 2, 8, 8, 16)).astype(np.float32)
    bn = pipeline.channels_last(net.second_bn)
    expected = np.maximum(bn(y) + skip, 0)
    apart = pipeline.Apart(net.second_bn)(y.copy(), residual=skip)
    norm = pipeline.Fused(net.second_bn)
    fused = norm(y, residual=skip)
    assert fused is y
    np.testing.assert_array_equal(apart, expected)
    np.testing.assert_allclose(fused, expected, atol=1e-5)
    assert (fused == 0).any()


def test_padded_convolutions_cannot_take_a_batch_norm_before_them(net):
    with pytest.raises(ValueError, match="cannot be folded"):
        cbn.fuse_bn_linear(cbn.from_torch(net.last_bn), *pipeline.arrays(net.last), padding=1)


def test_convolution_is_pytorchs(net):
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 16)).astype(np.float32)
    y = pipeline.Convolution(*pipeline.arrays(net.last))(x)
    with torch.inference_mode():
        expected = net.last(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert y.flags.c_contiguous
    assert error(y, expected) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_four_threads_give_the_bits_of_one(net, images, way):
    requests = [images[start : start + n] for n in (1, 5, 32) for start in range(0, 8 * n, n)] * 4
    expected = pipeline.answers(pipeline.Server(net, **WAYS[way]), requests, 1)
    together = pipeline.answers(pipeline.Server(net, **WAYS[way]), requests, 4)  # a new one: plans are made meanwhile
    assert len(together) == len(requests)
    for a, b, x in zip(together, expected, requests, strict=True):
        assert len(a) == len(x)
        np.testing.assert_array_equal(a, b)


def test_the_server_needs_no_pytorch(net, images, tmp_path):
    serve = pipeline.Server(net)
    (tmp_path / "server").write_bytes(pickle.dumps(serve))
    (tmp_path / "torch.py").write_text("raise ImportError('the server asked for PyTorch')")
    np.save(tmp_path / "images.npy", images[:32])
    (tmp_path / "serve.py").write_text(
        f"""
import pickle, sys
sys.path.append({str(ROOT)!r})
import numpy as np
with open("server", "rb") as file:
    np.save("logits.npy", pickle.load(file)(np.load("images.npy")))
"""
    )
    subprocess.run([sys.executable, "serve.py"], cwd=tmp_path, check=True)
    assert error(np.load(tmp_path / "logits.npy"), serve(images[:32])) < 1e-6


def test_onnx_runtime_serves_the_same(net, images):
    pytest.importorskip("onnxruntime", reason=f"onnxruntime is not installed: {pipeline.PEERS}")
    ways, absent = pipeline.contenders(net)
    if absent:
        pytest.skip(absent)
    for n in (1, 7):
        assert error(ways["ONNX Runtime"](images[:n]), in_torch(net, images[:n])) < 1e-5


def test_without_onnx_runtime(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ways, absent = pipeline.contenders(net)
    assert "ONNX Runtime" not in ways
    assert absent.startswith("ONNX Runtime is absent: ModuleNotFoundError: import of onnxruntime halted")


def test_a_turn_measures(images):
    sent = []
    result = pipeline.turn(lambda x: sent.append(len(x)), images[:3], threads=2, seconds=0.02)
    assert set(sent) == {3}
    assert 0 < result["p50"] <= result["p99"] < 2e4
    assert result["images/s"] > 0
    assert result["cores"] > 0


def test_what_is_ahead_follows_the_numbers():
    def column(p50, rate):
        return {"p50": p50, "images/s": rate}

    served, other = pipeline.SERVED, "other"
    even = {
        (b, t, name): column(10.0, 5.0) for b in pipeline.BATCHES for t in pipeline.THREADS for name in (served, other)
    }
    assert pipeline.ahead(even, [served, other]).endswith(": none.")
    lines = pipeline.ahead(
        even | {(1, 1, other): column(5.0, 1.0), (32, 4, other): column(99.0, 10.0)}, [served, other]
    )
    assert lines.splitlines()[2:] == [
        "- 1 image a request, shorter latency in 1 thread: other (0.50×)",
        "- 32 images a request, more images/s from 4 threads: other (2.00×)",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_main_writes_what_it_found(tmp_path, capsys, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    threads = torch.get_num_threads()
    pipeline.main([*SHORT, "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert (tmp_path / "pipeline.md").read_text(encoding="utf-8") in text
    assert text.count("\n|") > 20
    assert "from 4 threads at once as from one: yes." in text
    assert ("ONNX Runtime is absent" in text) >= (not installed)
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "pipeline.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {row["contender"] for row in rows}
    assert names >= {pipeline.SERVED, "cbn, fused", "cbn, layer by layer", "PyTorch"}
    assert len(rows) == len(names) * 4
    assert all(0 < float(row["p50_us"]) <= float(row["p99_us"]) for row in rows)


def test_without_pytorch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"^examples/pipeline\.py [^\n]*: " + re.escape(pipeline.PEERS)):
        pipeline.main([])
    with pytest.raises(SystemExit) as stopped:
        pipeline.main(["--help"])
    assert stopped.value.code == 0
    assert "--milliseconds N" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_demo_with_and_without_pytorch(tmp_path, monkeypatch, capsys, installed):
    monkeypatch.setattr(demo, "EXAMPLES", {})
    if not installed:
        monkeypatch.setitem(sys.modules, "torch", None)
    demo.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "pipeline.md").exists() == installed
    err = capsys.readouterr().err
    assert ("left out" in err) == (not installed)
    assert "everything above is in" in err
