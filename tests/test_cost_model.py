"""`benchmarks.scaling`: the cost model's limits, its fit, and the simulations against what can be computed."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[bench]'")

from benchmarks import scaling

NETWORK = scaling.Network("test", 1e-5, 1e-9, 2e-9)


def test_an_exchange_by_hand():
    assert NETWORK.exchange(1, 1000) == 0
    assert NETWORK.exchange(2, 1000) == pytest.approx(1e-5 + 1e-6)
    assert NETWORK.exchange(9, 1000) == pytest.approx(4e-5 + 8e-6)
    forward_and_backward = 2 * 4e-5 + 8 * 7 * 8 * 100 * 1e-9 + 2 * 9 * 100 * 2e-9
    assert NETWORK.flat(9, 100) == pytest.approx(forward_and_backward)


def test_a_hierarchy_is_flat_on_one_machine_and_cheaper_on_many():
    inside = scaling.Network("inside", 1e-6, 1e-10, 2e-9)
    assert scaling.hierarchical(inside, NETWORK, 8, 100) == pytest.approx(inside.flat(8, 100))
    for n in (256, 4096, 10_000):
        assert scaling.hierarchical(inside, NETWORK, n, 100) < NETWORK.flat(n, 100) / 2


def test_the_fit_finds_what_made_the_rows():
    rows = []
    for channels in scaling.CHANNELS:
        exchange = NETWORK.exchange(2, 32 * channels)
        own = 5e-6 + 1e-8 * channels
        together = own + NETWORK.flat(2, channels) + 6e-5 + 1.5e-8 * channels
        merge = NETWORK.merge(2, channels)
        rows.append({"ranks": 2, "channels": channels, "exchange": exchange, "merge": merge, "own": own,
                     "together": together})  # fmt: skip
    here, python = scaling.fitted(rows)
    assert (here.latency, here.per_byte, here.merging) == pytest.approx((1e-5, 1e-9, 2e-9))
    assert python == pytest.approx((6e-5, 1.5e-8))
    for row in rows:
        assert scaling.predicted(here, python, 1e-4, row, 2) == pytest.approx(row["together"])
        doubled = scaling.predicted(here, python, 1e-4, row | {"own": 2 * row["own"]}, 1)
        assert doubled == pytest.approx(2 * row["together"] + 1e-4)
    assert scaling.sharing(rows, [row | {"together": 2 * row["together"] + 7e-5} for row in rows]) == pytest.approx(
        7e-5
    )


def test_waiting_for_two_ranks():
    """The larger of two normal values is 1/sqrt(pi) standard deviations above the mean."""
    often, once = scaling.waiting(2, 50, 0.05, steps=200)
    assert often == pytest.approx(1 + 0.05 / math.sqrt(math.pi), abs=2e-3)
    assert once == pytest.approx(1 + 0.05 / math.sqrt(math.pi * 50), abs=2e-3)
    assert scaling.waiting(1, 50, 0.0) == pytest.approx((1, 1))


def test_merged_parts_have_the_variance_of_all():
    for fan_in in (None, 2, 16):
        error, _ = scaling.merging_error(333, fan_in=fan_in)
        assert error < 1e-14


def test_threads_meet_the_limit_of_the_memory():
    assert scaling.thread_speed(1, 1e6) == 1
    for n in scaling.THREADS[1:]:
        assert scaling.thread_speed(n, 1e12) == pytest.approx(min(n, 370 / 20), rel=1e-3)
    speeds = [scaling.thread_speed(n, 2e5) for n in scaling.THREADS]
    assert np.argmax(speeds) not in (0, len(speeds) - 1)
