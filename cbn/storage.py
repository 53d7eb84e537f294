"""Layers and statistics in files: numpy's .npz or safetensors, with a JSON header. Loading runs no code of the file.

`load` trusts no file. The header says which arrays the layer has, so their sizes are known. `load` compares them with
the sizes in the file before it reads an array, and every read is bounded.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from . import checks, entries
from .checks import Array
from .memory import empty_cache, retried

__all__ = ["load", "save"]

HEADER = "cbn"
FORMAT = 1
CLASSES: dict[str, type[Any]] = {}  # of the layers; they register here, since they import this module
ARRAYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_grad", "bias_grad")
ARGUMENTS = (
    *("num_features", "eps", "momentum", "affine", "track_running_stats"),
    *("bias", "dtype", "channel_axis", "running_var", "activation"),
)
OPTIONAL = {
    "nonfinite": "propagate",
    "on_single": "error",
    "ghost_batch_size": None,
    "renorm": None,
    "num_domains": None,
}  # arguments, with their defaults
SWITCHES = ("use_batch_stats", "update_running_stats", "train_parameters")
LIMIT = 1 << 17  # bytes of one read, so of a header: cbn's has less than 4 KB, and zipfile reads 64 KB at the end

Path = str | os.PathLike[str]
Described = dict[str, tuple[tuple[int, ...], str]]  # shapes and dtypes of the arrays, from a file's headers
Content = tuple[Any, Described, Callable[[], Iterable[tuple[str, Array]]]]  # header, arrays described, arrays read


@dataclass
class Arrays:
    """The arrays of a file: shapes and dtypes as its headers say, and how they are read."""

    described: Described
    read: Callable[[], Iterable[tuple[str, Array]]]

    def expect(self, expected: Described) -> None:
        """Refuse a file that has not just these arrays."""
        if sorted(self.described) != sorted(expected):
            raise ValueError(f"it holds {_some(sorted(self.described))} and should hold {sorted(expected)}")
        problems = []
        for key, found in self.described.items():
            for what, value, right in zip(("shape", "dtype"), found, expected[key], strict=True):
                if value != right:
                    problems.append(f"{key} has {what} {value}; expected {right}")
        if problems:
            raise ValueError("; ".join(problems))


# What is in files but layers: by the class's name, from its arguments, its arrays, and whether they may be not finite
BUILDERS: dict[str, Callable[[Any, Arrays, bool], Any]] = {}


def save_content(
    file: Path | BinaryIO, header: dict[str, Any], arrays: dict[str, Array], allow_nonfinite: bool
) -> None:
    """Write class, arguments and arrays of what is no layer."""
    header = {"format": FORMAT, **header, "arrays": sorted(arrays)}
    _save(file, header, arrays, allow_nonfinite, False)


def save(
    layer: Any,
    file: Path | BinaryIO,
    *,
    allow_nonfinite: bool = False,
    allow_negative_var: bool = False,
) -> None:
    """Write a layer to a file; see `BatchNorm.save`."""
    arrays = layer._snapshot(ARRAYS)
    bad = [key for key, a in arrays.items() if not np.all(np.isfinite(a))]
    if bad and not allow_nonfinite:
        raise ValueError(f"not finite: {', '.join(bad)}; allow_nonfinite=True writes them all the same")
    header = {
        "format": FORMAT,
        "class": next(c.__name__ for c in type(layer).__mro__ if CLASSES.get(c.__name__) is c),
        "arguments": {
            "num_features": layer.num_features,
            "eps": layer.eps,
            "momentum": layer.momentum,
            "affine": layer.affine,
            "track_running_stats": layer.track_running_stats,
            "bias": layer.bias is not None,
            "dtype": layer.dtype.name,
            "channel_axis": layer.channel_axis,
            "running_var": "unbiased" if layer._unbiased else "biased",
            "activation": layer.activation,
        },
        "training": layer.training,
        "frozen": layer.frozen,
        "arrays": sorted(arrays),
    }
    if callable(layer.renorm):
        raise ValueError(
            "renorm is a function, which no file holds: assign None or a pair before, and it after loading"
        )
    # What is at its default is left out, so that older versions read the file
    header["arguments"] |= {name: value for name, own in OPTIONAL.items() if (value := getattr(layer, name)) != own}
    switches = ("train_parameters",) if layer.frozen else SWITCHES
    header |= {name: value for name in switches if (value := getattr(layer, name)) is not None}
    _save(file, header, arrays, allow_nonfinite, allow_negative_var)


def _save(
    file: Path | BinaryIO,
    header: dict[str, Any],
    arrays: dict[str, Array],
    allow_nonfinite: bool,
    allow_negative_var: bool,
) -> None:
    path, name = _path(file, "write"), _name(file)
    package = _safetensors() if _is_safetensors(name) else None
    described = {key: (a.shape, a.dtype.name) for key, a in arrays.items()}
    # `save` does not write what `load` would refuse
    _build(header, described, arrays.items, allow_nonfinite, allow_negative_var)
    content = _content(package, json.dumps(header), arrays)
    if path is not None:
        replace(path, content)
    else:
        _write(cast(BinaryIO, file), content)


@retried
def _content(package: Any, header: str, arrays: dict[str, Array]) -> bytes:
    """The whole content of a file, made before anything is written."""
    if package:
        return package.numpy.save(arrays, metadata={HEADER: header})  # type: ignore[no-any-return]
    buffer = io.BytesIO()  # seekable, so that zipfile writes no data descriptors
    entries: dict[str, Any] = {HEADER: np.array(header), **arrays}
    np.savez(buffer, **entries)
    return buffer.getvalue()


def load(
    file: Path | BinaryIO,
    *,
    allow_nonfinite: bool = False,
    allow_negative_var: bool = False,
) -> Any:
    """Read a layer from a file that `BatchNorm.save` wrote.

    Parameters
    ----------
    file : str, path-like or binary file object
        The first bytes tell the format; a file named .safetensors must have that format. `load` reads a file object
        from its position to its end, because a file holds one layer. A stream that is not seekable, for example a
        socket, must have the safetensors format, and is read to the end of the layer.
    allow_nonfinite : bool
        Whether to accept NaN and infinities.
    allow_negative_var : bool
        Whether to accept running variances below zero whose sum with eps is positive.

    Returns
    -------
    BatchNorm
        Layer of the class that was saved, or of the cbn class that this class extended.

    Raises
    ------
    ValueError
        For any other file: foreign, truncated, pickled, with wrong shapes or values. `load` unpickles nothing, and
        takes no more memory than the layer needs (twice that for safetensors), whatever sizes the file claims.
    TypeError
        If `file` is neither a path nor a file object that reads bytes.
    OSError
        If the file cannot be read.
    ImportError
        If the safetensors package is missing and the format needs it.

    Examples
    --------
    >>> import io
    >>> import cbn
    >>> file = io.BytesIO()
    >>> cbn.BatchNorm2d(3).eval().save(file)
    >>> cbn.load(io.BytesIO(file.getvalue()))
    BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True).eval()
    """
    path, name = _path(file, "read"), _name(file)
    if _is_safetensors(name):
        _safetensors()
    with contextlib.ExitStack() as stack:
        source = cast(BinaryIO, file) if path is None else stack.enter_context(open(path, "rb"))
        reader = _Reader(source, name)

        def read() -> Any:
            return _load(reader, name, allow_nonfinite, allow_negative_var)

        try:
            return read()
        except MemoryError:
            if not reader.seekable():
                raise
            empty_cache()
        reader.seek(0)
        return read()


# ---- files -----------------------------------------------------------------------------------------------------------


def _path(file: Any, method: str) -> str | None:
    """The path as given, or None for a binary file object with this method."""
    if isinstance(file, (str, os.PathLike)):
        return os.fsdecode(file)
    mode = "rb" if method == "read" else "wb"
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"file {_name(file)!r} is open for text; open it with {mode!r}")
    if not callable(getattr(file, method, None)):
        advice = "; io.BytesIO makes a file of them" if isinstance(file, (bytes, bytearray, memoryview)) else ""
        raise TypeError(f"file must be a path or a binary file object, not {type(file).__name__}{advice}")
    return None


def _name(file: Any) -> str:
    """The name of a file for messages; its suffix may choose the format."""
    if isinstance(file, (str, os.PathLike)):
        return os.fsdecode(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else f"<{type(file).__name__}>"


def _is_safetensors(name: str) -> bool:
    """Whether the file's name chooses the safetensors format."""
    return name.lower().endswith(".safetensors")


