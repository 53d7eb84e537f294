"""Memory of large outputs that is used again, and the sizes of caches and memory that the system tells."""

import gc
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import cbn
from cbn import memory
from cbn.kernels import arrays

LARGE = (16, 8, 64, 64)  # 2 MB of float32


@pytest.fixture(autouse=True)
def _cache():
    before = arrays.set_cache_limit(1 << 26)
    cbn.empty_cache()
    yield
    arrays.set_cache_limit(before)


def address(a):
    return a.__array_interface__["data"][0]


def test_a_dead_output_is_the_next_one():
    bn = cbn.BatchNorm2d(8)
    x = np.ones(LARGE, np.float32)
    for layer in (bn, bn.eval()):
        y = layer(x)
        where = address(y)
        assert address(layer(x)) != where, "y is alive"
        del y
        assert arrays.cache_state()[0] >= x.nbytes
        again = layer(x)
        assert address(again) == where
        cbn.empty_cache()
    assert again.flags.owndata
    assert again.base is None
    assert again.flags.aligned
    assert address(again) % 64 == 0


def test_an_output_outlives_its_layer():
    x = np.random.default_rng(0).standard_normal(LARGE).astype(np.float32)
    bn = cbn.BatchNorm2d(8).eval()
    y = bn(x)
    expected = y.copy()
    view = y[3:5]
    del bn, y
    gc.collect()
    other = cbn.BatchNorm2d(8).eval()
    for _ in range(5):
        other(x + 1)
    assert np.array_equal(view, expected[3:5])


def test_the_limit_holds_and_the_oldest_go_first():
    arrays.set_cache_limit(5 << 20)
    held = [arrays.empty_like(np.empty(1 << 21, np.int8)) for _ in range(4)]
    last = address(held[-1])
    while held:
        held.pop(0)
        assert arrays.cache_state()[0] <= 5 << 20
    assert arrays.cache_state()[0] >= 1 << 22
    assert address(arrays.empty_like(np.empty(1 << 21, np.int8))) == last
    arrays.set_cache_limit(0)
    assert arrays.cache_state() == (0, 0)
    del held
    a = arrays.empty_like(np.empty(1 << 21, np.int8))
    del a
    assert arrays.cache_state() == (0, 0)


def test_what_is_much_too_large_is_left():
    arrays.set_cache_limit(1 << 30)
    large = arrays.empty_like(np.empty(64 << 20, np.int8))
    del large
    kept = arrays.cache_state()[0]
    small = arrays.empty_like(np.empty(1 << 20, np.int8))
    assert arrays.cache_state()[0] == kept
    del small


def test_many_small_limits():
    """More blocks than the list has places."""
    arrays.set_cache_limit(1 << 30)
    held = [arrays.empty_like(np.empty((1 << 20) + 4096 * i, np.int8)) for i in range(100)]
    for i, a in enumerate(held):
        a.fill(i)
    del a
    held.clear()
    assert 0 < arrays.cache_state()[0] <= 1 << 30
    cbn.empty_cache()
    assert arrays.cache_state() == (0, 1 << 30)


def test_order_in_memory_and_resize():
    x = np.asfortranarray(np.empty((1000, 700), np.float32))
    y = arrays.empty_like(x)
    assert y.flags.f_contiguous
    assert y.dtype == np.float32
    y.fill(3)
    z = arrays.empty_like(np.empty(1 << 20, np.int8))
    z.fill(5)
    z.resize(3 << 20, refcheck=False)  # numpy asks our realloc, and fills the rest with zeros
    assert z[: 1 << 20].min() == 5
    assert z[1 << 20 :].max() == 0
    z.resize(100, refcheck=False)
    assert z.min() == 5
    assert np.all(y == 3)


def test_what_grows_keeps_its_alignment_and_its_huge_pages():
    """The C library's realloc keeps neither; and what came from it was the next output."""
    z = arrays.empty_like(np.empty(1 << 20, np.int8))
    for megabytes in (3, 4, 6, 7, 20, 33, 5, 2, 60):
        before = len(z)
        z.fill(megabytes)
        z.resize(megabytes << 20, refcheck=False)
        assert address(z) % 64 == 0, megabytes
        n = min(before, len(z))
        assert (z[:n] == megabytes).all(), megabytes
        assert not z[n:].any(), megabytes
        if megabytes >= 4 and sys.platform.startswith("linux"):
            assert "hg" in flags_of_mapping(address(z) + (2 << 20)), megabytes
    del z
    again = arrays.empty_like(np.empty(60 << 20, np.int8))
    assert address(again) % 64 == 0


