"""Every kernel against `cbn.reference`: instruction set × dtype × layout × mode × number of threads."""

import numpy as np
import pytest

import cbn
from cbn import reference
from cbn.functional import native_batch_norm, native_batch_norm_backward
from cbn.kernels import arrays, engine

from .paths import (
    GRADIENT_LIMIT,
    INPUT_DTYPES,
    KNOBS,
    LARGE_RANGE,
    LAYOUTS,
    LIMIT,
    PARAMETERS,
    PATH_SHAPES,
    STATISTICS_LIMIT,
    THREADS,
    agree,
    in_memory_order,
)


def data(rng, dtype, layout):
    shape, axis, order = LAYOUTS[layout]
    n_channels = shape[axis]
    x = in_memory_order((3 * rng.standard_normal(shape) + 10).astype(dtype), order)
    dy = in_memory_order(rng.standard_normal(shape).astype(dtype), order)
    weight, bias, mean = rng.standard_normal((3, n_channels)).astype(PARAMETERS[dtype])
    var = rng.uniform(0.5, 2, n_channels).astype(PARAMETERS[dtype])
    return x, dy, weight, bias, mean, var, axis


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("affine", [True, False])
def test_forward_and_backward(isa, parallel, rng, dtype, layout, affine):
    x, dy, weight, bias, mean, var, axis = data(rng, dtype, layout)
    if not affine:
        weight = bias = None
    axis_index = axis % x.ndim
    for train in (True, False):
        exact_mean, exact_var = mean, var
        if train:
            n, exact_mean, m2 = reference.moments(x, axis_index)
            exact_var = m2 / n
        exact_y = reference.normalize(x, exact_mean, exact_var, weight, bias, 1e-5, axis_index)
        exact = reference.backward(dy, x, exact_mean, exact_var, weight, 1e-5, train, axis_index)
        results = []
        for n_threads in THREADS:
            with cbn.num_threads(n_threads):
                y, save_mean, save_invstd = native_batch_norm(
                    x, weight, bias, *((None, None) if train else (mean, var)), train, 0.1, 1e-5, channel_axis=axis
                )
                gradients = native_batch_norm_backward(
                    dy, x, weight, mean, var, save_mean, save_invstd, train, 1e-5, channel_axis=axis
                )
            results.append([a.tobytes("A") for a in (y, save_mean, save_invstd, *gradients)])
        assert y.dtype == x.dtype
        assert y.strides == x.strides
        agree(y, exact_y, LIMIT[x.dtype])
        if train:
            agree(save_mean, exact_mean, STATISTICS_LIMIT[x.dtype])
            agree(save_invstd, 1 / np.sqrt(exact_var + 1e-5), STATISTICS_LIMIT[x.dtype])
        for gradient, exact_gradient in zip(gradients, exact, strict=True):
            agree(gradient, exact_gradient, GRADIENT_LIMIT[x.dtype])
        assert all(r == results[0] for r in results), "the bits depend on the number of threads"


