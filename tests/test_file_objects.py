"""save and load with file objects: files of every kind, streams that cannot be sought, and what is no binary file."""

import bz2
import gzip
import io
import os
import socket
import tempfile

import numpy as np
import pytest
import safetensors.numpy

import cbn
from cbn.storage import ARRAYS

from .test_storage import layer


def named(file, suffix):
    file.name = "bn" + suffix
    return file


class Unseekable:
    """A stream that is no io class: it writes or reads, and no more."""

    def __init__(self, content=b"", suffix="", most=None):
        self.content, self.name, self.most = content, "stream" + suffix, most

    def write(self, data):
        self.content += bytes(data)

    def read(self, size):
        size = min(size, self.most or size)
        part, self.content = self.content[:size], self.content[size:]
        return part


class Raw(io.RawIOBase):
    """A raw file that takes and gives 7 bytes at a time."""

    def __init__(self, content=b""):
        self.file = io.BytesIO(content)

    def writable(self):
        return True

    def write(self, data):
        return self.file.write(data[:7])

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self.file.read(min(7, len(buffer)))
        buffer[: len(part)] = part
        return len(part)

    def seekable(self):
        return True

    def seek(self, *args):
        return self.file.seek(*args)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_file_objects(tmp_path, rng, suffix):
    bn = layer(rng)
    path = tmp_path / ("bn" + suffix)
    bn.save(path)
    content = path.read_bytes()
    for make in (
        lambda: named(io.BytesIO(), suffix),
        lambda: open(tmp_path / ("a" + suffix), "w+b"),
        lambda: open(tmp_path / ("a" + suffix), "w+b", buffering=0),
        lambda: tempfile.NamedTemporaryFile(suffix=suffix),
        *([tempfile.SpooledTemporaryFile] if suffix != ".safetensors" else []),  # it lets nobody name it
        lambda: named(Raw(), suffix),
    ):
        with make() as file:
            bn.save(file)
            file.seek(0)
            assert file.read() == content
            file.seek(0)
            assert np.array_equal(cbn.load(file).running_var, bn.running_var)
            assert file.read() == b""  # it is left where the layer ends
    for module in (gzip, bz2):
        with module.open(path, "wb") as file:
            bn.save(named(file, suffix) if suffix == ".safetensors" and module is bz2 else file)
        with module.open(path, "rb") as file:
            assert np.array_equal(cbn.load(io.BytesIO(file.read())).running_var, bn.running_var)
            file.seek(0)
            if not (suffix == ".safetensors" and module is gzip):  # whose .npz is named like safetensors
                assert np.array_equal(cbn.load(file).running_var, bn.running_var)
    stream = Unseekable(suffix=suffix)
    bn.save(stream)
    assert stream.content == content


@pytest.mark.parametrize("most", [None, 1, 1000])
def test_streams_that_cannot_be_sought(rng, most):
    bn = layer(rng)
    stream = Unseekable(suffix=".safetensors")
    bn.save(stream)
    cbn.BatchNorm1d(5).save(stream)
    stream.most = most
    assert np.array_equal(cbn.load(stream).running_mean, bn.running_mean)  # no byte more is read: the next layer stands
    assert cbn.load(stream).num_features == 5
    stream = Unseekable(most=most)
    bn.save(stream)
    with pytest.raises(ValueError, match=r"'stream' cannot be sought.*load\(io.BytesIO\(file.read\(\)\)\)"):
        cbn.load(stream)


def test_sockets_and_pipes():
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("wb") as out, theirs.makefile("rb") as file:
        for n in (3, 5):
            content = io.BytesIO()
            cbn.BatchNorm1d(n).save(named(content, ".safetensors"))
            out.write(content.getvalue())
            out.flush()
            assert cbn.load(file).num_features == n  # while the other end stays open
        cbn.BatchNorm1d(3).save(out)
        out.flush()
        with pytest.raises(ValueError, match="cannot be sought"):
            cbn.load(file)
    read, write = os.pipe()
    with open(read, "rb") as file:
        with open(write, "wb") as out:
            cbn.BatchNorm1d(3).save(out)
        assert cbn.load(io.BytesIO(file.read())).num_features == 3


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_layer_at_the_end_of_a_file(suffix):
    file = named(io.BytesIO(), suffix)
    file.write(b"something else")
    cbn.BatchNorm1d(3).save(file)
    file.seek(14)
    assert cbn.load(file).num_features == 3
    assert file.tell() == len(file.getvalue())
    file.seek(0)
    with pytest.raises(ValueError, match="is not a layer"):
        cbn.load(file)


def test_the_format_is_known_by_the_content(tmp_path):
    cbn.BatchNorm1d(3).save(tmp_path / "bn.safetensors")
    for name in ("bn", "bn.npz", "bn.bin"):
        (tmp_path / name).write_bytes((tmp_path / "bn.safetensors").read_bytes())
        assert cbn.load(tmp_path / name).num_features == 3
    cbn.BatchNorm1d(3).save(tmp_path / "bn.npz")
    os.replace(tmp_path / "bn.npz", tmp_path / "bn.safetensors")
    with pytest.raises(ValueError, match=r"is an \.npz file, and its name says safetensors"):
        cbn.load(tmp_path / "bn.safetensors")
    (tmp_path / "x.safetensors").symlink_to("blob")  # the name that is given counts
    cbn.BatchNorm1d(3).save(tmp_path / "x.safetensors")
    assert safetensors.numpy.load_file(tmp_path / "blob").keys() == set(ARRAYS)


def test_text_files_and_what_is_no_file(tmp_path):
    path = tmp_path / "bn.npz"
    bn = cbn.BatchNorm1d(3)
    bn.save(path)
    with open(path, encoding="latin-1") as file, pytest.raises(TypeError, match=r"bn.npz' is open for text.*'rb'"):
        cbn.load(file)
    with open(tmp_path / "t", "w") as file, pytest.raises(TypeError, match=r"t' is open for text; open it with 'wb'"):
        bn.save(file)
    for file in (io.StringIO(), tempfile.NamedTemporaryFile("w+")):
        with file, pytest.raises(TypeError, match="'wb'"):
            bn.save(file)
    with tempfile.NamedTemporaryFile("w+") as file, pytest.raises(TypeError, match="reads str, not bytes; open it"):
        cbn.load(file)
    with open(path, "rb") as file, pytest.raises(io.UnsupportedOperation, match=r"bn.npz' is not open for writing"):
        bn.save(file)
    with open(tmp_path / "t", "wb") as file, pytest.raises(io.UnsupportedOperation, match="t' is not open for reading"):
        cbn.load(file)
    with pytest.raises(ValueError, match="closed file"):
        cbn.load(file)
    for wrong in (None, 3, b"bn.npz", bytearray(3), {}, np.zeros(3), [str(path)], cbn):
        words = f"file must be a path or a binary file object, not {type(wrong).__name__}"
        with pytest.raises(TypeError, match=words):
            cbn.load(wrong)
        with pytest.raises(TypeError, match=words):
            bn.save(wrong)
    with pytest.raises(TypeError, match=r"not bytes; io\.BytesIO makes a file of them"):
        cbn.load(path.read_bytes())


def test_a_file_object_gets_the_whole_layer_or_nothing():
    bn, file = cbn.BatchNorm1d(3), io.BytesIO()
    bn.running_var[0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        bn.save(file)
    assert file.getvalue() == b""
