"""The contenders: how each system does each operation, on arrays that it may lay out as it likes beforehand.

A contender is a class with `name`, `version()` (ImportError or OSError where it is absent), `supports(case)`, and a
constructor that takes (case, data) and prepares everything that is not the operation itself. `run()` is what is timed;
`results()` gives, after a run, what it computed, as numpy arrays of the case's shape, to be compared with float64.

Like is compared with like: with memory "out" a contender writes to memory that it was given before; with "called" it is
called as its users call it and allocates.
"""

import numpy as np

from . import native

EPS = 1e-5


class Data:
    """The arrays of a case, the same in every process."""

    def __init__(self, case):
        rng = np.random.default_rng(7)
        self.case = case
        self.dtype = case.dtype
        self.parameters = np.dtype("float32" if case.dtype == "bfloat16" else case.dtype)
        if case.dtype == "bfloat16":
            import ml_dtypes

            self.dtype = ml_dtypes.bfloat16
        shape, n_channels = case.shape, case.shape[1]
        self.x, self.dy = self.array(rng), self.array(rng)
        self.x += 1
        self.weight, self.bias, self.mean = rng.standard_normal((3, n_channels)).astype(self.parameters)
        self.var = rng.uniform(0.5, 2, n_channels).astype(self.parameters)
        self.shape = shape

    def array(self, rng=None):
        """An array that lies as the case says, drawn or empty. Standard normals, and cheap ones when there are many."""
        shape = self.case.shape
        lying = (shape[0], *shape[2:], shape[1]) if self.case.layout == "last" else shape
        if rng is None:
            a = np.empty(lying, self.dtype)
        else:
            n = int(np.prod(lying))
            block = rng.standard_normal(min(n, 1 << 20), dtype=np.float32)
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

    @classmethod
    def supports(cls, case):
        return case.dtype == "float32"

    def results(self):
        return self.found


class Cbn(Contender):
    """The layer in evaluation, the functions in training and backward."""

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
        from cbn import functional as f

        d = data
        out = d.array() if case.memory == "out" else None
        activation = "relu" if case.fused else None
        residual = d.dy if case.fused == "add+relu" else None
        if case.op == "eval":
            import cbn

            bn = cbn.BatchNorm(case.shape[1], eps=EPS, dtype=data.parameters, activation=activation).eval()
            bn.load_state_dict({"weight": d.weight, "bias": d.bias, "running_mean": d.mean, "running_var": d.var})
            self.run = lambda: bn(d.x, out=out)
            if residual is not None:
                self.run = lambda: bn(d.x, out=out, residual=residual)
        elif case.op == "train" and case.fused:
            arrays = d.x, d.mean, d.var, d.weight, d.bias, True, 0.1, EPS
            self.run = lambda: f.batch_norm(*arrays, out=out, activation=activation, residual=residual)
        elif case.op == "train":
            self.run = lambda: f.native_batch_norm(d.x, d.weight, d.bias, d.mean, d.var, True, 0.1, EPS, out=out)[0]
        else:
            _, mean, invstd = f.native_batch_norm(d.x, d.weight, d.bias, None, None, True, 0.1, EPS)
            self.run = lambda: f.native_batch_norm_backward(
                d.dy, d.x, d.weight, None, None, mean, invstd, True, EPS, out=out
            )

    def results(self):
        found = self.run()
        return dict(zip(("dx", "dweight", "dbias"), found, strict=True)) if self.case.op == "backward" else {"y": found}


class Numpy(Contender):
    """The plain expression; with memory given, two ufuncs with `out=` in evaluation."""

    name = "numpy"

    @classmethod
    def version(cls):
        return np.__version__

    @classmethod
    def supports(cls, case):
        # it has one thread whatever is asked, and bfloat16 an element at a time
        return (case.threads == 1 or case.op == "eval") and case.dtype != "bfloat16"

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


class Torch(Contender):
    """Its functions, with `out=` where memory is given; the module as called where it is not."""

    name = "PyTorch"
    fuses = True

    @classmethod
    def version(cls):
        import torch

        return torch.__version__

    @classmethod
    def supports(cls, case):
        return True

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
        self.x, self.dy = self.tensor(data.x), self.tensor(data.dy)
        w, b, m, v = (self.tensor(a) for a in (data.weight, data.bias, data.mean, data.var))
        x, dy = self.x, self.dy
        self.y = self.tensor(data.array())
        if len(case.shape) == 3 and case.layout == "last" and case.memory == "out":
            # With `out=` it takes (N, C, L) for contiguous, whatever its strides are, and the values come out wrong
            # (2.13); as (N, C, L, 1) they come out right.
            x, dy, self.y = (t.unsqueeze(-1) for t in (x, dy, self.y))
        if case.op == "backward":
            _, mean, invstd = torch.native_batch_norm(x, w, b, None, None, True, 0.1, EPS)
            call, mask = torch.ops.aten.native_batch_norm_backward, [True, True, True]
            if case.memory == "out":
                dw, db = torch.empty_like(w), torch.empty_like(b)
                outs = {"out0": self.y, "out1": dw, "out2": db}
                self.run = lambda: call.out(dy, x, w, None, None, mean, invstd, True, EPS, mask, **outs)
            else:
                self.run = lambda: call(dy, x, w, None, None, mean, invstd, True, EPS, mask)
        elif case.memory == "out":
            saved = (torch.empty(case.shape[1]), torch.empty(case.shape[1])) if case.op == "train" else (
                torch.empty(0), torch.empty(0))  # fmt: skip
            saved = tuple(s.to(w.dtype) for s in saved)
            training = case.op == "train"
            self.run = lambda: torch.native_batch_norm(x, w, b, m, v, training, 0.1, EPS, out=(self.y, *saved))[0]
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


