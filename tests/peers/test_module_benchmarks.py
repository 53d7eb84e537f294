"""The benchmarks of PyTorch's modules and of training steps: results against float64, wrong ones not timed."""

from dataclasses import asdict, replace

import pytest

from . import peer

torch = peer("torch")
peer("tqdm")
from benchmarks import cases, contenders, suite, worker  # noqa: E402
from benchmarks.cases import Case  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch itself uses it

CASES = [
    *(replace(case, shape=(6, 5, *case.shape[2:][:1], *case.shape[3:][:1])) for case in cases.of_modules([1])[:6]),
    *(Case(op, (6, 5, 4, 3), layout, 1, "called", group="modules") for op in ("eval", "train", "step")
      for layout in cases.LAYOUTS),
    Case("step", (4, 1, 200), "first", 1, "called", group="steps", network="1-D convolutions"),
    Case("step", (2, 3, 32, 32), "last", 1, "called", group="steps", network="MobileNet"),
]  # fmt: skip
RESULTS = {"modules": {"step": {"dx", "dweight", "dbias"}}, "steps": {"step": {"loss", "gradients"}}}
COMPILED = "PyTorch, compiled"


@pytest.fixture(autouse=True)
def as_before():
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def answers(case, folder, names):
    """{contender: its answer}."""
    exact = [suite.Exact(case, folder).files]
    return {name: worker.Worker().prepare(name, asdict(case), exact) for name in names}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_modules_and_steps_are_compared_with_float64(case, tmp_path, monkeypatch):
    names = [name for name in contenders.ALL if contenders.of(name, case).supports(case)]
    limits = [name for name in names if name.startswith("limit")]
    assert set(names) - set(limits) == {"cbn", "PyTorch", COMPILED} | ({"cbn, fused"} if case.network else set())
    assert bool(limits) == (not case.network)
    names = [name for name in names if name not in (COMPILED, *limits)]
    torch.set_grad_enabled(False)  # as another case of the same process may leave it
    for name, answer in answers(case, tmp_path, names).items():
        assert answer["wrong"] is None, (name, answer)
        assert set(answer["errors"]) == RESULTS[case.group].get(case.op, {"y"}), name
    monkeypatch.setenv("CBN_BENCH_PLANT", ";".join(f"wrong:{name}" for name in names))
    assert all(answer["wrong"] for answer in answers(case, tmp_path, names).values())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[-2:] + CASES[-4:-2], ids=lambda c: c.name)
def test_compiled_modules_and_steps_are_compared_with_float64(case, tmp_path):
    answer = answers(case, tmp_path, [COMPILED])[COMPILED]
    assert answer["wrong"] is None, answer


def test_cbn_takes_the_place_of_every_module():
    case = CASES[-2]
    made = contenders.of("cbn", case)(case, contenders.Data(case))
    kinds = {type(m).__module__ for m in made.plain.modules() if isinstance(m, torch.nn.BatchNorm1d)}
    assert kinds == {"cbn.torch.modules"}
