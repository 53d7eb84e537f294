"""What a call changes is changed at one moment, and what it reads is read at one moment.

A signal handler, and another thread, can run between any two instructions of Python code. Here one does, at each of
them in turn: a trace function that runs before each instruction of cbn's own code.
"""

import os
import sys
import threading

import numpy as np
import pytest

import cbn
from cbn.functional import batch_norm

PACKAGE = os.path.dirname(cbn.__file__)


class Interrupted(BaseException):
    """What a handler raises."""


def before_instruction(k, call, action):
    """call(), with action() before the k-th Python instruction of cbn; whether there are that many."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            seen += 1
            if seen == k + 1:
                sys.settrace(None)
                action()
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        pass
    finally:
        sys.settrace(outer)
    return seen > k


def interrupt():
    raise Interrupted


def state_of(bn):
    """All bytes that a layer's calls change, as one value."""
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_grad", "bias_grad")
    return tuple(None if getattr(bn, name) is None else getattr(bn, name).tobytes() for name in names)


def trained_layer(**kwargs):
    bn = cbn.BatchNorm1d(3, **kwargs)
    x = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32) * 3 + 1
    bn(x)
    bn.backward(x)
    bn.weight[...], bn.bias[...] = [1, 2, 3], [4, 5, 6]
    return bn


def change_of(name):
    """(make a layer, a call that changes it)."""
    x = np.random.default_rng(2).standard_normal((8, 3)).astype(np.float32)
    other = cbn.BatchNorm1d(3)
    other(x)
    other.weight[...], other.bias[...] = 7, 8
    other = other.state_dict()
    return {
        "training": lambda bn: bn(x),
        "training in place": lambda bn: bn(x.copy(), out=x.copy()),
        "backward": lambda bn: bn.backward(x[:6]),
        "backward in place": lambda bn: bn.backward(x[:6].copy(), out=np.empty_like(x[:6])),
        "zero_grad": lambda bn: bn.zero_grad(),
        "reset_running_stats": lambda bn: bn.reset_running_stats(),
        "reset_parameters": lambda bn: bn.reset_parameters(),
        "load_state_dict": lambda bn: bn.load_state_dict(other),
    }[name]


