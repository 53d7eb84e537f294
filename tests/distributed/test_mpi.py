"""`cbn.mpi` on several ranks against one process with the whole batch, and where ranks are missing."""

import contextlib
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cbn
from tests.peers import peer

peer("mpi4py")
from tests.distributed import ranks  # noqa: E402

ROOT = Path(__file__).parents[2]
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
if MPIEXEC is None and not os.environ.get("CBN_REQUIRE_PEERS"):
    pytest.skip("there is no mpiexec: pip install mpich", allow_module_level=True)
LIMITS = {"float32": 1e-6, "float64": 1e-12, "float16": 2e-3}
REFUSED = (
    "ghost_batch_size is for a batch of one process, and SyncBatchNorm has none of it",
    "renorm is for a batch of one process",
    "comm must be an mpi4py.MPI.Intracomm, not int",
    "timeout must be positive, or None, but got 0",
    "timeout must be seconds, or None, not 'long'",
    "use_batch_stats is False, so SyncBatchNorm exchanges nothing",
    "the moments of the last forward stand for more than its batch",
    "Expected more than 1 value per channel when training, got moments with count 1 in channel 0",
)
OF_RANK = ("y", "dx", "dz", "evaluated")  # joined, they are those of the whole batch
SUMMED = ("dweight", "dbias")


