"""Digests of what layers remember for backward: whether somebody has written to it since."""

from __future__ import annotations

import numpy as np

from . import checks
from .checks import Array
from .steps import Context

MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: the {} of the "
    "last forward. Pass a copy to the layer, or change it after backward()"
)

checking = False


def set_check_inputs(check: bool) -> bool:
    """Let layers check that their input does not change between forward and backward; return the setting before.

    A training forward remembers its input and its residual by reference. If they are written to before `backward`, the
    gradient is wrong. With the check a forward keeps a digest of their bytes, and `backward` raises a RuntimeError if
    the digest differs. The check is off by default, because it reads both arrays once more, at about 1 GB/s.

    Parameters
    ----------
    check : bool
        The setting for all layers of the process, from their next forward on.

    Returns
    -------
    bool
        The setting before.

    Examples
    --------
    >>> import numpy as np
    >>> import cbn
    >>> before = cbn.set_check_inputs(True)
    >>> bn, x = cbn.BatchNorm1d(2), np.eye(2, dtype=np.float32)
    >>> y = bn(x)
    >>> x += 1
    >>> bn.backward(y)
    Traceback (most recent call last):
    ...
    RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation: the input of the last forward. Pass a copy to the layer, or change it after backward()
    >>> cbn.set_check_inputs(before)
    True
    """  # noqa: E501
    global checking
    before, checking = checking, checks.boolean(check, "check")
    return before


def digest(a: Array | None) -> bytes | None:
    """A digest of an array's values."""
    if a is None:
        return None
    import hashlib  # its import takes 3 ms, which `import cbn` saves

    return hashlib.blake2b(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data, digest_size=16).digest()


def note(context: Context) -> None:
    """Keep digests of input and residual; called while `checking`."""
    context.digests = digest(context.inp.x), digest(context.epilogue.residual)


def compare(context: Context) -> None:
    """Refuse a context whose input or residual has changed."""
    if context.digests is None:
        return
    read = (context.inp.x, context.epilogue.residual)
    for name, a, before in zip(("input", "residual"), read, context.digests, strict=True):
        if digest(a) != before:
            raise RuntimeError(MODIFIED.format(name))
