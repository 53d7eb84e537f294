"""Second derivatives and forward mode: against the formulas and finite differences, over every path of the kernels."""

import itertools

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import (
    batch_norm_jvp,
    native_batch_norm,
    native_batch_norm_backward,
    native_batch_norm_double_backward,
)
from cbn.kernels import engine

from .paths import HALVES, INPUT_DTYPES, KNOBS, LAYOUTS, PARAMETERS, PATH_SHAPES, agree, in_memory_order
from .test_guard_pages import guarded

# Of the largest value of the exact result, which is rounded once
LIMIT = {
    np.dtype(np.float32): 1e-7,
    np.dtype(np.float64): 2e-13,
    np.dtype(HALVES[0]): 2**-11,
    np.dtype(HALVES[1]): 2**-8,
}
PER_CHANNEL = {np.dtype(np.float32): 1e-7, np.dtype(np.float64): 1e-12} | {np.dtype(t): 1e-7 for t in HALVES}
OTHERS = list(itertools.product([True, False], repeat=3))


class Case:
    """Arrays of a call, drawn; `exact` are the results of the reference."""

    def __init__(self, rng, shape, axis, dtype, order=None, train=True, loc=10.0, scale=3.0):
        def drawn(mean=0.0, size=1.0):
            return in_memory_order((size * rng.standard_normal(shape) + mean).astype(dtype), order)

        self.axis, self.train = axis, train
        self.x, self.dy, self.ggI = drawn(loc, scale), drawn(0.5), drawn(-0.25)
        of_c = rng.standard_normal((5, shape[axis])).astype(PARAMETERS[dtype])
        self.weight, self.ggG, self.ggB, self.running_mean, self.bias = of_c
        self.running_var = rng.uniform(0.5, 2, shape[axis]).astype(PARAMETERS[dtype])
        n, mean, m2 = reference.moments(self.x, axis % self.x.ndim) if shape[axis] else (0, np.ones(0), np.ones(0))
        self.saved = mean, 1 / np.sqrt(m2 / max(n, 1) + 1e-5)
        self.exact_statistics = (mean, m2 / max(n, 1)) if train else (self.running_mean, self.running_var)

    @property
    def rest(self):
        """What follows weight and bias in both functions."""
        return self.running_mean, self.running_var, *self.saved, self.train, 1e-5

    def double_backward(self):
        return native_batch_norm_double_backward(
            self.ggI, self.ggG, self.ggB, self.dy, self.x, self.weight, *self.rest, channel_axis=self.axis
        )

    def jvp(self):
        return batch_norm_jvp(
            self.ggI, self.ggG, self.ggB, self.x, self.weight, self.bias, *self.rest, channel_axis=self.axis
        )

    @property
    def exact(self):
        axis = self.axis % self.x.ndim
        statistics = *self.exact_statistics, self.weight, 1e-5, self.train, axis
        return (
            *reference.double_backward(self.ggI, self.ggG, self.ggB, self.dy, self.x, *statistics),
            reference.jvp(self.ggI, self.ggG, self.ggB, self.x, *statistics),
        )

    def results(self):
        return *self.double_backward(), self.jvp()

    def check(self, *words):
        grad_dy, grad_x, grad_weight, y_t = found = self.results()
        for a, exact in zip((grad_dy, grad_x, y_t), (*self.exact[:2], self.exact[3]), strict=True):
            assert a.dtype == self.x.dtype
            agree(a, exact, LIMIT[a.dtype], *words)
        if self.weight is None:
            assert grad_weight is None
        else:
            assert grad_weight.dtype == self.weight.dtype
            agree(grad_weight, self.exact[2], PER_CHANNEL[self.x.dtype], *words)
        return found


