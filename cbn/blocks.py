"""Arrays in blocks: how an array that no memory holds is cut, read and written, and what a layer does to a block."""

from __future__ import annotations

import contextlib
import errno
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
from .batchnorm import BatchNorm, refuse_overrides
from .checks import Act, Array, Doubles
from .inputs import as_input
from .kernels import passes

Slices = tuple[slice, ...]


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
        refuse_overrides(bn, "an array in blocks")
        for option in ("ghost_batch_size", "renorm") if batch else ():
            if getattr(bn, option) is not None:
                raise ValueError(f"bn has {option}, which is for batches: an array in blocks is normalized as a whole")
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
    def file_name(self) -> str | None:
        """Of the file that the array is in, where that is known."""
        found = getattr(getattr(self.array, "file", None), "filename", None)  # of h5py
        return found if isinstance(found, str) and os.path.isfile(found) else None

    @property
    def modified(self) -> int | None:
        """When the file was written last, where that is known."""
        return None if self.file_name is None else os.stat(self.file_name).st_mtime_ns

    @property
    def identity(self) -> dict[str, Any] | None:
        """What tells the array from others, as far as its library says it; None of an array in memory."""
        names = {"file": self.file_name, "name": getattr(self.array, "name", None)}
        store = getattr(self.array, "store_path", None)  # of zarr
        return names | {"store": None if store is None else str(store), "kind": type(self.array).__name__}

    def is_in_file_of(self, other: Blocks) -> bool:
        mine, others = self.file_name, other.file_name
        return mine is not None and others is not None and os.path.samefile(mine, others)

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
        if self.file_name is not None:
            with open(self.file_name, "rb") as file:
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
    file_name = identity = None

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

    def __init__(self, array: Array, mapped: Any, path: str | None = None, part: str | None = None) -> None:
        """array: of the memory of `mapped`; part: the file of this name, beside `path`, is ours until it is whole."""
        super().__init__(array)
        if mapped.mode == "c":
            raise ValueError('a memmap of mode "c" cannot be given back to its file: open it with mode "r" or "r+"')
        self.mapped = mapped
        self.map: mmap.mmap = mapped._mmap
        self.start: int = np.frombuffer(self.map, np.uint8).ctypes.data
        self.in_file = mapped.offset - mapped.offset % mmap.ALLOCATIONGRANULARITY - self.start  # add it to an address
        self.path, self.part = path, part
        self.file = None if path is None else os.open(self.part_path, os.O_RDWR)
        self.writer = ThreadPoolExecutor(1, "cbn.outofcore")
        self.buffers: list[Array | Any] = [None, None]  # in turns
        self.writing: list[Future[None] | None] = [None, None]  # what is written from each of them

    @classmethod
    def create(cls, path: str, like: Blocks, dtype: np.dtype[Any]) -> Mapped:
        """A new .npy file, for the results of this array's blocks; until it is whole no other file has its name."""
        fortran = like.order == tuple(reversed(range(len(like.shape)))) and len(like.shape) > 1
        part = f"{os.path.basename(path)}.{os.urandom(4).hex()}.part"
        place = os.path.join(os.path.dirname(path), part)
        try:
            array = np.lib.format.open_memmap(place, "w+", dtype, like.shape, fortran_order=fortran)
            return cls(array, array, path, part)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place)
            raise

    @classmethod
    def resume(cls, path: str, part: str, dtype: np.dtype[Any]) -> Mapped:
        """The file that `create` began."""
        array = np.lib.format.open_memmap(os.path.join(os.path.dirname(path), part), "r+")
        return cls(_typed(array, dtype), array, path, part)

    @property
    def part_path(self) -> str:
        assert self.path is not None
        assert self.part is not None
        return os.path.join(os.path.dirname(self.path), self.part)

    @property
    def file_name(self) -> str | None:  # type: ignore[override]
        found = self.mapped.filename
        return None if found is None or not os.path.exists(found) else os.path.realpath(found)

    @property
    def identity(self) -> dict[str, Any] | None:  # type: ignore[override]
        if self.path is not None:
            return {"file": self.path, "part": self.part}
        place = byte_bounds(self.array)[0] + self.in_file
        return {"file": self.file_name, "place": place, "strides": self.array.strides}

    def open_for_writing(self) -> None:
        if not self.array.flags.writeable:
            raise ValueError('out is read-only: a memmap of mode "r+" or "w+" can be written')
        if self.file is None and self.is_file(self.mapped.filename):
            with contextlib.suppress(OSError):
                self.file = os.open(self.mapped.filename, os.O_RDWR)

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
        if self.file is None:
            return part
        self._wait(0)
        if self.buffers[0] is None or self.buffers[0].size < part.size:
            self.buffers[0] = np.empty(part.size, self.dtype)
        shape = [part.shape[axis] for axis in self.order]
        room: Array = self.buffers[0][: part.size].reshape(shape).transpose(np.argsort(self.order))
        return room

    def write(self, at: Slices, y: Array) -> None:
        if self.file is not None:
            target = self.array[at].transpose(self.order)
            place = target.__array_interface__["data"][0] + self.in_file
            self.writing[0] = self.writer.submit(_write_runs, self.file, y.transpose(self.order), place, target.strides)
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
        place, path = self.part_path, self.path
        self.path = None
        os.replace(place, path)
        return _typed(np.load(path, mmap_mode="r+"), self.dtype)

    def abandon(self, resumable: bool) -> None:
        self.writer.shutdown()
        if self.path is not None and not resumable:
            os.unlink(self.part_path)
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def span(self, at: Slices) -> int:
        """Bytes between the first and the last one of a block, all of which may come to memory with it."""
        low, high = byte_bounds(self.array[at])
        return high - low

    def is_same(self, other: Blocks) -> bool:
        if super().is_same(other):
            return True
        if not isinstance(other, Mapped) or not self.is_in_file_of(other):
            return False
        mine, others = ([end + b.in_file for end in byte_bounds(b.array)] for b in (self, other))
        if mine[1] <= others[0] or others[1] <= mine[0]:
            return False
        if mine == others and self.array.strides == other.array.strides and self.dtype == other.dtype:
            return True
        raise ValueError("out overlaps the array in its file, and is another one")


