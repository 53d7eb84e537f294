"""PyTorch modules on cbn's kernels, and the exchange of a model's batch norms for them.

>>> import torch
>>> import cbn.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
>>> model = cbn.torch.convert(model)
>>> type(model[1]).__module__
'cbn.torch.modules'
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('cbn.torch needs PyTorch 2.4 or newer: pip install "cbn[torch]"') from error

from .convert import Report, convert, report, revert
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Report", "SyncBatchNorm", "convert", "report", "revert"]
