"""What is measured: operations, shapes, layouts; the short list and the full one."""

from dataclasses import dataclass, replace
from math import prod

ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}  # of the inputs; parameters of bfloat16 are float32
OPS = ("eval", "train", "backward")
FUSED = ("relu", "add+relu")
LAYOUTS = ("first", "last")

# ResNet-50's stages at N = 32, the largest of each stage's; and at N = 1, as an inference service sees them.
RESNET = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
SINGLE = ((1, 64, 56, 56), (1, 512, 7, 7))
NCL = ((64, 256, 1000),)
NC = ((4096, 1024), (60000, 100))
# From oneDNN's own lists, and what has broken somebody's kernel: primes, one channel, many channels, tiny images.
ODD = (
    (1, 257, 28, 28),
    (1, 1024, 28, 17),
    (2, 251, 28, 28),
    (8, 322, 16, 16),
    (88, 600, 16, 16),
    (12, 4, 8, 8),
    (32, 27, 7),
    (32, 128, 10),
    (8, 3, 224, 224),
    (16, 17, 10007),
    (1, 1, 3000, 3000),
    (100, 100000),
    (1000003, 3),
)
# Small calls: all overhead.
SMALL = ((1, 64), (32, 64), (1, 64, 8, 8), (1, 256, 14, 14))
GROWTH = tuple(10**k for k in range(2, 9))


@dataclass(frozen=True)
class Case:
    """One thing to measure: an operation on a shape.

    `layout` is "first" (NCHW, NCL) or "last" (an NCHW-shaped array with NHWC memory, NLC, NC). `memory` is "out" where
    the output's memory is given, "called" where the contender allocates it. `threads` 0 stands for all cores. `fused`
    is what follows a forward pass: "relu", "add+relu" (a residual, then ReLU), or nothing.
    """

    op: str
    shape: tuple
    layout: str = "first"
    threads: int = 1
    memory: str = "out"
    dtype: str = "float32"
    fused: str = ""

    @property
    def name(self):
        """As in results and on the command line: train-32x64x112x112-first-float32-out-1t."""
        op = f"{self.op}+{self.fused}" if self.fused else self.op
        return f"{op}-{self.shape_name}-{self.layout}-{self.dtype}-{self.memory}-{self.threads}t"

    @property
    def shape_name(self):
        return "x".join(map(str, self.shape))

    @property
    def n_bytes(self):
        """Bytes of one array: a unit of traffic."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def channel_bytes(self):
        """Bytes of one channel in one array."""
        return self.n_bytes // self.shape[1]

    def units(self, cache):
        """(least number of units that move through memory, why), for caches of so many bytes a core.

        A channel (of x, in backward of x and dy) that stays in half a core's cache between the two passes is read
        once; else twice. In channels last every channel goes through every row, so it never stays.
        """
        if self.fused == "add+relu":
            units, why = replace(self, fused="").units(cache)
            return units + 1, f"{why}; read the residual"
        if self.op == "eval":
            return 2, "read x, write y"
        arrays = 1 if self.op == "train" else 2
        if self.layout == "first" and arrays * self.channel_bytes <= cache // 2:
            return arrays + 1, f"read {'x' if arrays == 1 else 'x, dy'}, write; a channel stays in cache"
        return 2 * arrays + 1, f"read {'x' if arrays == 1 else 'x, dy'} twice, write"


def layouts_of(shape):
    """Layouts that a shape is measured in: without spatial axes there is one."""
    return ("last",) if len(shape) == 2 else LAYOUTS


def of_shapes(shapes, threads, ops=OPS, **kwargs):
    """Cases of all operations, layouts and thread counts; training needs more than one value per channel."""
    return [
        Case(op, shape, layout, n, **kwargs)
        for n in threads
        for shape in shapes
        for layout in layouts_of(shape)
        for op in ops
    ]


def short(cores):
    """About five minutes on two cores: a large, a middle and a small stage, one NCL, one NC, single images."""
    shapes = ((32, 256, 56, 56), (32, 1024, 14, 14), (32, 2048, 7, 7), (4096, 1024))
    cases = of_shapes(shapes, (cores,))
    cases += of_shapes(((64, 256, 1000),), (cores,), ("train",))[:1]
    cases += of_shapes(((1, 64, 56, 56),), (1,), ("eval",))
    cases += of_shapes(((32, 256, 56, 56),), (1,))[:3]
    cases += [replace(c, memory="called") for c in of_shapes(((32, 256, 56, 56),), (cores,)) if c.layout == "first"]
    cases += of_shapes(((32, 256, 56, 56),), (cores,), ("eval", "train"), dtype="bfloat16")
    for fused in FUSED:
        cases += of_shapes(((32, 256, 56, 56),), (cores,), ("eval", "train"), fused=fused)[:2]
    return cases


def full(cores):
    """Everything: every shape, one core and all, memory given and as called, other types too."""
    counts = (1, cores) if cores > 1 else (1,)
    shapes = (*RESNET, *SINGLE, *NCL, *NC, *ODD)
    cases = of_shapes(shapes, counts)
    cases += of_shapes((*RESNET, *NCL, *NC), (cores,), memory="called")
    for dtype in ("float64", "bfloat16"):
        cases += of_shapes((RESNET[1], RESNET[3], NC[0]), (cores,), dtype=dtype)
    for fused in FUSED:
        cases += of_shapes((*RESNET, NC[0]), counts, ("eval", "train"), fused=fused)
    return cases


def parse_shape(text):
    """A shape from the command line, as in 32x64x56x56."""
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"unknown shape {text!r}; expected sizes joined by x, N and C first, as in 32x64x56x56")
    return shape
