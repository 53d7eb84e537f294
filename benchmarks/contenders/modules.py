"""PyTorch's modules and cbn's in their place: single calls, and whole training steps of networks."""

import importlib.util
import os
import shutil

import numpy as np

from .base import EPS, RESULTS, Contender
from .ours import Cbn
from .pytorch import Torch

GROUPS = ("modules", "steps")


class TorchModule(Torch):
    """The module as called; of "steps" forward and backward of a network of such."""

    @classmethod
    def supports(cls, case):
        return case.group in GROUPS and importlib.util.find_spec("torch") is not None

    def __init__(self, case, data):
        Contender.__init__(self, case, data)
        import torch

        self.torch = torch
        torch.set_num_threads(case.threads)
        torch.set_grad_enabled(True)  # other cases of PyTorch's disable it
        self.x = self.tensor(data.x)
        if case.group == "steps":
            # Everybody's gradients: where float32 rounds to the other side of a ReLU's bend, they jump
            self.tolerances = {"loss": 1e-5, "gradients": 3e-2}
            self.plain = network(case)
            self.model = self.prepared(self.plain)
            self.targets = torch.arange(case.shape[0]) % 10
            self.run = self.step
        else:
            self.plain = module(case, data)
            self.model = self.prepared(self.plain)
            self.dy = None if data.dy is None else self.tensor(data.dy)
            self.x.requires_grad_(case.op != "eval")
            self.run = {"eval": self.evaluate, "train": self.forward, "step": self.gradients}[case.op]

    def prepared(self, model):
        return model

    def evaluate(self):
        with self.torch.no_grad():
            return self.model(self.x)

    def forward(self):
        return self.model(self.x)

    def gradients(self):
        return self.torch.autograd.grad(self.model(self.x), (self.x, self.plain.weight, self.plain.bias), self.dy)

    def step(self):
        self.plain.zero_grad()
        loss = self.torch.nn.functional.cross_entropy(self.model(self.x), self.targets)
        loss.backward()
        return loss

    def results(self):
        found = self.run()
        if self.case.group == "steps":
            return {"loss": found.detach().numpy().reshape(1), "gradients": gradients_of(self.plain)}
        if self.case.op == "step":
            return {name: t.numpy() for name, t in zip(RESULTS["step"], found, strict=True)}
        return {"y": found.detach().numpy()}


class CompiledModule(TorchModule):
    """The same through `torch.compile`."""

    name = "PyTorch, compiled"

    @classmethod
    def version(cls):
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise OSError("torch.compile needs a C++ compiler")
        return super().version()

    def prepared(self, model):
        return self.torch.compile(model)


class CbnModule(TorchModule):
    """cbn's module in the place of PyTorch's, by `cbn.torch.convert`."""

    name = Cbn.name
    fuse = False

    @classmethod
    def version(cls):
        return Cbn.version()

    def prepared(self, model):
        import cbn.torch

        self.plain = cbn.torch.convert(model, fuse=self.fuse)
        return self.plain


class CbnFused(CbnModule):
    """With ReLU and the residual addition in the batch norm's pass."""

    name = "cbn, fused"
    fuse = True

    @classmethod
    def supports(cls, case):
        return super().supports(case) and case.group == "steps"


def module(case, data):
    """PyTorch's module with the case's parameters and statistics."""
    import torch

    dims = {2: 1, 3: 1, 4: 2, 5: 3}[len(case.shape)]
    made = getattr(torch.nn, f"BatchNorm{dims}d")(case.shape[1], eps=EPS)
    given = {"weight": data.weight, "bias": data.bias, "running_mean": data.mean, "running_var": data.var}
    made.load_state_dict({name: torch.from_numpy(a) for name, a in given.items()}, strict=False)
    return made.train(case.op != "eval")


def network(case):
    """A network of the example of training steps, the same in every process."""
    import torch

    from examples.torch_training import NETWORKS

    torch.manual_seed(0)
    made = NETWORKS[case.network][0]()
    return made.to(memory_format=torch.channels_last) if case.layout == "last" else made


def gradients_of(model):
    """Those of all batch norms' parameters, one behind the other."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return np.concatenate([p.grad.numpy() for m in norms for p in m.parameters()])


def exact_step(case, data):
    """{name: result} of a step in float64, by PyTorch's modules."""
    made = TorchModule(case, data)
    made.plain.double()
    made.x = made.x.double()
    return made.results()