def flags_of_mapping(where):
    """The kernel's flags of the memory at an address; hg: huge pages are asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= where < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_what_shrinks_gives_its_memory_up():
    for size in (1 << 21, 1000):
        z = arrays.empty_like(np.empty(40 << 20, np.int8))
        z.fill(7)
        cbn.empty_cache()
        z.resize(size, refcheck=False)
        assert arrays.cache_state()[0] >= 40 << 20, size
        assert (z == 7).all(), size
        del z
        cbn.empty_cache()


def test_sizes_that_no_memory_has():
    for size in (1 << 46, (1 << 62) + 1, *((1 << 63) - k for k in (1, 64, 65, 128, 1 << 21, (1 << 21) + 65))):
        with pytest.raises(MemoryError):
            arrays.empty_like(np.broadcast_to(np.int8(0), (size,)))


def test_tracemalloc_counts_the_living():
    x = np.empty(1 << 22, np.int8)
    arrays.empty_like(x)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y = arrays.empty_like(x)
        assert tracemalloc.get_traced_memory()[0] - before >= x.nbytes
        del y
        assert tracemalloc.get_traced_memory()[0] - before < x.nbytes
    finally:
        tracemalloc.stop()


def test_threads_share_it():
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        alive = []
        for i in range(200):
            a = arrays.empty_like(np.empty(int(rng.integers(1 << 20, 1 << 21)), np.uint8))
            a[:: 1 << 12] = seed
            a[-1] = seed
            alive.append(a)
            if len(alive) > 3:
                alive.pop(int(rng.integers(4)))
            wrong.extend(i for b in alive if b[0] != seed or b[-1] != seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_handler_of_other_arrays_stays():
    name = np._core.multiarray.get_handler_name
    before = name(np.empty(10))
    y = arrays.empty_like(np.empty(1 << 21, np.int8))
    assert name(y) == "cbn"
    assert name(np.empty(10)) == before


STARVED = """
import copy, io, resource
import numpy as np
import cbn
from cbn.functional import batch_norm
from cbn.kernels import arrays, engine
cbn.set_num_threads(1)
arrays.set_cache_limit(1 << 30)
rng = np.random.default_rng(0)
x = rng.standard_normal((64, 8, 64, 64)).astype(np.float32)     # 8 MB
bn = cbn.BatchNorm2d(8)
SETUP
def starve():
    cbn.empty_cache()    # of what the first call has left
    held = [arrays.empty_like(np.empty(100 << 20, np.int8)) for _ in range(3)]
    del held
    assert arrays.cache_state()[0] >= 300 << 20
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))

def call():
    return CALL

