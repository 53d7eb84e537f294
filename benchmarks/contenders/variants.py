"""cbn's variants of a batch norm beside its plain call: masks, ghost batches, mixtures, second derivatives.

All are layers, with a momentum of 0, so that the running statistics, which some variants read, stay as they are. The
results of a variant are called "variant y" and so on, beside those of the plain call in the same case.
"""

import numpy as np

from cbn import reference

from .base import EPS, RESULTS, Contender
from .ours import Cbn

R_MAX, D_MAX, MIX = 1.5, 0.5, 0.3
# Names of a variant's results, where they are not those of the operation
DERIVATIVES = {"double backward": ("grad_dy", "grad_x", "grad_weight"), "tangent": ("y_t",)}


def names_of(case):
    """(names of the plain call's results, names of the variant's)."""
    plain = RESULTS.get(case.op, ("y",))
    return plain, tuple(f"variant {name}" for name in DERIVATIVES.get(case.variant, plain))


class Given:
    """What a variant takes beside x: arguments of a layer, of its forward, or of functions."""

    def __init__(self, case, data):
        rng = np.random.default_rng(11)
        n, _, *spatial = case.shape
        self.options, self.forward, self.w = {}, {}, np.ones((1,) * len(case.shape))
        if case.variant == "lengths":
            lengths = rng.integers(1, spatial[0] + 1, n)
            self.forward = {"lengths": lengths}
            self.w = (np.arange(spatial[0]) < lengths[:, None]).reshape(n, 1, -1, *(1 for _ in spatial[1:]))
        elif case.variant == "mask":
            mask = rng.random((n, *spatial)) < 0.7
            self.forward, self.w = {"mask": mask}, mask[:, None]
        elif case.variant == "sample weights":
            weights = rng.uniform(0.5, 2, n)
            self.forward, self.w = {"sample_weight": weights}, weights.reshape(-1, *(1 for _ in case.shape[1:]))
        elif case.samples:
            self.options = {"ghost_batch_size": case.samples}
        elif case.variant == "renorm":
            self.options = {"renorm": (R_MAX, D_MAX)}
        elif case.variant == "mix":
            self.forward = {"mix": MIX}
        elif case.variant in DERIVATIVES:
            self.wide = data.array(rng)
            self.narrow = rng.standard_normal((2, case.shape[1])).astype(data.parameters)


class Plain(Contender):
    """The plain call of a layer."""

    name, version = Cbn.name, Cbn.version

    @classmethod
    def supports(cls, case):
        return case.group == "variants"

    def __init__(self, case, data):
        super().__init__(case, data)
        self.out = data.array() if case.memory == "out" else None
        self.bn = self.layer()
        if case.op == "backward":
            self.bn(data.x)
        self.run = self.backward if case.op == "backward" else self.forward

    def layer(self, **options):
        import cbn

        d, op = self.data, self.case.op
        bn = cbn.BatchNorm(self.case.shape[1], eps=EPS, momentum=0.0, dtype=d.parameters, **options)
        bn.load_state_dict({"weight": d.weight, "bias": d.bias, "running_mean": d.mean, "running_var": d.var})
        return bn.eval() if op == "eval" else bn

    def forward(self):
        return self.bn(self.data.x, out=self.out)

    def backward(self):
        return self.bn.backward(self.data.dy, out=self.out)

    def results(self):
        self.bn.zero_grad()
        found, names = self.run(), names_of(self.case)[0]
        sums = (self.bn.weight_grad, self.bn.bias_grad) if self.case.op == "backward" else ()
        return dict(zip(names, (found, *sums), strict=True))


