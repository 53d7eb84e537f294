"""Layers from other systems, each with its own eps, momentum and running variance.

A converter returns a layer that computes the same values as the original, in training and in evaluation, or it raises
an error with the reason. `import cbn` imports no other system, and most converters import none either: they read
attributes and arrays.

=================  =======  ========================  =====================  ====================
system             eps      momentum                  running variance       mode of the layer
=================  =======  ========================  =====================  ====================
PyTorch            its own  the same                  unbiased               the module's
Keras              its own  1 - momentum              biased; fused kernel   evaluation, or frozen
                                                      of Keras 2: unbiased
ONNX               its own  1 - momentum              biased                 the node's
Flax, variables    given    1 - momentum              biased                 evaluation
Flax, nnx modules  its own  1 - momentum              biased                 the module's
Equinox            its own  1 - momentum              biased                 the layer's
Haiku              given    1 - decay_rate            biased                 evaluation
MLX                its own  the same                  unbiased since 0.32.1  the layer's
=================  =======  ========================  =====================  ====================
"""

from .equinox import from_equinox
from .flax import from_flax
from .haiku import from_haiku
from .keras import from_keras
from .mlx import from_mlx
from .onnx import from_onnx
from .torch import from_torch, to_torch_state

__all__ = [
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_mlx",
    "from_onnx",
    "from_torch",
    "to_torch_state",
]