# Shapes around every border of the partition and of the loops: vectors, unrolled vectors, chunks, tiles, row blocks.
LENGTHS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, s) for s in LENGTHS] + [(s, 3) for s in LENGTHS[1:]] + [(3, s) for s in LENGTHS]
)
def test_borders_of_vectors(isa, rng, dtype, shape):
    x = rng.standard_normal(shape).astype(dtype)
    n, mean, m2 = reference.moments(x)
    y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    agree(y, reference.normalize(x, mean, m2 / n), LIMIT[x.dtype])
    dy = rng.standard_normal(shape).astype(dtype)
    gradients = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)
    for gradient, exact in zip(gradients, reference.backward(dy, x, mean, m2 / n), strict=True):
        scale = max(np.abs(exact).max(), np.abs(dy).max() / np.sqrt(m2 / n + 1e-5).min() * 1e-2)
        assert np.abs(gradient - exact).max() <= GRADIENT_LIMIT[x.dtype] * scale


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 2, 65535), 1), ((1, 2, 65536), 1), ((2, 2, 65537), 1), ((2, 1, 200001), 1),  # chunks of one run
        ((700, 2, 199), 1), ((66000, 2, 2), 1), ((1, 1, 300000), 1),  # chunks of many runs
        ((255, 5), 1), ((257, 5), 1), ((70000, 3), 1), ((2, 1, 1000, 5), 3), ((1000003, 3), 1),  # joined rows
        ((3, 511), 1), ((3, 1024), 1), ((300, 1025), 1), ((300, 2500), 1), ((2, 40000), 1),  # column tiles
        ((8, 40, 127), 1), ((8, 40, 128), 1), ((7, 40, 127), 1), ((9, 33, 49), 1), ((300, 5, 4), 1),  # short runs
        ((3, 33, 129), 1), ((1, 70, 100), 1), ((1, 3000, 100), 1),  # groups of channels
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_borders_of_the_partition(parallel, rng, dtype, shape, axis):
    x = (rng.standard_normal(shape) + 5).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    n, mean, m2 = reference.moments(x, axis)
    exact_y = reference.normalize(x, mean, m2 / n, channel_axis=axis)
    exact = reference.backward(dy, x, mean, m2 / n, channel_axis=axis)
    results = []
    for n_threads in (1, 2, 5, 16):
        with cbn.num_threads(n_threads):
            y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis)
            gradients = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, channel_axis=axis)
        results.append([a.tobytes() for a in (y, *saved, *gradients)])
    assert all(r == results[0] for r in results)
    agree(y, exact_y, LIMIT[x.dtype])
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        agree(gradient, exact_gradient, GRADIENT_LIMIT[x.dtype])


@pytest.mark.parametrize("shape", PATH_SHAPES.values(), ids=PATH_SHAPES)
@pytest.mark.parametrize("dtype", LARGE_RANGE)
@pytest.mark.parametrize("wide", [slice(0), slice(3, None, 4), slice(15, 16)], ids=["none", "many", "one"])
def test_every_path_gives_the_same_bits(isa, parallel, rng, dtype, shape, wide):
    """Order of the work, kind of store, fetching, threads, alignment: knobs that no result depends on.

    Some channels begin with a value far out, so they are reduced twice; those of `wide` need float64 arithmetic; one is
    not finite.
    """
    x = rng.standard_normal(shape).astype(dtype)
    x[0, ::5].flat[0] = 1e4
    x[:, wide] *= 1e36
    x[0, 4].flat[0] = np.inf
    dy = rng.standard_normal(shape).astype(dtype)
    weight, bias, mean = rng.standard_normal((3, shape[1])).astype(PARAMETERS[dtype])
    var = rng.uniform(1, 2, shape[1]).astype(PARAMETERS[dtype])

    def results(offset):
        memory = np.empty(2 * x.size + 128, dtype)
        y, dx = (memory[i : i + x.size].reshape(shape) for i in (offset, x.size + 64 + offset))
        with np.errstate(all="ignore"):
            _, *saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, out=y)
            _, *sums = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5, out=dx)
            in_place = [x.copy(), dy.copy()]
            native_batch_norm(in_place[0], weight, bias, None, None, True, 0.1, 1e-5, out=in_place[0])
            native_batch_norm_backward(in_place[1], x, weight, None, None, *saved, True, 1e-5, out=in_place[1])
            evaluated = cbn.functional.batch_norm(x, mean, var, weight, bias)
        # A NaN is a NaN: which of two operands' payloads it has is the compiler's choice
        found = [np.where(np.isnan(a), np.nan, a).tobytes() for a in (y, dx, *in_place, evaluated, *saved, *sums)]
        assert found[:2] == found[2:4]
        return found

    engine.tune(bytes_per_thread=1 << 40, **KNOBS["two passes"])
    expected = results(0)
    for name, knobs in KNOBS.items():
        engine.tune(bytes_per_thread=1, **{"nontemporal_bytes": 1 << 40, "prefetch": True} | knobs)
        for n_threads, offset in ((1, 0), (2, 3), (3, 1), (1, 8)):
            with cbn.num_threads(n_threads):
                assert results(offset) == expected, (name, n_threads)


