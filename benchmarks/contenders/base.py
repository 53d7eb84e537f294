"""What contenders share: the arrays of a case, and what a contender is."""

import numpy as np

EPS = 1e-5
CLIP = 2.0  # a bound that some values exceed, so that the comparison with float64 sees whether they are clipped
# Names of an operation's results; the result of all others is y
RESULTS = {
    "backward": ("dx", "dweight", "dbias"),
    "moments": ("mean", "var"),
    "moments+extrema": ("mean", "var", "min", "max"),
    "moments+skipna": ("mean", "var"),
    "update": ("mean", "var"),
    "step": ("dx", "dweight", "dbias"),
}


class Data:
    """The arrays of a case, the same in every process."""

    def __init__(self, case):
        rng = np.random.default_rng(7)
        self.case = case
        self.dtype = case.dtype
        statistics = case.group == "statistics"
        self.parameters = np.dtype("float32" if case.dtype == "bfloat16" else "float64" if statistics else case.dtype)
        if case.dtype == "bfloat16":
            import ml_dtypes

            self.dtype = ml_dtypes.bfloat16
        shape, n_channels = case.shape, case.shape[1]
        self.x, self.dy = self.array(rng), self.array(rng)
        if case.dtype != "uint8":
            self.x += 1000 if statistics else 1  # far from 0, as sensors and counts are: it shows who loses digits
        if case.op == "moments+skipna":
            self.x.flat[::97] = np.nan  # 97 divides no shape, so all channels of large arrays have some
        self.weight, self.bias, self.mean = rng.standard_normal((3, n_channels)).astype(self.parameters)
        if statistics:
            self.mean += 1000
        self.var = rng.uniform(0.5, 2, n_channels).astype(self.parameters)
        if case.op not in ("backward", "step") and case.fused != "add+relu":
            self.dy = None  # drawn all the same, so that the other arrays are those of every operation
        self.shape = shape

    def array(self, rng=None):
        """An array that lies as the case says, drawn or empty. Standard normals, and cheap ones when there are many."""
        shape = self.case.shape
        lying = (shape[0], *shape[2:], shape[1]) if self.case.layout == "last" else shape
        if rng is None:
            a = np.empty(lying, self.dtype)
        else:
            n = int(np.prod(lying))
            size = min(n, 1 << 20)
            if self.dtype == "uint8":
                block = rng.integers(256, size=size, dtype=np.uint8)
            else:
                block = rng.standard_normal(size, dtype=np.float32)
            # a period that no shape divides, so that channels do not repeat
            a = np.resize(block[: len(block) - 1 if n > len(block) else n], n).astype(self.dtype).reshape(lying)
        return np.moveaxis(a, -1, 1) if self.case.layout == "last" else a

    def per_channel(self, v):
        return v.reshape((1, -1) + (1,) * (len(self.case.shape) - 2))


class Contender:
    """What they share."""

    fuses = False  # whether it can do what follows a forward pass, in the same call or in others

    def __init__(self, case, data):
        self.case, self.data = case, data
        self.tolerances = {}  # {name of a result: largest error}, where others than the usual ones hold

    @classmethod
    def supports(cls, case):
        return case.dtype == "float32"

    def results(self):
        return self.found
