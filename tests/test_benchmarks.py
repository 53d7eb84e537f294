"""The benchmark suite: traffic model, arguments, honesty (wrong results are not timed), interruption, comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed: pip install -e '.[bench]'")
from benchmarks import __main__ as command
from benchmarks import cases, compare, contenders, suite, worker
from benchmarks.cases import Case
from cbn.kernels import engine

from .conftest import closed_pipe

ROOT = Path(__file__).parent.parent
MB = 1 << 20


@pytest.mark.parametrize(
    ("case", "units"),
    [
        (Case("eval", (32, 256, 56, 56)), 2),
        (Case("eval", (32, 256, 56, 56), "last"), 2),
        (Case("train", (32, 256, 56, 56)), 2),  # 401 KB a channel: within half of 1 MB
        (Case("train", (32, 64, 112, 112)), 3),  # 1.6 MB
        (Case("train", (32, 256, 56, 56), "last"), 3),
        (Case("backward", (32, 512, 28, 28)), 3),  # two arrays of 100 KB
        (Case("backward", (32, 256, 56, 56)), 5),  # two arrays of 401 KB
        (Case("backward", (4096, 1024), "last"), 5),
        (Case("eval", (8,), group="networks", network="ResNet-50"), 2),
        (Case("train", (64,), group="networks", network="U-Net-1d"), 2 + 4 / 18),  # 4 of 18 with 1 MB a channel
        (Case("moments+extrema", (20000, 1000), "last", group="statistics"), 1),
        (Case("update", (8, 17), "last", group="statistics"), 1),
        (Case("standardize+clip", (20000, 1000), "last", group="statistics"), 2),
    ],
)
def test_traffic_model(case, units):
    assert case.units(MB)[0] == units


def test_lists():
    full = cases.full(2)
    assert len(set(full)) == len(full) > 100
    assert {c.op for c in full} == {*cases.OPS, "step", *cases.STATISTICS}
    assert {c.memory for c in full} == {"out", "called"}
    assert {c.threads for c in full} == {1, 2}
    assert len([c for c in cases.short(2) if c.group == "shapes"]) < 40
    assert {c.group for c in cases.short(2)} == {"shapes", "functions", "networks"}
    assert cases.full(1)
    names = [c.name for c in full]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("network", "n", "channels", "first", "last"),
    [
        # Half of the parameters that the summaries of Keras's models call not trainable: means and variances
        ("ResNet-50", 53, 53_120 // 2, (1, 64, 112, 112), (1, 2048, 7, 7)),
        ("MobileNet-v2", 52, 34_112 // 2, (1, 32, 112, 112), (1, 1280, 7, 7)),
        ("U-Net-1d", 18, 2 * (2 * (64 + 128 + 256 + 512) + 1024), (1, 64, 4096), (1, 64, 4096)),
    ],
)
def test_networks(network, n, channels, first, last):
    case = Case("train", (1,), group="networks", network=network)
    shapes = [part.shape for part in case.parts]
    assert len(shapes) == n
    assert (shapes[0], shapes[-1]) == (first, last)
    assert sum(shape[1] for shape in shapes) == channels
    assert case.n_bytes == 4 * sum(map(np.prod, shapes))


@pytest.mark.parametrize("text", ["32x64x56x56", "4096X1024"])
def test_shapes(text):
    assert "x".join(map(str, cases.parse_shape(text))) == text.lower()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--shape", "32"], "unknown shape '32'"),
        (["run", "--shape", "32x0"], "unknown shape '32x0'"),
        (["run", "--shape", "axb"], "unknown shape 'axb'"),
        (["run", "--peer", "foo"], "unknown peer 'foo'; known: numpy, PyTorch"),
        (["run", "--op", "fit"], "invalid choice: 'fit'"),
        (["run", "--group", "shape"], "invalid choice: 'shape'"),
        (["run", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["run", "--fused", "gelu"], "invalid choice: 'gelu'"),
        (["run", "--variant", "dropout"], "invalid choice: 'dropout'"),
        (["run", "--dtype", "float64"], "nothing to measure"),
        (["run", "--shape", "8x6x5x4", "--dtype", "uint8"], "nothing to measure"),
        (["run", "--shape", "8x6x5x4", "--fused", "relu", "--op", "backward"], "nothing to measure"),
        (["run", "--threads", "0"], "--threads must be 1 or more"),
        (["compare", "absent.json"], "No such file"),
    ],
)
def test_unknown_arguments_are_clear_errors(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_types_and_what_follows_are_chosen(capsys):
    command.main(["run", "--list", "--shape", "8x6x5x4", "--layout", "first", "--dtype", "bfloat16", "--threads", "1"])
    assert capsys.readouterr().out.split() == [f"{op}-8x6x5x4-first-bfloat16-out-1t" for op in cases.OPS]
    command.main(["run", "--list", "--shape", "8x6x5x4", "--layout", "last", "--fused", "add+relu", "--threads", "2"])
    assert capsys.readouterr().out.split() == [f"{op}+add+relu-8x6x5x4-last-float32-out-2t" for op in ("eval", "train")]
    command.main(["run", "--list", "--dtype", "bfloat16"])
    names = capsys.readouterr().out.split()
    assert names
    assert all("bfloat16" in name for name in names)
    command.main(["run", "--list", "--group", "statistics", "--dtype", "uint8", "--op", "moments", "--threads", "1"])
    assert capsys.readouterr().out.split() == ["statistics-moments-64x3x224x224-first-uint8-called-1t"]


@pytest.mark.parametrize(
    "arguments", [("benchmarks",), ("benchmarks", "run", "--list"), ("benchmarks.accuracy", "--help")]
)
def test_benchmarks_end_at_a_closed_pipe(arguments):
    done = closed_pipe(*arguments)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("package", ["matplotlib", "ml_dtypes", "tqdm"])
def test_benchmarks_name_the_extra_of_a_missing_package(package):
    code = f"import sys; sys.modules[{package!r}] = None; import benchmarks.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert last == f"ModuleNotFoundError: the benchmarks need {package}: pip install -e '{ROOT}[bench]'"


def test_a_missing_peer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    absent = suite.Suite(tmp_path / "results.json", peers=["JAX"], limits=()).absent
    assert absent["JAX"].endswith(": pip install -e '.[bench-peers]' in the checkout")


def run(*arguments, plant="", **kwargs):
    environment = {**os.environ, "CBN_BENCH_PLANT": plant}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs,
    )  # fmt: skip


QUICK = ("--turns", 2, "--seconds", 0.002, "--peer", "numpy", "--threads", 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run of three operations against numpy, with one wrong result planted."""
    out = tmp_path_factory.mktemp("bench")
    done = run("--shape", "8x6x5x4", "--layout", "first", "--out", out, *QUICK, plant="wrong:numpy")
    assert done.returncode == 0, done.stderr
    return done, json.loads((out / "results.json").read_text()), out