class Variant(Plain):
    """The call with what the case names."""

    name = "cbn, variant"

    def __init__(self, case, data):
        self.given = Given(case, data)
        super().__init__(case, data)
        if case.op == "backward" and self.given.forward:
            self.bn(data.x, **self.given.forward)
        if case.variant in DERIVATIVES:
            self.run = self.derivative()
        elif case.variant == "given moments":
            import cbn

            self.bn.train()
            self.given.forward = {"moments": cbn.moments(data.x)}
        elif case.variant == "mix":
            self.bn.eval()
        self.tolerances = dict.fromkeys(names_of(case)[1], 1e-3 if case.op == "backward" else 1e-4)

    def layer(self):
        return super().layer(**self.given.options)

    def forward(self):
        return self.bn(self.data.x, out=self.out, **self.given.forward)

    def derivative(self):
        """A call of a function, at the saved statistics of the batch."""
        from cbn import functional as f

        d, along, (gamma, beta) = self.data, self.given.wide, self.given.narrow
        _, mean, invstd = f.native_batch_norm(d.x, d.weight, d.bias, None, None, True, 0.1, EPS)
        saved = (None, None, mean, invstd, True, EPS)
        if self.case.variant == "tangent":
            return lambda: f.batch_norm_jvp(along, gamma, beta, d.x, d.weight, d.bias, *saved)
        return lambda: f.native_batch_norm_double_backward(along, gamma, beta, d.dy, d.x, d.weight, *saved)

    def results(self):
        names = names_of(self.case)[1]
        if self.case.variant not in DERIVATIVES:
            return dict(zip(names, super().results().values(), strict=True))
        found = self.run()
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))


class Loop(Variant):
    """Ghost batches as their users write them: a loop over slices in Python."""

    name = "cbn, loop over slices"

    @classmethod
    def supports(cls, case):
        return case.group == "variants" and case.samples > 0

    def layer(self):
        return Plain.layer(self)

    def __init__(self, case, data):
        super().__init__(case, data)
        self.slices = [slice(i, i + case.samples) for i in range(0, case.shape[0], case.samples)]
        if case.op == "backward":
            self.layers = [Plain.layer(self) for _ in self.slices]  # which remember their slices
            for bn, part in zip(self.layers, self.slices, strict=True):
                bn(data.x[part])

    def forward(self):
        for part in self.slices:
            self.bn(self.data.x[part], out=self.out[part])
        return self.out

    def backward(self):
        for bn, part in zip(self.layers, self.slices, strict=True):
            bn.backward(self.data.dy[part], out=self.out[part])
        return self.out

    def results(self):
        if self.case.op != "backward":
            return super().results()
        for bn in self.layers:
            bn.zero_grad()
        self.run()
        sums = [sum(getattr(bn, name) for bn in self.layers) for name in ("weight_grad", "bias_grad")]
        return dict(zip(names_of(self.case)[1], (self.out, *sums), strict=True))


def exact(case, data, part, plain):
    """The float64 results of a variant for some channels; `plain(part, rows)` has the plain call's of some samples."""
    given = Given(case, data)
    x, dy = data.x[:, part], None if data.dy is None else data.dy[:, part]
    weight, bias, w = data.weight[part], data.bias[part], given.w
    count, mean, m2, _, _ = reference.counted_moments(x, w)
    var = m2 / count
    if case.variant in DERIVATIVES:
        along, (gamma, beta) = given.wide[:, part], given.narrow[:, part]
        if case.variant == "tangent":
            return (reference.jvp(along, gamma, beta, x, mean, var, weight, EPS),)
        return reference.double_backward(along, gamma, beta, dy, x, mean, var, weight, EPS)
    if case.samples:
        slices = [slice(i, i + case.samples) for i in range(0, case.shape[0], case.samples)]
        wide, *sums = zip(*(plain(part, rows) for rows in slices), strict=True)
        return (np.concatenate(wide), *(np.sum(values, axis=0) for values in sums))
    if case.variant == "mix":
        mean, var = reference.mixture(mean, var, data.mean[part], data.var[part], MIX)
    if case.variant == "renorm":
        r, d = reference.renormalization(mean, var, data.mean[part], data.var[part], R_MAX, D_MAX, EPS)
        weight, bias = weight * r, bias + weight * d
    if case.op == "backward":
        dx, dweight, dbias = reference.counted_backward(dy, x, w, weight, EPS)
        if case.variant == "renorm":
            dweight = dweight * r + dbias * d
        return dx, dweight, dbias
    return (np.where(w > 0, reference.normalize(x, mean, var, weight, bias, EPS), 0.0),)
