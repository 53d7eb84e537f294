"""cbn: its functions and its layers; and with either kind of store, where other code goes on with the result."""

import ctypes

from .. import native
from .base import EPS, Contender


class Cbn(Contender):
    """The functions; of "shapes" the layer in evaluation."""

    name = "cbn"
    fuses = True

    @classmethod
    def version(cls):
        import cbn

        return cbn.__version__

    @classmethod
    def supports(cls, case):
        return True

    def __init__(self, case, data):
        super().__init__(case, data)
        self.out = data.array() if case.memory == "out" else None
        self.activation = "relu" if case.fused else None
        self.residual = data.dy if case.fused == "add+relu" else None
        self.run = self.layer() if case.op == "eval" and case.group == "shapes" else self.function()
        if case.chain:
            self.run = self.chained(self.run)

    def layer(self):
        """A call of a layer in evaluation."""
        bn, x, out, residual = self.made(self.activation).eval(), self.data.x, self.out, self.residual
        if residual is None:
            return lambda: bn(x, out=out)
        return lambda: bn(x, out=out, residual=residual)

    def made(self, activation=None):
        """A layer with the case's parameters and statistics."""
        import cbn

        d = self.data
        bn = cbn.BatchNorm(self.case.shape[1], eps=EPS, dtype=d.parameters, activation=activation)
        bn.load_state_dict({"weight": d.weight, "bias": d.bias, "running_mean": d.mean, "running_var": d.var})
        return bn

    def function(self):
        """A call of a function."""
        from cbn import functional as f

        d, out, op = self.data, self.out, self.case.op
        if op == "backward":
            _, mean, invstd = f.native_batch_norm(d.x, d.weight, d.bias, None, None, True, 0.1, EPS)
            return lambda: f.native_batch_norm_backward(
                d.dy, d.x, d.weight, None, None, mean, invstd, True, EPS, out=out
            )
        if op == "eval" or self.case.fused:
            arrays, fused = (d.x, d.mean, d.var, d.weight, d.bias, op == "train", 0.1, EPS), {}
            if self.case.fused:
                fused = {"activation": self.activation, "residual": self.residual}
            return lambda: f.batch_norm(*arrays, out=out, **fused)
        return lambda: f.native_batch_norm(d.x, d.weight, d.bias, d.mean, d.var, True, 0.1, EPS, out=out)[0]

    def chained(self, run):
        """The call between the chain's other passes: y = a*x + b with plain stores, and a sum, both of `limits.c`."""
        lib, words, threads = native.driver("limits"), self.case.chain.split(), ctypes.c_int(self.case.threads)
        written = self.data.dy if self.case.op == "backward" else self.data.x
        source = 2 * written - 0.5  # so that 0.5*source + 0.25 is what is written
        n, readers = ctypes.c_ssize_t(self.out.size), ctypes.c_int(1) if words[-1] == "one" else threads
        arrays = source, written, self.out
        a, x, y = (ctypes.c_void_p(array.ctypes.data) for array in arrays)

        def call(arrays=arrays):  # which live as long as the function
            if words[0] == "write":
                lib.limit_scale(a, x, n, threads, 0)
            result = run()
            lib.limit_read(y, n, readers)
            return result

        return call

    def results(self):
        found = self.run()
        return dict(zip(("dx", "dweight", "dbias"), found, strict=True)) if self.case.op == "backward" else {"y": found}


class CbnLayers(Cbn):
    """Layers in every operation."""

    name = "cbn layers"

    @classmethod
    def supports(cls, case):
        return case.group in ("functions", "networks")

    def __init__(self, case, data):
        super().__init__(case, data)
        bn, d, out = self.made(), data, self.out
        if case.op == "backward":
            bn(d.x)
            self.run = lambda: bn.backward(d.dy, out=out)
        elif case.op == "eval":
            self.run = self.layer()
        else:
            self.run = lambda: bn(d.x, out=out)
        self.bn = bn

    def results(self):
        if self.case.op != "backward":
            return {"y": self.run()}
        self.bn.zero_grad()
        return {"dx": self.run(), "dweight": self.bn.weight_grad, "dbias": self.bn.bias_grad}


class CbnPlain(Cbn):
    """Plain stores, whatever the size."""

    name = "cbn, plain stores"
    nontemporal_bytes = 1 << 62

    @classmethod
    def supports(cls, case):
        return case.group == "chain"

    def __init__(self, case, data):
        from cbn.kernels import engine

        engine.tune(nontemporal_bytes=self.nontemporal_bytes)
        super().__init__(case, data)


class CbnNonTemporal(CbnPlain):
    """Non-temporal stores, whatever the size."""

    name = "cbn, non-temporal stores"
    nontemporal_bytes = 0
