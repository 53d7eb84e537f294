"""numpy: the expression as its users write it."""

import numpy as np

from .base import EPS, Contender


class Numpy(Contender):
    """The plain expression; with memory given, two ufuncs with `out=` in evaluation."""

    name = "numpy"

    @classmethod
    def version(cls):
        return np.__version__

    @classmethod
    def supports(cls, case):
        # it has one thread whatever is asked, and bfloat16 an element at a time
        return (case.threads == 1 or case.op == "eval") and case.dtype != "bfloat16" and case.group in (
            "shapes", "functions")  # fmt: skip

    def __init__(self, case, data):
        super().__init__(case, data)
        self.out = data.array() if case.memory == "out" else None
        self.axes = tuple(i for i in range(len(case.shape)) if i != 1)
        invstd = 1 / np.sqrt(data.var + EPS)
        self.scale = data.per_channel((data.weight * invstd).astype(case.dtype))
        self.shift = data.per_channel((data.bias - data.mean * invstd * data.weight).astype(case.dtype))
        self.run = getattr(self, case.op)

    def eval(self):
        if self.out is None:
            return self.data.x * self.scale + self.shift
        np.multiply(self.data.x, self.scale, out=self.out)
        return np.add(self.out, self.shift, out=self.out)

    def train(self):
        d = self.data
        mean, var = d.x.mean(self.axes, keepdims=True), d.x.var(self.axes, keepdims=True)
        scale = d.per_channel(d.weight) / np.sqrt(var + EPS)
        if self.out is None:
            return (d.x - mean) * scale + d.per_channel(d.bias)
        np.subtract(d.x, mean, out=self.out)
        np.multiply(self.out, scale, out=self.out)
        return np.add(self.out, d.per_channel(d.bias), out=self.out)

    def backward(self):
        d = self.data
        n = d.x.size // d.x.shape[1]
        centered = d.x - d.x.mean(self.axes, keepdims=True)
        invstd = 1 / np.sqrt((centered**2).sum(self.axes, keepdims=True) / n + EPS)
        dbias = d.dy.sum(self.axes, keepdims=True)
        product = (d.dy * centered).sum(self.axes, keepdims=True)
        dx = (d.dy - dbias / n - centered * (product * invstd**2 / n)) * (invstd * d.per_channel(d.weight))
        return dx, (product * invstd).ravel(), dbias.ravel()

    def results(self):
        found = self.run()
        return dict(zip(("dx", "dweight", "dbias"), found, strict=True)) if self.case.op == "backward" else {"y": found}