CHANGES = (
    "training",
    "training in place",
    "backward",
    "backward in place",
    "zero_grad",
    "reset_running_stats",
    "reset_parameters",
    "load_state_dict",
)
KINDS = {"exponential": {}, "cumulative": {"momentum": None}, "float64": {"dtype": np.float64}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupted_call_has_changed_all_or_nothing(name, kind):
    change = change_of(name)
    before, done = trained_layer(**KINDS[kind]), trained_layer(**KINDS[kind])
    change(done)
    allowed = {state_of(before): "nothing", state_of(done): "all"}
    assert len(allowed) == 2
    k, found = 0, set()
    while True:
        bn = trained_layer(**KINDS[kind])
        reached = before_instruction(k, lambda bn=bn: change(bn), interrupt)
        assert state_of(bn) in allowed, f"{name}, interrupted before instruction {k}: half changed"
        found.add(allowed[state_of(bn)])
        if not reached:
            break
        k += 1
    assert k > 20
    assert found == {"nothing", "all"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_handler_sees_a_state_before_or_after(name):
    change = change_of(name)
    done = trained_layer()
    states = [trained_layer().state_dict(), (change(done), done.state_dict())[1]]

    k, reached = 0, True
    while reached:
        bn, seen = trained_layer(), []
        reached = before_instruction(k, lambda bn=bn: change(bn), lambda bn=bn, seen=seen: seen.append(bn.state_dict()))
        for found in seen:
            assert any(all(np.array_equal(found[key], s[key]) for key in s) for s in states), (
                f"{name}: half a state before instruction {k}: {found}"
            )
        k += 1
    assert k > 20


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
def test_a_result_is_of_one_state(training, shape):
    """Whenever another thread loads a state during a call, y is that of the state before or of the state after."""
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    first, second = trained_layer(), trained_layer()
    second.load_state_dict({name: a + 1 for name, a in second.state_dict().items()})
    states = [layer.state_dict() for layer in (first, second)]
    expected = [layer.train(training)(x).tobytes() for layer in (first, second)]
    assert expected[0] != expected[1]
    k, reached, found = 0, True, set()
    while reached:
        bn = cbn.BatchNorm1d(3).train(training)
        bn.load_state_dict(states[0])
        y = []
        reached = before_instruction(k, lambda bn=bn, y=y: y.append(bn(x)), lambda bn=bn: bn.load_state_dict(states[1]))
        assert y[0].tobytes() in expected, f"y of two states, one loaded before instruction {k}"
        found.add(y[0].tobytes())
        k += 1
    assert found == set(expected)


def test_interrupted_functions_move_both_statistics_or_none():
    x = np.random.default_rng(4).standard_normal((6, 3)).astype(np.float32)
    k, reached, found = 0, True, set()
    while reached:
        mean, var = np.zeros(3, ">f4")[::-1], np.ones(6)[::2]
        reached = before_instruction(k, lambda m=mean, v=var: batch_norm(x, m, v, training=True), interrupt)
        moved = (bool(mean.any()), bool((var != 1).any()))
        assert moved in ((False, False), (True, True)), f"interrupted before instruction {k}: {moved}"
        found.add(moved)
        k += 1
    assert len(found) == 2


def test_an_interrupted_forward_leaves_a_backward_that_belongs_to_the_statistics():
    x, y = np.random.default_rng(5).standard_normal((2, 6, 3)).astype(np.float32)
    k, reached = 0, True
    while reached:
        bn = trained_layer()
        before = bn.num_batches_tracked.copy()
        old = bn.backward(y)
        reached = before_instruction(k, lambda bn=bn: bn(x), interrupt)
        same = np.array_equal(bn.backward(y), old)
        assert same == (bn.num_batches_tracked == before), f"interrupted before instruction {k}"
        k += 1


class Awkward(np.ndarray):
    """An array whose Python methods raise."""

    def __iadd__(self, other):
        raise RuntimeError("no addition")

    def __setitem__(self, key, value):
        raise RuntimeError("no assignment")

    def fill(self, value):
        raise RuntimeError("no filling")


@pytest.mark.parametrize("name", ["num_batches_tracked", "running_mean", "running_var", "weight_grad", "bias_grad"])
def test_methods_of_subclasses_are_not_in_the_way(name):
    x = np.random.default_rng(6).standard_normal((6, 3)).astype(np.float32)
    plain, other = trained_layer(), trained_layer()
    setattr(other, name, getattr(other, name).view(Awkward))
    for bn in (plain, other):
        bn(x)
        bn.backward(x)
    assert state_of(plain) == state_of(other)
    for bn in (plain, other):
        bn.zero_grad()
        bn.reset_running_stats()
    assert state_of(plain) == state_of(other)


def test_the_counter_does_not_wrap():
    x = np.eye(3, dtype=np.float32)
    bn = cbn.BatchNorm1d(3, momentum=None)
    bn.num_batches_tracked[...] = 2**63 - 2
    for _ in range(3):
        bn(x)
        assert bn.num_batches_tracked == 2**63 - 1
    assert np.all(np.isfinite(bn.running_mean))


def test_threads_that_load_and_threads_that_evaluate():
    x = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)
    first, second = trained_layer().eval(), trained_layer().eval()
    second.load_state_dict({name: a + 1 for name, a in second.state_dict().items()})
    states = [layer.state_dict() for layer in (first, second)]
    allowed = {layer(x).tobytes() for layer in (first, second)}
    bn, stop, wrong = trained_layer().eval(), threading.Event(), []

    def evaluate():
        while not stop.is_set():
            for argument in (x, x.copy(order="F")):
                y = bn(argument)
                if np.ascontiguousarray(y).tobytes() not in allowed:
                    wrong.append(y)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for k in range(3000):
        bn.load_state_dict(states[k % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
