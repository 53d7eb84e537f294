"""Batch normalization for CPUs: Cython kernels, parallel with OpenMP, behind numpy-facing layers.

Every operation has four steps, forward and backward: measure the data, merge the statistics of its parts, solve for
coefficients, apply them element by element.

========================  ============================================================================
`cbn.batchnorm`           the layers: forward and backward, in training and in evaluation
`cbn.state`               the state of a layer: arguments, arrays, modes, state dict, copies
`cbn.attributes`          checked attributes of layers
`cbn.population`          running statistics as Moments, and compared with a batch
`cbn.diagnostics`         what is wrong with a layer; its pictures are in `cbn.pictures`
`cbn.recalibrate`         running statistics from all inputs of a data set
`cbn.plan`                a layer's evaluation, prepared for one shape and dtype
`cbn.functional`          functions without state, under PyTorch's names
`cbn.verbs`               measure, merge, solve and apply, one by one
`cbn.quantized`           evaluation of 8-bit input
`cbn.steps`               the work of a call around the passes, and the context of backward
`cbn.moments`             count, mean and sum of squared distances; exact merge
`cbn.running`             the statistics of a stream
`cbn.scaling`             standardize, with given statistics
`cbn.sklearn`             scikit-learn's StandardScaler, imported only when asked for
`cbn.inputs`              arguments in the form that the passes read
`cbn.checks`              checks of arguments that layers and functions share, with their messages
`cbn.entries`             entries of state dicts and files
`cbn.storage`             layers in files
`cbn.convert`             layers of PyTorch, Keras, ONNX, Flax, Equinox, Haiku, MLX
`cbn.fuse`                layers folded into linear layers and convolutions
`cbn.threads`             how many threads
`cbn.memory`              sizes of the caches, memory kept for large outputs
`cbn.config`              show_config and the self-check
`cbn.reference`           the specification, in float64 numpy
`cbn.kernels`             the compiled passes; its docstring is the map of the folder
========================  ============================================================================

Imports run one way: layers and functions → steps → inputs → kernels; `checks` and `reference` import nothing of
cbn.
"""

from . import functional, reference
from .batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
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
from .digests import set_check_inputs
from .fuse import fuse_bn_linear, fuse_conv_bn, fuse_linear_bn
from .memory import empty_cache
from .moments import Moments, moments
from .recalibrate import Recalibration, recalibrate
from .running import RunningMoments
from .scaling import standardize
from .storage import load
from .threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "Recalibration",
    "RunningMoments",
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
    "recalibrate",
    "reference",
    "set_check_inputs",
    "set_num_threads",
    "show_config",
    "standardize",
    "to_torch_state",
]
