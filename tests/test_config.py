"""show_config, `python -m cbn`, the self-check, and the stubs of the compiled module."""

import ast
import subprocess
import sys
from pathlib import Path

import cbn
from cbn import config
from cbn.kernels import passes

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


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "cbn"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "All kernels agree with the reference." in done.stdout


def test_stubs_name_what_the_compiled_module_has():
    stub = ast.parse(Path(passes.__file__).with_name("passes.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
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
