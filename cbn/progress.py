"""Progress bars: tqdm's, on a terminal, where it is installed."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["bar_on_terminal"]


def bar_on_terminal(shown: bool, *batches: Any, **options: Any) -> Any:
    """A bar of tqdm on stderr, around batches or not; None where there is none to show."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(*batches, file=sys.stderr, **options)
