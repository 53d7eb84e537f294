"""save and load: round trips, foreign files, and that nothing is ever unpickled."""

import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import cbn
from cbn.storage import ARRAYS, HEADER


def layer(rng, **kwargs):
    bn = cbn.BatchNorm2d(3, **{"eps": 1e-3, "momentum": 0.25, "channel_axis": -1, "running_var": "biased", **kwargs})
    x = rng.standard_normal((2, 4, 4, 3))
    bn(x)
    bn.backward(x)
    return bn


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"dtype": np.float64}],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_round_trip(tmp_path, rng, kwargs, frozen, suffix):
    bn = layer(rng, **kwargs).eval()
    if frozen and bn.running_mean is not None:
        bn.freeze()
    bn.save(tmp_path / f"bn{suffix}")
    other = cbn.load(str(tmp_path / f"bn{suffix}"))
    assert type(other) is cbn.BatchNorm2d
    assert other.__dict__.keys() == bn.__dict__.keys()
    for name, value in vars(bn).items():
        if name != "_saved":
            assert np.array_equal(getattr(other, name), value) if value is not None else getattr(other, name) is None
            assert type(getattr(other, name)) is type(value)
    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    assert np.array_equal(other(x), bn(x))


def test_arrays_that_were_switched_on_or_off_later(tmp_path):
    bn = cbn.BatchNorm1d(3)
    bn.bias = bn.weight_grad = None
    bn.save(tmp_path / "bn")
    other = cbn.load(tmp_path / "bn")
    assert other.bias is None
    assert other.weight_grad is None
    bn = cbn.BatchNorm1d(3, affine=False)
    bn.weight = np.full(3, 2, np.float32)
    bn.save(tmp_path / "bn")
    assert np.array_equal(cbn.load(tmp_path / "bn").weight, [2, 2, 2])


def test_a_subclass_comes_back_as_the_class_it_extends(tmp_path):
    class Mine(cbn.BatchNorm1d):
        pass

    class BatchNorm2d(cbn.BatchNorm1d):  # a name of ours for something else
        pass

    for kind in (Mine, BatchNorm2d):
        kind(3).save(tmp_path / "bn")
        assert type(cbn.load(tmp_path / "bn")) is cbn.BatchNorm1d


def test_nonfinite_values_are_asked_for(tmp_path):
    bn = cbn.BatchNorm1d(3)
    bn.running_mean[1] = np.nan
    bn.bias[0] = np.inf
    cbn.BatchNorm1d(5).save(tmp_path / "bn")
    with pytest.raises(ValueError, match="not finite: bias, running_mean; allow_nonfinite"):
        bn.save(tmp_path / "bn")
    assert cbn.load(tmp_path / "bn").num_features == 5  # the file that was there
    bn.save(tmp_path / "bn", allow_nonfinite=True)
    with pytest.raises(ValueError, match="running_mean is not finite"):
        cbn.load(tmp_path / "bn")
    assert np.isnan(cbn.load(tmp_path / "bn", allow_nonfinite=True).running_mean[1])


def test_a_failed_save_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        cbn.BatchNorm1d(3).save(tmp_path / "nowhere" / "bn")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        cbn.BatchNorm1d(3).save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_permissions_are_those_of_any_file(tmp_path):
    cbn.BatchNorm1d(3).save(tmp_path / "bn")
    (tmp_path / "other").touch()
    assert (tmp_path / "bn").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_others_read_the_safetensors_file(tmp_path, rng):
    bn = layer(rng)
    bn.save(tmp_path / "bn.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "bn.safetensors")
    assert sorted(tensors) == sorted(ARRAYS)
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def safetensors_file(path):
    """(tensors, metadata) of a good file, to be changed and written again."""
    with safetensors.safe_open(path, framework="numpy") as archive:
        return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.clear(), "it has no cbn header"),
        (lambda t, m: t.pop("weight"), "it holds .* and should hold"),
        (lambda t, m: t.update(extra=np.zeros(3)), "it holds .* and should hold"),
        (lambda t, m: t.update(weight=np.zeros(4, np.float32)), r"weight has shape \(4,\); expected \(3,\)"),
        (lambda t, m: t.update(weight=np.zeros(3, np.int32)), "weight has dtype int32; expected float32"),
        (lambda t, m: t.update(bias=np.zeros(3)), "bias has dtype float64; expected float32"),
        (lambda t, m: t.update(running_var=-np.ones(3, np.float32)), "running_var is negative"),
        (lambda t, m: t.update(weight=np.full(3, np.nan, np.float32)), "weight is not finite"),
        (lambda t, m: m.update({HEADER: m[HEADER].replace("BatchNorm2d", "object")}), "unknown class 'object'"),
        (lambda t, m: m.update({HEADER: "{"}), "is not a layer that cbn has saved"),
    ],
)
def test_foreign_safetensors(tmp_path, rng, change, words):
    path = tmp_path / "bn.safetensors"
    layer(rng).save(path)
    tensors, metadata = safetensors_file(path)
    change(tensors, metadata)
    path.write_bytes(safetensors.numpy.save(tensors, metadata or None))
    with pytest.raises(ValueError, match=words):
        cbn.load(path)