def test_a_run_names_its_report(results):
    done, found, out = results
    for name in ("results.json", "report.html"):
        assert str(out / name) in done.stdout
        assert (out / name).exists()
    assert found["suite"]["complete"]
    assert {b["extra_info"]["op"] for b in found["benchmarks"]} == set(cases.OPS)


def test_a_wrong_result_is_reported_and_not_timed(results):
    done, found, _ = results
    assert {r["contender"] for r in found["suite"]["wrong"]} == {"numpy"}
    assert "WRONG, not timed: numpy" in done.stdout
    assert not [b for b in found["benchmarks"] if b["extra_info"]["contender"] == "numpy"]
    assert [b for b in found["benchmarks"] if b["extra_info"]["contender"] == "cbn"]


def test_pytest_benchmark_reads_the_results(results):
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(results[2] / "results.json")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train-8x6x5x4-first-float32-out-1t" in done.stdout


def test_ratios_are_formed_turn_by_turn(tmp_path):
    done = run("--shape", "64x7x9", "--op", "eval", "--out", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {b["group"] + b["extra_info"]["contender"]: b for b in found["benchmarks"]}
    ours, numpys = (np.array(rows["eval-64x7x9-first-float32-out-1t" + n]["stats"]["data"]) for n in ("cbn", "numpy"))
    ratio = rows["eval-64x7x9-first-float32-out-1tnumpy"]["extra_info"]["ratio"]
    assert ratio["median"] == pytest.approx(np.median(numpys / ours))
    assert all(b["extra_info"]["first"] > 0 for b in found["benchmarks"])


def test_an_interruption_leaves_what_was_measured(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--out", str(tmp_path), "--shape", "64x7x9", "--shape", "2048x512",
         "--turns", "50", "--seconds", "0.01", "--peer", "numpy", "--threads", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    path = tmp_path / "results.json"
    for _ in range(600):
        if path.exists() and json.loads(path.read_text())["benchmarks"]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(path.read_text())
    assert found["benchmarks"]
    assert not found["suite"]["complete"]
    assert str(tmp_path / "report.html") in output
    assert (tmp_path / "report.html").exists()
    left = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    assert not left.strip()


def synthetic(factor=1.0, spread=0.02, rows=40, seed=0, slow_row=None):
    """Results of so many rows with this noise, and this change of cbn's times in all of them or in one."""
    rng = np.random.default_rng(seed)
    benchmarks = []
    for k in range(rows):
        change = factor if slow_row in (None, k) else 1.0
        probe = (1 + k) * change * np.exp(rng.normal(0, spread) + rng.normal(0, spread, 9))
        info = {"contender": "cbn", "probe": probe.tolist(), "op": "eval", "shape": [4, 5 + k], "layout": "last",
                "threads": 1, "memory": "out", "dtype": "float32"}  # fmt: skip
        benchmarks.append({"group": f"row{k}", "extra_info": info})
    return {"benchmarks": benchmarks, "suite": {}}


def test_compare_finds_a_slow_down_of_all_rows_in_the_noise_of_each(capsys):
    """30 % in rows that scatter by 14 %: no row can be told from noise, their median can."""
    for seed in range(1, 6):
        found = compare.Comparison(synthetic(spread=0.1, rows=60), synthetic(1.3, spread=0.1, rows=60, seed=seed))
        assert found.print() == 1
        assert "slower: all rows (60, their median): +" in capsys.readouterr().out
        assert len(found.suspects()) == 60


def test_compare_finds_one_slow_row_among_quiet_ones(capsys):
    found = compare.Comparison(synthetic(), synthetic(1.3, seed=1, slow_row=7))
    assert found.print() == 1
    assert [case.shape for case in found.suspects()] == [(4, 12)]
    assert "1 slower, 0 faster" in capsys.readouterr().out


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_compare_is_quiet_about_noise(spread, capsys):
    for seed in range(1, 6):
        assert compare.Comparison(synthetic(spread=spread), synthetic(spread=spread, seed=seed)).print() == 0


def test_compare_lets_the_better_of_two_measurements_count(capsys):
    base, disturbed, again = synthetic(), synthetic(2.0, seed=1, slow_row=7), synthetic(seed=2)
    assert compare.Comparison(base, disturbed).print() == 1
    assert compare.Comparison(base, disturbed, again).print() == 0
    assert compare.Comparison(base, synthetic(0.7, seed=2)).print() == 0
    assert "faster: all rows" in capsys.readouterr().out
    assert compare.Comparison(base, synthetic(rows=0)).print() == 1


def test_compare_refuses_foreign_files(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path / "a.json")])
    assert "not a file of results of this suite" in capsys.readouterr().err