def _safetensors() -> Any:
    """The optional safetensors package."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('safetensors files need the safetensors package: pip install "cbn[safetensors]"') from error
    return safetensors


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all bytes; a raw file may take them in parts."""
    try:
        if not isinstance(file, io.RawIOBase):
            file.write(content)
            return
        rest = memoryview(content)
        while rest:
            written: int | None = file.write(rest)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, "the file takes no more without waiting", _name(file))
            rest = rest[written:]
    except io.UnsupportedOperation:
        raise io.UnsupportedOperation(f"file {_name(file)!r} is not open for writing; open it with 'wb'") from None
    except TypeError as error:
        raise TypeError(f"file {_name(file)!r} takes no bytes ({error}); open it with 'wb'") from None


def replace(path: str, content: bytes) -> None:
    """Replace a regular file as a whole or not at all, with the old mode and owner; or create it.

    Anything else (a pipe, a device, the descriptor behind /dev/stdout) is written to.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    target = _behind_links(path)
    if target is None or (old and not stat.S_ISREG(old.st_mode)) or not os.path.basename(path):
        with open(
            path, "ab" if target is None else "wb", buffering=0
        ) as stream:  # a descriptor's file may have content
            _write(cast(BinaryIO, stream), content)
        return
    if old and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    temporary = os.path.join(os.path.dirname(target), f".cbn-{os.urandom(8).hex()}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(temporary, flags, 0o600 if old else 0o666), "wb") as file:
            file.write(content)
            if old:
                with contextlib.suppress(PermissionError):  # only root may give a file away
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave an empty file
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from None  # with the user's path
        raise


def _behind_links(path: str) -> str | None:
    """The target of a path through symbolic links, which may not exist; None for an open descriptor."""
    while os.path.islink(path):
        if os.path.abspath(path).startswith("/proc/"):
            return None
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return path


class _Reader:
    """A binary file from its position on, also for zipfile. A read is complete, and never longer than `LIMIT`."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._start: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            if getattr(file, "seekable", lambda: True)():  # a tempfile.SpooledTemporaryFile had none before Python 3.11
                self._start = file.tell()
                file.seek(self._start)

    def seekable(self) -> bool:
        return self._start is not None

    def tell(self) -> int:
        return self._file.tell() - cast(int, self._start)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            self._file.seek(0, 2)
            offset += self.tell()
        if offset < 0:  # zipfile expects an OSError where it looks for a file's end
            raise OSError("it is too short") if whence == 2 else ValueError("it names a place before its start")
        self._file.seek(cast(int, self._start) + offset)
        return offset

    def read(self, size: int = -1) -> bytes:
        if size > LIMIT:
            raise ValueError(f"a header of {size} bytes is none of cbn's")
        size = LIMIT if size < 0 else size
        data = b""
        while len(data) < size:
            try:
                part = self._file.read(size - len(data))
            except io.UnsupportedOperation:
                raise io.UnsupportedOperation(
                    f"file {self._name!r} is not open for reading; open it with 'rb'"
                ) from None
            if part is None:
                raise BlockingIOError(errno.EAGAIN, "the file has no more without waiting", self._name)
            if not isinstance(part, bytes):
                raise TypeError(f"file {self._name!r} reads {type(part).__name__}, not bytes; open it with 'rb'")
            if not part:
                break
            data += part
        return data


