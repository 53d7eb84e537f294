"""`pytest benchmarks`: cbn and numpy under pytest-benchmark, in one process, for those who know it.

Quick looks while working on a kernel. Comparisons with other libraries need a process each: `make bench`.
"""

import numpy as np
import pytest

from .cases import NC, RESNET, SMALL, Case, layouts_of
from .contenders import Cbn, Data, Numpy
from .suite import cores

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install -e '.[bench]'")

CASES = [
    Case(op, shape, layout, len(cores()))
    for shape in (RESNET[1], RESNET[3], RESNET[4], NC[0])
    for layout in layouts_of(shape)
    for op in ("eval", "train", "backward")
]
SMALL_CASES = [Case("eval", shape, layouts_of(shape)[0]) for shape in SMALL]


@pytest.mark.parametrize("contender", [Cbn, Numpy], ids=lambda c: c.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operation(benchmark, case, contender):
    if not contender.supports(case):
        pytest.skip("not one of its operations")
    benchmark.group = case.name
    held = contender(case, Data(case))
    held.run()
    benchmark(held.run)
    assert all(np.isfinite(a).all() for a in held.results().values())


@pytest.mark.parametrize("contender", [Cbn, Numpy], ids=lambda c: c.name)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: c.name)
def test_small_call(benchmark, case, contender):
    benchmark.group = case.name
    held = contender(case, Data(case))
    benchmark(held.run)
