"""Linear, convolution, ReLU, losses and Adam in plain numpy: what the examples' networks need around cbn's layers.

They keep to cbn's protocol: ``layer(x)``, then ``layer.backward(dy)``, which returns dx and adds to ``weight_grad`` and
``bias_grad``. Not a framework: no graph, no checks, stride 1 and "same" padding only.
"""

import numpy as np

LOG_FLOOR = -100.0  # where PyTorch's BCELoss cuts off log(p); the smallest float32 has log 1.4e-45 = -103
PRODUCT_FLOOR = 1e-12  # and p*(1 - p) in the denominator of its gradient


class Layer:
    """What a layer without parameters has in common with one of cbn's."""

    weight = bias = weight_grad = bias_grad = None

    def train(self, mode=True):
        return self

    def eval(self):
        return self.train(False)

    def zero_grad(self):
        for grad in (self.weight_grad, self.bias_grad):
            if grad is not None:
                grad.fill(0)


class Affine(Layer):
    """Weight (out, in, ...) and bias (out,), drawn as PyTorch draws them: uniform within ±1/sqrt(fan_in)."""

    def __init__(self, shape, rng, dtype):
        bound = 1 / np.sqrt(np.prod(shape[1:]))
        self.weight = rng.uniform(-bound, bound, shape).astype(dtype)
        self.bias = rng.uniform(-bound, bound, shape[0]).astype(dtype)
        self.weight_grad = np.zeros_like(self.weight)
        self.bias_grad = np.zeros_like(self.bias)


class Linear(Affine):
    """y = x @ weight.T + bias, for x of shape (N, n_in)."""

    def __init__(self, n_in, n_out, rng, dtype=np.float32):
        super().__init__((n_out, n_in), rng, dtype)

    def __call__(self, x):
        self.x = x
        return x @ self.weight.T + self.bias

    def backward(self, dy):
        self.weight_grad += dy.T @ self.x
        self.bias_grad += dy.sum(axis=0)
        return dy @ self.weight


def columns(x, kernel):
    """What stands under the kernel at each place of x (N, C, *S), zeros beyond the edges: (N, *S, C * kernel size)."""
    padded = np.pad(x, [(0, 0), (0, 0), *((k // 2, k // 2) for k in kernel)])
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=tuple(range(2, x.ndim)))
    views_nsck = np.moveaxis(views, 1, x.ndim - 1)
    return views_nsck.reshape(*views_nsck.shape[: x.ndim - 1], -1)


class Conv(Affine):
    """Convolution over any number of spatial axes: stride 1, odd kernels, output as large as the input.

    The output has channels last in memory, whatever its axes say: that is how the matrix product leaves it.
    """

    def __init__(self, n_in, n_out, kernel, rng, dtype=np.float32):
        super().__init__((n_out, n_in, *kernel), rng, dtype)
        self.kernel = tuple(kernel)

    def __call__(self, x):
        self.columns = columns(x, self.kernel)
        y_nso = self.columns @ self.weight.reshape(len(self.weight), -1).T + self.bias
        return np.moveaxis(y_nso, -1, 1)

    def backward(self, dy):
        dy_mo = np.moveaxis(dy, 1, -1).reshape(-1, len(self.weight))
        columns_mk = self.columns.reshape(len(dy_mo), -1)
        self.weight_grad += (dy_mo.T @ columns_mk).reshape(self.weight.shape)
        self.bias_grad += dy_mo.sum(axis=0)
        # dx gathers from every place that a value stood under the kernel: the kernel mirrored, channels swapped.
        mirrored = np.flip(self.weight, axis=tuple(range(2, self.weight.ndim))).swapaxes(0, 1)
        return np.moveaxis(columns(dy, self.kernel) @ mirrored.reshape(len(mirrored), -1).T, -1, 1)


class Conv1d(Conv):
    """Convolution of (N, C, L)."""

    def __init__(self, n_in, n_out, size, rng, dtype=np.float32):
        super().__init__(n_in, n_out, (size,), rng, dtype)


class Conv2d(Conv):
    """Convolution of (N, C, H, W)."""

    def __init__(self, n_in, n_out, size, rng, dtype=np.float32):
        super().__init__(n_in, n_out, (size, size), rng, dtype)


class ReLU(Layer):
    def __call__(self, x):
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy):
        return dy * self.positive


class Sigmoid(Layer):
    def __call__(self, x):
        self.y = sigmoid(x)
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class Flatten(Layer):
    def __call__(self, x):
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        return dy.reshape(self.shape)


class Sequential(Layer):
    """Layers one after the other; None is left out, so that one expression gives a network with and without a layer."""

    def __init__(self, *layers):
        self.layers = [layer for layer in layers if layer is not None]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode=True):
        for layer in self.layers:
            layer.train(mode)
        return self

    def zero_grad(self):
        for layer in self.layers:
            layer.zero_grad()

    def parameters(self):
        """Pairs (parameter, its gradient), the arrays themselves."""
        pairs = [(a.weight, a.weight_grad) for a in self.layers] + [(a.bias, a.bias_grad) for a in self.layers]
        return [pair for pair in pairs if pair[0] is not None]


class Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1) with PyTorch's defaults; updates the parameters in place."""

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8):
        self.parameters = list(parameters)
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p, _ in self.parameters]
        self.lr, self.betas, self.eps = lr, betas, eps
        self.steps = 0

    def step(self):
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for (p, grad), (m, v) in zip(self.parameters, self.moments, strict=True):
            m += (1 - beta1) * (grad - m)
            v += (1 - beta2) * (grad * grad - v)
            p -= (self.lr / correction1) * m / (np.sqrt(v / correction2) + self.eps)


def sigmoid(z):
    """1/(1 + exp(-z)), without overflow on either side."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def softmax_cross_entropy(z, labels):
    """(mean loss, dz) of logits z (N, C) and integer labels (N,)."""
    rows = np.arange(len(z))
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    log_p = z[rows, labels] - z.max(axis=1) - np.log(e.sum(axis=1))
    p[rows, labels] -= 1
    return -float(np.mean(log_p, dtype=np.float64)), p / len(z)


def bce_with_logits(z, t):
    """(mean loss, dz) of logits and targets in {0, 1}: log(1 + exp(z)) - t*z, written so that nothing overflows."""
    loss = np.maximum(z, 0) - t * z + np.log1p(np.exp(-np.abs(z)))
    return float(np.mean(loss, dtype=np.float64)), (sigmoid(z) - t) / z.size


def bce(p, t):
    """(mean loss, dp) of probabilities and targets, with the two floors that PyTorch's BCELoss has."""
    with np.errstate(divide="ignore"):
        log_p, log_q = np.maximum(np.log(p), LOG_FLOOR), np.maximum(np.log1p(-p), LOG_FLOOR)
    loss = -(t * log_p + (1 - t) * log_q)
    return float(np.mean(loss, dtype=np.float64)), (p - t) / np.maximum(p * (1 - p), PRODUCT_FLOOR) / p.size
