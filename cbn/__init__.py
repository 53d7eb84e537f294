"""Batch normalization for CPUs: Cython kernels, parallel with OpenMP, behind numpy-facing layers.

========================  ============================================================================
`cbn.batchnorm`           the layers: parameters, running statistics, train and eval, forward, backward
`cbn.functional`          the same without state: check, allocate, call the kernels
`cbn.moments`             count, mean and sum of squared distances; exact merge
`cbn.state`               entries of state dicts
`cbn.storage`             layers in files
`cbn.convert`             layers of PyTorch, Keras, ONNX, Flax, Equinox, Haiku, MLX
`cbn.fuse`                layers folded into linear layers and convolutions
`cbn.threads`             how many threads
`cbn.memory`              sizes of the caches, memory kept for large outputs
`cbn.config`              show_config and the self-check
`cbn.checks`              checks of arguments, and the words of every refusal
`cbn.reference`           the specification, in float64 numpy
`cbn.kernels`             maps and reductions over two layouts, compiled for every instruction set
========================  ============================================================================

Imports run one way: layers → functional → kernels → checks; `reference` knows nobody.
"""

from . import functional, reference
from .batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, set_check_inputs
from .config import __version__, show_config
from .convert import (
    from_equinox,
    from_flax,
    from_haiku,
    from_keras,
    from_mlx,
    from_onnx,
    from_torch,
    to_torch_state,
)
from .fuse import fuse_bn_linear, fuse_conv_bn, fuse_linear_bn
from .memory import empty_cache
from .moments import Moments, moments
from .storage import load
from .threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "__version__",
    "empty_cache",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_mlx",
    "from_onnx",
    "from_torch",
    "functional",
    "fuse_bn_linear",
    "fuse_conv_bn",
    "fuse_linear_bn",
    "get_num_threads",
    "load",
    "moments",
    "num_threads",
    "reference",
    "set_check_inputs",
    "set_num_threads",
    "show_config",
    "to_torch_state",
]