def bits(results):
    return [None if a is None else a.tobytes("A") for a in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("train", [True, False])
def test_values_on_any_number_of_threads(isa, parallel, rng, dtype, layout, train):
    shape, axis, order = LAYOUTS[layout]
    case = Case(rng, shape, axis, dtype, order, train)
    found = []
    for n_threads in (1, 2, 3, 5, 8):
        with cbn.num_threads(n_threads):
            results = case.check(layout, n_threads)
        for a in (*results[:2], results[3]):
            assert a.strides == case.x.strides
        found.append(bits(results))
    assert all(f == found[0] for f in found), "the bits depend on the number of threads"


@pytest.mark.parametrize("shape", PATH_SHAPES.values(), ids=PATH_SHAPES)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_every_path_gives_the_same_bits(isa, parallel, rng, dtype, shape):
    """Threads, kind of store, fetching, one pass of tiles or two passes: nothing that decides a bit."""
    case = Case(rng, shape, 1, dtype)
    expected = bits(case.check(shape))
    for name, changes in KNOBS.items():
        for n_threads in (1, 4, 7):
            knobs = engine.tune(**changes)
            with cbn.num_threads(n_threads):
                assert bits(case.results()) == expected, (n_threads, name)
            engine.tune(**knobs)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_an_element_does_not_depend_on_its_place(isa, rng, dtype, axis):
    """Strides, order, broadcast and misaligned arrays give the bits of contiguous ones."""
    shape = (4, 6, 9, 21)
    case = Case(rng, shape, axis, dtype)
    expected = [np.ascontiguousarray(a).tobytes() for a in case.results()]

    def misaligned(a):
        memory = bytearray(a.nbytes + 1)
        b = np.frombuffer(memory, np.uint8)[1:].view(dtype).reshape(a.shape)
        b[...] = a
        return b

    def spaced(a):
        memory = np.zeros(tuple(2 * s for s in a.shape), dtype)
        memory[tuple(slice(None, None, 2) for _ in a.shape)] = a
        return memory[tuple(slice(None, None, 2) for _ in a.shape)]

    def padded(a):
        memory = np.zeros((*a.shape[:-1], a.shape[-1] + 5), dtype)
        memory[..., : a.shape[-1]] = a
        return memory[..., : a.shape[-1]]

    for change in (misaligned, spaced, padded, np.asfortranarray, lambda a: a[::-1].copy()[::-1]):
        for names in (("dy",), ("ggI",), ("dy", "ggI")):
            kept = {name: getattr(case, name) for name in names}
            for name in names:
                setattr(case, name, change(kept[name]))
            assert [np.ascontiguousarray(a).tobytes() for a in case.results()] == expected, (change, names)
            for name in names:
                setattr(case, name, kept[name])
    # x decides the order of the sums: to rounding
    for change in (misaligned, spaced, padded, np.asfortranarray):
        other = Case(rng, shape, axis, dtype)
        other.x = change(other.x)
        other.check(change)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_broadcast_arrays(isa, rng, axis, train):
    case = Case(rng, (5, 4, 6), axis, np.float64, train=train)
    for name in ("dy", "ggI"):
        setattr(case, name, np.broadcast_to(rng.standard_normal((1, 4, 6)), case.x.shape))
    case.check()


@pytest.mark.parametrize("given", OTHERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_what_is_not_given_is_zeros(rng, dtype, train, affine, given):
    case = Case(rng, (5, 4, 33), 1, dtype, train=train)
    for name, there in zip(("ggI", "ggG", "ggB"), given, strict=True):
        if not there:
            setattr(case, name, None)
    if not affine:
        case.weight = None
    grad_dy, grad_x, grad_weight, y_t = case.check(given)
    if given == (False, False, False):
        assert not grad_dy.any()
        assert not grad_x.any()
        assert not y_t.any()
        assert grad_weight is None or not grad_weight.any()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_against_finite_differences(rng, train, axis):
    """An oracle that knows none of these formulas: differences of the first derivatives, and of the forward pass."""
    case = Case(rng, (4, 3, 5), axis, np.float64, train=train, loc=0.5, scale=1.0)
    n_channels = case.x.shape[axis]

    def forward(x, weight, bias):
        buffers = (None, None) if train else (case.running_mean, case.running_var)
        return native_batch_norm(x, weight, bias, *buffers, train, 0.1, 1e-5, channel_axis=axis)

    def loss(dy, x, weight):
        """That whose gradients with respect to dx, dweight and dbias are ggI, ggG and ggB."""
        saved = forward(x, weight, None)[1:] if train else (None, None)
        first = native_batch_norm_backward(
            dy, x, weight, case.running_mean, case.running_var, *saved, train, 1e-5, channel_axis=axis
        )
        return sum((a * b).sum() for a, b in zip(first, (case.ggI, case.ggG, case.ggB), strict=True))

    *gradients, y_t = case.results()
    arguments = [case.dy, case.x, case.weight]
    for k, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in arguments]
                moved[k][index] += step
                values.append(loss(*moved))
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[index], rel=1e-6, abs=1e-7)
    bias = np.zeros(n_channels)
    ends = [forward(case.x + h * case.ggI, case.weight + h * case.ggG, bias + h * case.ggB)[0] for h in (1e-6, -1e-6)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, y_t, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_the_gradient_of_dy_is_the_tangent(isa, rng, dtype):
    """The backward pass is linear in dy: the same derivative, and the same bits."""
    for shape, axis in (((7, 5, 40), 1), ((7, 40, 5), 2)):
        case = Case(rng, shape, axis, dtype)
        assert case.double_backward()[0].tobytes() == case.jvp().tobytes()


@pytest.mark.parametrize("x_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("dy_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("train", [True, False])
def test_arrays_of_several_dtypes_are_taken_as_float64(rng, x_dtype, dy_dtype, train):
    case = Case(rng, (6, 3, 7), 1, x_dtype, train=train)
    case.dy = case.dy.astype(dy_dtype)
    for tangent_dtype in INPUT_DTYPES:
        case.ggI = case.ggI.astype(tangent_dtype)
        grad_dy, grad_x, grad_weight, y_t = case.results()
        assert (grad_dy.dtype, grad_x.dtype, y_t.dtype) == (dy_dtype, x_dtype, x_dtype)
        assert grad_weight.dtype == case.weight.dtype
        for a, exact in zip((grad_dy, grad_x, y_t), (*case.exact[:2], case.exact[3]), strict=True):
            agree(a, exact, LIMIT[a.dtype])
        agree(grad_weight, case.exact[2], PER_CHANNEL[case.x.dtype])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 3, 50), (300, 3)])