def test_the_paths_agree_with_the_reference(isa, parallel, rng):
    """What all paths agree on is right: the pipeline, against float64."""
    engine.tune(**KNOBS["pipeline, past the caches"])
    for shape in PATH_SHAPES.values():
        x = (rng.standard_normal(shape) + 100).astype(np.float32)
        dy = rng.standard_normal(shape).astype(np.float32)
        n, mean, m2 = reference.moments(x)
        y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        agree(y, reference.normalize(x, mean, m2 / n), LIMIT[x.dtype])
        gradients = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5)
        for gradient, exact in zip(gradients, reference.backward(dy, x, mean, m2 / n), strict=True):
            agree(gradient, exact, GRADIENT_LIMIT[x.dtype])


def test_unknown_knobs_are_refused():
    before = engine.tune()
    with pytest.raises(TypeError, match="no knob 'blocking'; there are bytes_per_thread, nontemporal_bytes"):
        engine.tune(blocking=1, prefetch=False)
    assert engine.tune() == before


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_bits_do_not_depend_on_addresses_or_out(isa, rng, dtype, last):
    shape = (3, 100, 7) if last else (3, 7, 100)
    axis = -1 if last else 1
    x = rng.standard_normal(shape).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    expected_y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis)
    expected_dx = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, channel_axis=axis)[0]
    memory = np.empty(x.size + 64, dtype)
    memory_out = np.empty(x.size + 64, dtype)
    for offset in range(0, 20):
        moved = memory[offset : offset + x.size].reshape(shape)
        moved[...] = x
        out = memory_out[19 - offset : 19 - offset + x.size].reshape(shape)
        y, *saved = native_batch_norm(moved, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis, out=out)
        assert y is out
        assert y.tobytes() == expected_y.tobytes()
        native_batch_norm_backward(dy, moved, None, None, None, *saved, True, 1e-5, channel_axis=axis, out=out)
        assert out.tobytes() == expected_dx.tobytes()


def test_an_element_has_the_same_bits_in_a_vector_and_in_a_tail(isa, rng):
    """Every position of a run: whole vectors and parts of one round alike."""
    mean, var = rng.standard_normal(1), rng.uniform(1, 2, 1)
    for dtype in INPUT_DTYPES:
        value = dtype(rng.standard_normal())
        y = cbn.functional.batch_norm(np.full((1, 1, 203), value), mean, var)
        assert len(set(y.ravel().tolist())) == 1


def test_layouts_are_recognized():
    def layout(x, axis=1):
        found = arrays.Layout.of(x, axis)
        return None if found is None else (found.rows, found.N, found.C, found.S)

    x = np.zeros((2, 3, 4, 5), np.float32)
    assert layout(x) == (False, 2, 3, 20)
    assert layout(x, 3) == (True, 24, 5, 1)
    assert layout(x, 0) == (False, 1, 2, 60)
    assert layout(in_memory_order(x, (0, 2, 3, 1))) == (True, 40, 3, 1)
    assert layout(in_memory_order(x, (1, 0, 2, 3))) == (False, 1, 3, 40)
    assert layout(x[::-1]) == (False, 2, 3, 20)
    assert layout(x[:, 1:]) == (False, 2, 2, 20)
    assert layout(x[..., ::2]) is None
    assert layout(x[..., :3]) is None
    assert layout(x[:, :, :, ::-1]) is None
    assert layout(np.broadcast_to(x[:1], (7, 3, 4, 5))) is None
    assert layout(np.zeros((6, 3))) == (True, 6, 3, 1)
    assert layout(np.zeros((6, 3))[::2]) == (True, 3, 3, 1)
    assert layout(np.zeros((6, 1))) == (False, 1, 1, 6)
    assert layout(np.zeros((6, 3), order="F")) == (False, 1, 3, 6)
    assert layout(np.zeros((1, 3))) == (True, 1, 3, 1)
    assert layout(np.zeros((1, 3, 1, 1))) == (True, 1, 3, 1)
    assert "2 runs of 20" in repr(arrays.Layout.of(x, 1))


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1)])
def test_known_layouts_run_without_a_copy(rng, order):
    x = in_memory_order(rng.standard_normal((2, 3, 4, 5)).astype(np.float32), order)
    assert arrays.Input(x, 1).x.ctypes.data == x.ctypes.data


