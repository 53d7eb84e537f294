"""What is measured, in a short list and a full one: operations, shapes, and the other groups."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

from .networks import NETWORKS, batch_norms

ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8, "uint8": 1}  # of the inputs; uint8 is for statistics alone
OPS = ("eval", "train", "backward")
FUSED = ("relu", "add+relu")
LAYOUTS = ("first", "last")
GROUPS = ("shapes", "functions", "networks", "chain", "statistics", "variants", "modules", "steps")

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
# Small calls of the functions, in every operation.
FUNCTIONS = ((1, 64), (32, 64), (1, 64, 8, 8), (1, 256, 14, 14), (1, 512, 7, 7))
BATCHES = (1, 8, 32)  # of the networks
# What stands around a batch norm. A producer writes x before it; a reader reads its result, on all threads or on one.
CHAINS = ("read", "read by one", "write and read")
CHAIN_BATCHES = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)  # of 256 channels at 28x28: 0.8 to 205 MB an array
# The shapes of each operation on statistics: tables (genes, sensors), observations of environments, one long channel,
# and images as bytes.
IMAGES = (64, 3, 224, 224)
MEASURED = ((20000, 1000), (1000000, 17), (8, 17), (64, 376), (1, 1, 10**7))
STATISTICS = {
    "moments": (*MEASURED, IMAGES),
    "moments+extrema": (*MEASURED, IMAGES),
    "moments+skipna": MEASURED,
    "update": ((8, 17), (64, 376)),
    "standardize+clip": ((64, 376), (20000, 1000)),
}
# Each variant with the plain calls that it is held against and their shapes: those of the same traffic, but for the
# derivatives, whose measure is the backward pass.
SEQUENCES, PICTURES, ROWS = (32, 256, 1000), (32, 64, 112, 112), (4096, 1024)
VARIANTS = {
    **dict.fromkeys(("lengths", "mask", "sample weights"), (("train", "backward"), (SEQUENCES, PICTURES))),
    **dict.fromkeys([f"ghosts of {n}" for n in (8, 32, 128, 512)], (("train", "backward"), (ROWS,))),
    "renorm": (("train", "backward"), (PICTURES, ROWS)),
    "mix": (("train",), (PICTURES, ROWS)),
    "given moments": (("eval",), (PICTURES, ROWS)),
    **dict.fromkeys(("double backward", "tangent"), (("backward",), (SEQUENCES, PICTURES, ROWS))),
}

# PyTorch's modules as called, from small to large; "step" is forward and backward.
MODULES = ((32, 64), ROWS, (32, 128, 14, 14), (32, 64, 28, 28), (32, 64, 112, 112))
# Training steps of networks with these inputs; the networks are those of examples/torch_training.py.
STEPS = (("ResNet-18", (32, 3, 112, 112)), ("MobileNet", (32, 3, 112, 112)), ("1-D convolutions", (32, 1, 4000)))


@dataclass(frozen=True)
class Case:
    """One thing to measure: an operation on a shape.

    `layout` is "first" (NCHW, NCL) or "last" (an NCHW-shaped array with NHWC memory, NLC, NC). `memory` is "out" where
    the output's memory is given, "called" where the contender allocates it. `threads` 0 stands for all cores. `fused`
    is what follows a forward pass: "relu", "add+relu" (a residual, then ReLU), or nothing.

    `group` is one of GROUPS. "functions" are called through functions, where "shapes" may go through a layer. Of
    "networks" a case is all batch norms of the `network` in their order, through functions; its shape is (N,). Of
    "chain" it is a batch norm and the passes of other code that the `chain` names. "statistics" has operations of its
    own, the keys of STATISTICS. Of "variants" it is a plain call, beside which the `variant` is measured. Of
    "modules" it is a call of PyTorch's module on tensors, and of "steps" a training step of the `network`; there an
    operation may be "step", forward and backward.
    """

    op: str
    shape: tuple
    layout: str = "first"
    threads: int = 1
    memory: str = "out"
    dtype: str = "float32"
    fused: str = ""
    group: str = "shapes"
    network: str = ""
    chain: str = ""
    variant: str = ""

    @property
    def name(self):
        """As in results and on the command line: train-32x64x112x112-first-float32-out-1t."""
        op = f"{self.op}+{self.fused}" if self.fused else self.op
        group = self.chain or self.variant or self.group
        group = "" if group in ("shapes", "networks", "steps") else group.replace(" ", "_") + "-"
        return f"{group}{op}-{self.shape_name}-{self.layout}-{self.dtype}-{self.memory}-{self.threads}t"

    @property
    def shape_name(self):
        name = "x".join(map(str, self.shape))
        return f"{self.network.replace(' ', '_')}@{name}" if self.network else name

    @property
    def subject(self):
        """What a row of a table is about: the shape; of a network its name and the batch."""
        return (self.network, *self.shape) if self.network else self.shape

    @property
    def is_many(self):
        """Whether it stands for all batch norms of a network."""
        return self.group == "networks" and self.network != ""

    @property
    def parts(self):
        """The case itself; of "networks" a case for each batch norm, in their order."""
        if not self.is_many:
            return (self,)
        return tuple(replace(self, shape=shape, network="") for shape in batch_norms(self.network, *self.shape))

    @property
    def samples(self):
        """Samples of a ghost batch; 0 where there is none."""
        return int(self.variant.split()[-1]) if self.variant.startswith("ghosts") else 0

    @property
    def n_bytes(self):
        """Bytes of one array: a unit of traffic. Of "networks" one of each batch norm."""
        if self.is_many:
            return sum(part.n_bytes for part in self.parts)
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
        if self.is_many:
            parts = Counter(self.parts)
            units = sum(n * part.n_bytes * part.units(cache)[0] for part, n in parts.items()) / self.n_bytes
            return units, "each batch norm by itself"
        if self.op == "step":
            both = [replace(self, op=op).units(cache) for op in ("train", "backward")]
            return sum(units for units, _ in both), "; ".join(why for _, why in both)
        if self.fused == "add+relu":
            units, why = replace(self, fused="").units(cache)
            return units + 1, f"{why}; read the residual"
        if self.op in ("eval", "standardize+clip"):
            return 2, "read x, write y"
        if self.op in STATISTICS:
            return 1, "read x"
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


def of_networks(threads, batches=BATCHES):
    """Cases of all networks; backward with memory given and without, since PyTorch takes none there."""
    return [
        Case(op, (n,), layout, t, memory, group="networks", network=network)
        for t in threads
        for network in NETWORKS
        for n in batches
        for layout in LAYOUTS
        for op in OPS
        for memory in (("out", "called") if op == "backward" else ("out",))
    ]


def of_functions(threads, memories=("out", "called")):
    """Cases of small calls of the functions; one value a channel is no batch to train with."""
    return [
        Case(op, shape, layouts_of(shape)[0], t, memory, group="functions")
        for t in threads
        for shape in FUNCTIONS
        for memory in memories
        for op in OPS
        if op == "eval" or prod(shape) > shape[1]
    ]


def of_chains(threads):
    """Cases of chains, at sizes from a fraction of the caches to many times theirs."""
    return [
        Case(op, (n, 256, 28, 28), layout, t, group="chain", chain=chain)
        for t in threads
        for chain in CHAINS
        for n in CHAIN_BATCHES
        for layout in LAYOUTS
        for op in OPS
    ]


def of_statistics(threads):
    """Cases of statistics. Results are small, or allocated by everybody's usual call."""
    return [
        Case(
            op, shape, layouts_of(shape)[0], t, "called", "uint8" if shape == IMAGES else "float32", group="statistics"
        )
        for t in threads
        for op, shapes in STATISTICS.items()
        for shape in shapes
    ]