def test_large_means(isa, rng, dtype, shape):
    """Means of all arrays far beside their spreads: no digits are lost, but for those that the arrays never had."""
    case = Case(rng, shape, 1, dtype, loc=1e6, scale=1.0)
    case.dy, case.ggI = case.dy + dtype(3e4), case.ggI - dtype(2e4)
    limit = 2e-7 if dtype == np.float32 else 1e-9  # float64 has the mean of x, and so x - mean, to 1e-10
    for a, e in zip(case.results(), case.exact, strict=True):
        agree(a, e, limit)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_constant_channels(isa, rng, dtype):
    case = Case(rng, (8, 4, 30), 1, dtype)
    case.x[:, 0], case.dy[:, 1], case.ggI[:, 2] = 1000, 300, -300
    case.x[:, 3] = case.dy[:, 3] = case.ggI[:, 3] = 7
    n, mean, m2 = reference.moments(case.x)
    case.saved, case.exact_statistics = (mean, 1 / np.sqrt(m2 / n + 1e-5)), (mean, m2 / n)
    for a, e in zip(case.results(), case.exact, strict=True):
        for c in range(4):
            of_c = (slice(None), c) if a.ndim > 1 else c
            limit = PER_CHANNEL[case.x.dtype] if a.ndim == 1 else 2 * LIMIT[a.dtype]
            difference = np.abs(np.asarray(a[of_c], np.float64) - e[of_c]).max()
            assert difference <= limit * np.abs(e[of_c]).max() + 1e-13 * np.abs(e).max(), c


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, HALVES[1]])
def test_what_a_type_holds_does_not_overflow_on_its_way(isa, rng, dtype, size):
    """Values far out, whose products float32 does not hold; the results, of the size of dy and ggI, it does."""
    for shape in ((9, 4, 40), (60, 4)):
        case = Case(rng, shape, 1, dtype, loc=0.5 * size, scale=size)
        case.dy, case.ggI = (a * a.dtype.type(np.clip(size, 1e-12, 1e15)) for a in (case.dy, case.ggI))
        with np.errstate(all="ignore"):
            case.check(size)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", [(6, 4, 30), (30, 4)])