# ---- formats ---------------------------------------------------------------------------------------------------------


def _bytes(read: Callable[[int], bytes], size: int) -> bytearray:
    """Read `size` bytes; memory grows with the bytes that arrive."""
    data = bytearray()
    while len(data) < size:
        part = read(min(LIMIT, size - len(data)))
        if not part:
            raise ValueError("it ends too early")
        data += part
    return data


def _read_npz(reader: _Reader, start: bytes) -> Content:
    if start[:2] != b"PK":
        raise ValueError("it is no .npz file")
    size = reader.seek(0, 2)
    reader.seek(max(size - 22, 0))
    if reader.read(4) != b"PK\5\6":
        raise ValueError("it does not end with a zip directory")
    archive = zipfile.ZipFile(cast(Any, reader))
    infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if HEADER not in infos:
        raise ValueError("it has no cbn header")
    if len(infos) != len(archive.infolist()):
        raise ValueError("it has an entry twice")
    if min(info.header_offset for info in infos.values()) != 0:
        raise ValueError("something stands before its first entry")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise ValueError("it is compressed, and cbn compresses nothing")  # so no entry is larger than the file

    def opened(key: str) -> tuple[Any, tuple[int, ...], np.dtype[Any]]:
        """A stream after the npy header of an entry, and shape and dtype from the header."""
        stream = archive.open(infos[key])
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{key} is no array of cbn's")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1000)
        return stream, shape, dtype

    def numbers(key: str) -> Array:
        stream, shape, dtype = opened(key)
        data = _bytes(stream.read, math.prod(shape) * dtype.itemsize)
        if stream.read(1):
            raise ValueError(f"{key} is longer than its shape says")
        return np.frombuffer(data, dtype).reshape(shape)

    _, shape, dtype = opened(HEADER)
    if shape != () or dtype.kind != "U" or dtype.itemsize > LIMIT:
        raise ValueError(f"its header is an array of {dtype} of shape {shape}")
    header = json.loads(str(numbers(HEADER)))
    keys = [key for key in infos if key != HEADER]
    _as_listed(keys, header)
    described = {}
    for key in keys:
        _, shape, dtype = opened(key)
        described[key] = shape, dtype.name

    def arrays() -> Iterator[tuple[str, Array]]:
        for key in keys:
            yield key, numbers(key)
        reader.seek(0, 2)  # a file object is left where the layer ends

    return header, described, arrays


