"""Files that lie: sizes, headers and damage. Each is a ValueError, and takes no more memory than the layer needs."""

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

import cbn
from cbn.storage import ARRAYS, HEADER

FORMATS = ("npz", "safetensors")
LARGE = 1 << 26  # bytes of what no layer here needs
MOST = 1 << 22  # bytes that a refusal may take


def saved(layer=None, form="npz"):
    """The bytes of a layer's file."""
    file = io.BytesIO()
    file.name = "bn." + form
    (layer or cbn.BatchNorm1d(3)).save(file)
    return file.getvalue()


def entries(content):
    """(header, arrays) of a good .npz, to be changed and written again."""
    with np.load(io.BytesIO(content)) as archive:
        arrays = dict(archive)
    return json.loads(str(arrays.pop(HEADER))), arrays


def npz(header, arrays, save=np.savez):
    file = io.BytesIO()
    save(file, **{HEADER: np.array(json.dumps(header)), **arrays})
    return file.getvalue()


def tensors(header, metadata=None, data=b"", length=None):
    """A safetensors file of these pieces, whatever they are."""
    text = json.dumps({"__metadata__": metadata or {HEADER: json.dumps(header[0])}, **header[1]}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(layer=None):
    """(cbn's header, the format's descriptions, data) of a good safetensors file."""
    content = saved(layer, "safetensors")
    length = int.from_bytes(content[:8], "little")
    parts = json.loads(content[8 : 8 + length])
    return json.loads(parts.pop("__metadata__")[HEADER]), parts, content[8 + length :]


def refused(source, words=""):
    """The file is refused with these words, and little memory was taken for that."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is not a layer that cbn has saved: .*" + words):
            cbn.load(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST, f"{peak >> 20} MB"


# ---- sizes of .npz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "num_batches_tracked", HEADER, "extra"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_array_in_a_small_layers_file(tmp_path, name, save):
    header, arrays = entries(saved())
    large = {name: np.zeros(LARGE, np.uint8) if name != HEADER else np.array("x" * (LARGE // 4))}
    path = tmp_path / "bn.npz"
    path.write_bytes(npz(header, {**arrays, **large} if name != HEADER else arrays, save))
    if name == HEADER:
        save(path, **large, **arrays)
    refused(path)


def test_an_address_space_is_enough_that_holds_the_layer(tmp_path):
    """The limit counts what numpy and safetensors take outside Python too."""
    header, arrays = entries(saved())
    (tmp_path / "a.npz").write_bytes(
        npz(header, {**arrays, "weight": np.zeros(1 << 28, np.uint8)}, np.savez_compressed)
    )
    header, parts, _ = described()
    parts["weight"] = {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}
    with open(tmp_path / "b.safetensors", "wb") as file:
        file.write(tensors((header, parts)))
        file.truncate(1 << 30)
    code = """
import resource, sys, cbn, safetensors.numpy
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        cbn.load(path)
    except ValueError as error:
        print(error)
"""
    paths = [str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "it is compressed, and cbn compresses nothing" in done.stdout, done.stdout
    assert "weight has shape (268435456,); expected (3,)" in done.stdout


def test_a_header_that_asks_for_a_large_layer(tmp_path):
    """With arrays that are as large by their own headers, in a file that has not so much."""
    for n in (1 << 26, 1 << 40, 1 << 62):
        header, arrays = entries(saved())
        header["arguments"]["num_features"] = n
        refused(npz(header, arrays), r"running_mean has shape \(3,\); expected \(\d+,\)")
        header["arrays"] = ["weight"]
        header["arguments"]["bias"] = False
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            text = io.BytesIO()
            np.save(text, np.array(json.dumps(header)))
            archive.writestr(HEADER + ".npy", text.getvalue())
            text = io.BytesIO()
            np.lib.format.write_array_header_1_0(text, {"descr": "<f4", "fortran_order": False, "shape": (n,)})
            archive.writestr("weight.npy", text.getvalue())
        refused(file.getvalue(), "it ends too early")
        parts = {"weight": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}
        refused(tensors((header, parts), data=bytes(100)), "it ends too early")


def directory(content, name):
    """Where the zip's directory has this entry."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))


@pytest.mark.parametrize("name", [*ARRAYS, HEADER])
def test_a_directory_that_lies_about_sizes(name):
    content = saved()
    place = directory(content, name + ".npy") + 20
    for sizes in ((1 << 31, 1 << 31), (1 << 31, 0), (0, 1 << 31), (0, 0), (64, 64), (200, 200)):
        lie = bytearray(content)
        lie[place : place + 8] = struct.pack("<II", *sizes)
        refused(bytes(lie))


def test_many_entries():
    for n in (200, 30_000):
        file = io.BytesIO(saved())
        with zipfile.ZipFile(file, "a") as archive:
            for i in range(n):
                archive.writestr(f"{i}.npy", b"")
        refused(file.getvalue(), "and 19[0-9] more and should hold" if n < 1000 else r"a header of \d+ bytes is none")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_a_large_npy_header(version):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }".ljust(LARGE if version[0] > 1 else 60_000)
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    good = saved()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        pieces = {info.filename: archive.read(info) for info in archive.infolist()}
    pieces["weight.npy"] = b"\x93NUMPY" + bytes(version) + size + header + bytes(12)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, piece in pieces.items():
            archive.writestr(name, piece)
    refused(file.getvalue(), "Header info length .* is large" if version == (1, 0) else "weight is no array of cbn's")


