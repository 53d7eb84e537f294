"""Threads: how many, the same bits for any number, sharing a layer, forking, and an untouched host process."""

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cbn
from cbn import threads
from cbn.functional import native_batch_norm, native_batch_norm_backward
from cbn.kernels import passes

HAS_OPENMP = passes.build_info()["openmp"] != 0


def in_a_new_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 6, 40, 40), 1), ((8, 40, 40, 6), -1), ((3000, 70), 1), ((1, 1, 400000), 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bytes_for_1_to_16_threads(isa, parallel, rng, shape, axis, dtype):
    x = (rng.standard_normal(shape) * 5 + 100).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    weight, bias = rng.standard_normal((2, shape[axis])).astype(dtype)
    results = []
    for n in range(1, 17):
        with cbn.num_threads(n):
            y, *saved = native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, channel_axis=axis)
            gradients = native_batch_norm_backward(dy, x, weight, None, None, *saved, True, 1e-5, channel_axis=axis)
        results.append(b"".join(a.tobytes() for a in (y, *saved, *gradients)))
    assert len(set(results)) == 1


def test_who_decides():
    default = cbn.get_num_threads()
    cbn.set_num_threads(5)
    assert cbn.get_num_threads() == 5
    with cbn.num_threads(7):
        assert cbn.get_num_threads() == 7
        with cbn.num_threads(1):
            assert cbn.get_num_threads() == 1
        assert cbn.get_num_threads() == 7
        with ThreadPoolExecutor(1) as pool:  # the block is the calling thread's alone
            assert pool.submit(cbn.get_num_threads).result() == 5
    with pytest.raises(KeyError), cbn.num_threads(3):
        raise KeyError
    assert cbn.get_num_threads() == 5
    passes.ask_threads(process=0)
    assert cbn.get_num_threads() == default


@pytest.mark.parametrize("n", [0, -1, 1 << 17])
def test_numbers_out_of_range(n):
    for call in (cbn.set_num_threads, cbn.num_threads):
        with pytest.raises(ValueError, match=f"n must be a number of threads, 1 or more, but got {n}"):
            call(n)


@pytest.mark.parametrize("n", [1.0, "2", None, True])
def test_what_is_no_number(n):
    for call in (cbn.set_num_threads, cbn.num_threads):
        with pytest.raises(TypeError, match="n must be a number of threads"):
            call(n)


def test_environment():
    show = "import cbn; print(cbn.get_num_threads())"
    assert in_a_new_process(show, CBN_NUM_THREADS="11") == "11"
    for value in ("0", "many", "-3"):
        with pytest.raises(AssertionError, match="CBN_NUM_THREADS must be a number of threads"):
            in_a_new_process(show, CBN_NUM_THREADS=value)