def _read_safetensors(package: Any, reader: _Reader, start: bytes) -> Content:
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or not 1 <= length <= LIMIT:
        raise ValueError("it ends too early" if len(start) < 9 else f"a header of {length} bytes is none of cbn's")
    content = start + _bytes(reader.read, length - 1)
    tensors = json.loads(content[8:].decode())
    metadata = tensors.pop("__metadata__", None) if isinstance(tensors, dict) else None
    if not isinstance(metadata, dict) or HEADER not in metadata:
        raise ValueError("it has no cbn header")
    header = json.loads(metadata[HEADER])
    _as_listed(list(tensors), header)
    described = {}
    for key, tensor in tensors.items():
        if not (isinstance(tensor, dict) and isinstance(tensor.get("shape"), list) and "dtype" in tensor):
            raise ValueError(f"{key} has no shape and dtype, but {tensor!r}")
        dtype = re.sub(
            r"^([FIU])(?=\d+$)", lambda m: {"F": "float", "I": "int", "U": "uint"}[m[1]], str(tensor["dtype"])
        )
        described[key] = tuple(tensor["shape"]), dtype

    def arrays() -> Iterable[tuple[str, Array]]:
        # Shapes and dtypes are known to be the layer's; the package checks that the format's rules are kept
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in described.values())
        whole = b"".join((content, _bytes(reader.read, size)))
        if reader.seekable() and reader.read(1):
            raise ValueError("something follows its arrays")
        return package.numpy.load(whole).items()  # type: ignore[no-any-return]

    return header, described, arrays


def _as_listed(keys: list[str], header: Any) -> None:
    """Refuse a file that does not hold what its header lists: a damaged directory can lose entries."""
    listed = header.get("arrays") if isinstance(header, dict) else None
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise ValueError("its header lists no arrays")
    if sorted(keys) != sorted(listed):
        raise ValueError(f"it holds {_some(sorted(keys))} and should hold {_some(listed)}")


def _some(keys: list[str], most: int = 10) -> str:
    return f"{keys[:most]}" + (f" and {len(keys) - most} more" if len(keys) > most else "")


# ---- layers ----------------------------------------------------------------------------------------------------------