expected = call()
before = out.tobytes()
out[...] = 0
starve()
found = call()
assert arrays.cache_state()[0] < 300 << 20, "there was memory enough"
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
found, expected = (a if isinstance(a, (tuple, list)) else (a,) for a in (found, expected))
for a, b in zip(found, expected, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
assert out.tobytes() == before
print("good")
"""
TO_OUT = "out = np.empty_like(x)"
BIG = "big = cbn.BatchNorm1d(1 << 20)"  # 4 MB an array
STARVED_CALLS = {  # what allocates: (set up, call); `out` is where it does not allocate its output
    "output": ("", "bn(x)"),
    "evaluation": ("bn.eval()", "bn(x)"),
    "many small outputs": ("x = x[:6].copy()", "[bn.eval()(x) for _ in range(20)]"),
    "copy of what no loop reads": ("x, out = x[..., ::2], np.empty((64, 8, 64, 32), np.float32)", "bn(x, out=out)"),
    "copy in native order": (f"{TO_OUT}; x = x.astype('>f4')", "bn.eval()(x, out=out.view())"),
    "copy of a list": (f"{TO_OUT}; x = list(x)", "bn(x, out=out)"),
    "residual that lies otherwise": (
        f"{TO_OUT}; z = np.asfortranarray(x)", "bn(x, out=out, residual=z)"),
    "residual in native order": (
        f"{TO_OUT}; z = x.astype('>f4')", "bn(x, out=out, residual=z)"),
    "gradient in native order": (f"{TO_OUT}; bn(x); dy = x.astype('>f4')", "bn.backward(dy, out=out)"),
    "scratch of the pipeline": (
        "x = np.tile(x, (1, 1, 2, 2)); out = np.empty_like(x); "
        "engine.tune(l2_bytes=1 << 20, l3_bytes=1 << 28, nontemporal_bytes=0)", "bn(x, out=out)"),
    "statistics": ("x = x.reshape(2, -1)", "(lambda m: (m.mean, m.m2))(cbn.moments(x))"),
    "gradient": ("bn(x); dy = x + 1", "bn.backward(dy)"),
    "gradient of a dtype of its own": (f"{TO_OUT}; bn(x); dy = x.astype(np.float64)", "bn.backward(dy, out=out)"),
    "gradient of 16 bits, leaky": (
        "x = x.astype(np.float16); bn.activation = ('leaky_relu', 0.1); bn(x); out = np.empty_like(x); dy = x.copy()",
        "bn.backward(dy, out=out)"),
    "gradient of the residual": (f"{TO_OUT}; bn(x, residual=x); dy = x.copy()", "bn.backward(dy, out=out)"),
    "8 bits, as float64": (
        "out = np.empty_like(x); q = x.astype(np.int8)",
        "batch_norm(q, np.full(8, 1e33), np.ones(8), x_scale=1e-3, out=out)"),
    "8 bits that no loop reads": (
        "q = np.zeros((64, 8, 256, 512), np.int8)[:, :, ::4, ::2]; out = np.empty(q.shape, np.float32)",
        "batch_norm(q, np.zeros(8), np.ones(8), x_scale=1e-3, out=out)"),
    "fused weights before": ("w = x.reshape(8, -1); bn.eval()", "cbn.fuse_linear_bn(w, None, bn)"),
    "fused weights after": ("w = x.reshape(-1, 8); bn.eval()", "cbn.fuse_bn_linear(bn, w, None)"),
    "plan": ("bn.eval()", "bn.plan((64, 8, 64, 64))(x)"),
    "a layer": ("", "cbn.BatchNorm1d(1 << 20).weight"),
    "state dict": (BIG, "big.state_dict()['weight']"),
    "a state that is loaded": (f"{BIG}; state = big.state_dict()", "big.load_state_dict(state) and big.weight"),
    "deep copy": (BIG, "copy.deepcopy(big).weight"),
    "copy for a pickle": (BIG, "big.__getstate__()['_weight']"),
    "parameter of another dtype": (
        f"{BIG}; w = np.ones(1 << 20)", "setattr(big, 'weight', w) or big.weight"),
    "zeros": (BIG, "big.zero_grad() or big.weight_grad"),
    "file that is written": (f"{BIG}; out = np.empty(0)", "big.save('/dev/null') or x"),
    "file that is read": (
        f"{BIG}; file = io.BytesIO(); big.save(file)", "file.seek(0) or cbn.load(file).weight"),
    "evaluation of many channels": (f"{BIG}; one = np.ones((2, 1 << 20), np.float32); big.eval()", "big(one)"),
}  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.parametrize("name", STARVED_CALLS)
def test_memory_that_nobody_uses_is_given_back_before_a_call_fails(name):
    setup, call = STARVED_CALLS[name]
    setup = "\n".join(["out = np.empty(0)", *setup.split("; ")])
    # Large blocks have mappings of their own, so that the limit on the address space is what malloc meets
    done = run(STARVED.replace("SETUP", setup).replace("CALL", call), MALLOC_MMAP_THRESHOLD_="65536")
    assert done.stdout == "good\n", done.stderr


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", **environment},
        timeout=60,
    )


def test_the_limit_by_environment():
    code = "import cbn; from cbn.kernels import arrays, engine; print(arrays.cache_state()[1])"
    assert run(code, CBN_CACHE_BYTES="0").stdout == "0\n"
    assert run(code, CBN_CACHE_BYTES="123456").stdout == "123456\n"
    assert run(code, CBN_CACHE_BYTES="9" * 5000).stdout == f"{1 << 62}\n"
    assert int(run(code).stdout) == memory.memory_bytes() // memory.SHARE
    for bad in ("-1", "1GB", "²"):
        done = run(code, CBN_CACHE_BYTES=bad)
        assert f"CBN_CACHE_BYTES must be a number of bytes, 0 or more, not {bad!r}" in done.stderr


def test_show_config_names_it(capsys):
    cbn.show_config()
    text = capsys.readouterr().out
    assert "MB kept, at most 67 MB" in text
    assert "L2 " in text


def write_cache(root, index, level, size, cpus, kind="Unified"):
    folder = root / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", level), ("size", size), ("shared_cpu_list", cpus), ("type", kind)):
        (folder / name).write_text(f"{text}\n")


def test_cache_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 16)
    assert memory.cache_sizes(tmp_path) == (memory.L2_BYTES, memory.L3_BYTES)
    write_cache(tmp_path, 0, 1, "48K", "0", "Data")
    write_cache(tmp_path, 2, 2, "2048K", "0-1")
    write_cache(tmp_path, 3, 3, "32M", "0-7")
    assert memory.cache_sizes(tmp_path) == (2 << 20, 64 << 20), "two threads of one core; two L3"
    for folder in tmp_path.iterdir():
        (folder / "size").write_text("what?")
    assert memory.cache_sizes(tmp_path) == (memory.L2_BYTES, memory.L3_BYTES)


def test_an_l2_that_many_cores_share(tmp_path):
    write_cache(tmp_path, 2, 2, "4M", "0-3")
    assert memory.cache_sizes(tmp_path)[0] == 1 << 20


def test_memory_of_a_control_group(tmp_path):
    everything = memory.memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_bytes(tmp_path) == everything
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.memory_bytes(tmp_path) == 1000000