def test_what_is_not_finite_stays_in_its_channel(isa, rng, train, layout):
    for name, value in itertools.product(("x", "dy", "ggI"), (np.inf, np.nan)):
        case = Case(rng, layout, 1, np.float32, train=train)
        before = case.results()
        getattr(case, name)[1:2, 2].flat[0] = value
        after = case.results()
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(np.delete(a, 2, -1 if a.ndim == 1 else 1), np.delete(b, 2, -1 if a.ndim == 1 else 1))
        assert not all(np.isfinite(a).all() for a in after)


def test_in_evaluation_an_infinite_x_has_finite_gradients(rng):
    case = Case(rng, (6, 4, 30), 1, np.float64, train=False)
    case.x[0, 0, 0] = np.inf
    _, grad_x, grad_weight, _ = case.results()
    assert np.isfinite(grad_x).all()
    assert np.isfinite(grad_weight).all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (2, 0, 4), (0, 0)])
def test_empty_batches(rng, shape, train):
    for dtype in INPUT_DTYPES:
        case = Case(rng, shape, 1, dtype, train=train)
        grad_dy, grad_x, grad_weight, y_t = case.results()
        assert grad_dy.shape == grad_x.shape == y_t.shape == shape
        assert grad_dy.dtype == grad_x.dtype == y_t.dtype == dtype
        assert np.array_equal(grad_weight, np.zeros(shape[1]))


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 17), (9, 5, 49), (33, 7), (3, 130), (5, 3, 200), (70, 1030), (300, 3)])
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_outside_an_array_is_read(isa, parallel, rng, dtype, shape, at_end):
    for axis in {1, len(shape) - 1}:
        for nontemporal in (0, 1 << 40):
            engine.tune(nontemporal_bytes=nontemporal)
            case = Case(rng, shape, axis, dtype)
            for name in ("x", "dy", "ggI"):
                a = guarded(shape, dtype, at_end)
                a[...] = getattr(case, name)
                setattr(case, name, a)
            case.check(shape)


def test_nothing_that_is_given_changes(rng):
    case = Case(rng, (4, 3, 5), 1, np.float32)
    before = {name: a.copy() for name, a in vars(case).items() if isinstance(a, np.ndarray)}
    case.results()
    for name, a in before.items():
        assert np.array_equal(getattr(case, name), a), name


def test_a_weight_that_float64_alone_holds_asks_for_float64(rng):
    """As `native_batch_norm_backward`: also where an existing pass does the work."""
    case = Case(rng, (6, 3, 20), 1, np.float32, train=False)
    case.ggI = None
    case.weight, case.ggG, case.ggB = (a.astype(np.float64) for a in (case.weight, case.ggG, case.ggB))
    for a, e in zip(case.results(), case.exact, strict=True):
        assert np.abs(a - e).max() <= 2**-24 * np.abs(e).max()


# ---- what is refused -------------------------------------------------------------------------------------------------

X = np.ones((4, 3, 2), np.float32)
ONES = np.ones(3, np.float32)


