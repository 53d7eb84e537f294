"""Layers in files: numpy's .npz with a JSON header, and nothing that could run code on loading."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import batchnorm

__all__ = ["load", "save"]

HEADER = "cbn"
FORMAT = 1
CLASSES: dict[str, type[batchnorm.BatchNorm]] = {name: getattr(batchnorm, name) for name in batchnorm.__all__}
ARRAYS = (*batchnorm.BatchNorm._state_names, "weight_grad", "bias_grad")


def refuse_safetensors(path: Path) -> None:
    if path.suffix == ".safetensors":
        raise NotImplementedError("the safetensors format is not supported yet; use .npz")


def save(layer: batchnorm.BatchNorm, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> None:
    """Write a layer to a file; see `BatchNorm.save`."""
    path = Path(path)
    refuse_safetensors(path)
    arrays = {name: getattr(layer, name).copy() for name in ARRAYS if getattr(layer, name) is not None}
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
            "nonfinite": layer.nonfinite,
        },
        "training": layer.training,
        "frozen": layer.frozen,
    }
    entries: dict[str, Any] = {HEADER: np.array(json.dumps(header)), **arrays}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **entries)
        # mkstemp makes a private file; a saved layer is one like any other
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
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
    refuse_safetensors(path)
    with open(path, "rb") as file:
        try:
            return _build(*_read(file), allow_nonfinite)
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
        unknown = [name for name in archive.files if name not in ARRAYS and name != HEADER]
        if unknown:
            raise ValueError(f"unknown entries {unknown}")
        return header, {name: archive[name] for name in archive.files if name != HEADER}


def _build(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], allow_nonfinite: bool) -> batchnorm.BatchNorm:
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r}, and this version reads {FORMAT}")
    if header["class"] not in CLASSES:
        raise ValueError(f"unknown class {header['class']!r}")
    for name in ("training", "frozen"):
        if not isinstance(header[name], bool):
            raise ValueError(f"{name} is {header[name]!r}")
    layer = CLASSES[header["class"]](**header["arguments"])
    # An array that was assigned or taken away after construction: the file's own list decides.
    for name in ARRAYS:
        if name not in arrays:
            setattr(layer, name, None)
        elif getattr(layer, name) is None and name == "num_batches_tracked":
            layer.num_batches_tracked = np.zeros((), np.int64)
        elif getattr(layer, name) is None:
            setattr(layer, name, np.zeros(layer.num_features, layer.dtype))
    layer._load(arrays, True, allow_nonfinite, optional=(), names=ARRAYS)
    layer.train(header["training"])
    if header["frozen"]:
        layer.freeze()
    return layer
