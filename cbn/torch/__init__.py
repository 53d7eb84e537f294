"""PyTorch modules on cbn's kernels, and the exchange of a model's batch norms for them.

>>> import torch
>>> import cbn.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
>>> model = cbn.torch.convert(model)
>>> type(model[1]).__module__
'cbn.torch.modules'
"""

import os
import warnings

try:
    import torch
except ImportError as error:
    raise ImportError('cbn.torch needs PyTorch 2.4 or newer: pip install "cbn[torch]"') from error

from ..config import openmp_of
from ..kernels import engine
from .convert import Report, convert, report, revert
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Report", "SyncBatchNorm", "convert", "report", "revert"]


def _check_runtimes() -> None:
    """Warn where PyTorch and cbn call an OpenMP runtime each: the threads of both wait busily for work."""
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    ours, theirs = (openmp_of(path) for path in (engine.__file__, library))
    if ours and theirs and ours != theirs:
        warnings.warn(
            f"PyTorch and cbn have an OpenMP runtime each ({theirs}, {ours}), whose threads compete for processors; "
            f"one serves both if Python starts with LD_PRELOAD={theirs}",
            RuntimeWarning,
            stacklevel=3,
        )


_check_runtimes()
