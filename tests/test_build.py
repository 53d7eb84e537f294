"""What is built, and from what: flags, lints of the sources, the source distribution, wheels, compilers refused."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cbn.kernels import passes

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for p in (ROOT / "cbn").rglob("*") if p.suffix in (".py", ".pyi", ".pyx", ".c", ".h") and p.name != "passes.c"
)


def test_no_build_file_asks_for_instructions_or_fast_math():
    for name in ("setup.py", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        for flag in ("-march", "-mtune", "-mavx", "-mfma", "-ffast-math", "-Ofast"):
            assert flag not in text, f"{flag} in {name}"
    for path in SOURCES:
        assert not re.search(r"pragma (GCC|clang) (optimize|target)", path.read_text()), path


def test_no_openmp_pragma_beside_a_target_attribute():
    """Compilers outline the body of a parallel region without the attribute: the region belongs to Cython."""
    for path in SOURCES:
        if path.suffix in (".c", ".h"):
            assert "pragma omp" not in path.read_text(), path


@pytest.mark.parametrize("compiler", [c for c in ("gcc", "clang") if shutil.which(c)])
def test_every_compiler_here_takes_the_c_sources(compiler):
    sources = [str(path) for path in SOURCES if path.suffix == ".c"]
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    includes = [f"-I{folder}" for folder in (ROOT / "cbn" / "kernels", np.get_include(), sysconfig.get_path("include"))]
    done = subprocess.run([*command, *includes, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_run_one_way():
    allowed = {
        "checks": set(),
        "reference": set(),
        "threads": {"checks", "kernels"},
        "memory": {"kernels"},
        "functional": {"checks", "kernels"},
        "moments": {"checks", "functional", "kernels"},
        "batchnorm": {"checks", "functional", "kernels", "storage"},
        "storage": {"batchnorm"},
        "fuse": {"batchnorm", "checks"},
        "config": {"checks", "functional", "kernels", "memory", "reference", "threads"},
    }
    for path in (ROOT / "cbn").glob("*.py"):
        if path.stem.startswith("__"):
            continue
        found = set()
        for names in re.findall(r"^\s*from \. import (.*)$", path.read_text(), re.M):
            found |= {n.strip() for n in names.split(",")}
        found |= set(re.findall(r"^\s*from \.(\w+)", path.read_text(), re.M))
        assert found <= allowed[path.stem], path
    for path in (ROOT / "cbn" / "convert").glob("*.py"):
        above = re.findall(r"^\s*from \.\. import (.*)$", path.read_text(), re.M)
        above += re.findall(r"^\s*from \.\.(\w+)", path.read_text(), re.M)
        beside = re.findall(r"^\s*from \.(\w+)", path.read_text(), re.M)
        assert set(above) <= {"batchnorm", "checks"}, path
        assert path.stem == "__init__" or set(beside) <= {"common"}, path


def test_symbols_are_hidden():
    try:
        done = subprocess.run(["nm", "-D", "--defined-only", passes.__file__], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    assert symbols <= {"PyInit_passes", "_init", "_fini", "_edata", "_end", "__bss_start"}, symbols


def build(arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = build(["-c", code], ROOT)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


def test_the_sdist_holds_every_source(sdist):
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                                 cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()  # fmt: skip
        wanted = {n for n in listing if n.startswith(("cbn/", "tests/", "examples/")) and (ROOT / n).exists()}
    else:
        wanted = {str(p.relative_to(ROOT)) for p in SOURCES}
    packed = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    assert wanted <= packed, sorted(wanted - packed)
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py", "Makefile", "conftest.py"):
        assert name in packed
    assert "cbn/kernels/passes.c" not in packed


@pytest.mark.slow
def test_a_wheel_from_the_sdist_passes_the_tests_in_an_empty_environment(sdist, tmp_path):
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    done = build(["-c", code], sdist)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [n for n in names if n.endswith((".c", ".h", ".pyx"))]
    for needed in ("cbn/py.typed", "cbn/kernels/passes.pyi", "cbn/kernels/passes.pxd"):
        assert needed in names
    done = build(["-m", "venv", str(tmp_path / "venv")], tmp_path)
    assert done.returncode == 0, done.stderr
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", f"{wheel}[test]"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    # A folder without cbn/ in it, so that the tests import the wheel
    for name in ("tests", "conftest.py", "pyproject.toml"):
        (sdist / name).rename(tmp_path / name)
    tests = [
        f"tests/test_{n}.py" for n in ("kernels", "layers", "functional", "errors", "storage", "threads", "moments")
    ]
    # All but the one that goes through every knob: it takes as long as all others, and the sources are the same
    command = [python, "-m", "pytest", "-q", "--deselect", "tests/test_kernels.py::test_every_path_gives_the_same_bits"]
    done = subprocess.run([*command, *tests], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_foreign_compiler_is_refused_in_clear_words(tmp_path):
    fake = tmp_path / "cl"
    fake.write_text("#!/bin/sh\necho 'unknown option' >&2\nexit 2\n")
    fake.chmod(0o755)
    done = build(["setup.py", "-q", "build_ext", "-t", str(tmp_path), "-b", str(tmp_path)], ROOT, CC=str(fake))
    assert done.returncode != 0
    assert "is neither gcc nor clang" in done.stderr
    assert "set the environment variable CC" in done.stderr
    assert "Traceback" not in done.stderr


def compiler_without_openmp(folder):
    fake = folder / "cc"
    fake.write_text(
        '#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && { echo "no omp.h" >&2; exit 1; }; done\nexec cc "$@"\n'
    )
    fake.chmod(0o755)
    return str(fake)


def test_missing_openmp_is_an_error_with_its_remedy(tmp_path):
    arguments = ["setup.py", "-q", "build_ext", "-t", str(tmp_path), "-b", str(tmp_path)]
    done = build(arguments, ROOT, CC=compiler_without_openmp(tmp_path))
    assert done.returncode != 0
    for words in ("cannot build an OpenMP program", "no omp.h", "libgomp", "libomp-dev", "CBN_WITHOUT_OPENMP=1"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_build_without_openmp_works(tmp_path):
    arguments = ["setup.py", "-q", "build_ext", "-t", str(tmp_path / "t"), "-b", str(tmp_path)]
    # Without optimization, which takes most of the time of a build
    done = build(arguments, ROOT, CC=compiler_without_openmp(tmp_path), CBN_WITHOUT_OPENMP="1", CBN_DEBUG="1")
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "cbn").glob("*.py"):
        (tmp_path / "cbn" / path.name).write_text(path.read_text())
    (tmp_path / "cbn" / "kernels" / "__init__.py").write_text("")
    done = build(["-m", "cbn"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "built without OpenMP" in done.stdout
    assert "All kernels agree" in done.stdout