@pytest.mark.skipif("avx512_bf16" not in engine.available(), reason="a processor without it")
def test_other_types_have_the_loops_of_avx512(rng):
    """Each type's place in the table; the tests leave those of avx512_bf16 out otherwise."""
    x, g = rng.standard_normal((2, 40, 9, 70))
    mean, var = np.zeros(9), np.ones(9)

    def results():
        found = []
        for dtype in (np.float32, np.float64, np.float16):
            a, dy = x.astype(dtype), g.astype(dtype)
            for parameters in (np.float32, np.float64):
                found.append(cbn.functional.batch_norm(a, mean.astype(parameters), var.astype(parameters)))
            y, *saved = native_batch_norm(a, None, None, None, None, True, 0.1, 1e-5)
            found += [y, *saved, *native_batch_norm_backward(dy, a, None, None, None, *saved, True, 1e-5)]
        for dtype in (np.uint8, np.int8):
            found.append(cbn.functional.batch_norm((x * 20).astype(np.int8).view(dtype), mean, var, x_scale=0.1))
        return [a.tobytes() for a in found]

    engine.use_isa("avx512")
    expected = results()
    engine.use_isa("avx512_bf16")
    assert results() == expected


def test_use_isa_refuses_unknown_and_lists_what_is_available():
    with pytest.raises(ValueError, match=r"CBN_ISA: instruction set 'sse9' is not known; available: baseline"):
        engine.use_isa("sse9")
    assert engine.isa() == engine.available()[-1]


def test_arrays_that_overlap_themselves_are_copied(rng):
    """No output can lie as they do; with a channel's runs or rows over one another a kernel would write twice."""
    signal = rng.standard_normal(64)
    windows = np.lib.stride_tricks.sliding_window_view
    for x, axis in (
        (windows(signal, 8), 0), (windows(signal, 8), 1), (windows(signal, 8).T, 0), (windows(signal, 8).T, 1),
        (np.broadcast_to(signal[:4, None], (6, 4, 10)), 1), (np.broadcast_to(signal[:4], (6, 10, 4)), 2),
        (np.broadcast_to(signal[:4], (6, 4)), 1), (np.broadcast_to(signal[:4], (6, 4)), 0),
        (np.broadcast_to(signal[0], (6, 4)), 1), (windows(signal, 8)[::2, ::-1], 1),
        (windows(signal.reshape(16, 4), 5, 0), 1), (windows(signal.reshape(4, 16), (2, 3)), 1),
    ):  # fmt: skip
        n, mean, m2 = reference.moments(x, axis)
        y = cbn.functional.batch_norm(x, None, None, training=True, channel_axis=axis)
        agree(y, reference.normalize(x, mean, m2 / n, channel_axis=axis), 1e-12)


@pytest.mark.parametrize("dtype", LARGE_RANGE)
@pytest.mark.parametrize("last", [False, True])
def test_a_channel_has_the_same_bits_whatever_its_neighbours_are(isa, rng, dtype, last):
    """Neighbours that are not finite, or that need float64 arithmetic, in every position of a vector."""
    x, dy = rng.standard_normal((2, 60, 40)).astype(dtype)
    axis = 1
    if not last:
        x, dy, axis = np.ascontiguousarray(x.T), np.ascontiguousarray(dy.T), 0

    def run(x):
        y, *saved = native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, channel_axis=axis)
        dx, dweight, dbias = native_batch_norm_backward(dy, x, None, None, None, *saved, True, 1e-5, channel_axis=axis)
        return [np.moveaxis(y, axis, 0), np.moveaxis(dx, axis, 0), dweight, dbias]

    clean = run(x)
    for value in (np.nan, np.inf, 1e35, 3e38):
        dirty = x.copy()
        spoiled = rng.choice(40, 9, replace=False)
        np.moveaxis(dirty, axis, 0)[spoiled, 3] = value
        kept = np.setdiff1d(np.arange(40), spoiled)
        for a, b in zip(run(dirty), clean, strict=True):
            assert np.array_equal(a[kept], b[kept])
