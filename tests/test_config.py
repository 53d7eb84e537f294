"""show_config, `python -m cbn`, the self-check, and the stubs of the compiled module."""

import ast
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cbn
from cbn import __main__ as command
from cbn import config, kernels
from cbn.kernels import engine

from .conftest import closed_pipe

ROOT = Path(__file__).parent.parent


def test_show_config_says_all(capsys):
    cbn.show_config()
    text = capsys.readouterr().out
    assert cbn.__version__ in text
    for isa in engine.available():
        assert isa in text
    for name in ("numpy", "compiler", "OpenMP", "instruction sets", "in use", "threads"):
        assert name in text


def test_self_check_passes_and_can_fail(monkeypatch):
    lines = []
    assert config.self_check(lines.append)
    assert len(lines) == 2 * len(config._types()) * len(engine.available())
    assert all(line.endswith("ok") for line in lines)
    monkeypatch.setattr(config, "_largest_error", lambda *arguments: 1.0)
    lines.clear()
    assert not config.self_check(lines.append)
    assert all("WRONG" in line for line in lines)
    assert engine.isa() == engine.available()[-1]


def test_unchecked_names_what_the_self_check_leaves_out_and_why(monkeypatch):
    expected = [f"{isa}, which this processor does not have" for isa in engine.built()[len(engine.available()) :]]
    if not engine.build_info()["openmp"]:
        expected.append("several threads, as this is a build without OpenMP")
    assert config.unchecked() == expected
    monkeypatch.setattr(engine, "available", lambda: ["baseline"])
    monkeypatch.setattr(engine, "build_info", lambda: {"openmp": None})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert config.unchecked() == [
        *(f"{isa}, which this processor does not have" for isa in engine.built()[1:]),
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


@pytest.mark.parametrize("name", kernels.__all__)
def test_stubs_name_what_the_compiled_modules_have(name):
    module = importlib.import_module(f"cbn.kernels.{name}")
    stub = ast.parse(Path(module.__file__).with_name(f"{name}.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)} | set(classes)
    declared -= {"_HasForward"}  # for type checkers alone
    actual = {n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    assert declared == {n for n in actual if not n.startswith("_")}
    for class_name, node in classes.items():
        if class_name.startswith("_"):
            continue
        members = {getattr(n, "name", None) or n.target.id for n in node.body if not isinstance(n, ast.Expr)}
        own = {n for n in vars(getattr(module, class_name)) if not n.startswith("_")}
        assert own == {n for n in members if not n.startswith("_")}, class_name


def test_public_names():
    for name in cbn.__all__:
        assert getattr(cbn, name).__doc__ or name == "__version__"
    assert (Path(cbn.__file__).parent / "py.typed").exists()


def test_one_version():
    assert f'\nversion = "{cbn.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"## {cbn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
