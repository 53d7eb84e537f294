"""The examples: their numpy layers, the reader of CIFAR-10, and what each of them measures, at small settings."""

import csv
import pickle
import re
import runpy
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cbn

for package in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(
        package, reason="the examples need scikit-learn, matplotlib and tqdm: pip install -e '.[examples]'"
    )

from examples import __main__ as demo  # noqa: E402
from examples import (  # noqa: E402
    adaptation,
    binary_logits,
    digits_mlp,
    embed,
    federated,
    four_steps,
    layers,
    lengths,
    producer,
    recalibration,
    report,
    sequences,
    tiny_batches,
    training,
)

from .conftest import closed_pipe  # noqa: E402

SCRIPTS = Path(demo.__file__).parent
NAMES = (
    "__main__",
    "digits_mlp",
    "binary_logits",
    "four_steps",
    "sequences",
    "lengths",
    "producer",
    "recalibration",
    "tiny_batches",
    "adaptation",
    "embed",
    "federated",
    "ranks",
    "hosts/__main__",
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def png_size(path):
    """(width, height) out of the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def central_differences(f, a, h=1e-6):
    """The gradient of f() with respect to the array a, which f reads."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        value = a[i]
        a[i] = value + h
        above = f()
        a[i] = value - h
        below = f()
        a[i] = value
        gradient[i] = (above - below) / (2 * h)
    return gradient


# ---- layers --------------------------------------------------------------------------------------------------------

F64 = np.float64
MODELS = {
    "linear": ((5, 4), lambda rng: layers.Linear(4, 3, rng, F64)),
    "conv1d": ((3, 2, 6), lambda rng: layers.Conv1d(2, 3, 3, rng, F64)),
    "conv1d of 5": ((2, 2, 4), lambda rng: layers.Conv1d(2, 2, 5, rng, F64)),
    "conv2d": ((2, 2, 4, 3), lambda rng: layers.Conv2d(2, 3, 3, rng, F64)),
    "relu": ((4, 3), lambda rng: layers.ReLU()),
    "sigmoid": ((4, 3), lambda rng: layers.Sigmoid()),
    "flatten": ((2, 3, 2), lambda rng: layers.Flatten()),
    "cnn with batch norm": (
        (3, 1, 4, 4),
        lambda rng: layers.Sequential(
            layers.Conv2d(1, 2, 3, rng, F64),
            cbn.BatchNorm2d(2, dtype=F64),
            None,
            layers.ReLU(),
            layers.Conv2d(2, 2, 3, rng, F64),
            cbn.BatchNorm2d(2, dtype=F64),
            layers.ReLU(),
            layers.Flatten(),
            layers.Linear(32, 2, rng, F64),
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_layers(name, rng):
    shape, build = MODELS[name]
    layer = build(rng)
    x = rng.normal(size=shape)
    dy = rng.normal(size=layer(x).shape)

    def loss():
        return float(np.sum(layer(x) * dy))

    layer.zero_grad()
    layer(x)
    np.testing.assert_allclose(layer.backward(dy), central_differences(loss, x), rtol=1e-5, atol=1e-7)
    model = layer if isinstance(layer, layers.Sequential) else layers.Sequential(layer)
    for parameter, gradient in model.parameters():
        np.testing.assert_allclose(gradient, central_differences(loss, parameter), rtol=1e-5, atol=1e-7)
    once = [gradient.copy() for _, gradient in model.parameters()]
    layer(x)
    layer.backward(dy)
    for (_, gradient), value in zip(model.parameters(), once, strict=True):
        np.testing.assert_allclose(gradient, 2 * value)  # backward adds
    model.zero_grad()
    assert not any(gradient.any() for _, gradient in model.parameters())


def test_convolution_is_the_sum_over_the_window(rng):
    layer = layers.Conv2d(2, 3, 3, rng, F64)
    x = rng.normal(size=(2, 2, 4, 5))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = layer(x)
    assert y.shape == (2, 3, 4, 5)
    for n, o, i, j in np.ndindex(y.shape):
        window = padded[n, :, i : i + 3, j : j + 3]
        assert y[n, o, i, j] == pytest.approx(np.sum(window * layer.weight[o]) + layer.bias[o])


def test_initial_weights_are_pytorchs(rng):
    layer = layers.Linear(100, 500, rng)
    assert layer.weight.shape == (500, 100)
    assert layer.weight.dtype == np.float32
    for a in (layer.weight, layer.bias):
        assert 0.095 < np.abs(a).max() <= 0.1  # 1/sqrt(100)
    assert layer.weight.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.01)
    kernel = layers.Conv2d(4, 300, 3, rng).weight
    assert 0.95 / 6 < np.abs(kernel).max() <= 1 / 6  # 1/sqrt(4 * 3 * 3)


def test_gradients_of_losses(rng):
    z = rng.normal(size=(5, 3)) * 3
    labels = rng.integers(0, 3, 5)
    targets = rng.integers(0, 2, (5, 3)).astype(F64)
    p = rng.uniform(0.05, 0.95, (5, 3))
    for loss, a, t in (
        (layers.softmax_cross_entropy, z, labels),
        (layers.bce_with_logits, z, targets),
        (layers.bce, p, targets),
    ):
        np.testing.assert_allclose(
            loss(a, t)[1], central_differences(lambda f=loss, a=a, t=t: f(a, t)[0], a), rtol=1e-6
        )


def test_values_of_losses():
    assert layers.softmax_cross_entropy(np.zeros((2, 10), np.float32), np.array([3, 7]))[0] == pytest.approx(np.log(10))
    far = np.array([[1000.0, 0.0]], np.float32)
    assert layers.softmax_cross_entropy(far, np.array([0]))[0] == 0
    assert layers.softmax_cross_entropy(far, np.array([1]))[0] == 1000
    z, t = np.array([[-1000.0], [1000.0], [0.0]], np.float32), np.array([[0.0], [0.0], [1.0]], np.float32)
    loss, dz = layers.bce_with_logits(z, t)
    assert loss == pytest.approx((1000 + np.log(2)) / 3)
    np.testing.assert_allclose(dz[:, 0] * 3, [0, 1, -0.5])
    assert dz.dtype == np.float32
    np.testing.assert_array_equal(layers.sigmoid(z)[:, 0], [0, 1, 0.5])


def test_adam_is_the_textbooks():
    parameter, gradient = np.array([1.0, 1.0]), np.zeros(2)
    adam = layers.Adam([(parameter, gradient)], lr=0.1)
    p = m = v = np.zeros(2)
    p = p + 1
    for t in range(1, 6):
        gradient[...] = (t, -0.01 * t)
        adam.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(parameter, p, rtol=1e-12)


# ---- training and report -------------------------------------------------------------------------------------------


def test_minibatches_leave_out_a_single_sample(rng):
    sizes = [len(index) for index in training.minibatches(21, 10, rng)]
    assert sizes == [10, 10]
    batches = list(training.minibatches(27, 10, rng))
    assert [len(index) for index in batches] == [10, 10, 7]
    assert sorted(np.concatenate(batches)) == list(range(27))
    assert [training.n_batches(n, 10) for n in (20, 21, 22)] == [2, 2, 3]


def test_verdict_follows_the_numbers():
    def runs(train_loss, accuracy):
        return {
            "train_loss": np.array(train_loss)[:, None],
            "test_loss": np.array(train_loss)[:, None],
            "test_accuracy": np.array(accuracy)[:, None],
        }

    comparisons = training.compare("A", runs([1.0, 3.0], [0.9, 0.5]), runs([2.0, 2.0], [0.8, 0.4]))
    text = training.verdict(comparisons)
    assert "better on every seed in 1 of 3" in text
    lost = text.split("Where it does not win:")[1]
    assert (
        "- A, training loss: 2.000 ± 1.000 with, 2.000 ± 0.000 without; better on 1 and worse on 1 of 2 seeds" in lost
    )
    assert "accuracy" not in lost
    three = training.compare("B", runs([1, 1, 3.0], [0, 0, 0]), runs([2, 2, 2.0], [0, 0, 0]))
    assert "more seeds than it is worse:\n\n- B, training loss" in training.verdict(three)


def test_table_is_markdown():
    text = report.table(["name", "a"], [["x", 1], ["longer", "1.25"]])
    assert text.splitlines() == [
        "| name   |    a |",
        "|--------|-----:|",
        "| x      |    1 |",
        "| longer | 1.25 |",
    ]


# ---- digits_mlp ----------------------------------------------------------------------------------------------------


def test_digits_at_the_articles_settings(tmp_path, capsys):
    results = digits_mlp.run(digits_mlp.digits(), seeds=2, epochs=5, rates=(1e-4,))
    with_bn, without = results[1e-4, True], results[1e-4, False]
    assert with_bn["train_loss"].shape == (2, 5)
    assert with_bn["train_loss"][:, -1].mean() < without["train_loss"][:, -1].mean() - 0.2
    assert with_bn["test_accuracy"][:, -1].mean() > without["test_accuracy"][:, -1].mean() + 0.05
    assert np.all(np.diff(with_bn["train_loss"]) < 0)
    digits_mlp.show(results, tmp_path, "digits_mlp", "digits")
    text = capsys.readouterr().out
    assert (tmp_path / "digits_mlp.md").read_text(encoding="utf-8") in text
    assert "1.57 (1.57 to 1.61)" in text
    assert "1.65 (1.62 to 1.67)" in text
    assert training.mean_std(with_bn["train_loss"][:, -1]) in text
    width, height = png_size(tmp_path / "digits_mlp.png")
    assert width >= 1200
    assert height >= 400
    with open(tmp_path / "digits_mlp.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * 5
    assert float(rows[0]["value"]) == pytest.approx(with_bn["train_loss"][0, 0], rel=1e-5)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, which is how the files of CIFAR-10 are."""

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(content)) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def write_batch(path, content):
    with open(path, "wb") as file:
        Python2Pickler(file, 2).dump(content)
    # Numpy's module had another name then.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def batch(rng, n=7, **changes):
    content = {
        "batch_label": "a batch",
        "labels": [int(label) for label in rng.integers(0, 10, n)],
        "data": rng.integers(0, 256, (n, 3072)).astype(np.uint8),
        "filenames": [f"image_{i}.png" for i in range(n)],
    }
    return {**content, **changes}


@pytest.fixture
def cifar10(tmp_path, rng):
    """A folder like cifar-10-batches-py, of seven images a file; (folder, contents)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    contents = {name: batch(rng) for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    for name, content in contents.items():
        write_batch(folder / name, content)
    return folder, contents


def test_cifar10_is_read(cifar10):
    folder, contents = cifar10
    assert b"numpy.core.multiarray\n_reconstruct" in (folder / "test_batch").read_bytes()
    data = digits_mlp.cifar10(folder)
    assert data.x_train.shape == (35, 3072)
    assert data.x_train.dtype == np.float32
    expected = np.concatenate([contents[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    np.testing.assert_allclose(data.x_train, expected / 255, rtol=1e-6)
    np.testing.assert_allclose(data.x_test, contents["test_batch"]["data"] / 255, rtol=1e-6)
    assert list(data.y_test) == contents["test_batch"]["labels"]
    assert list(data.y_train[7:14]) == contents["data_batch_2"]["labels"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_batches_that_python3_wrote_are_read(tmp_path, rng, protocol, order):
    content = {key.encode(): value for key, value in batch(rng).items()}
    content[b"data"] = np.asarray(content[b"data"], order=order)
    (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol))
    x, labels = digits_mlp.read_batch(tmp_path / "batch")
    np.testing.assert_array_equal(x, content[b"data"])
    assert list(labels) == content[b"labels"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["data", "batch_label", "labels"])
def test_nothing_in_a_batch_is_run(tmp_path, rng, where):
    path, victim = tmp_path / "data_batch_1", tmp_path / "victim"
    evil = [Evil(victim)] * 7 if where == "labels" else Evil(victim)
    path.write_bytes(pickle.dumps({k.encode(): v for k, v in batch(rng, **{where: evil}).items()}, 3))
    assert pickle.loads(path.read_bytes())
    assert victim.exists()  # the file does what it threatens to do, where it is allowed to
    victim.unlink()
    with pytest.raises(
        ValueError, match=r"data_batch_1 is no batch of CIFAR-10: it asks for .*, which no such file needs"
    ):
        digits_mlp.read_batch(path)
    assert not victim.exists()


@pytest.mark.parametrize(("module", "name"), [("os", "system"), ("builtins", "eval"), ("numpy", "load")])
def test_names_that_are_refused(tmp_path, module, name):
    path = tmp_path / "data_batch_3"
    path.write_bytes(f"c{module}\n{name}\n(S'1'\ntR.".encode())
    with pytest.raises(ValueError, match=rf"data_batch_3 is no batch of CIFAR-10: it asks for {module}\.{name}"):
        digits_mlp.read_batch(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((7, 3071), np.uint8)}, r"b'data' has shape \(7, 3071\), expected \(n, 3072\)"),
        ({"data": np.zeros((7, 3072), np.float32)}, r"an array of type b'f4', expected u1"),
        ({"data": [1, 2, 3]}, r"expected a dict with an array b'data'"),
        ({"labels": [1, 2, 3]}, r"b'labels' must be a list of 7 labels"),
        ({"labels": [10] * 7}, r"b'labels' must be whole numbers from 0 to 9"),
        ({"labels": ["1"] * 7}, r"b'labels' must be whole numbers from 0 to 9"),
    ],
)
def test_batches_that_are_wrong(tmp_path, rng, changes, message):
    path = tmp_path / "data_batch_5"
    write_batch(path, batch(rng, **changes))
    with pytest.raises(ValueError, match="data_batch_5 is no batch of CIFAR-10: " + message):
        digits_mlp.read_batch(path)


def test_files_that_are_no_batches(tmp_path, rng):
    path = tmp_path / "test_batch"
    write_batch(path, batch(rng))
    whole = path.read_bytes()
    for content in (b"", b"not a pickle", whole[:1000], whole[:-1], pickle.dumps([1, 2])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="test_batch is no batch of CIFAR-10"):
            digits_mlp.read_batch(path)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is missing: expected data_batch_1 to data_batch_5"):
        digits_mlp.cifar10(tmp_path)


def test_cifar10_on_the_command_line(cifar10, tmp_path, capsys):
    digits_mlp.main(["--cifar10", str(cifar10[0]), "--seeds", "1", "--epochs", "1", "--out", str(tmp_path / "out")])
    assert "The MLP on CIFAR-10" in (tmp_path / "out" / "cifar10_mlp.md").read_text(encoding="utf-8")
    assert png_size(tmp_path / "out" / "cifar10_mlp.png")[0] > 1000
    with pytest.raises(SystemExit) as stopped:
        digits_mlp.main(["--cifar10", str(tmp_path)])
    assert stopped.value.code == 2
    assert "data_batch_1 is missing" in capsys.readouterr().err


# ---- binary_logits -------------------------------------------------------------------------------------------------


def test_arrangements_1_and_3_agree():
    assert max(binary_logits.agreement(np.float64)) < 1e-14
    assert 0 < max(binary_logits.agreement(np.float32)) < 1e-6


def test_plain_bce_breaks_where_the_probability_rounds():
    by_logit = {row[0]: row[1:] for row in binary_logits.saturation()}
    exact, p, unbounded, bounded, dz, through_p = by_logit[10]
    assert exact == pytest.approx(10 + np.log1p(np.exp(-10)), rel=1e-6)
    assert unbounded == bounded == pytest.approx(exact, rel=1e-3)
    assert dz == pytest.approx(through_p, rel=1e-3) == pytest.approx(p)
    assert by_logit[50] == [50, 1, np.inf, 100, 1, 0]
    assert by_logit[150] == [150, 1, np.inf, 100, 1, 0]


def test_binary_classifier(tmp_path, capsys):
    assert np.all(binary_logits.lost_gradients(5, True) == 0)
    assert np.max(binary_logits.lost_gradients(5, False)) > 0.2
    binary_logits.main(["--seeds", "2", "--epochs", "4", "--out", str(tmp_path)])
    assert "float64" in capsys.readouterr().out
    results = binary_logits.run(seeds=1, epochs=4)
    assert len(results) == 12
    first, third = (results["standardized", a, True] for a in (1, 3))
    np.testing.assert_allclose(first["train_loss"], third["train_loss"], atol=1e-6)
    np.testing.assert_allclose(first["test_loss"], third["test_loss"], atol=5e-3)
    assert first["test_accuracy"][0, -1] > 0.9
    for name in ("binary_logits.png", "binary_logits_saturation.png"):
        assert png_size(tmp_path / name)[0] > 1000


# ---- four_steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [cbn.BatchNorm1d, cbn.BatchNorm2d])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 5e-7)])
def test_steps_by_hand_are_cbns(layer, dtype, tolerance):
    batches = four_steps.wine_batches() if layer is cbn.BatchNorm1d else four_steps.image_batches()
    steps = four_steps.compare_steps(layer, batches, dtype)
    assert {step for step, _ in steps} == {"1 normalize", "2 scale and shift", "3 gradients", "4 inference"}
    for by_hand, ours in steps.values():
        assert by_hand.shape == ours.shape
        assert four_steps.relative_difference(by_hand, ours) < tolerance
    x_hat = steps["1 normalize", "x̂"][1]
    axes = (0, *range(2, x_hat.ndim))
    np.testing.assert_allclose(x_hat.mean(axis=axes), 0, atol=1e-6)
    np.testing.assert_allclose(x_hat.std(axis=axes), 1, atol=1e-3)


def test_running_variances():
    variances = four_steps.running_variances()
    assert variances["biased"] == pytest.approx((1.3, 1.3))
    assert variances["unbiased"] == pytest.approx((1.7, 1.7))


def test_cnn_learns_faster_with_batch_norm(tmp_path, capsys):
    results = four_steps.run(seeds=1, epochs=1, rates=(1e-3,))
    assert results[1e-3, True]["train_loss"][0, 0] < results[1e-3, False]["train_loss"][0, 0] - 0.5
    four_steps.show(results, tmp_path)
    text = capsys.readouterr().out
    assert "| biased, as in the article |     1.3 | 1.3 |" in text
    assert "| unbiased, as in PyTorch   |     1.7 | 1.7 |" in text
    for name in ("four_steps.png", "four_steps_cnn.png"):
        assert png_size(tmp_path / name)[0] > 1000


# ---- sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", sequences.SHAPES)
def test_three_shapes(shape):
    seen = sequences.demonstrate(shape)
    x, y = seen["x"], seen["y_train"]
    assert y.shape == shape
    assert seen["gamma"].shape == seen["beta"].shape == (shape[1],)
    np.testing.assert_allclose(y, sequences.normalized_by_hand(x, 0), atol=1e-6)
    assert np.max(np.abs(y - sequences.normalized_by_hand(x, 1))) > 5e-3
    mean, var = seen["after_train"]
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=(0, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, 0.9 + 0.1 * x.var(axis=(0, 2), ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(mean, seen["after_eval"][0])
    np.testing.assert_array_equal(var, seen["after_eval"][1])
    by_hand = (x - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
    np.testing.assert_allclose(seen["y_eval"], by_hand, atol=1e-6)


def test_evaluation_settles():
    x, train, once, often = sequences.settle().values()
    means = [np.abs(a.mean(axis=(0, 2))) for a in (x, train, once, often)]
    assert np.all(means[0] > 1.5)
    assert np.all(means[1] < 1e-6)
    assert np.all(means[2] > 1)
    assert np.all(means[3] < 0.3)


def test_sequence_cnn(tmp_path, capsys):
    results = sequences.run(seeds=1, epochs=1, rates=(1e-3,), batches=(8, 32))
    for b in (8, 32):
        assert results[1e-3, b, True]["train_loss"][0, 0] < results[1e-3, b, False]["train_loss"][0, 0]
    sequences.show(results, tmp_path)
    assert "### (8, 3, 15)" in capsys.readouterr().out
    for name in ("sequences.png", "sequences_cnn.png"):
        assert png_size(tmp_path / name)[0] > 1000


# ---- recalibration -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged():
    """The digits and a network of averaged weights, by type."""

    def of(dtype):
        data = digits_mlp.digits()
        data.x_train, data.x_test = data.x_train.astype(dtype), data.x_test.astype(dtype)
        return data, recalibration.train(data, seed=0, epochs=2)[1]

    return {dtype: of(dtype) for dtype in (np.float64, np.float32)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_recalibrated_statistics_are_those_of_one_array(averaged, dtype, tolerance):
    data, model = averaged[dtype]
    orders = recalibration.orders(data, np.random.default_rng(0))
    assert [len(x[-1]) for x in orders.values()] == [29, 2, 29]
    for words, batches in orders.items():
        assert sum(map(len, batches)) == len(data.x_train)
        found = recalibration.compare(model, batches, data)
        for way in ("recalibrate", "recalibrate, layer by layer"):
            assert max(found[way][2:]) < tolerance
        assert found["update_bn"][3] > (0.01 if words.startswith("shuffled") else 0.3)
    losses = [
        recalibration.compare(model, batches, data)["recalibrate, layer by layer"][1] for batches in orders.values()
    ]
    assert np.ptp(losses) < tolerance  # in any order


def test_ways_are_compared_from_one_network(averaged):
    data, model = averaged[np.float32]
    before = [bn.state_dict() for bn in recalibration.batch_norms(model)]
    recalibration.compare(model, [data.x_train[:100], data.x_train[100:]], data)
    for bn, state in zip(recalibration.batch_norms(model), before, strict=True):
        np.testing.assert_array_equal(bn.running_var, state["running_var"])
        assert bn.momentum == 0.1


def test_average_of_networks():
    models = [digits_mlp.network(3, True, np.random.default_rng(seed)) for seed in range(3)]
    mean = recalibration.average(models)
    for (found, _), *pairs in zip(*(model.parameters() for model in (mean, *models)), strict=True):
        np.testing.assert_allclose(found, np.mean([p for p, _ in pairs], axis=0), rtol=1e-5, atol=1e-8)


def test_standard_errors_say_how_far_few_batches_are_off(averaged, tmp_path, capsys):
    data, model = averaged[np.float32]
    rng = np.random.default_rng(0)
    few, many = ([recalibration.draw_batches(model, data, count, rng) for _ in range(10)] for count in (8, 64))
    for quantity in recalibration.QUANTITIES:
        means = {
            (kind, draws is many): np.mean([one[f"{kind} {quantity}"] for one in draws])
            for kind in ("reported", "actual")
            for draws in (few, many)
        }
        for of_many in (False, True):
            assert means["reported", of_many] == pytest.approx(means["actual", of_many], rel=0.3)
        assert means["reported", False] / means["reported", True] == pytest.approx(np.sqrt(8), rel=0.2)
    recalibration.main(["--seeds", "1", "--epochs", "1", "--draws", "1", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert rows == [7] * (2 + 2 + 9 + 2 + len(recalibration.COUNTS))
    assert png_size(tmp_path / "recalibration.png")[0] > 1000


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_padding_is_nothing_to_a_network_with_lengths(rng):
    """Outputs and gradients, in training and evaluation, for any padding; over the padding too they differ."""
    data = lengths.written_digits()
    assert {int(n) for n in np.count_nonzero(~np.isnan(data.x_train[:, 0]), axis=1)} == {8, 16, 24, 32}
    x, y = data.x_train[:16], data.y_train[:16]
    found = {}
    for norm in lengths.COLORS:
        for length in (None, 64):
            network = lengths.Network(norm, length, np.random.default_rng(0))
            z = network(x)
            network.backward(layers.softmax_cross_entropy(z, y)[1])
            gradients = [gradient.copy() for _, gradient in network.parameters()]
            found[norm, length] = [z, *gradients, network.eval()(x)]
    for norm in lengths.COLORS:
        alike = [
            np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[norm, None], found[norm, 64], strict=True)
        ]
        assert all(alike) == (norm != lengths.PLAIN), norm


def test_gradients_of_padded_sequences(rng):
    """Against differences, of a network in float64."""
    x, labels = lengths.written_digits().x_train[:6].astype(F64), np.arange(6)
    network = lengths.Network(lengths.MASKED, None, rng)
    for layer in network.layers:
        singles = [name for name, v in vars(layer).items() if getattr(v, "dtype", None) == np.float32]
        vars(layer).update({name: vars(layer)[name].astype(F64) for name in singles})
    value = network.layers[-1].weight
    network.zero_grad()
    network.backward(layers.softmax_cross_entropy(network(x), labels)[1])
    wanted = central_differences(lambda: layers.softmax_cross_entropy(network(x), labels)[0], value[:2, :3], 1e-3)
    np.testing.assert_allclose(network.layers[-1].weight_grad[:2, :3], wanted, rtol=1e-3, atol=1e-4)


def test_lengths(tmp_path, capsys):
    results = lengths.run(seeds=1, epochs=3, batches=(16,))
    assert len(results) == 6
    loss = {key: metrics["test_loss"][0, -1] for key, metrics in results.items()}
    for padding in lengths.PADDED:
        assert loss[padding, 16, lengths.MASKED] < loss[padding, 16, lengths.WITHOUT] - 0.2
    lengths.show(results, tmp_path)
    text = capsys.readouterr().out
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [8] * (2 + len(results))
    assert png_size(tmp_path / "lengths.png")[0] > 500


# ---- producer ------------------------------------------------------------------------------------------------------


def test_producer(tmp_path, capsys):
    results = producer.run(rounds=1, widths=(96, 256))
    for times in results.values():
        assert float(times["difference"]) < 1e-5
        assert all(times[key] > 0 for key in times if key != "difference")
    producer.show(results, tmp_path, 1)
    text = capsys.readouterr().out
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [8] * (2 + len(results))
    assert png_size(tmp_path / "producer.png")[0] > 500


# ---- tiny_batches --------------------------------------------------------------------------------------------------


def test_bounds_widen():
    bounds = tiny_batches.widening(100)
    assert [bounds(n) for n in (0, 100, 200, 300, 1000)] == [(1, 0), (1, 0), (2, 2.5), (3, 5), (3, 5)]


def test_tiny_batches(tmp_path, capsys):
    results = tiny_batches.run(seeds=1, epochs=2)
    assert len(results) == 4 + 4 + 3
    loss = {key: metrics["test_loss"][0, -1] for key, metrics in results.items()}
    for words in (tiny_batches.WITHOUT, tiny_batches.RENORM):
        assert loss[2, words] < loss[2, tiny_batches.PLAIN] - 0.2
    assert loss[4, tiny_batches.RENORM] < loss[4, tiny_batches.PLAIN]
    assert loss[256, tiny_batches.PLAIN] < loss[256, tiny_batches.WITHOUT]
    one_epoch = [results[4, words]["test_loss"][0, 0] for words in (tiny_batches.SLOW, tiny_batches.RENORM)]
    assert one_epoch[0] == pytest.approx(one_epoch[1], rel=1e-3)  # bounds of (1, 0) are plain batch norm
    tiny_batches.show(results, tmp_path)
    text = capsys.readouterr().out
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [7] * (2 + len(results))
    assert "1 of 1" in text
    assert png_size(tmp_path / "tiny_batches.png")[0] > 1000


# ---- adaptation ----------------------------------------------------------------------------------------------------


def test_shifts(rng):
    x = np.zeros((2, 64), np.float32)
    x[0, 0] = x[1, 27] = 9  # a corner, and row 3, column 3
    blurred = adaptation.blur(x, 1, rng).reshape(2, 8, 8)
    np.testing.assert_allclose(blurred[0, :2, :2], 1, rtol=1e-6)
    np.testing.assert_allclose(blurred[1, 2:5, 2:5], 1, rtol=1e-6)
    np.testing.assert_allclose(blurred.sum(axis=(1, 2)), [4, 9], rtol=1e-6)
    for shift, strength in adaptation.SHIFTS.values():
        y = shift(x, strength, rng)
        assert y.shape == x.shape
        assert y.dtype == np.float32
    assert set(adaptation.DRAWN) <= set(adaptation.SHIFTS)


def test_a_mixture_is_a_population_of_both(rng):
    """Equal parts of a training set and a batch: a = 0.5 is the statistics of one array of both."""
    training_set, batch = rng.normal(0, 1, (500, 3)), rng.normal(2, 3, (500, 3))
    bn = cbn.BatchNorm1d(3, dtype=F64, running_var="biased").eval()
    bn.set_running_moments(cbn.moments(training_set))
    both = np.concatenate([training_set, batch])
    expected = (batch - both.mean(axis=0)) / np.sqrt(both.var(axis=0) + bn.eps)
    np.testing.assert_allclose(bn(batch, mix=0.5), expected, rtol=1e-12, atol=1e-12)
    without = (training_set.var(axis=0) + batch.var(axis=0)) / 2
    model = layers.Sequential(lambda x: x, bn)
    assert adaptation.understated(model, batch) == pytest.approx(np.mean(both.var(axis=0) / without), rel=1e-12)


def test_adaptation(tmp_path, capsys):
    results, factors = adaptation.run(seeds=1, epochs=5)
    assert len(results) == 3 * len(adaptation.SHIFTS)
    accuracy = {key: dict(zip(adaptation.MIXES, values[0], strict=True)) for key, values in results.items()}
    big = {words: accuracy[adaptation.BIG, words] for words in adaptation.SHIFTS}
    for words in ("contrast × 0.1", "brightness + 1"):
        assert big[words][0] < 0.7
        assert big[words][1] == pytest.approx(big["clean"][1], abs=0.02)  # a = 1 undoes them
    for batches in (adaptation.SMALL, adaptation.SORTED):
        assert accuracy[batches, "clean"][1] < accuracy[batches, "clean"][0] - 0.02
    assert all(values.min() >= 1 for values in factors.values())
    assert factors["brightness + 1"].mean() > 1.5
    adaptation.show(results, factors, tmp_path)
    text = capsys.readouterr().out
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert rows == [7] * (2 * (2 + len(adaptation.SHIFTS)) + 2 + len(adaptation.DRAWN))
    assert png_size(tmp_path / "adaptation.png")[0] > 1000


# ---- embed ---------------------------------------------------------------------------------------------------------


def test_pipeline_that_embeds_cbn(tmp_path, capsys):
    found = embed.run(seconds=60, repeats=2)
    assert found["x"].shape == (90, embed.WINDOW, 6)
    assert all(found["same bits"][name] for name in ("cbn", "cbn threads", "cbn openmp"))
    assert found["same bits from the view"]
    assert all(found["difference"][name] < 1e-6 for name in ("cbn", "cbn threads", "cbn openmp"))
    assert found["features"].shape == (90, 12)
    np.testing.assert_allclose(found["features"][:, :6], found["y"].mean(axis=1))
    embed.show(found, tmp_path)
    assert "cbn, 4 Python threads" in capsys.readouterr().out
    assert png_size(tmp_path / "embed.png")[0] > 1000


def test_stored_statistics_are_those_of_all_windows(tmp_path):
    x = embed.windows(embed.sensor_signal(30))
    assert x.base is not None
    assert x.shape[1:] == (embed.WINDOW, 6)
    embed.store_layer(x, tmp_path / "bn.npz", batch=10)
    bn = cbn.load(tmp_path / "bn.npz")
    assert not bn.training
    assert bn.channel_axis == -1
    wide = x.astype(np.float64)
    np.testing.assert_allclose(bn.running_mean, wide.mean(axis=(0, 1)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bn.running_var, wide.var(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(embed.sensor_signal(30), embed.sensor_signal(30))


# ---- all of them ---------------------------------------------------------------------------------------------------


def test_demo(tmp_path, capsys):
    demo.main(["--quick", "--out", str(tmp_path)])
    for example in demo.EXAMPLES:
        name = example.__name__.split(".")[-1]
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8").count("\n|") > 4
        assert png_size(tmp_path / f"{name}.png")[0] > 1000
    assert f"[{len(demo.EXAMPLES)}/{len(demo.EXAMPLES)}]" in capsys.readouterr().err


def test_pictures_leave_matplotlib_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.draw(tmp_path / "a.png", lambda figure, axes: axes[0, 0].plot([1, 2]), size=(2, 2))
    assert dict(matplotlib.rcParams) == before
    assert png_size(tmp_path / "a.png") == (300, 300)


def test_a_script_runs_by_itself(tmp_path):
    ran = subprocess.run(
        [sys.executable, SCRIPTS / "embed.py", "--seconds", "20", "--repeats", "1", "--out", tmp_path / "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith("# cbn inside a feature pipeline")
    assert "sensor windows: 100%" in ran.stderr
    assert (tmp_path / "out" / "embed.png").exists()


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (sequences, ["--batches", "1"], "batch norm needs two samples"),
        (embed, ["--seconds", "11"], "each half must hold four windows"),
        (four_steps, ["--epochs", "0"], "must be 1 or more, not 0"),
    ],
)
def test_arguments_that_are_refused(example, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- federated -----------------------------------------------------------------------------------------------------


def test_federated(tmp_path, capsys):
    federated.main(["--seeds", "1", "--rounds", "2", "--out", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == list(federated.WORDS)
    losses, errors = ([float(row[i].split()[0]) for row in rows] for i in (1, 3))
    assert errors[2] < 1e-6 < errors[0]  # the moments that clients measured are those of all data
    assert losses[2] < min(losses[:2])
    assert png_size(tmp_path / "federated.png")[0] > 1000


def test_the_server_refuses_what_is_no_message():
    server, client = socket.socketpair()
    with server, client:
        client.sendall(struct.pack("<Q", 1 << 40))
        with pytest.raises(ValueError, match="a message of 1099511627776 bytes; expected 67108864 at most"):
            federated.receive(server)
        federated.send(client, [np.arange(3)], 5, {"moments": b"no moments"})
        arrays, count, metrics = federated.receive(server)
        assert (arrays[0].tolist(), count) == ([0, 1, 2], 5)
        with pytest.raises(ValueError, match="do not begin as those of"):
            federated.moments_of([[metrics["moments"]]])
        client.sendall(b"\0\0")
        client.close()
        with pytest.raises(ConnectionError, match="the other side has hung up"):
            federated.receive(server)


@pytest.mark.parametrize("script", NAMES)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert stopped.value.code == 0
    assert "--out DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [("examples", "--help"), ("examples.embed", "--seconds", "20", "--repeats", "1"), ("examples.hosts", "--quick")],
)
def test_examples_end_at_a_closed_pipe(tmp_path, arguments):
    done = closed_pipe(*arguments, "--out", str(tmp_path))
    assert done.returncode == 141
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", NAMES)
def test_examples_name_the_extra_of_a_missing_package(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv[0] = {str(SCRIPTS / script)!r} + ".py"
sys.path[0] = {str(SCRIPTS)!r}
sys.modules["sklearn"] = sys.modules["tqdm"] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    last = ran.stderr.splitlines()[-1]
    assert last == (
        f"ModuleNotFoundError: the examples need scikit-learn, tqdm: pip install -e '{SCRIPTS.parent}[examples]'"
    )


def test_the_readmes_commands_work(monkeypatch, capsys):
    """Each script that it names takes the options that it names."""
    block = (SCRIPTS / "README.md").read_text().split("```")[1]
    commands = re.findall(r"\bpython (-m )?(\S+)(.*)", block)
    assert len(commands) == block.count("python ") >= 4
    for module, name, rest in commands:
        path = SCRIPTS.parent / (f"{name}/__main__.py" if module else name)
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
        text = capsys.readouterr().out
        for option in re.findall(r"--[a-z0-9-]+", rest):
            assert option in text, f"{name} {option}"