class OnnxRuntime(Contender):
    """A model of one BatchNormalization node, inputs and outputs bound."""

    name = "ONNX Runtime"

    @classmethod
    def version(cls):
        import onnx  # noqa: F401  the model is made with it
        import onnxruntime

        return onnxruntime.__version__

    @classmethod
    def supports(cls, case):
        return case.op == "eval" and case.layout == ("first" if len(case.shape) > 2 else "last") and (
            case.dtype == "float32")  # fmt: skip

    def __init__(self, case, data):
        super().__init__(case, data)
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        tensors = {"weight": data.weight, "bias": data.bias, "mean": data.mean, "var": data.var}
        node = helper.make_node("BatchNormalization", ["x", *tensors], ["y"], epsilon=EPS)
        graph = helper.make_graph(
            [node],
            "batch_norm",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, case.shape)],
            [numpy_helper.from_array(a, name) for name, a in tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x = np.ascontiguousarray(data.x)
        if case.memory == "out":
            self.y = np.empty(case.shape, np.float32)
            binding = session.io_binding()
            binding.bind_cpu_input("x", x)
            binding.bind_output("y", "cpu", 0, np.float32, case.shape, self.y.ctypes.data)
            self.run = lambda: session.run_with_iobinding(binding)
        else:
            self.run = lambda: session.run(["y"], {"x": x})[0]

    def results(self):
        found = self.run()
        return {"y": self.y if self.case.memory == "out" else found}


class OpenVino(Contender):
    """A compiled model of one BatchNormInference, its tensors set once."""

    name = "OpenVINO"

    @classmethod
    def version(cls):
        import openvino

        return openvino.__version__.split("-")[0]

    supports = OnnxRuntime.supports

    def __init__(self, case, data):
        super().__init__(case, data)
        import openvino as ov
        from openvino import opset8 as ops

        x = ops.parameter(case.shape, np.float32, name="x")
        node = ops.batch_norm_inference(
            x, *(ops.constant(a) for a in (data.weight, data.bias, data.mean, data.var)), EPS
        )
        compiled = ov.Core().compile_model(
            ov.Model([node], [x], "batch_norm"),
            "CPU",
            {"INFERENCE_NUM_THREADS": str(case.threads), "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"},
        )
        request = compiled.create_infer_request()
        self.input = np.ascontiguousarray(data.x)
        request.set_input_tensor(ov.Tensor(self.input, shared_memory=True))
        self.y = None
        if case.memory == "out":
            self.y = np.empty(case.shape, np.float32)
            request.set_output_tensor(ov.Tensor(self.y, shared_memory=True))
        self.request = request
        self.run = request.infer

    def results(self):
        self.run()
        return {"y": self.request.get_output_tensor().data.copy() if self.y is None else self.y}


class Jax(Contender):
    """A function compiled by XLA for the CPU. It always allocates its results."""

    name = "JAX"

    @classmethod
    def version(cls):
        import jax

        return jax.__version__

    @classmethod
    def supports(cls, case):
        return case.memory == "called" and case.dtype == "float32"

    def __init__(self, case, data):
        super().__init__(case, data)
        import jax
        import jax.numpy as jnp

        axes = tuple(i for i in range(len(case.shape)) if i != (len(case.shape) - 1 if case.layout == "last" else 1))
        shape = [1] * len(case.shape)
        shape[-1 if case.layout == "last" else 1] = case.shape[1]

        def normalize(x, mean, var, weight, bias):
            mean, var, weight, bias = (a.reshape(shape) for a in (mean, var, weight, bias))
            return (x - mean) * (weight * jax.lax.rsqrt(var + EPS)) + bias

        def train(x, weight, bias):
            return normalize(x, x.mean(axes), x.var(axes), weight, bias)

        def lying(a):
            return jnp.asarray(np.moveaxis(a, 1, -1) if case.layout == "last" else a)

        x, dy = lying(data.x), lying(data.dy)
        w, b, m, v = map(jnp.asarray, (data.weight, data.bias, data.mean, data.var))
        if case.op == "eval":
            f, arguments = jax.jit(normalize), (x, m, v, w, b)
        elif case.op == "train":
            f, arguments = jax.jit(train), (x, w, b)
        else:
            f, arguments = jax.jit(lambda dy, x, w, b: jax.vjp(train, x, w, b)[1](dy)), (dy, x, w, b)
        self.run = lambda: jax.block_until_ready(f(*arguments))

    def results(self):
        def back(a):
            return np.moveaxis(np.asarray(a), -1, 1) if self.case.layout == "last" and a.ndim > 1 else np.asarray(a)

        found = self.run()
        if self.case.op == "backward":
            return {k: back(a) for k, a in zip(("dx", "dweight", "dbias"), found, strict=True)}
        return {"y": back(found)}


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
        return True

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


PEERS = (Numpy, Torch, OneDnnPlain, OneDnnLast, OneDnnBlocked8, OneDnnBlocked16, OnnxRuntime, OpenVino, Jax)
LIMITS = (LimitRead, LimitScale, LimitStream, LimitInPlace)
ALL = {c.name: c for c in (Cbn, *PEERS, *LIMITS)}