def call(function, **changes):
    """A call with plain arguments, but for these."""
    plain = dict(x=X, weight=ONES, running_mean=ONES, running_var=ONES, save_mean=ONES, save_invstd=ONES, train=True,
                 eps=1e-5)  # fmt: skip
    if function is native_batch_norm_double_backward:
        plain = dict(ggI=X, ggG=ONES, ggB=ONES, dy=X) | plain
    else:
        plain = dict(x_t=X, weight_t=ONES, bias_t=ONES, bias=ONES) | plain
    return function(**(plain | changes))


BOTH = (native_batch_norm_double_backward, batch_norm_jvp)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": None}, TypeError, "input must be an array, not None"),
        ({"x": X.astype(int)}, TypeError, "input has dtype int64; expected float32"),
        ({"x": np.ones(3)}, ValueError, "expected at least 2D input"),
        ({"channel_axis": 3}, ValueError, "channel_axis 3 is out of range"),
        ({"weight": np.ones(4)}, ValueError, "weight should contain 3 elements not 4"),
        ({"weight": np.ones(3, int)}, TypeError, "weight has dtype int64"),
        ({"save_mean": None}, RuntimeError, "save_mean and save_invstd must be defined in training mode"),
        ({"save_invstd": np.ones(2)}, ValueError, "save_invstd should contain 3 elements not 2"),
        ({"train": False, "running_mean": None}, ValueError, "running_mean must be defined in evaluation mode"),
        ({"train": False, "running_var": None}, ValueError, "running_var must be defined in evaluation mode"),
        ({"train": False, "running_var": np.ones(4)}, ValueError, "running_var should contain 3 elements not 4"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"eps": -1, "train": False}, ValueError, "eps must be non-negative"),
        ({"eps": "1"}, TypeError, "eps must be a number"),
    ],
)
def test_refused_as_the_backward_pass_refuses(function, changes, error, words):
    with pytest.raises(error, match=words):
        call(function, **changes)


@pytest.mark.parametrize(
    ("function", "name"),
    [(native_batch_norm_double_backward, "ggI"), (native_batch_norm_double_backward, "dy"), (batch_norm_jvp, "x_t")],
)
def test_arrays_like_x_are_named(function, name):
    with pytest.raises(ValueError, match=rf"^{name} has shape \(4, 3, 1\); expected \(4, 3, 2\), as the input"):
        call(function, **{name: X[..., :1]})
    with pytest.raises(TypeError, match=rf"^{name} has dtype int64; expected float32"):
        call(function, **{name: X.astype(int)})
    with pytest.raises(TypeError, match=rf"^{name} is a masked array"):
        call(function, **{name: np.ma.masked_array(X)})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((native_batch_norm_double_backward, name) for name in ("ggG", "ggB")),
        *((batch_norm_jvp, name) for name in ("weight_t", "bias_t", "bias")),
    ],
)
def test_arrays_per_channel_are_named(function, name):
    with pytest.raises(ValueError, match=rf"^{name} should contain 3 elements not 4"):
        call(function, **{name: np.ones(4)})
    with pytest.raises(ValueError, match=rf"^{name} has shape \(3, 1\)"):
        call(function, **{name: np.ones((3, 1))})
    with pytest.raises(TypeError, match=rf"^{name} has dtype complex128"):
        call(function, **{name: np.ones(3, complex)})


def test_a_dy_is_needed():
    with pytest.raises(TypeError, match="dy must be an array, not None"):
        call(native_batch_norm_double_backward, dy=None)


def test_what_an_object_holds_is_read_once():
    class Once:
        def __init__(self, a):
            self.a, self.times = a, 0

        def __array__(self, dtype=None, copy=None):
            self.times += 1
            return self.a

    for function in BOTH:
        names = ["x", "weight", "save_mean", "save_invstd"]
        names += ["ggI", "ggG", "ggB", "dy"] if function is BOTH[0] else ["x_t", "weight_t", "bias_t"]
        given = {name: Once(X if name in ("x", "ggI", "dy", "x_t") else ONES) for name in names}
        call(function, **given)
        assert {name: once.times for name, once in given.items()} == dict.fromkeys(names, 1)