@pytest.mark.skipif(not HAS_OPENMP, reason="built without OpenMP")
def test_the_default_is_bounded_and_what_is_asked_for_is_not():
    show = "import cbn; print(cbn.get_num_threads())"
    cores = len(os.sched_getaffinity(0))
    assert in_a_new_process(show, OMP_NUM_THREADS="1") == "1"
    assert int(in_a_new_process(show, OMP_NUM_THREADS="64")) <= cores
    assert in_a_new_process(f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {show}") == "1"
    assert in_a_new_process(show, OMP_NUM_THREADS="1", CBN_NUM_THREADS="9") == "9"


def test_cgroup_quota(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    quota = lambda: threads.cgroup_quota(tmp_path, own)  # noqa: E731
    assert quota() == 0
    (group / "cpu.max").write_text("max 100000\n")
    assert quota() == 0
    (group / "cpu.max").write_text("250000 100000\n")
    assert quota() == 3
    (tmp_path / "a" / "cpu.max").write_text("100000 100000\n")  # the group above binds too
    assert quota() == 1
    (tmp_path / "a" / "cpu.max").write_text("1000 100000\n")
    assert quota() == 1
    for damaged in ("", "nonsense", "1 2 3", "x 100000"):
        (tmp_path / "a" / "cpu.max").write_text(damaged)
        assert quota() == 3
    # version 1
    own.write_text("4:cpu,cpuacct:/jobs\n2:memory:/jobs\n")
    group = tmp_path / "cpu" / "jobs"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert quota() == 0
    (group / "cpu.cfs_quota_us").write_text("400000\n")
    assert quota() == 4
    assert threads.cgroup_quota(tmp_path / "absent", tmp_path / "absent") == 0


def test_the_reason_is_told():
    assert "affinity" in threads.explain() or "without OpenMP" in threads.explain()
    cbn.set_num_threads(2)
    assert "set_num_threads" in threads.explain() or not HAS_OPENMP
    with cbn.num_threads(2):
        assert threads.explain() == "num_threads()" or not HAS_OPENMP


def test_one_layer_in_many_threads_in_evaluation(rng, parallel):
    bn = cbn.BatchNorm1d(16)
    bn(rng.standard_normal((64, 16)).astype(np.float32))
    bn.eval()
    inputs = [rng.standard_normal((200, 16)).astype(np.float32) for _ in range(32)]
    expected = [bn(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for y, e in zip(pool.map(bn, inputs), expected, strict=True):
                assert np.array_equal(y, e)


def test_updates_of_many_threads_are_atomic(rng, parallel):
    """With momentum=None the average over all batches does not depend on their order; a lost update would show."""
    bn = cbn.BatchNorm1d(16, momentum=None, dtype=np.float64)
    inputs = [rng.standard_normal((50, 16)) + k for k in range(200)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(bn, inputs))
    finally:
        sys.setswitchinterval(before)
    assert bn.num_batches_tracked == 200
    np.testing.assert_allclose(bn.running_mean, np.mean([x.mean(0) for x in inputs], axis=0), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, np.mean([x.var(0, ddof=1) for x in inputs], axis=0), rtol=1e-12)


def test_nobody_sees_a_half_update(parallel):
    """Mean and variance of the same batch, while another thread trains: a snapshot of both."""
    bn = cbn.BatchNorm1d(64, momentum=1.0, dtype=np.float64)
    batches = [np.array([[-k], [k]], float) * np.ones(64) + 10 * k for k in (1.0, 3.0)]
    bn(batches[0])
    stop = threading.Event()

    def train():
        k = 0
        while not stop.is_set():
            k ^= 1
            bn(batches[k])

    worker = threading.Thread(target=train)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    worker.start()
    try:
        for _ in range(300):
            state = bn.state_dict()
            mean, var = state["running_mean"][0], state["running_var"][0]
            assert (mean, var) in ((10.0, 2.0), (30.0, 18.0))
    finally:
        stop.set()
        worker.join()
        sys.setswitchinterval(before)


FORK = """
import os, sys, threading
import numpy as np
import cbn
from cbn.kernels import passes
passes.tune(bytes_per_thread=1)
cbn.set_num_threads(4)
x = np.random.default_rng(0).standard_normal((64, 32, 100)).astype(np.float32)
bn = cbn.BatchNorm1d(32)
expected = bn(x)                       # the parent's OpenMP threads are running now
stop = threading.Event()
def train():
    while not stop.is_set():
        bn(x)
worker = threading.Thread(target=train)
worker.start()                         # and one of them may hold the lock of the updates
good = True
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(bn(x), expected) and cbn.get_num_threads() == 1 else 1)
    good &= os.waitpid(pid, 0)[1] == 0
stop.set()
worker.join()
print("good" if good and cbn.get_num_threads() == 4 else "bad")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_hang():
    assert in_a_new_process(FORK, PYTHONWARNINGS="ignore") == "good"


UNTOUCHED = """
import os, signal, sys, threading, warnings
import numpy as np
def state():
    return (dict(os.environ), os.getcwd(), sys.getswitchinterval(), signal.getsignal(signal.SIGINT),
            list(warnings.filters), threading.active_count(), np.geterr(), np.get_printoptions(),
            os.sched_getaffinity(0), len(os.listdir("/proc/self/task")))
import ctypes
gomp = ctypes.CDLL("libgomp.so.1") if sys.argv[1:] else None
tiny = np.array([5e-324]), np.array([1e-40], np.float32)
before = state()
omp = gomp and gomp.omp_get_max_threads()
import cbn
assert state() == before, "import changed the process"
assert not gomp or gomp.omp_get_max_threads() == omp
assert (tiny[0] * 1)[0] == 5e-324 and (tiny[1] * np.float32(1))[0] > 0, "subnormals are flushed to zero"
cbn.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((100, 100, 100))
cbn.BatchNorm1d(100)(x)
assert (tiny[0] * 1)[0] == 5e-324 and (tiny[1] * np.float32(1))[0] > 0
assert not gomp or gomp.omp_get_max_threads() == omp
print("good")
"""


def test_import_changes_nothing_in_the_process():
    assert in_a_new_process(UNTOUCHED) == "good"


@pytest.mark.skipif(not HAS_OPENMP, reason="built without OpenMP")
def test_the_host_keeps_its_number_of_threads():
    code = UNTOUCHED.replace("sys.argv[1:]", "True")
    assert in_a_new_process(code, OMP_NUM_THREADS="2") == "good"


SIGNALS = """
import signal
import numpy as np
import cbn
bn, x = cbn.BatchNorm1d(64), np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
handled = 0
def handler(*_):
    global handled
    handled += 1
    bn.state_dict()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
while handled < 2000:
    bn(x)
signal.setitimer(signal.ITIMER_REAL, 0)
print("good")
"""


def test_a_signal_handler_may_use_the_layer_that_it_interrupts():
    assert in_a_new_process(SIGNALS) == "good"


def test_subnormal_values_are_computed(isa):
    x = np.array([[1e-40], [3e-40]], np.float32)
    m = cbn.moments(x)
    assert m.mean[0] == pytest.approx(2e-40, rel=1e-4)
    y = cbn.functional.batch_norm(x, np.zeros(1), np.ones(1), eps=0.0)
    assert np.array_equal(y, x)


def test_no_source_sets_the_threads_of_the_process():
    for path in Path(cbn.__file__).parent.rglob("*"):
        if path.suffix in (".pyx", ".pxd", ".c", ".h", ".py") and path.name != "passes.c":
            assert not re.search(r"\bomp_set_\w+\s*\(", path.read_text()), path


def test_instruction_set_by_environment():
    for isa in passes.available():
        assert in_a_new_process("from cbn.kernels import passes; print(passes.isa())", CBN_ISA=isa) == isa
    with pytest.raises(AssertionError, match="'mmx' is not known; available: baseline"):
        in_a_new_process("import cbn", CBN_ISA="mmx")
