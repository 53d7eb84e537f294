"""The limits of the memory."""

import numpy as np

from .. import native
from .base import Contender


class Limit(Contender):
    """What the memory can do on arrays of this size: not batch normalization, and compared with nothing."""

    kind = None
    fuses = True

    @classmethod
    def version(cls):
        native.driver("limits")
        return ""

    @classmethod
    def supports(cls, case):
        if case.group == "steps":
            return False
        return case.group in ("shapes", "functions", "statistics") or cls.kind in ("plain", "stream")

    def __init__(self, case, data):
        super().__init__(case, data)
        import ctypes

        lib = native.driver("limits")
        flat = data.x.ravel(order="K")
        x = flat.ctypes.data_as(ctypes.c_void_p)
        self.keep = flat, np.empty_like(flat)
        y = self.keep[1].ctypes.data_as(ctypes.c_void_p)
        n, threads = ctypes.c_ssize_t(flat.nbytes // 4), ctypes.c_int(case.threads)  # of float32, whatever x is
        self.keep[1][...] = 0
        if self.kind == "read":
            self.run = lambda: lib.limit_read(x, n, threads)
        elif self.kind == "in place":
            self.run = lambda: lib.limit_scale(y, y, n, threads, 0)
        else:
            self.run = lambda: lib.limit_scale(x, y, n, threads, int(self.kind == "stream"))

    def results(self):
        return {}


class LimitRead(Limit):
    name, kind = "limit: read", "read"


class LimitScale(Limit):
    name, kind = "limit: scale, plain stores", "plain"


class LimitStream(Limit):
    name, kind = "limit: scale, streaming stores", "stream"


class LimitInPlace(Limit):
    name, kind = "limit: scale in place", "in place"


LIMITS = (LimitRead, LimitScale, LimitStream, LimitInPlace)
