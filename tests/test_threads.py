"""Threads: how many, the same bits for any number, sharing a layer, too few, forking, an untouched host process."""

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
from cbn.kernels import engine

HAS_OPENMP = engine.build_info()["openmp"] != 0


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
    with cbn.num_threads(3):
        with cbn.num_threads(None):  # in there nobody asks but the process
            assert cbn.get_num_threads() == 5
        assert cbn.get_num_threads() == 3
    cbn.set_num_threads(None)
    assert cbn.get_num_threads() == default
    with cbn.num_threads(None):
        assert cbn.get_num_threads() == default


@pytest.mark.parametrize("n", [0, -1, 1025, 1 << 17, 10**30, pytest.param(10**5000, id="huge")])
def test_numbers_out_of_range(n):
    before = engine.asked_threads()
    for call in (cbn.set_num_threads, cbn.num_threads):
        words = (
            f"n must be a number of threads from 1 to 1024, but got {n}$"
            if n < 1 << 63
            else "of 64 bits, but got one of"
        )
        with pytest.raises(ValueError, match=words):
            call(n)
    assert engine.asked_threads() == before


def test_the_largest_number():
    cbn.set_num_threads(1024)
    assert cbn.get_num_threads() == 1024


@pytest.mark.parametrize("n", [1.0, "2", True])
def test_what_is_no_number(n):
    for call in (cbn.set_num_threads, cbn.num_threads):
        with pytest.raises(TypeError, match="n must be a number of threads or None, not "):
            call(n)


def test_threads_by_environment():
    show = "import cbn; print(cbn.get_num_threads())"
    default = in_a_new_process(show)
    assert in_a_new_process(show, CBN_NUM_THREADS="11") == "11"
    assert in_a_new_process(show, CBN_NUM_THREADS=" 1024 ") == "1024"
    for value in ("", " "):
        assert in_a_new_process(show, CBN_NUM_THREADS=value) == default, value
    for value in ("0", "many", "-3", "1025", "4.0", "4,2", "1_0", "²", "9" * 5000):
        with pytest.raises(AssertionError, match="CBN_NUM_THREADS must be a number of threads from 1 to 1024, not '"):
            in_a_new_process(show, CBN_NUM_THREADS=value)


def test_back_to_the_default_of_the_environment():
    code = "import cbn; cbn.set_num_threads(3); cbn.set_num_threads(None); print(cbn.get_num_threads())"
    assert in_a_new_process(code, CBN_NUM_THREADS="11") == "11"


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
    assert threads.explain() == "set_num_threads()" or not HAS_OPENMP
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


# What the processes of the tests below have: a call that opens one region, of up to 16 threads, the number of threads
# that then exist, and limits.
PRELUDE = """
import ctypes, os, resource, signal, sys, threading, time
import numpy as np
import cbn
from cbn import config, threads
from cbn.kernels import arrays, engine
engine.tune(bytes_per_thread=1)
x = np.random.default_rng(0).standard_normal((2, 16, 20000)).astype(np.float32)     # an item for each channel

def right():
    return cbn.moments(x).m2.tobytes() == expected

with cbn.num_threads(1):
    expected = cbn.moments(x).m2.tobytes()

def count():              # of threads, at least of those that have not just ended
    return min((time.sleep(0.002), len(os.listdir("/proc/self/task")))[1] for _ in range(20))

def alive(n):             # whether n threads are; the system counts those that have ended too, until they have run
    give_up = time.monotonic() + 10
    while (found := len(os.listdir("/proc/self/task"))) > n and time.monotonic() < give_up:
        time.sleep(0.001)
    return found == n

def openmp():             # cbn's own runtime: other packages bring copies of theirs, but not into this process
    path, = config.openmp_runtime()
    return ctypes.CDLL(path)

def spare(megabytes):     # of address space
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))

def in_thread(function):
    found = []
    worker = threading.Thread(target=lambda: found.append(function()))
    worker.start()
    worker.join()
    return found[0]

def in_child(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)       # it hangs: the test says so
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0
"""
openmp_alone = pytest.mark.skipif(not HAS_OPENMP, reason="built without OpenMP")
linux_alone = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a limit works is Linux's")


def gomp_of_cbn():
    """The path of cbn's own OpenMP runtime."""
    return in_a_new_process("import cbn; from cbn import config; print(*config.openmp_runtime())")


def good(code, **environment):
    """Whether the code, after the prelude, is right by its own `assert`s and lives to its end."""
    assert in_a_new_process(f"{PRELUDE}{code}\nprint('good')", PYTHONWARNINGS="ignore", **environment) == "good"


@openmp_alone
@linux_alone
@pytest.mark.parametrize("megabytes", [1, 20, 100])
@pytest.mark.parametrize("n", [2, 8, 16])
def test_threads_that_memory_has_no_room_for(n, megabytes):
    """OpenMP's runtime would end the process."""
    good(f"""
cbn.set_num_threads({n})
before = count()
spare({megabytes})
assert right() and right()
started = count() - before
assert started <= {megabytes} // 8, started     # a stack has 8 MB
assert cbn.get_num_threads() == started + 1
fewer = "of {n} no more could be created"
assert threads.explain() == ("set_num_threads()" if started + 1 == {n} else fewer), threads.explain()
""", OMP_STACKSIZE="8M")  # fmt: skip


