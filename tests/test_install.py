"""What a user meets before the first call: imports that fail, in words that say what to do."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import cbn
from cbn.kernels import engine

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def clone(tmp_path):
    """A source folder that was never compiled."""
    package = Path(cbn.__file__).parent
    for path in [*package.glob("*.py"), package / "kernels" / "__init__.py"]:
        target = tmp_path / "clone" / "cbn" / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "clone" / "cbn" / "kernels" / "engine.pyx").touch()
    return tmp_path / "clone"


def failure(folder, *arguments):
    """What Python, started in the folder, says when it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize("arguments", [("-c", "import cbn"), ("-m", "cbn"), ("-c", "import cbn.functional")])
def test_an_uncompiled_source_folder_says_what_to_do(clone, arguments):
    error = failure(clone, *arguments)
    assert "circular" not in error
    assert error.splitlines()[-1] == (
        f"ImportError: cbn is imported from its source folder {clone}, which has no compiled module: "
        "run from another folder, where Python finds the cbn that `pip install .` has installed, "
        f"or compile in place with `pip install -e {clone}`"
    )


def test_pytest_in_an_uncompiled_source_folder_says_what_to_do(clone):
    root = Path(__file__).parents[1]
    shutil.copy(root / "conftest.py", clone)
    (clone / "test_nothing.py").write_text("def test_nothing(): pass\n")
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"ImportError: cbn is imported from its source folder {clone}" in done.stdout + done.stderr


def test_a_source_folder_compiled_for_another_python_says_so(clone):
    (clone / "cbn" / "kernels" / "engine.cpython-39-x86_64-linux-gnu.so").touch()
    last = failure(clone, "-c", "import cbn").splitlines()[-1]
    assert f"source folder {clone}, which was compiled for another Python" in last
    assert f"(engine.cpython-39-x86_64-linux-gnu.so; this one is {sysconfig.get_config_var('SOABI')})" in last
    assert f"`pip install -e {clone}`" in last


def test_a_library_that_is_missing_is_named(clone):
    """The compiled module is there: its own words stay, and nothing is said about source folders."""
    compiled = Path(engine.__file__).read_bytes()
    library = re.search(rb"lib(gomp|omp|c)\.so\.\d", compiled)[0]
    absent = library[:-1] + b"9"
    (clone / "cbn" / "kernels" / f"engine{SUFFIX}").write_bytes(compiled.replace(library, absent))
    error = failure(clone, "-c", "import cbn")
    last = error.splitlines()[-1]
    assert last.startswith(f"ImportError: cbn's compiled module {clone}/cbn/kernels/engine{SUFFIX} cannot be loaded: ")
    assert f"{absent.decode()}: cannot open shared object file" in last
    assert ("install OpenMP's runtime: libgomp1 on Debian" in last) == (b"gomp" in library)
    assert "source folder" not in last
    assert "needs numpy" not in last
    assert error.count("cannot open shared object file") == 2  # the loader's own error is the cause


def test_a_numpy_that_is_too_old_is_named(clone):
    (clone / "cbn" / "kernels" / f"engine{SUFFIX}").write_text("not a library")
    last = failure(clone, "-c", "import numpy; numpy.__version__ = '1.26.4'; import cbn").splitlines()[-1]
    assert last.endswith(" (cbn needs numpy 2.0 or newer, and this one is 1.26.4)")


def test_an_installation_without_the_compiled_module_is_not_called_a_source_folder(clone):
    (clone / "cbn" / "kernels" / "engine.pyx").unlink()
    last = failure(clone, "-c", "import cbn").splitlines()[-1]
    assert last == f"ImportError: cbn in {clone} has no compiled module: install it again"


def test_a_missing_numpy_is_named(clone):
    error = failure(clone, "-c", "import sys; sys.modules['numpy'] = None; import cbn")
    assert error.splitlines()[-1].startswith("ModuleNotFoundError: import of numpy halted")
