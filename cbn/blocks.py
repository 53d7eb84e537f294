"""Arrays in blocks: how an array that no memory holds is cut, read and written, and what a layer does to a block."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from . import checks, steps
from .batchnorm import BatchNorm
from .checks import Act, Array, Doubles
from .inputs import as_input
from .kernels import passes

Slices = tuple[slice, ...]

PART = ".part"  # what a file's name ends with until the file is whole


# ---- a layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What a layer does to the blocks of an array, as it was when this was made."""

    axis: int
    statistics: tuple[Doubles, Doubles] | None  # running mean and variance; None: those of the whole array
    affine: tuple[Doubles | None, Doubles | None]
    eps: float
    act: Act
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, bn: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> Evaluation:
        """Of a layer that takes arrays of this shape and dtype, or an error."""
        if not isinstance(bn, BatchNorm):
            raise TypeError(f"bn must be a cbn.BatchNorm, not {type(bn).__name__}")
        axis = checks.axis_index(bn.channel_axis, len(shape))
        if shape[axis] != bn.num_features:
            known = "does not know yet how many it has" if bn.num_features is None else f"has {bn.num_features}"
            raise ValueError(f"the array has {shape[axis]} channels, and the layer {known}")
        if bn.num_domains is not None:
            raise ValueError(f"bn has {bn.num_domains} sets of statistics, of which an array in blocks cannot choose")
        if checks.native_input(dtype) is None:
            raise TypeError(f"the array has dtype {dtype}; expected {checks.INPUTS}")
        batch = bn.use_batch_stats
        if batch is None:
            batch = bn.training or bn.running_mean is None
        statistics = None if batch else (np.array(bn.running_mean, np.float64), np.array(bn.running_var, np.float64))
        weight, bias = (None if v is None else np.array(v, np.float64) for v in (bn.weight, bn.bias))
        return cls(axis, statistics, (weight, bias), bn.eps, checks.activation(bn.activation), bn.dtype)

    def __call__(
        self, block: Array, channels: slice, statistics: tuple[Doubles, Doubles], out: Array | None = None
    ) -> Array:
        """y of a block with these channels of the array, whose mean and variance are given."""
        mean, var = (v[channels] for v in statistics)
        weight, bias = (None if v is None else v[channels] for v in self.affine)
        inp = as_input(block, self.axis)
        inp.promote_for(self.dtype)
        coef = steps.coefficients(mean, passes.inverse_std(var, self.eps), steps.Affine(weight, bias))
        return steps.forward_fixed(inp, coef, steps.Epilogue(None, self.act), out)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def cut(
    shape: Sequence[int], order: Sequence[int], units: Sequence[int], whole: Sequence[int], limit: int
) -> tuple[int, ...]:
    """The shape of a block of at most `limit` elements: as few and as contiguous ones as can be.

    order: the axes as they lie in memory, from the slowest. units: of which the sizes of a block are multiples. whole:
    axes that are not cut.
    """
    size = [min(shape[a], shape[a] if a in whole else units[a]) for a in range(len(shape))]
    for axis in reversed(order):
        others = math.prod(size) // max(size[axis], 1)
        most = limit // max(others, 1)
        size[axis] = shape[axis] if most >= shape[axis] else max(size[axis], most // units[axis] * units[axis])
        if size[axis] < shape[axis]:
            break
    return tuple(size)


def positions(shape: Sequence[int], size: Sequence[int], order: Sequence[int]) -> Iterator[Slices]:
    """The blocks, in the order of memory."""
    ranges = [[slice(i, min(i + size[a], shape[a])) for i in range(0, shape[a], max(size[a], 1))] for a in order]
    for found in itertools.product(*ranges):
        at = dict(zip(order, found, strict=True))
        yield tuple(at[a] for a in range(len(shape)))


# ---- arrays of every kind --------------------------------------------------------------------------------------------


class Blocks:
    """An array that is read and written by blocks: one of numpy, of h5py or zarr, or any with shape, dtype, slices."""

    copies = 4  # of a block, that a library may have in memory on the way to the disk or from it: measured

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        units = getattr(array, "shards", None) or getattr(array, "chunks", None) or (1,) * len(self.shape)
        self.units: tuple[int, ...] = tuple(max(1, min(u, n)) for u, n in zip(units, self.shape, strict=True))
        self.order = tuple(range(len(self.shape)))

    @property
    def modified(self) -> int | None:
        """When the file was written last, where that is known."""
        return None

    def nothing(self, whole: Sequence[int]) -> Array:
        """An array without elements, as a block is, with all of these axes."""
        return np.empty([n if axis in whole else 0 for axis, n in enumerate(self.shape)], self.dtype)

    def read(self, at: Slices) -> Array:
        return np.asarray(self.array[at])

    def prefetch(self, at: Slices) -> None:
        """Blocks that are read next."""

    def give_back(self, at: Slices) -> None:
        """The memory of a block that has been read or written."""

    def room(self, at: Slices) -> Array:
        """Memory for the result of a block, of which `write` knows."""
        return np.empty([s.stop - s.start for s in at], self.dtype)

    def write(self, at: Slices, y: Array) -> None:
        self.array[at] = y

    def flush(self) -> None:
        """Let all that was written reach the system."""
        file = getattr(self.array, "file", None)  # of h5py
        if file is not None:
            file.flush()

    def sync(self) -> None:
        """Let what the system has of it reach the disk, where the file is known; any thread may call it."""
        filename = getattr(getattr(self.array, "file", None), "filename", None)  # of h5py
        if filename is not None and os.path.isfile(filename):
            with open(filename, "rb") as file:
                os.fsync(file.fileno())

    def finish(self) -> Any:
        """The result, when all of it is written."""
        return self.array

    def abandon(self, resumable: bool) -> None:
        """Nothing more will be written, for now or ever."""

    def is_same(self, other: Blocks) -> bool:
        """Whether both are the same array; an error if they share some memory all the same."""
        if self.array is other.array:
            return True
        return type(self.array) is type(other.array) and (self.array == other.array) is True


class InMemory(Blocks):
    """An array of numpy."""

    copies = 1

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.order = tuple(sorted(self.order, key=lambda axis: -abs(array.strides[axis])))

    def read(self, at: Slices) -> Array:
        return self.array[at]  # type: ignore[no-any-return]

    room = read

    def write(self, at: Slices, y: Array) -> None:
        pass  # it was made there

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def is_same(self, other: Blocks) -> bool:
        if not isinstance(other, InMemory):
            return False
        a, b = self.array, other.array
        if byte_bounds(a) == byte_bounds(b) and a.strides == b.strides and a.dtype == b.dtype:
            return True
        if np.may_share_memory(a, b):
            raise ValueError("out overlaps the array, and is another one: neither is the whole of the other")
        return False


class Mapped(InMemory):
    """A memmap, which leaves memory block by block.

    The pages that are read come from the file by themselves and go back on demand. Results are written to the file,
    where it can be opened, by a thread while the next block is made: each page of a new file that is written in memory
    costs a fault, twice the time of all else.
    """

    copies = 2

    def __init__(self, array: Any, descriptor: int | None = None, path: str | None = None) -> None:
        super().__init__(array)
        if array.mode == "c":
            raise ValueError('a memmap of mode "c" cannot be given back to its file: open it with mode "r" or "r+"')
        self.map: mmap.mmap = array._mmap
        self.start: int = np.frombuffer(self.map, np.uint8).ctypes.data
        self.in_file = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY - self.start  # add it to an address
        self.file = descriptor
        self.path = path  # of a file of ours, which ends with PART until it is whole
        self.writer = ThreadPoolExecutor(1, "cbn.outofcore")
        self.buffers: list[Array | Any] = [None, None]  # in turns
        self.writing: list[Future[None] | None] = [None, None]  # what is written from each of them

    @classmethod
    def create(cls, path: str, like: Blocks, dtype: np.dtype[Any]) -> Mapped:
        """A new .npy file, for the results of this array's blocks."""
        fortran = like.order == tuple(reversed(range(len(like.shape)))) and len(like.shape) > 1
        file = _locked(path + PART)
        try:
            array = np.lib.format.open_memmap(path + PART, "w+", dtype, like.shape, fortran_order=fortran)
        except BaseException:
            os.close(file)
            raise
        return cls(array, file, path)

    @classmethod
    def resume(cls, path: str) -> Mapped:
        """The file that `create` began."""
        file = _locked(path + PART)
        try:
            array = np.lib.format.open_memmap(path + PART, "r+")
        except BaseException:
            os.close(file)
            raise
        return cls(array, file, path)

    @property
    def modified(self) -> int | None:
        filename = self.array.filename
        return None if filename is None or not os.path.exists(filename) else os.stat(filename).st_mtime_ns

    def open_for_writing(self) -> None:
        if not self.array.flags.writeable:
            raise ValueError('out is read-only: a memmap of mode "r+" or "w+" can be written')
        if self.file is None and self.is_file(self.array.filename):
            with contextlib.suppress(OSError):
                self.file = os.open(self.array.filename, os.O_RDWR)

    def is_file(self, path: Any) -> bool:
        """Whether memory is mapped from what now has this path, as far as Linux tells."""
        try:
            found = os.stat(path)
            with open("/proc/self/maps") as maps:
                for line in maps:
                    where, _, _, device, inode = line.split(None, 5)[:5]
                    first, last = (int(number, 16) for number in where.split("-"))
                    if first <= self.start < last:
                        major, minor = (int(number, 16) for number in device.split(":"))
                        return (os.makedev(major, minor), int(inode)) == (found.st_dev, found.st_ino)
        except (OSError, TypeError, ValueError):
            pass
        return False

    def prefetch(self, at: Slices) -> None:
        part = self.array[at]
        if self._is_contiguous(part):
            self._advise(part, mmap.MADV_WILLNEED)

    def give_back(self, at: Slices) -> None:
        self._advise(self.array[at], mmap.MADV_DONTNEED)

    def _advise(self, part: Array, advice: int) -> None:
        low, high = byte_bounds(part)
        first = (low - self.start) // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(advice, first, high - self.start - first)

    def _is_contiguous(self, part: Array) -> bool:
        return part.transpose(self.order).flags.c_contiguous

    def room(self, at: Slices) -> Array:
        part: Array = self.array[at]
        if self.file is None or not self._is_contiguous(part):
            return part
        self._wait(0)
        if self.buffers[0] is None or self.buffers[0].size < part.size:
            self.buffers[0] = np.empty(part.size, self.dtype)
        shape = [part.shape[axis] for axis in self.order]
        room: Array = self.buffers[0][: part.size].reshape(shape).transpose(np.argsort(self.order))
        return room

    def write(self, at: Slices, y: Array) -> None:
        part = self.array[at]
        if self.file is not None and self._is_contiguous(part):
            content = y.transpose(self.order).view(np.uint8).reshape(-1).data
            self.writing[0] = self.writer.submit(_write_all, self.file, content, byte_bounds(part)[0] + self.in_file)
            self.buffers.reverse()
            self.writing.reverse()

    def _wait(self, i: int) -> None:
        writing = self.writing[i]
        if writing is not None:
            writing.result()  # an error stays: what was to be written is not there
            self.writing[i] = None

    def flush(self) -> None:
        self._wait(0)
        self._wait(1)

    def sync(self) -> None:
        if self.file is None:
            self.map.flush()
        else:
            os.fsync(self.file)

    def finish(self) -> Any:
        self.flush()
        if self.path is None:
            return self.array
        path, self.path = self.path, None
        os.replace(path + PART, path)
        return np.load(path, mmap_mode="r+")

    def abandon(self, resumable: bool) -> None:
        self.writer.shutdown()
        if self.file is not None:
            os.close(self.file)
            self.file = None
        if self.path is not None and not resumable:
            os.unlink(self.path + PART)

    def span(self, at: Slices) -> int:
        """Bytes between the first and the last one of a block, all of which may come to memory with it."""
        low, high = byte_bounds(self.array[at])
        return high - low

    def is_same(self, other: Blocks) -> bool:
        if super().is_same(other):
            return True
        if not isinstance(other, Mapped) or None in (self.modified, other.modified):
            return False
        if not os.path.samefile(self.array.filename, other.array.filename):
            return False
        mine, others = ([end + b.in_file for end in byte_bounds(b.array)] for b in (self, other))
        if mine[1] <= others[0] or others[1] <= mine[0]:
            return False
        if mine == others and self.array.strides == other.array.strides and self.dtype == other.dtype:
            return True
        raise ValueError("out overlaps the array in its file, and is another one")


def _locked(path: str) -> int:
    """A descriptor of a file, which may be new and which no other process writes at the same time."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise BlockingIOError(errno.EAGAIN, "it is being written already", path) from None
    except OSError:
        pass  # a file system without locks
    return file


def _write_all(file: int, content: memoryview, place: int) -> None:
    while content:
        done = os.pwrite(file, content, place)
        content, place = content[done:], place + done


def source_of(array: Any, name: str = "array") -> Blocks:
    """What is read: a path of an .npy file, or an array."""
    if isinstance(array, (str, os.PathLike)):
        path = os.fspath(array)
        try:
            array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{name} is {path!r}, which is no .npy file: {error}; pass an open array") from None
        if not isinstance(array, np.memmap):
            raise ValueError(f"{name} is {path!r}, an archive: pass one of its arrays")
    return _array(array, name)


def target_of(out: Any, source: Blocks, dtype: np.dtype[Any], begun: bool) -> Blocks:
    """Where results go. A path: a new .npy file, or the one that was `begun`."""
    if isinstance(out, (str, os.PathLike)):
        path = os.path.realpath(os.fspath(out))
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not path.endswith(".npy"):
            raise ValueError(
                f"out is {os.fspath(out)!r}; a path ends with .npy, and other files are passed as open arrays"
            )
        mine = getattr(source.array, "filename", None)
        if os.path.exists(path) and mine is not None and os.path.samefile(mine, path):
            raise ValueError("out is the file of the array: to work in place, pass a memmap of mode 'r+' as both")
        if begun and not os.path.exists(path + PART):
            raise FileNotFoundError(f"there is no {path + PART}, with which the state goes on")
        target: Blocks = Mapped.resume(path) if begun else Mapped.create(path, source, dtype)
    else:
        target = _array(out, "out")
    try:
        _expect(target, source.shape, dtype)
    except BaseException:
        target.abandon(begun)
        raise
    return target


def _expect(target: Blocks, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse an `out` that cannot take results of this shape and dtype."""
    if target.shape != shape:
        raise ValueError(f"out has shape {target.shape}; expected {shape}, as the array")
    if target.dtype != dtype:
        raise TypeError(f"out has dtype {target.dtype}; expected {dtype}")
    if isinstance(target, Mapped):
        target.open_for_writing()
    elif isinstance(target, InMemory) and not target.array.flags.writeable:
        raise ValueError("out is read-only")


def _array(array: Any, name: str) -> Blocks:
    if isinstance(array, np.ma.MaskedArray):
        checks.unmasked(array, name)
    if isinstance(array, np.memmap) and getattr(array, "_mmap", None) is not None:
        return Mapped(array)
    if isinstance(array, np.ndarray):
        return InMemory(array)
    chunks = getattr(array, "chunks", None)
    if chunks and not all(isinstance(size, int) for size in chunks):
        raise TypeError(f"{name} is lazy, {type(array).__name__}: cbn.dask has the same functions for dask arrays")
    if not all(hasattr(array, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        raise TypeError(
            f"{name} must be the path of an .npy file, or an array as numpy, h5py or zarr have it, "
            f"not {type(array).__name__}"
        )
    return Blocks(array)