def of_variants(threads):
    """Cases of all variants; a derivative allocates its results, and so does the backward pass beside it."""
    return [
        Case(op, shape, layout, t, "called" if len(ops) == 1 and op == "backward" else "out", group="variants",
             variant=variant)
        for t in threads
        for variant, (ops, shapes) in VARIANTS.items()
        for shape in shapes
        for layout in layouts_of(shape)
        for op in ops
    ]  # fmt: skip


def of_modules(threads):
    """Cases of PyTorch's modules, as called."""
    return of_shapes(MODULES, threads, ("eval", "train", "step"), memory="called", group="modules")


def of_steps(threads):
    """Cases of training steps."""
    return [
        Case("step", shape, layout, t, "called", group="steps", network=network)
        for t in threads
        for network, shape in STEPS
        for layout in (LAYOUTS if len(shape) == 4 else LAYOUTS[:1])
    ]


def of_groups(groups, threads):
    """Cases of some groups other than the shapes."""
    makers = {
        "functions": of_functions,
        "networks": of_networks,
        "chain": of_chains,
        "statistics": of_statistics,
        "variants": of_variants,
        "modules": of_modules,
        "steps": of_steps,
    }
    return [case for group in dict.fromkeys(groups) for case in makers[group](threads)]


def short(cores):
    """A quarter of an hour on two cores: a large, a middle, a small stage, one NCL, one NC, small calls, networks."""
    shapes = ((32, 256, 56, 56), (32, 1024, 14, 14), (32, 2048, 7, 7), (4096, 1024))
    cases = of_shapes(shapes, (cores,))
    cases += of_shapes(((64, 256, 1000),), (cores,), ("train",))[:1]
    cases += of_shapes(((1, 64, 56, 56),), (1,), ("eval",))
    cases += of_shapes(((32, 256, 56, 56),), (1,))[:3]
    cases += [replace(c, memory="called") for c in of_shapes(((32, 256, 56, 56),), (cores,)) if c.layout == "first"]
    cases += of_shapes(((32, 256, 56, 56),), (cores,), ("eval", "train"), dtype="bfloat16")
    for fused in FUSED:
        cases += of_shapes(((32, 256, 56, 56),), (cores,), ("eval", "train"), fused=fused)[:2]
    cases += of_functions((1,), ("out",))
    cases += of_networks((cores,), BATCHES[:2])
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
    return cases + of_groups(GROUPS[1:], counts)


def parse_shape(text):
    """A shape from the command line, as in 32x64x56x56."""
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"unknown shape {text!r}; expected sizes joined by x, N and C first, as in 32x64x56x56")
    return shape