@openmp_alone
@linux_alone
def test_a_stack_of_its_own_size():
    for size in ("512M", " 512 m ", "524288", "524288K", "536870912b"):
        good("before = count(); cbn.set_num_threads(8); spare(1200); assert right() and before < count() <= before + 2",
             OMP_STACKSIZE=size)  # fmt: skip


@openmp_alone
@linux_alone
@pytest.mark.parametrize("size", ["", "abc", "-5", "1", "8 MB", "999999999999999999999", "100000G"])
def test_a_stack_size_that_makes_no_sense(size):
    """libgomp prints what it thinks of it, and takes the default; or no thread at all can be created."""
    good("cbn.set_num_threads(4); assert right()", OMP_STACKSIZE=size)


@openmp_alone
@linux_alone
def test_threads_that_ended_are_not_taken_for_granted():
    """libgomp lets threads go when a region has fewer; the next large one creates them again."""
    good("""
for n in (8, 2):
    with cbn.num_threads(n):
        assert right()
spare(1)
with cbn.num_threads(16):
    assert right()
with cbn.num_threads(8):
    assert right()
""", OMP_STACKSIZE="64M")  # fmt: skip


@openmp_alone
@linux_alone
def test_many_callers_share_what_there_is():
    """Each Python thread has a pool of its own; what one has found to be free another must not take."""
    good("""
cbn.set_num_threads(8)
sys.setswitchinterval(1e-6)
start = threading.Barrier(6)
found = []
def work():
    start.wait()
    found.append(all([right() for _ in range(5)]))
workers = [threading.Thread(target=work) for _ in range(6)]
for worker in workers[:-1]:
    worker.start()
spare(150)
workers[-1].start()
for worker in workers:
    worker.join()
assert found == [True] * 6, found
""", OMP_STACKSIZE="8M")  # fmt: skip


@openmp_alone
@linux_alone
def test_more_threads_when_there_is_room_again():
    good("""
cbn.set_num_threads(6)
before = count()
spare(1)
assert right() and alive(before) and cbn.get_num_threads() == 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert in_thread(lambda: right() and alive(before + 6))     # with the Python thread itself
time.sleep(1.1)
assert right() and cbn.get_num_threads() == 6 and count() >= before + 5, count()
assert threads.explain() == "set_num_threads()", threads.explain()
""")


@openmp_alone
@linux_alone
def test_memory_that_nobody_uses_goes_to_stacks():
    good("""
arrays.set_cache_limit(1 << 30)
held = [arrays.empty_like(np.empty(100 << 20, np.int8)) for _ in range(3)]
del held
assert arrays.cache_state()[0] >= 300 << 20
cbn.set_num_threads(8)
before = count()
spare(1)
assert right() and alive(before + 7), (before, count())
""", OMP_STACKSIZE="8M")  # fmt: skip


@openmp_alone
@linux_alone
def test_threads_that_the_user_may_not_have():
    """RLIMIT_NPROC, as pids.max of a control group. It does not bind root, who becomes somebody else here."""
    good("""
if os.geteuid() == 0:
    os.setresuid(54321, 54321, 54321)     # who has no other processes
    spare_processes = count() + 3
else:
    spare_processes = 1                   # there are more already
resource.setrlimit(resource.RLIMIT_NPROC, (spare_processes,) * 2)
before = count()
cbn.set_num_threads(8)
assert right() and right()
assert before <= count() <= before + 3, (before, count())
assert cbn.get_num_threads() <= 4
""")


@openmp_alone
@linux_alone
def test_no_more_than_the_thread_limit_are_tried():
    good("cbn.set_num_threads(64); spare(100); assert right() and cbn.get_num_threads() == 64",
         OMP_THREAD_LIMIT="3", OMP_STACKSIZE="8M")  # fmt: skip


@openmp_alone
@linux_alone
@pytest.mark.parametrize("levels", [1, 2])
def test_a_call_within_a_region_of_another_library(levels):
    """There a region opens no threads, or as many at each call that its pool does not keep."""
    good(f"""
gomp = openmp()
gomp.omp_set_max_active_levels({levels})
cbn.set_num_threads(4)
found = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    cbn.set_num_threads(6)
    found.append(right() and right())
gomp.GOMP_parallel(body, None, 2, 0)
spare(2)
gomp.GOMP_parallel(body, None, 2, 0)
assert found == [True] * 4, found
""", OMP_STACKSIZE="8M")  # fmt: skip


@openmp_alone
def test_a_child_has_threads_where_its_parent_opened_no_region():
    good("""
cbn.set_num_threads(4)
def all_four():
    return cbn.get_num_threads() == 4 and right() and alive(4) and threads.explain() == "set_num_threads()"
assert in_child(all_four)
assert in_child(lambda: in_child(all_four))
assert in_child(lambda: in_thread(lambda: right() and alive(5)))
assert in_child(lambda: all_four() and not in_child(all_four) and in_child(lambda: right() and alive(1)))
""")


