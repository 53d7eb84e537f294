"""save and load: round trips, kinds of file, and that nothing is ever unpickled."""

import contextlib
import io
import json
import os
import pickle
import select
import stat
import subprocess
import sys
import threading
import tty
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


def test_what_is_named_is_what_the_user_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("absent/bn")
    (tmp_path / "loop").symlink_to("loop")
    for path, kind in (
        ("nowhere/bn.npz", FileNotFoundError),
        ("nowhere/../bn.npz", FileNotFoundError),
        ("nowhere/", IsADirectoryError),
        ("", FileNotFoundError),
        ("link", FileNotFoundError),
        ("loop", OSError),
        ("folder", IsADirectoryError),
        ("folder/.", IsADirectoryError),
        ("file/bn", NotADirectoryError),
    ):
        with pytest.raises(kind) as caught:
            cbn.BatchNorm1d(3).save(path)
        assert str(caught.value).endswith(f": {path!r}")
        assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert sorted(os.listdir()) == ["file", "folder", "link", "loop"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755, 0o664])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_is_replaced_keeps_its_mode_and_owner(tmp_path, mode, link):
    path = tmp_path / "bn"
    path.touch()
    path.chmod(mode)
    with contextlib.suppress(OSError):  # not for everybody to do
        os.chown(path, 12345, 12346)
    before = path.stat()
    if link:
        (tmp_path / "link").symlink_to("bn")
    if not os.access(path, os.W_OK):
        with pytest.raises(PermissionError, match=r"bn'$"):
            cbn.BatchNorm1d(3).save(path)
        assert path.read_bytes() == b""
        return
    cbn.BatchNorm1d(3).save(tmp_path / "link" if link else path)
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino  # replaced as a whole
    assert cbn.load(path).num_features == 3
    assert sorted(os.listdir(tmp_path)) == (["bn", "link"] if link else ["bn"])


def test_a_file_is_never_readable_to_more_than_the_one_that_it_replaces(tmp_path, monkeypatch):
    path = tmp_path / "bn"
    path.touch(0o600)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(os.fstat(fd).st_mode & 0o777))
    real = os.open
    monkeypatch.setattr(os, "open", lambda p, flags, mode=0o777: modes.append(mode) or real(p, flags, mode))
    cbn.BatchNorm1d(3).save(path)
    assert modes == [0o600, 0o600]


def test_hard_links_keep_the_old_layer(tmp_path):
    cbn.BatchNorm1d(3).save(tmp_path / "bn")
    os.link(tmp_path / "bn", tmp_path / "other")
    cbn.BatchNorm1d(5).save(tmp_path / "bn")
    assert [cbn.load(tmp_path / name).num_features for name in ("bn", "other")] == [5, 3]


def test_a_dangling_link_gets_its_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../first")
    (tmp_path / "first").symlink_to("second")
    cbn.BatchNorm1d(3).save(tmp_path / "folder" / "link")
    assert cbn.load(tmp_path / "second").num_features == 3
    assert (tmp_path / "folder" / "link").is_symlink()
    assert (tmp_path / "first").is_symlink()


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_pipe_stays_a_pipe(tmp_path, suffix):
    path = tmp_path / ("pipe" + suffix)
    os.mkfifo(path, 0o600)
    contents = []
    reader = threading.Thread(target=lambda: contents.append(path.read_bytes()), daemon=True)
    reader.start()
    cbn.BatchNorm1d(3).save(path)
    reader.join(60)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == [path.name]
    assert cbn.load(io.BytesIO(contents[0])).num_features == 3


def test_a_device_is_written_to():
    """A terminal, whose folder lets nobody replace it, root neither: a failing test must not cost /dev/null."""
    controller, terminal = os.openpty()
    tty.setraw(terminal)
    path = os.ttyname(terminal)
    saver = threading.Thread(target=lambda: cbn.BatchNorm1d(3).save(path), daemon=True)
    saver.start()
    content = b""
    while not content.endswith(bytes(2)) or b"PK\5\6" not in content[-22:]:
        assert select.select([controller], [], [], 60)[0], content
        content += os.read(controller, 1000)
    saver.join(60)
    assert cbn.load(io.BytesIO(content)).num_features == 3
    assert stat.S_ISCHR(os.stat(path).st_mode)
    os.close(controller)
    os.close(terminal)


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "link"])
def test_standard_output_is_written_to(tmp_path, name):
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = f"import cbn; cbn.BatchNorm1d(3).save({name!r})"
    arguments = {"args": [sys.executable, "-c", code], "cwd": tmp_path, "check": True, "timeout": 100}
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(cbn.__file__))}
    content = subprocess.run(**arguments, env=environment, stdout=subprocess.PIPE).stdout
    assert cbn.load(io.BytesIO(content)).num_features == 3
    with open(tmp_path / "out", "wb") as file:
        file.write(b"before")
        file.flush()
        number = os.fstat(file.fileno()).st_ino
        subprocess.run(**arguments, env=environment, stdout=file)
    assert (tmp_path / "out").read_bytes() == b"before" + content
    assert (tmp_path / "out").stat().st_ino == number


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
    with pytest.raises(ImportError, match=r"need the safetensors package: pip install .cbn\[safetensors\]."):
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


# ---- a variance below zero -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_variance_a_little_below_zero_is_asked_for(tmp_path, rng, suffix):
    bn = cbn.BatchNorm1d(3).eval()
    bn.running_var[...] = (1, -9e-6, -1e-12)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    exact = x / np.sqrt(bn.running_var.astype(float) + bn.eps)
    np.testing.assert_allclose(bn(x), exact, rtol=1e-6)
    path = tmp_path / ("bn" + suffix)
    words = "running_var is negative: -9e-06 in channel 1 .*allow_negative_var=True"
    for kwargs in ({}, {"allow_nonfinite": True}):
        with pytest.raises(ValueError, match=words):
            bn.save(path, **kwargs)
    assert os.listdir(tmp_path) == []
    bn.save(path, allow_negative_var=True)
    with pytest.raises(ValueError, match=words):
        cbn.load(path)
    other = cbn.load(path, allow_negative_var=True)
    assert np.array_equal(other.running_var, bn.running_var)
    assert np.array_equal(other(x), bn(x))
    assert np.array_equal(other.plan(x.shape)(x), bn(x))


@pytest.mark.parametrize("value", [-1e-5, -1, -np.inf])
def test_a_variance_that_eps_does_not_make_positive_is_refused(tmp_path, value):
    bn = cbn.BatchNorm1d(3, dtype=np.float64)
    bn.running_var[2] = value
    with pytest.raises(
        ValueError, match=f"negative: {float(value)} in channel 2, and not positive even with eps, 1e-05"
    ):
        bn.save(tmp_path / "bn", allow_negative_var=True, allow_nonfinite=True)