def run(name, size, folder, seconds=60):
    """{rank: what it found}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [MPIEXEC, "-n", str(size), sys.executable, "-m", "tests.distributed.ranks", name, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def agree(found, expected, limit, what):
    scale = max(1.0, float(np.abs(expected.astype(np.float64)).max(initial=0)))
    error = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / scale
    assert error <= limit, (what, error)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_equal_one_process_with_the_whole_batch(size, tmp_path):
    """Uneven parts, an empty one, one sample; the same bytes of statistics on every rank."""
    found = run("values", size, tmp_path)
    for case in ranks.CASES:
        x, dy, options = ranks.given(sum(ranks.SIZES[size]), *case[1:])
        options = {name: options[name] for name in ranks.OPTIONS[case[0]][1]}
        expected = ranks.step(ranks.made(cbn.BatchNorm, *case), x, dy, options)
        for name, whole in expected.items():
            parts = [of_rank[case][name] for of_rank in found]
            if whole is None:
                assert parts == [None] * size
            elif name in OF_RANK:
                agree(np.concatenate(parts), whole, LIMITS[case[2]], (case, name))
            elif name in SUMMED:
                agree(sum(p.astype(np.float64) for p in parts), whole, 20 * LIMITS[case[2]], (case, name))
            else:
                agree(parts[0], whole, LIMITS[case[2]], (case, name))
                assert len({p.tobytes() for p in parts}) == 1, (case, name)


def test_two_forward_passes_are_under_way_at_once(tmp_path):
    found = run("in_flight", 2, tmp_path)
    x, dy, _ = ranks.given(4, "first", "float64")
    for k, scale in enumerate((1, 2)):
        layer = ranks.made(cbn.BatchNorm, "plain", "first", "float64")
        agree(np.concatenate([of_rank["y"][k] for of_rank in found]), layer(scale * x), 1e-12, scale)
        agree(np.concatenate([of_rank["dx"][k] for of_rank in found]), layer.backward(dy), 1e-12, scale)
    assert all(of_rank["y"][2] == "this forward pass is finished already" for of_rank in found)


def test_copies_evaluation_given_moments_and_refusals(tmp_path):
    found = run("details", 2, tmp_path)
    x = ranks.given(4, "first", "float64")[0]
    whole = cbn.BatchNorm(5, dtype="float64")(x)
    for rank, of_rank in enumerate(found):
        part = slice(2 * rank, 2 * rank + 2)
        agree(of_rank["copied"], whole[part], 1e-12, "copied")
        agree(of_rank["lazy"], whole[part], 1e-12, "lazy")
        local = cbn.BatchNorm(5, dtype="float64")(x[part])
        agree(of_rank["alone"], local, 1e-12, "alone")
        agree(of_rank["pickled"], local, 1e-12, "pickled: without a communicator")
        for message, words in zip(of_rank["refused"], REFUSED, strict=True):
            assert words in message
    agree(found[0]["eval"], x[:2] / np.sqrt(1 + 1e-5), 1e-12, "eval")


def test_a_communicator_ends_and_another_has_its_handle(tmp_path):
    found = run("freed", 3, tmp_path)
    x = ranks.given(3, "first", "float64")[0]
    for k, parts in enumerate((((0, 1, 2),), ((0, 1), (2,)))):
        for part in parts:
            whole = cbn.BatchNorm(5, dtype="float64")(x[list(part)])
            agree(np.concatenate([found[rank][k] for rank in part]), whole, 1e-12, part)


def were_told(found):
    """Ranks 0 and 2, that rank 1 is missing."""
    for rank in (0, 2):
        message, missing, seconds, after = found[rank]
        words = "rank 1 of 3 did not come to the backward pass of 'stage 2' within 1.5 s"
        assert message == f"rank {rank} waited in vain: {words}"
        assert missing == (1,)
        assert 1.4 < seconds < 2.5
        assert after == f"the forward pass of 'stage 2' cannot exchange anything any more, since {words}"


def test_a_rank_that_raises_is_named_in_time(tmp_path):
    found = run("missing", 3, tmp_path)
    assert "dy has shape (2, 5, 4, 3)" in found[1]
    were_told(found)


def test_a_rank_that_is_killed_is_named_in_time(tmp_path):
    """mpiexec itself would end the job at once: shells stand between it and the ranks, hide the signal by which it
    tells them of a failure, and say how they ended.
    """
    said = shlex.quote(str(tmp_path)) + "/$PMI_RANK"
    then = f'trap "" USR1; "$@"; echo $? > {said}.part && mv {said}.part {said}.ended'
    command = [MPIEXEC, "-disable-auto-cleanup", "-n", "3", "sh", "-c", then, "-", sys.executable]
    job = subprocess.Popen(
        [*command, "-m", "tests.distributed.ranks", "killed", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ended = [tmp_path / f"{rank}.ended" for rank in range(3)]
        deadline = time.monotonic() + 30
        while not all(file.exists() for file in ended) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ended[1].read_text() == "137\n"
        assert all(file.exists() for file in ended)  # nobody waits for ever
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    were_told({rank: pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 2)})


def test_digits_on_two_ranks(tmp_path, capsys):
    """`examples/ranks.py`: synchronized, the losses of one process; each rank its own, others."""
    for package in ("sklearn", "matplotlib", "tqdm"):
        peer(package)
    from examples import ranks

    ranks.main(["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == [ranks.ONE, ranks.SYNCHRONIZED, ranks.OWN]
    assert float(rows[1][5]) < 1e-12 < 1e-2 < float(rows[2][5])
    assert float(rows[1][6]) == 0 < float(rows[2][6])
    assert (tmp_path / "ranks.png").exists()
    with pytest.raises(SystemExit):
        ranks.main(["--ranks", "9"])
    assert "--ranks must be from 2 to half of the batch, 8, not 9" in capsys.readouterr().err


def test_the_cost_model_runs(tmp_path, capsys):
    for package in ("matplotlib", "tqdm"):
        peer(package)
    from benchmarks import scaling

    scaling.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "scaling.md").read_text()
    assert text == capsys.readouterr().out
    ratios = [float(line.split("|")[-2]) for line in text.splitlines() if " ranks, " in line]
    assert len(ratios) == 8
    assert all(0.05 < ratio < 20 for ratio in ratios)  # of three calls each
    assert (tmp_path / "scaling.svg").read_text().count('<g id="axes_') == 4