def test_every_contender_agrees_with_float64_where_it_is_installed(tmp_path):
    """The whole path of each peer that is here, on a shape that all of them take."""
    done = run("--shape", "2x16x6x6", "--shape", "16x32", "--turns", 1, "--seconds", 0.001, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert not found["suite"]["wrong"]
    assert not found["suite"]["failed"]


CALLS = [
    Case("eval", (1,), group="networks", network="U-Net-1d"),
    *(Case(op, (2, 8, 3, 5), layout, 1, memory, group="functions")
      for op in cases.OPS for layout in cases.LAYOUTS for memory in ("out", "called")),
    *(Case(op, (2, 8, 3, 5), layout, 2, group="chain", chain=chain)
      for op in cases.OPS for layout in cases.LAYOUTS for chain in cases.CHAINS),
]  # fmt: skip


@pytest.mark.parametrize("case", CALLS, ids=lambda c: c.name)
def test_networks_functions_and_chains_are_compared_with_float64(case, tmp_path):
    before = engine.tune()
    exact = [suite.Exact(part, tmp_path, f"{i}-").files for i, part in enumerate(dict.fromkeys(case.parts))]
    taken = set()
    try:
        for name in ("cbn", "cbn layers", "cbn, plain stores", "cbn, non-temporal stores", "PyTorch"):
            contender = contenders.ALL[name]
            try:
                contender.version()
            except ImportError:
                continue
            if all(contender.supports(part) for part in case.parts):
                taken.add(name)
                answer = worker.Worker().prepare(name, asdict(case), exact)
                assert answer["wrong"] is None, (name, answer)
                assert set(answer["errors"]) == ({"dx", "dweight", "dbias"} if case.op == "backward" else {"y"})
    finally:
        engine.tune(**before)
    stores = {"cbn, plain stores", "cbn, non-temporal stores"}
    assert taken - {"PyTorch"} == {"cbn"} | (stores if case.chain else {"cbn layers"})


VARIANTS = [
    Case(op, shape, layout, 1, "called" if variant in ("double backward", "tangent") else "out", group="variants",
         variant=variant)
    for variant, (ops, _) in cases.VARIANTS.items()
    for op in ops
    for shape, layout in (((16, 6, 7, 5), "first"), ((16, 6, 7, 5), "last"), ((64, 6), "last"))
    if variant not in ("ghosts of 128", "ghosts of 512") and (len(shape) == 4 or variant.startswith("ghosts"))
]  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS, ids=lambda c: c.name)
def test_variants_are_compared_with_float64(case, tmp_path, monkeypatch):
    """The plain call, the variant, and the loop over slices; a wrong value of each is seen."""
    found = prepared(case, tmp_path)
    loop = {"cbn, loop over slices"} if case.variant.startswith("ghosts") else set()
    assert set(found) == {"cbn", "cbn, variant"} | loop
    plain, variant = contenders.names_of(case)
    for name, answer in found.items():
        assert answer["wrong"] is None, (name, answer)
        assert set(answer["errors"]) == set(plain if name == "cbn" else variant)
    monkeypatch.setenv("CBN_BENCH_PLANT", ";".join(f"wrong:{name}" for name in found))
    assert all(answer["wrong"] for answer in prepared(case, tmp_path).values())