@openmp_alone
def test_a_child_whose_pool_stayed_in_the_parent_is_serial():
    """And does not hang; threads that it starts itself have pools of their own."""
    good("""
cbn.set_num_threads(4)
assert right()
def serial():
    cbn.set_num_threads(3)
    return right() and cbn.get_num_threads() == 1 and alive(1) and threads.explain().startswith("forked child: ")
assert in_child(serial)
assert in_child(lambda: serial() and in_child(serial))
assert in_child(lambda: in_thread(lambda: right() and cbn.get_num_threads() == 4 and alive(5)))
assert cbn.get_num_threads() == 4 and right()
""")


@openmp_alone
def test_the_pool_belongs_to_the_python_thread_that_forks():
    good("""
cbn.set_num_threads(4)
parallel = lambda: right() and cbn.get_num_threads() == 4 and alive(4)
serial = lambda: right() and cbn.get_num_threads() == 1 and alive(1)
done, go = threading.Event(), threading.Event()
found = []
def work():
    assert right()
    done.set()
    go.wait()
    found.append(in_child(serial))
worker = threading.Thread(target=work)
worker.start()
done.wait()
assert in_child(parallel)                           # the main thread opened no region
assert in_thread(lambda: in_child(parallel))        # nor did this one
go.set()
worker.join()
assert found == [True]
""")


@openmp_alone
@linux_alone
def test_a_pool_of_another_library_is_noticed():
    """A library that shares the OpenMP runtime has opened a region in the thread that forks: cbn's would hang."""
    good("""
gomp = openmp()
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
region = lambda: gomp.GOMP_parallel(body, None, 3, 0)
cbn.set_num_threads(4)
parallel = lambda: right() and cbn.get_num_threads() == 4 and alive(4)
serial = lambda: right() and cbn.get_num_threads() == 1 and alive(1)
in_thread(region)
assert in_child(parallel)
assert in_thread(lambda: (region(), in_child(serial))[1])
region()
assert in_child(serial)
assert in_thread(lambda: in_child(parallel))
""")


@openmp_alone
@pytest.mark.parametrize("opened", [False, True])
def test_workers_of_multiprocessing(opened):
    good(f"""
import multiprocessing
cbn.set_num_threads(4)
if {opened}:
    assert right()
def work(_):
    signal.alarm(60)
    return right() and cbn.get_num_threads() == (1 if {opened} else 4)
with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=2) as pool:
    found = pool.map(work, range(3), chunksize=1)       # by the first two workers, which this thread forked
assert found == [True] * 3, found
""")


@openmp_alone
@linux_alone
def test_a_child_that_cannot_find_out_is_serial():
    good("""
cbn.set_num_threads(4)
def starved():
    spare(1)
    return right() and cbn.get_num_threads() == 1 and alive(1)
assert in_child(starved)
""", OMP_STACKSIZE="64M")  # fmt: skip


FORK = """
import os, sys, threading
import numpy as np
import cbn
from cbn.kernels import arrays, engine
engine.tune(bytes_per_thread=1)
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
        if path.suffix in (".pyx", ".pxd", ".c", ".h", ".py") and not (
            path.suffix == ".c" and path.with_suffix(".pyx").exists()
        ):
            assert not re.search(r"\bomp_set_\w+\s*\(", path.read_text()), path


def test_instruction_set_by_environment():
    for isa in engine.available():
        assert in_a_new_process("from cbn.kernels import engine; print(engine.isa())", CBN_ISA=isa) == isa
    with pytest.raises(AssertionError, match="'mmx' is not known; available: baseline"):
        in_a_new_process("import cbn", CBN_ISA="mmx")


@openmp_alone
@linux_alone
def test_fewer_threads_may_be_allowed_than_were_once_proven():
    """As another user, or under another limit of processes, what has been proven does not count."""
    if os.getuid():
        pytest.skip("only root can become somebody else")
    good("""
cbn.set_num_threads(8)
assert right()
cbn.set_num_threads(2)
assert right()                    # the others end
os.setgid(54321)
os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
cbn.set_num_threads(8)
assert right() and cbn.get_num_threads() < 8
""")


@openmp_alone
@linux_alone
def test_a_child_that_imports_cbn_after_its_parent_opened_a_region():
    """Its first thread is the copy of the one that forked, whose pool stayed in the parent."""
    code = f"""
import ctypes, os, signal, sys
{{before}}
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    {PRELUDE.strip().replace(chr(10), chr(10) + "    ")}
    cbn.set_num_threads(4)
    os._exit(0 if right() and cbn.get_num_threads() == {{threads}} else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    region = (
        f"gomp = ctypes.CDLL({gomp_of_cbn()!r}); body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None); "
        "gomp.GOMP_parallel(body, None, 3, 0)"
    )
    in_a_new_process(code.format(before=region, threads=1))
    in_a_new_process(code.format(before="", threads=4))