def test_a_large_json_header():
    header, arrays = entries(saved())
    header["class"] = "x" * LARGE
    refused(npz(header, arrays), "its header is an array of <U")
    refused(tensors((header, {})), r"a header of \d+ bytes is none of cbn's")
    for deep in ('{"a":' * 10_000, "[" * 10_000):
        file = io.BytesIO()
        np.savez(file, **{HEADER: np.array(deep), **arrays})
        refused(file.getvalue())
        refused(struct.pack("<Q", 10_000) + b"{" + deep[:10_000].encode())


@pytest.mark.parametrize("extra", [b"\0", b"PK", b"x" * 100])
@pytest.mark.parametrize("form", FORMATS)
def test_what_stands_before_or_after_the_layer(form, extra):
    content = saved(form=form)
    refused(content + extra)
    refused(extra + content)
    refused(content + content)


def test_a_zip_comment_and_an_entry_twice():
    file = io.BytesIO(saved())
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"hello"
    refused(file.getvalue(), "it does not end with a zip directory")
    file = io.BytesIO(saved())
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("weight.npy", archive.read("weight.npy"))
    refused(file.getvalue(), "it has an entry twice")


# ---- sizes of safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 17, (1 << 17) + 1, 1 << 30, 1 << 63, (1 << 64) - 1])
def test_a_length_that_lies(tmp_path, length):
    header, parts, data = described()
    path = tmp_path / "bn.safetensors"
    with open(path, "wb") as file:
        file.write(tensors((header, parts), data=data, length=length))
        file.truncate(1 << 32)  # as much as is claimed, of a disk that has not so much
    refused(path)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, r"weight has shape \(1099511627776,\)"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 1 << 42]}, ""),
        ({"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}, ""),
        ({"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}, ""),
        ({"dtype": "F32", "shape": [3]}, ""),
        ({"dtype": "F32", "shape": [3.5], "data_offsets": [0, 12]}, "weight has shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 12]}, "weight has shape"),
        ({"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}, "weight has no shape and dtype"),
        ({"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}, "weight has dtype F8_E4M3; expected float32"),
        ({"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}, "weight has dtype BF16; expected float32"),
        ({"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}, "weight has dtype"),
        ([], "weight has no shape and dtype"),
        (None, "weight has no shape and dtype"),
    ],
    ids=repr,
)
def test_a_tensor_that_lies(tensor, words):
    header, parts, data = described()
    refused(tensors((header, {**parts, "weight": tensor}), data=data), words)


@pytest.mark.parametrize(
    "metadata", [[], "cbn", {"cbn": 3}, {"cbn": "[]"}, {"cbn": "null"}, {"other": "{}"}, 0], ids=repr
)
def test_metadata_that_is_none_of_ours(metadata):
    _, parts, data = described()
    refused(tensors((None, parts), metadata, data))
    text = json.dumps(metadata).encode()
    refused(struct.pack("<Q", len(text)) + text)


# ---- headers ---------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    ("num_features", 0, "num_features must be 1 or more"),
    ("num_features", "3", "num_features must be a number of channels, not '3'"),
    ("num_features", True, "num_features must be a number of channels, not True"),
    ("num_features", 3.0, "num_features must be a number of channels"),
    ("num_features", 10**30, "num_features must be a number of channels of 64 bits"),
    ("eps", "1e-5", "eps must be a number, not '1e-5'"),
    ("eps", None, "eps must be a number, not None"),
    ("eps", float("nan"), "eps must be finite"),
    ("eps", 1e999, "eps must be finite"),
    ("eps", [1], "eps must be a number"),
    ("momentum", 2, r"momentum must be in \[0, 1\]"),
    ("momentum", True, "momentum must be a number"),
    ("affine", 1, "affine must be a bool, not 1"),
    ("track_running_stats", "no", "track_running_stats must be a bool, not 'no'"),
    ("bias", 1, "bias must be a bool, not 1"),
    ("bias", None, "bias must be a bool, not None"),
    ("bias", [0], r"bias must be a bool, not \[0\]"),
    ("bias", False, "bias is False, but the arrays are"),
    ("dtype", "float16", "dtype is 'float16'; expected 'float32' or 'float64'"),
    ("dtype", ["float32"], "dtype is"),
    ("dtype", [["a", "f4"]], "dtype is"),
    ("dtype", "float64", "has dtype float32; expected float64"),
    ("channel_axis", "1", "channel_axis must be an integer"),
    ("channel_axis", 9, "channel_axis 9 is out of range"),
    ("running_var", None, "running_var must be 'unbiased' or 'biased', not None"),
    ("running_var", ["biased"], "running_var must be"),
    ("activation", "gelu", "activation must be"),
    ("activation", ["leaky_relu", "x"], "the slope of leaky_relu must be a number"),
    ("activation", {"relu": 1}, "activation must be"),
    ("nonfinite", "sometimes", "nonfinite must be 'propagate', 'skip' or 'raise', not 'sometimes'"),
    ("extra", None, "its arguments should have .* unknown .'extra'"),
]


@pytest.mark.parametrize(("key", "value", "words"), ARGUMENTS, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("form", FORMATS)
def test_arguments_that_are_no_layers(form, key, value, words):
    header, arrays = entries(saved())
    _, parts, data = described()
    header["arguments"][key] = value
    refused(npz(header, arrays) if form == "npz" else tensors((header, parts), data=data), words)


@pytest.mark.parametrize("key", ["num_features", "eps", "affine", "bias", "dtype", "activation"])
def test_arguments_that_are_missing(key):
    header, arrays = entries(saved())
    del header["arguments"][key]
    refused(npz(header, arrays), f"its arguments should have .* missing .'{key}'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "1"}, "format '1', and this version reads 1"),
        ({"format": True}, "format True, and this version reads 1"),
        ({"class": "Linear"}, "unknown class 'Linear'"),
        ({"class": ["BatchNorm1d"]}, "unknown class"),
        ({"class": None}, "unknown class None"),
        ({"training": 1}, "training must be a bool, not 1"),
        ({"frozen": "no"}, "frozen must be a bool, not 'no'"),
        ({"extra": 1}, "its header should have .* unknown .'extra'"),
        ({"arguments": [3]}, "its arguments should be a mapping, not list"),
        ({"arguments": None}, "its arguments should be a mapping, not NoneType"),
        ({"arrays": None}, "its header lists no arrays"),
        ({"arrays": [1]}, "its header lists no arrays"),
        ({"arrays": {"weight": 1}}, "its header lists no arrays"),
        ({"arrays": []}, r"it holds .* and should hold \[\]"),
        ({"arrays": [*ARRAYS, "more"]}, "it holds .* and should hold .*'more'"),
    ],
    ids=repr,
)
def test_headers_that_are_no_layers(change, words):
    header, arrays = entries(saved())
    refused(npz({**header, **change}, arrays), words)


@pytest.mark.parametrize("header", [None, [], "x", 3, {}, {"format": 1}, {"format": 1, "arrays": []}], ids=repr)
def test_headers_of_other_kinds(header):
    refused(npz(header, entries(saved())[1]), "its header lists no arrays|format None|it holds")
    refused(npz(header, {}), "its header lists no arrays|its header should have")


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_without_what_its_header_lists(name):
    header, arrays = entries(saved())
    rest = {key: a for key, a in arrays.items() if key != name}
    refused(npz(header, rest), f"it holds .* and should hold .*'{name}'")
    if name == "bias":  # not listed either, though the flag says that it is there
        header["arrays"].remove("bias")
        refused(npz(header, rest), "bias is True, but the arrays are")


def test_files_of_version_0_1_have_an_argument_more():
    header, arrays = entries(saved())
    header["arguments"]["nonfinite"] = "propagate"
    assert cbn.load(io.BytesIO(npz(header, arrays))).num_features == 3


def test_the_other_byte_order_is_converted():
    header, arrays = entries(saved())
    arrays = {name: a.astype(a.dtype.newbyteorder(">")) for name, a in arrays.items()}
    arrays["weight"][...] = (1, 2, 3)
    layer = cbn.load(io.BytesIO(npz(header, arrays)))
    assert np.array_equal(layer.weight, [1, 2, 3])
    assert layer.weight.dtype.isnative


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(content, rng):
    """The file with one to four places changed, removed, doubled or filled."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i, n = int(rng.integers(len(content))), int(rng.choice([1, 2, 4, 8, 64]))
        kind = rng.integers(5)
        if kind == 0:
            content[i] ^= 1 << rng.integers(8)
        elif kind == 1:
            content[i : i + n] = rng.bytes(n)
        elif kind == 2:
            content[i : i + n] = rng.choice([b"\0", b"\xff", b"[", b"9"]) * n
        elif kind == 3:
            del content[i : i + n]
        else:
            content[i:i] = content[i : i + n]
        if not content:
            break
    return bytes(content)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
def test_damaged_files_are_refused_or_are_a_layer(form, seed):
    rng = np.random.default_rng(seed)
    layer = [
        cbn.BatchNorm2d(3),
        cbn.BatchNorm1d(40, affine=False),
        cbn.BatchNorm(2, dtype=float, activation=("leaky_relu", 0.1)).freeze(),
        cbn.BatchNorm3d(1, track_running_stats=False, bias=False),
    ][seed]
    content = saved(layer, form)
    cbn.load(io.BytesIO(content))
    loaded = 0
    tracemalloc.start()
    try:
        for i in range(500):
            lie = damaged(content, rng)
            try:
                found = cbn.load(io.BytesIO(lie))
            except ValueError:
                continue
            except BaseException as error:
                pytest.fail(f"file {i} gives {error!r}: {lie!r}")
            loaded += 1
            repr(found)
            found.save(io.BytesIO())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST, f"{peak >> 20} MB"
    assert loaded < 300
