"""show_config, `python -m cbn`, the self-check, and the stubs of the compiled module."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cbn
from cbn import __main__ as command
from cbn import config
from cbn.kernels import passes

from .conftest import closed_pipe

ROOT = Path(__file__).parent.parent


def test_show_config_says_all(capsys):
    cbn.show_config()
    text = capsys.readouterr().out
    assert cbn.__version__ in text
    for isa in passes.available():
        assert isa in text
    for name in ("numpy", "compiler", "OpenMP", "instruction sets", "in use", "threads"):
        assert name in text


def test_self_check_passes_and_can_fail(monkeypatch):
    lines = []
    assert config.self_check(lines.append)
    assert len(lines) == 2 * len(config._types()) * len(passes.available())
    assert all(line.endswith("ok") for line in lines)
    monkeypatch.setattr(config, "_largest_error", lambda *arguments: 1.0)
    lines.clear()
    assert not config.self_check(lines.append)
    assert all("WRONG" in line for line in lines)
    assert passes.isa() == passes.available()[-1]


def test_unchecked_names_what_the_self_check_leaves_out_and_why(monkeypatch):
    expected = [f"{isa}, which this processor does not have" for isa in passes.built()[len(passes.available()) :]]
    if not passes.build_info()["openmp"]:
        expected.append("several threads, as this is a build without OpenMP")
    assert config.unchecked() == expected
    monkeypatch.setattr(passes, "available", lambda: ["baseline"])
    monkeypatch.setattr(passes, "build_info", lambda: {"openmp": None})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert config.unchecked() == [
        *(f"{isa}, which this processor does not have" for isa in passes.built()[1:]),
        "bfloat16, as ml_dtypes is not installed: pip install 'cbn[bfloat16]'",
        "several threads, as this is a build without OpenMP",
    ]


def module(*arguments):
    return subprocess.run([sys.executable, "-m", "cbn", *arguments], capture_output=True, text=True, timeout=120)


def test_module_runs():
    done = module()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    left_out = [f"not checked: {what}" for what in config.unchecked()]
    assert lines[-2 - len(left_out) : -2] == left_out
    assert lines[-1] == ("All kernels that were checked" if left_out else "All kernels") + " agree with the reference."


def test_module_says_what_was_not_checked_and_what_failed(monkeypatch, capsys):
    monkeypatch.setattr(command, "show_config", lambda: None)
    monkeypatch.setattr(command, "unchecked", lambda: ["sse9, which this processor does not have"])
    for good, status, stream, words in (
        (True, 0, 0, "All kernels that were checked agree with the reference.\n"),
        (False, 1, 1, "A kernel disagrees with the reference: please report this output.\n"),
    ):
        monkeypatch.setattr(command, "self_check", lambda good=good: good)
        assert command.main([]) == status
        printed = capsys.readouterr()
        assert "\nnot checked: sse9, which this processor does not have\n" in printed.out
        assert printed[stream].endswith(words)


def test_module_has_help_and_version_and_refuses_the_rest():
    assert module("--version").stdout == f"cbn {cbn.__version__}\n"
    done = module("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m cbn [-h] [--version]\n")
    for arguments in (("--selfcheck",), ("check",)):
        done = module(*arguments)
        assert done.returncode == 2
        assert not done.stdout
        assert done.stderr.startswith("usage: python -m cbn [-h] [--version]\n")
        assert done.stderr.endswith(f"error: unrecognized arguments: {arguments[0]}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",)])
def test_a_closed_pipe_is_no_traceback(arguments):
    done = closed_pipe("cbn", *arguments)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_output_is_no_traceback():
    line = f"exec {shlex.quote(sys.executable)} -m cbn >&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_stubs_name_what_the_compiled_module_has():
    stub = ast.parse(Path(passes.__file__).with_name("passes.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    declared -= {"_HasForward"}  # for type checkers alone
    actual = {name for name, value in vars(passes).items() if callable(value) and not name.startswith("_")}
    assert declared == actual
    layout = next(node for node in stub.body if isinstance(node, ast.ClassDef))
    members = {getattr(node, "name", None) or node.target.id for node in layout.body if not isinstance(node, ast.Expr)}
    assert members == {name for name in vars(passes.Layout) if not name.startswith("_")}


def test_public_names():
    for name in cbn.__all__:
        assert getattr(cbn, name).__doc__ or name == "__version__"
    assert (Path(cbn.__file__).parent / "py.typed").exists()


def test_one_version():
    assert f'\nversion = "{cbn.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"## {cbn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
