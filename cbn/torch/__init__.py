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

from ..config import openmp_runtime
from .convert import Report, convert, report, revert
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Report", "SyncBatchNorm", "convert", "report", "revert"]


def _check_runtimes() -> None:
    """Warn where PyTorch and cbn have an OpenMP runtime each: the threads of both wait busily for work."""
    runtimes = openmp_runtime()
    if len(runtimes) > 1:
        folder = os.path.dirname(torch.__file__)
        preload = next((path for path in runtimes if path.startswith(folder)), runtimes[0])
        warnings.warn(
            f"this process has {len(runtimes)} OpenMP runtimes ({', '.join(runtimes)}), whose threads compete for the "
            f"processors; one serves both if Python starts with LD_PRELOAD={preload}",
            RuntimeWarning,
            stacklevel=3,
        )


_check_runtimes()
