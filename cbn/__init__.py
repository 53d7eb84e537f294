"""Batch normalization for CPUs: Cython kernels, parallel with OpenMP, behind numpy-facing layers.

========================  ============================================================================
`cbn.batchnorm`           the layers: parameters, running statistics, train and eval, forward, backward
`cbn.functional`          the same without state: check, allocate, call the kernels
`cbn.moments`             count, mean and sum of squared distances; exact merge
`cbn.storage`             layers in files
`cbn.threads`             how many threads
`cbn.memory`              sizes of the caches, memory kept for large outputs
`cbn.config`              show_config and the self-check
`cbn.checks`              checks of arguments, and the words of every refusal
`cbn.reference`           the specification, in float64 numpy
`cbn.kernels`             maps and reductions over two layouts, compiled for every instruction set
========================  ============================================================================

Imports run one way: layers → functional → kernels; `reference` and `kernels` know nobody.
"""

from . import checks, functional, reference
from .batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .config import __version__, show_config
from .memory import empty_cache
from .moments import Moments, moments
from .storage import load
from .threads import get_num_threads, num_threads, set_num_threads

fuse_linear_bn = checks.later("cbn.fuse_linear_bn")
fuse_conv_bn = checks.later("cbn.fuse_conv_bn")
fuse_bn_linear = checks.later("cbn.fuse_bn_linear")
from_torch = checks.later("cbn.from_torch")
from_keras = checks.later("cbn.from_keras")
from_flax = checks.later("cbn.from_flax")
from_onnx = checks.later("cbn.from_onnx")
to_torch_state = checks.later("cbn.to_torch_state")
recalibrate = checks.later("cbn.recalibrate")

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "__version__",
    "empty_cache",
    "functional",
    "get_num_threads",
    "load",
    "moments",
    "num_threads",
    "reference",
    "set_num_threads",
    "show_config",
]