def test_a_variant_is_chosen_by_its_name(capsys):
    command.main(["run", "--list", "--variant", "renorm", "--threads", "1", "--op", "train"])
    arrays = ("32x64x112x112-first", "32x64x112x112-last", "4096x1024-last")
    assert capsys.readouterr().out.split() == [f"renorm-train-{array}-float32-out-1t" for array in arrays]


STATISTICS = [
    Case(op, shape, layout, 1, "called", dtype, group="statistics")
    for shape, layout, dtype in (((8, 17), "last", "float32"), ((1, 1, 5000), "first", "float32"),
                                 ((4, 3, 16, 16), "first", "uint8"))
    for op in (cases.STATISTICS if dtype == "float32" else ("moments", "moments+extrema"))
    if len(shape) == 2 or op.startswith("moments")
]  # fmt: skip
MEASURE = ("cbn", "numpy", "PyTorch", "scikit-learn", "fast-array-utils")


def prepared(case, folder):
    """{contender: its answer} for all that are installed and support a case."""
    exact, found = [suite.Exact(case, folder).files], {}
    for name in contenders.ALL:
        contender = contenders.of(name, case)
        if name.startswith("limit") or not contender.supports(case):
            continue  # and is not imported: OpenVINO forks, which JAX warns about
        try:
            contender.version()
        except ImportError:
            continue
        found[name] = worker.Worker().prepare(name, asdict(case), exact)
    return found


