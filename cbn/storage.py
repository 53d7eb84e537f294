"""Layers in files: numpy's .npz or safetensors, with a JSON header, and nothing that could run code on loading."""

import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import batchnorm, state

__all__ = ["load", "save"]

HEADER = "cbn"
FORMAT = 1
CLASSES: dict[str, type[batchnorm.BatchNorm]] = {name: getattr(batchnorm, name) for name in batchnorm.__all__}
ARRAYS = (*batchnorm.BatchNorm._state_names, "weight_grad", "bias_grad")


def is_safetensors(path: Path) -> bool:
    """Whether the file's name asks for that format."""
    return path.suffix.lower() == ".safetensors"


def safetensors_package() -> Any:
    """The package, which is optional."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("files named .safetensors need the safetensors package: pip install safetensors") from error
    return safetensors


def save(layer: batchnorm.BatchNorm, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> None:
    """Write a layer to a file; see `BatchNorm.save`."""
    path = Path(os.path.realpath(path))  # through a link, to the file that it names
    safetensors = safetensors_package() if is_safetensors(path) else None
    arrays = layer._snapshot(ARRAYS)
    bad = [name for name, a in arrays.items() if not np.all(np.isfinite(a))]
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
    _build(header, arrays, allow_nonfinite)  # what cannot be loaded is not written
    temporary = path.with_name(f".cbn-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if safetensors:
                contiguous = {name: np.array(a, order="C") for name, a in arrays.items()}
                file.write(safetensors.numpy.save(contiguous, metadata={HEADER: json.dumps(header)}))
            else:
                entries: dict[str, Any] = {HEADER: np.array(json.dumps(header)), **arrays}
                np.savez(file, **entries)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> batchnorm.BatchNorm:
    """Read a layer from a file that `BatchNorm.save` wrote.

    Parameters
    ----------
    path : str or path-like
    allow_nonfinite : bool
        Whether NaN and infinities are accepted.

    Returns
    -------
    BatchNorm
        Of the class that was saved, or the cbn class that it extended.

    Raises
    ------
    ValueError
        For anything but such a file: foreign, truncated, pickled, of wrong shapes or values. Nothing is unpickled.
    OSError
        If the file cannot be read.
    ImportError
        For a name that ends with .safetensors, without the package of that name.

    Examples
    --------
    >>> import os, tempfile
    >>> import cbn
    >>> path = os.path.join(tempfile.mkdtemp(), "bn.npz")
    >>> cbn.BatchNorm2d(3).eval().save(path)
    >>> cbn.load(path)
    BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    path = Path(path)
    safetensors = safetensors_package() if is_safetensors(path) else None
    with open(path, "rb") as file:
        try:
            return _build(*(_read_safetensors(safetensors, path) if safetensors else _read(file)), allow_nonfinite)
        except Exception as error:  # whatever a foreign file makes a parser raise
            raise ValueError(f"{os.fspath(path)!r} is not a layer that cbn has saved: {error}") from error


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    if file.read(2) != b"PK":
        raise ValueError("it is no .npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        if HEADER not in archive.files:
            raise ValueError("it has no cbn header")
        header = json.loads(str(archive[HEADER]))
        # A damaged directory can lose entries, or have one twice
        if sorted(archive.files) != sorted([HEADER, *header["arrays"]]):
            raise ValueError(f"it holds {sorted(archive.files)} and should hold {header['arrays']}")
        return header, {name: archive[name] for name in header["arrays"]}


def _read_safetensors(safetensors: Any, path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    with safetensors.safe_open(path, framework="numpy") as archive:
        metadata = archive.metadata() or {}
        if HEADER not in metadata:
            raise ValueError("it has no cbn header")
        header = json.loads(metadata[HEADER])
        if sorted(archive.keys()) != sorted(header["arrays"]):
            raise ValueError(f"it holds {sorted(archive.keys())} and should hold {header['arrays']}")
        return header, {name: archive.get_tensor(name) for name in header["arrays"]}


def _build(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], allow_nonfinite: bool) -> batchnorm.BatchNorm:
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r}, and this version reads {FORMAT}")
    if header["class"] not in CLASSES:
        raise ValueError(f"unknown class {header['class']!r}")
    for name in ("training", "frozen"):
        if not isinstance(header[name], bool):
            raise ValueError(f"{name} is {header[name]!r}")
    unknown = [name for name in arrays if name not in ARRAYS]
    if unknown:
        raise ValueError(f"unknown entries {unknown}")
    # Without arrays first: the file's own list decides which there are, and none is made before its size is known
    arguments = dict(header["arguments"])
    if arguments.pop("nonfinite", "propagate") != "propagate":  # files of version 0.1 name it
        raise ValueError(f"nonfinite is {header['arguments']['nonfinite']!r}")
    flags = {name: arguments.pop(name) for name in ("affine", "track_running_stats", "bias")}
    layer = CLASSES[header["class"]](**arguments, affine=False, track_running_stats=False)
    layer.affine, layer.track_running_stats = flags["affine"], flags["track_running_stats"]
    problems = []
    for name, a in arrays.items():
        shape = () if name == "num_batches_tracked" else (layer.num_features,)
        if a.shape != shape:
            raise ValueError(f"{name} has shape {a.shape}; expected {shape}")
        dtype = np.dtype(np.int64) if name == "num_batches_tracked" else layer.dtype
        if a.dtype != dtype:
            raise ValueError(f"{name} has dtype {a.dtype}; expected {dtype}")
        try:
            setattr(layer, name, state.entry(name, a, shape, dtype, allow_nonfinite=allow_nonfinite))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    layer.train(header["training"])
    if header["frozen"]:
        layer.freeze()
    return layer
