"""PyTorch: its functions and its modules."""

import numpy as np

from .base import EPS, Contender


class Torch(Contender):
    """Its functions with `out=` where memory is given; where it is not, the module as called, or functions if the group
    asks for them.

    Backward has no `out=`: what has the name computes into memory of its own and copies, which takes up to twice as
    long. So it allocates, wherever it is compared; in groups other than "shapes" only with what allocates too.
    """

    name = "PyTorch"
    fuses = True

    @classmethod
    def version(cls):
        import torch

        return torch.__version__

    @classmethod
    def supports(cls, case):
        if case.group in ("chain", "variants"):
            return False
        return case.group == "shapes" or case.op != "backward" or case.memory == "called"

    def tensor(self, a):
        if a.dtype.name == "bfloat16":
            return self.torch.from_numpy(a.view(np.uint16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def __init__(self, case, data):
        super().__init__(case, data)
        import torch

        self.torch = torch
        torch.set_num_threads(case.threads)
        torch.set_grad_enabled(False)
        self.x, self.dy = (None if a is None else self.tensor(a) for a in (data.x, data.dy))
        w, b, m, v = (self.tensor(a) for a in (data.weight, data.bias, data.mean, data.var))
        x, dy = self.x, self.dy
        self.y = self.tensor(data.array())
        if len(case.shape) == 3 and case.layout == "last" and case.memory == "out":
            # With `out=` it takes (N, C, L) for contiguous, whatever its strides are, and the values come out wrong
            # (2.13); as (N, C, L, 1) they come out right.
            x, dy, self.y = (None if t is None else t.unsqueeze(-1) for t in (x, dy, self.y))
        if case.op == "backward":
            _, mean, invstd = torch.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)
            call, mask = torch.ops.aten.native_batch_norm_backward.default, [True, True, True]
            self.run = lambda: call(dy, x, w, None, None, mean, invstd, True, EPS, mask)
        elif case.memory == "out":
            saved = (torch.empty(case.shape[1]), torch.empty(case.shape[1])) if case.op == "train" else (
                torch.empty(0), torch.empty(0))  # fmt: skip
            saved = tuple(s.to(w.dtype) for s in saved)
            training = case.op == "train"
            self.run = lambda: torch.native_batch_norm(x, w, b, m, v, training, 0.1, EPS, out=(self.y, *saved))[0]
        elif case.group != "shapes":
            training = case.op == "train"
            self.run = lambda: torch.native_batch_norm(x, w, b, m, v, training, 0.1, EPS)[0]
        else:
            dims = {2: 1, 3: 1, 4: 2, 5: 3}[len(case.shape)]
            module = getattr(torch.nn, f"BatchNorm{dims}d")(case.shape[1], eps=EPS, dtype=w.dtype)
            module.load_state_dict({"weight": w, "bias": b, "running_mean": m, "running_var": v}, strict=False)
            module.train(case.op == "train")
            self.run = lambda: module(x)
        if case.fused:  # in place, as its users write it
            norm, add = self.run, case.fused == "add+relu"
            self.run = lambda: torch.relu_(norm().add_(dy) if add else norm())

    def results(self):
        found = self.run()
        if self.case.op == "backward":
            found = dict(zip(("dx", "dweight", "dbias"), found, strict=True))
        else:
            found = {"y": found}
        found = {k: t.float() if t.dtype == self.torch.bfloat16 else t for k, t in found.items()}
        return {k: t.numpy().reshape(self.case.shape if k in ("y", "dx") else -1) for k, t in found.items()}