def _load(reader: _Reader, name: str, allow_nonfinite: bool, allow_negative_var: bool) -> Any:
    start = reader.read(9)
    zipped = start[:2] == b"PK"
    if zipped and not reader.seekable():
        raise ValueError(f"{name!r} cannot be sought, as .npz needs it: load(io.BytesIO(file.read())) works")
    # A safetensors file begins with the length of its header, in 8 bytes, and with the header's brace
    package = _safetensors() if not zipped and (_is_safetensors(name) or start[8:] == b"{") else None
    try:
        if zipped and _is_safetensors(name):
            raise ValueError("it is an .npz file, and its name says safetensors")
        content = _read_safetensors(package, reader, start) if package else _read_npz(reader, start)
        return _build(*content, allow_nonfinite, allow_negative_var)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a foreign file makes a parser raise
        raise ValueError(f"{name!r} is not a layer that cbn has saved: {error}") from error


def _build(
    header: Any,
    described: Described,
    read: Callable[[], Iterable[tuple[str, Array]]],
    allow_nonfinite: bool,
    allow_negative_var: bool,
) -> Any:
    """The layer; its arrays are read once their shapes and dtypes are known to be right."""
    if isinstance(header, dict) and isinstance(header.get("class"), str) and header["class"] in BUILDERS:
        _expect_format(header)
        expect_keys("header", header, ("format", "class", "arguments", "arrays"))
        return BUILDERS[header["class"]](header["arguments"], Arrays(described, read), allow_nonfinite)
    layer = _without_arrays(header)
    problems = []
    expected = {}
    for key in header["arrays"]:
        counter = key == "num_batches_tracked"
        expected[key] = layer._shape_of(key), np.dtype(np.int64) if counter else layer.dtype
        for what, found, right in zip(("shape", "dtype"), described[key], expected[key], strict=True):
            if found != right:
                problems.append(f"{key} has {what} {found}; expected {right}")
    if problems:
        raise ValueError("; ".join(problems))
    for key, a in read():
        try:
            eps = layer.eps if allow_negative_var else None
            setattr(layer, key, entries.entry(key, a, *expected[key], allow_nonfinite=allow_nonfinite, eps=eps))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    layer.train(header["training"])
    for name in SWITCHES:
        setattr(layer, name, header.get(name))
    if header["frozen"]:
        layer.freeze()
    return layer


def _without_arrays(header: Any) -> Any:
    """The layer that a header describes, before it has arrays."""
    _expect_format(header)
    expect_keys("header", header, ("format", "class", "arguments", "training", "frozen", "arrays"), SWITCHES)
    if not isinstance(header["class"], str) or header["class"] not in CLASSES:
        raise ValueError(f"unknown class {header['class']!r}")
    unknown = [key for key in header["arrays"] if key not in ARRAYS]
    if unknown:
        raise ValueError(f"unknown entries {_some(unknown)}")
    arguments = header["arguments"]
    expect_keys("arguments", arguments, ARGUMENTS, tuple(OPTIONAL))
    flags = {key: checks.boolean(arguments[key], key) for key in ("affine", "track_running_stats", "bias")}
    for key in ("training", "frozen"):
        checks.boolean(header[key], key)
    if flags["bias"] != ("bias" in header["arrays"]):
        raise ValueError(f"bias is {flags['bias']}, but the arrays are {_some(header['arrays'])}")
    if arguments["dtype"] not in ("float32", "float64"):
        raise ValueError(f"dtype is {arguments['dtype']!r}; expected 'float32' or 'float64'")
    # Without arrays: the file's own list decides which there are
    layer = CLASSES[header["class"]](**{**arguments, "affine": False, "track_running_stats": False})
    layer.affine, layer.track_running_stats = flags["affine"], flags["track_running_stats"]
    return layer


def _expect_format(header: Any) -> None:
    if isinstance(header, dict) and (header.get("format") != FORMAT or header["format"] is True):
        raise ValueError(f"format {header.get('format')!r}, and this version reads {FORMAT}")


def expect_keys(what: str, mapping: Any, expected: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse a mapping that has not these keys, or has others too, but for those that are optional."""
    if not isinstance(mapping, dict):
        raise ValueError(f"its {what} should be a mapping, not {type(mapping).__name__}")
    missing, unknown = (
        [k for k in expected if k not in mapping],
        [k for k in mapping if k not in (*expected, *optional)],
    )
    if missing or unknown:
        raise ValueError(f"its {what} should have {list(expected)}; missing {missing}, unknown {_some(unknown)}")