def test_truncated_and_other_files_named_safetensors(tmp_path, rng):
    path = tmp_path / "bn.safetensors"
    layer(rng).save(path)
    content = path.read_bytes()
    cbn.BatchNorm1d(3).save(tmp_path / "bn.npz")
    truncated = [content[:length] for length in [0, 1, 7, 8, 9, *range(20, len(content), 31), len(content) - 1]]
    for other in [*truncated, (tmp_path / "bn.npz").read_bytes(), pickle.dumps(3), b"\xff" * 100]:
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is not a layer that cbn has saved"):
            cbn.load(path)


def test_without_the_safetensors_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    path = tmp_path / "bn.safetensors"
    with pytest.raises(ImportError, match="need the safetensors package: pip install safetensors"):
        cbn.BatchNorm1d(3).save(path)
    assert not path.exists()
    with pytest.raises(ImportError, match="need the safetensors package"):
        cbn.load(path)


class Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "bn"
    good = cbn.BatchNorm1d(3)
    good.save(path)
    arrays = dict(np.load(path))
    files = [pickle.dumps(Bomb())]
    for name in (HEADER, "weight"):
        np.savez(tmp_path / "evil.npz", **{**arrays, name: np.array([Bomb()] * 3, dtype=object)})
        files.append((tmp_path / "evil.npz").read_bytes())
    np.save(tmp_path / "evil.npy", np.array([Bomb()], dtype=object))
    files.append((tmp_path / "evil.npy").read_bytes())
    for content in files:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a layer that cbn has saved"):
            cbn.load(path)
    assert not Bomb.exploded


def test_truncated_and_damaged_files(tmp_path, rng):
    path = tmp_path / "bn"
    layer(rng).save(path)
    content = path.read_bytes()
    for length in [0, 1, 2, 3, 10, *range(20, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a layer that cbn has saved"):
            cbn.load(path)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        same_or_refused(path, damaged)
    # Every byte of the directory at the end, where a change can make entries disappear
    for position in range(content.index(b"PK\x01\x02"), len(content)):
        for change in (0xFF, 1):
            damaged = bytearray(content)
            damaged[position] ^= change
            same_or_refused(path, damaged)


def same_or_refused(path, content):
    """A damaged file is refused, or the damage is in what does not matter (a date, an attribute)."""
    path.write_bytes(content)
    try:
        layer = cbn.load(path)
    except ValueError:
        return
    assert sorted(name for name in ARRAYS if getattr(layer, name) is not None) == sorted(ARRAYS)


def rewritten(path, header=None, drop=(), **arrays):
    with np.load(path) as archive:
        entries = dict(archive)
    parsed = json.loads(str(entries[HEADER]))
    parsed.update(header or {})
    entries.update(arrays)
    entries[HEADER] = np.array(json.dumps(parsed))
    for name in drop:
        del entries[name]
    with open(path, "wb") as file:
        np.savez(file, **entries)


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"format": 2}},
        {"header": {"class": "Linear"}},
        {"header": {"class": "object"}},
        {"header": {"arguments": {"num_features": 3, "nonsense": 1}}},
        {"header": {"arguments": {"num_features": 4}}},
        {"header": {"arguments": {"num_features": -4}}},
        {"header": {"arguments": {"num_features": 10**18}}},
        {"header": {"arrays": []}},
        {"header": {"arrays": ["weight", "weight"]}},
        {"header": {"arrays": None}},
        {"header": {"arguments": [3]}},
        {"header": {"training": "yes"}},
        {"header": {"frozen": None}},
        {"drop": [HEADER]},
        {"drop": ["running_mean"], "header": {"frozen": True}},
        {"foreign": np.zeros(3)},
        {"weight": np.zeros(4, np.float32)},
        {"weight": np.array(["a", "b", "c"])},
        {"running_var": np.array([1, -1, 1], np.float32)},
        {"bias": np.array([1, np.nan, 1], np.float32)},
        {"num_batches_tracked": np.array(-3)},
        {"num_batches_tracked": np.array(1.5)},
    ],
)
def test_foreign_contents(tmp_path, change):
    path = tmp_path / "bn"
    cbn.BatchNorm1d(3).save(path)
    change = dict(change)
    rewritten(path, change.pop("header", None), change.pop("drop", ()), **change)
    with pytest.raises(ValueError, match="is not a layer that cbn has saved"):
        cbn.load(path)


def test_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        cbn.load(tmp_path / "absent")
    path = tmp_path / "file"
    np.savez(path, weight=np.zeros(3))
    with pytest.raises(ValueError, match="no cbn header"):
        cbn.load(tmp_path / "file.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cbn.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match="is not a layer"):
        cbn.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"it is no \.npz file"):
        cbn.load(path)


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    negative, incomplete = cbn.BatchNorm1d(3), cbn.BatchNorm1d(3).freeze()
    negative.running_var[0] = -1
    incomplete.running_mean = None
    for bn, words in ((negative, "running_var is negative"), (incomplete, "running_mean must be defined")):
        with pytest.raises(ValueError, match=words):
            bn.save(tmp_path / "bn")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link_and_long_names_work(tmp_path):
    cbn.BatchNorm1d(3).save(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    cbn.BatchNorm1d(5).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert cbn.load(tmp_path / "target").num_features == 5
    cbn.BatchNorm1d(3).save(tmp_path / ("n" * 250))
    assert cbn.load(tmp_path / ("n" * 250)).num_features == 3
