"""oneDNN by a small C driver, in each of its memory formats."""

import numpy as np

from .. import native
from .base import EPS, Contender


class OneDnn(Contender):
    """oneDNN 2.x of Debian by a small C driver, in one of its memory formats."""

    format = None
    op_codes = {"eval": 0, "train": 1, "backward": 2}  # noqa: RUF012

    @classmethod
    def driver(cls):
        return native.driver("onednn", "dnnl")

    @classmethod
    def version(cls):
        import ctypes

        numbers = (ctypes.c_int * 3)()
        cls.driver().onednn_version(numbers)
        return ".".join(map(str, numbers))

    @classmethod
    def supports(cls, case):
        blocked = cls.format in (2, 3)
        rank_fits = len(case.shape) <= 4
        return (
            case.dtype == "float32"
            and case.group in ("shapes", "networks")
            and case.memory == "out"
            and rank_fits
            and (cls.format == 0) <= (case.layout == "first")
            and (cls.format == 1) <= (case.layout == "last")
            and not (blocked and case.shape[1] % 8)
        )

    def __init__(self, case, data):
        super().__init__(case, data)
        import ctypes

        lib = self.lib = self.driver()
        # 2-D and 3-D shapes as 4-D: its kernels for those are the fast ones
        n, c, *spatial = case.shape
        h, w = [*spatial, 1, 1][:2]
        self.context = ctypes.c_void_p()
        plain = 1 if case.layout == "last" else 0
        code = lib.onednn_create(
            ctypes.byref(self.context), self.op_codes[case.op], self.format, plain,
            *(ctypes.c_int64(i) for i in (n, c, h, w)), ctypes.c_float(EPS),
        )  # fmt: skip
        if code:
            raise RuntimeError(f"oneDNN refuses the case, status {code}")
        self.fill(0, data.x)
        self.fill(5, np.stack([data.weight, data.bias]))
        mean, var = data.mean, data.var
        if case.op == "backward":
            axes = tuple(i for i in range(data.x.ndim) if i != 1)
            mean, var = data.x.mean(axes, dtype=np.float64), data.x.var(axes, dtype=np.float64)
            self.fill(2, data.dy)
        if case.op != "train":
            self.fill(3, mean)
            self.fill(4, var)
        data.x = data.dy = None  # it has copies
        run, context = lib.onednn_run, self.context

        def call():
            if run(context):
                raise RuntimeError("oneDNN failed")

        self.run = call

    def fill(self, which, a, back=False):
        """Into the driver's memory, in C order of what the driver takes for plain; or back from there."""
        import ctypes

        if which < 3 and self.case.layout == "last":
            a = np.moveaxis(a, 1, -1)
        if not back:
            a = np.ascontiguousarray(a, dtype=np.float32)
        assert a.flags.c_contiguous
        if self.lib.onednn_fill(self.context, which, a.ctypes.data_as(ctypes.c_void_p), int(back)):
            raise RuntimeError("oneDNN cannot reorder")

    def results(self):
        self.run()
        result = self.data.array()
        self.fill(1, result, back=True)
        if self.case.op != "backward":
            return {"y": result}
        sums = np.empty((2, self.case.shape[1]), np.float32)
        self.fill(6, sums, back=True)
        return {"dx": result, "dweight": sums[0], "dbias": sums[1]}


class OneDnnPlain(OneDnn):
    name, format = "oneDNN nchw", 0


class OneDnnLast(OneDnn):
    name, format = "oneDNN nhwc", 1


class OneDnnBlocked8(OneDnn):
    name, format = "oneDNN nChw8c", 2


class OneDnnBlocked16(OneDnn):
    name, format = "oneDNN nChw16c", 3

    @classmethod
    def supports(cls, case):
        return super().supports(case) and case.shape[1] % 16 == 0