def _typed(array: Any, dtype: np.dtype[Any]) -> Any:
    """With the dtype that .npy has no name for, as bfloat16."""
    return array.view(dtype) if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize else array


def _write_runs(file: int, y: Array, place: int, strides: tuple[int, ...]) -> None:
    """Write the contiguous y where an array in the file has its values, with these strides, run by run."""
    n_outer, size = y.ndim, y.dtype.itemsize
    while n_outer and (strides[n_outer - 1] == size or y.shape[n_outer - 1] == 1):
        n_outer -= 1
        size *= y.shape[n_outer]
    content = y.reshape(-1).view(np.uint8).data
    for i, index in enumerate(np.ndindex(y.shape[:n_outer])):
        at = place + sum(k * stride for k, stride in zip(index, strides, strict=False))
        _write_all(file, content[i * size : (i + 1) * size], at)


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


def target_of(out: Any, source: Blocks, dtype: np.dtype[Any], begun: dict[str, Any] | None) -> Blocks:
    """Where results go. A path: a new .npy file, or the one that was `begun`, as its identity says."""
    if isinstance(out, (str, os.PathLike)):
        path = os.path.realpath(os.fspath(out))
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not path.endswith(".npy"):
            raise ValueError(
                f"out is {os.fspath(out)!r}; a path ends with .npy, and other files are passed as open arrays"
            )
        if source.file_name is not None and os.path.exists(path) and os.path.samefile(source.file_name, path):
            raise ValueError("out is the file of the array: to work in place, pass a memmap of mode 'r+' as both")
        if begun is None:
            target: Blocks = Mapped.create(path, source, dtype)
        elif begun.get("part") is None or begun["file"] != path:
            raise ValueError(f"the state is of work whose out is {begun.get('file')!r}, and not {path!r}")
        else:
            target = Mapped.resume(path, begun["part"], dtype)
    else:
        target = _array(out, "out")
    try:
        _expect(target, source.shape, dtype)
    except BaseException:
        target.abandon(begun is not None)
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
    if isinstance(array, np.ndarray):
        owner: Any = array
        while isinstance(owner, np.ndarray):  # np.asarray(memmap) is in its file, too
            if isinstance(owner, np.memmap) and getattr(owner, "_mmap", None) is not None:
                return Mapped(array, owner)
            owner = owner.base
        return InMemory(array)
    chunks = getattr(array, "chunks", None)
    if chunks and not all(isinstance(size, int) for size in chunks):
        raise TypeError(f"{name} is lazy, {type(array).__name__}: cbn.dask has the same functions for dask arrays")
    if not all(hasattr(array, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        raise TypeError(
            f"{name} must be the path of an .npy file, or an array as numpy, h5py or zarr have it, "
            f"not {type(array).__name__}"
        )
    try:
        return Blocks(array)
    except TypeError:
        raise TypeError(f"{name} has dtype {array.dtype}, which is none of numpy's") from None