@pytest.mark.parametrize("case", STATISTICS, ids=lambda c: c.name)
def test_statistics_are_compared_with_float64(case, tmp_path, monkeypatch):
    """Every result, by bounds that an error in one value exceeds."""
    found = prepared(case, tmp_path)
    for name, answer in found.items():
        assert answer["wrong"] is None, (name, answer)
        assert set(answer["errors"]) == set(contenders.RESULTS.get(case.op, "y"))
    expected = {
        "moments": set(MEASURE),
        "moments+extrema": set(MEASURE[:3]),
        "moments+skipna": {*MEASURE[:2], MEASURE[3]},
    }
    expected = expected.get(case.op, {"cbn", "stable-baselines3"})
    if len(case.shape) > 2:
        expected &= set(MEASURE[:3])
    assert set(found) == expected & {"cbn", "numpy", "fast-array-utils", "stable-baselines3", *found}
    monkeypatch.setenv("CBN_BENCH_PLANT", ";".join(f"wrong:{name}" for name in found))
    assert all(answer["wrong"] for answer in prepared(case, tmp_path).values())


def test_lost_digits_are_recorded_and_no_fault(tmp_path):
    """float32 sums of a million rows around 1000 leave no digit of a variance of 1."""
    case = Case("moments", (1000000, 2), "last", 1, "called", group="statistics")
    found = prepared(case, tmp_path)
    assert not any(answer["wrong"] for answer in found.values())
    errors = {name: answer["errors"]["var"] for name, answer in found.items()}
    assert errors["numpy"] > 1
    assert 1e-6 < errors["fast-array-utils"] < 1e-2
    assert errors["cbn"] < 1e-14


def test_another_formula_is_wrong_where_no_digits_are_lost(tmp_path, monkeypatch):
    """The unbiased variance, in the place of the biased one."""
    of_numpy = contenders.of("numpy", STATISTICS[0])
    monkeypatch.setattr(of_numpy, "moments", lambda self: (self.x.mean(0), self.x.var(0, ddof=1)))
    assert prepared(STATISTICS[0], tmp_path)["numpy"]["wrong"].startswith("var is off by")


def test_nan_in_any_channel_is_wrong():
    exact = np.ones(3)
    for i in range(3):
        value = exact.copy()
        value[i] = np.nan
        assert np.isnan(worker.error_of(value, exact))


def test_the_limit_of_statistics_is_a_read(tmp_path):
    done = run("--group", "statistics", "--op", "update", "--turns", 2, "--seconds", 0.002, "--threads", 1,
               "--out", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert not found["suite"]["wrong"] + found["suite"]["failed"]
    rows = {(b["group"], b["extra_info"]["contender"]): b for b in found["benchmarks"]}
    for case in cases.of_statistics([1]):
        if case.op == "update":
            ours, read = (np.array(rows[case.name, name]["stats"]["data"]) for name in ("cbn", "limit: read"))
            assert rows[case.name, "cbn"]["extra_info"]["share"]["median"] == pytest.approx(np.median(read / ours))
            assert rows[case.name, "stable-baselines3"]["extra_info"]["ratio"]["median"] > 0


@pytest.mark.parametrize(
    "options",
    [{"fused": "relu"}, {"fused": "add+relu"}, {"dtype": "bfloat16"}, {"dtype": "float64", "fused": "add+relu"}],
)
@pytest.mark.parametrize("op", ["eval", "train"])
@pytest.mark.parametrize("memory", ["out", "called"])
def test_fused_cases_and_other_types(tmp_path, options, op, memory):
    """cbn and PyTorch, where it is, against the exact results that the workers compare with."""
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install -e '.[bench]'")
    case = Case(op, (3, 5, 6, 7), "last", 1, memory, **options)
    assert case.name.startswith(f"{op}+{case.fused}-" if case.fused else f"{op}-3x5x6x7-last-bfloat16")
    exact = np.load(suite.Exact(case, tmp_path).files["y"])
    for name in ("cbn", "PyTorch"):
        contender = contenders.ALL[name]
        try:
            contender.version()
        except ImportError:
            continue
        found = contender(case, contenders.Data(case)).results()["y"].astype(np.float64)
        assert np.abs(found - exact).max() <= (2**-8 if "dtype" in options else 1e-5) * np.abs(exact).max()
        assert (found.min() == 0) == bool(case.fused)
    assert case.units(1 << 20)[0] == 2 + (op == "train") + (case.fused == "add+relu")
