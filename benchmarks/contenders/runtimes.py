"""ONNX Runtime, OpenVINO and JAX: what runs a compiled model."""

import numpy as np

from .base import EPS, Contender


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
        layout = "first" if len(case.shape) > 2 else "last"
        return case.op == "eval" and case.layout == layout and case.dtype == "float32" and case.group == "shapes"

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
        return case.memory == "called" and case.dtype == "float32" and case.group == "shapes"

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

        x, dy = lying(data.x), None if data.dy is None else lying(data.dy)
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
