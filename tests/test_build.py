"""What is built, and from what: flags, lints of the sources, the source distribution, wheels, compilers refused."""

import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cbn import kernels
from cbn.kernels import engine

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p
    for p in (ROOT / "cbn").rglob("*")
    if p.suffix in (".py", ".pyi", ".pyx", ".pxd", ".c", ".h")
    and not (p.suffix == ".c" and p.with_suffix(".pyx").exists())
)
MODULES = [importlib.import_module(f"cbn.kernels.{name}") for name in kernels.__all__]


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
    built = engine.built()  # the other sets are for other architectures
    sources = [str(p) for p in SOURCES if p.suffix == ".c" and (p.parent.name != "sets" or p.stem in built)]
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    includes = [f"-I{folder}" for folder in (ROOT / "cbn" / "kernels", np.get_include(), sysconfig.get_path("include"))]
    done = subprocess.run([*command, *includes, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def functions(path):
    """(name, lines) of the functions of a source; of Python without their docstrings."""
    lines = path.read_text().splitlines()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                doc = node.body[0] if ast.get_docstring(node) else None
                yield node.name, node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
    elif path.suffix in (".pyx", ".pxd"):
        for i, line in enumerate(lines):
            if re.match(r" *(cdef|cpdef|def)\b.*\(", line):
                indent = len(line) - len(line.lstrip())
                body = itertools.takewhile(
                    lambda text, indent=indent: not text or len(text) - len(text.lstrip()) > indent, lines[i + 1 :]
                )
                yield line.strip(), 1 + len("\n".join(body).rstrip().splitlines())
    else:
        for i, line in enumerate(lines):
            if line == "{":
                head = len(list(itertools.takewhile(lambda text: text and text[0] not in "#}*", lines[i - 1 :: -1])))
                yield lines[i - head], head + lines[i:].index("}") + 1


def test_files_and_functions_are_short():
    long = [
        f"{path}: {path.read_text().count(chr(10))} lines"
        for path in SOURCES
        if len(path.read_text().splitlines()) > 600
    ]
    found = [(n, path, name) for path in SOURCES for name, n in functions(path)]
    assert len(found) > 500
    long += [f"{path}: {name} has {n} lines" for n, path, name in found if n > 80]
    assert not long


def test_imports_run_one_way():
    allowed = {
        "checks": set(),
        "reference": set(),
        "threads": {"checks", "kernels"},
        "memory": {"kernels"},
        "inputs": {"checks", "kernels"},
        "moments": {"checks", "inputs", "kernels", "masked"},
        "scaling": {"checks", "inputs", "kernels", "steps"},
        "running": {"checks", "entries", "inputs", "kernels", "memory", "moments", "scaling", "storage"},
        "sklearn": {"checks", "inputs", "kernels", "moments", "scaling", "steps"},
        "steps": {"checks", "inputs", "kernels", "masked", "moments"},
        "quantized": {"checks", "inputs", "kernels", "steps"},
        "verbs": {"checks", "inputs", "kernels", "moments", "steps"},
        "second": {"checks", "inputs", "kernels", "steps"},
        "functional": {"checks", "inputs", "kernels", "masked", "quantized", "second", "steps", "verbs"},
        "plan": {"checks", "inputs", "kernels", "quantized", "steps"},
        "attributes": {"checks", "kernels"},
        "entries": {"checks"},
        "storage": {"checks", "entries", "memory"},
        "state": {"attributes", "checks", "entries", "kernels", "memory", "steps", "storage"},
        "course": {"checks", "ghost", "inputs", "kernels", "masked", "moments", "quantized", "steps"},
        "masked": {"checks", "inputs", "kernels"},
        "ghost": {"checks", "inputs", "kernels", "moments", "steps"},
        "domains": {"checks", "course", "inputs", "kernels", "quantized", "steps"},
        "digests": {"checks", "steps"},
        "pictures": {"checks"},
        "diagnostics": {"checks", "inputs", "moments", "pictures"},
        "population": {"checks", "diagnostics", "inputs", "kernels", "memory", "moments", "state"},
        "batchnorm": {
            *("attributes", "checks", "course", "digests", "domains", "ghost", "inputs", "kernels", "moments"),
            *("masked", "plan", "population", "quantized", "steps", "storage"),
        },
        "recalibrate": {
            *("batchnorm", "checks", "course", "inputs", "kernels", "masked", "moments", "population", "progress"),
        },
        "fuse": {"batchnorm", "checks", "kernels"},
        "sync": {"batchnorm", "checks", "course", "masked", "moments", "steps"},
        "mpi": {"checks", "sync"},
        "dask": {"batchnorm", "blocks", "checks", "moments", "scaling", "threads"},
        "progress": set(),
        "blocks": {"batchnorm", "checks", "inputs", "kernels", "steps"},
        "work": {"blocks", "checks", "moments", "progress", "storage", "threads"},
        "outofcore": {"blocks", "checks", "course", "moments", "running", "scaling", "work"},
        "config": {"checks", "functional", "kernels", "memory", "reference", "threads"},
    }
    for path in (ROOT / "cbn").glob("*.py"):
        if path.stem.startswith("__"):
            continue
        found = set()
        for names in re.findall(r"^\s*from \. import (.*)$", path.read_text(), re.M):
            found |= {n.split()[0] for n in names.split(",")}
        found |= set(re.findall(r"^\s*from \.(\w+)", path.read_text(), re.M))
        assert found <= allowed[path.stem], path
    for path in (ROOT / "cbn" / "convert").glob("*.py"):
        above = re.findall(r"^\s*from \.\. import (.*)$", path.read_text(), re.M)
        above += re.findall(r"^\s*from \.\.(\w+)", path.read_text(), re.M)
        beside = re.findall(r"^\s*from \.(\w+)", path.read_text(), re.M)
        assert set(above) <= {"batchnorm", "checks"}, path
        assert path.stem == "__init__" or set(beside) <= {"common"}, path

    for path in (ROOT / "cbn" / "torch").glob("*.py"):
        above = re.findall(r"^\s*from \.\. import (.*)$", path.read_text(), re.M)
        above = {name for names in above for name in names.split(", ")}
        above |= set(re.findall(r"^\s*from \.\.(\w+)", path.read_text(), re.M))
        allowed_above = {"batchnorm", "checks", "config", "functional", "inputs", "kernels", "moments", "steps", "sync"}
        assert above <= allowed_above, path


def test_cimports_run_one_way():
    allowed = {
        "kernels": set(),
        "partition": {"kernels"},
        "coefficients": {"kernels"},
        "job": {"coefficients", "kernels", "partition"},
        "statistics": {"coefficients", "job", "kernels", "partition"},
        "conversion": {"job", "kernels", "partition", "tiles"},
        "tiles": {"coefficients", "job", "kernels", "partition"},
        "at_once": {"coefficients", "job", "kernels", "partition", "tiles"},
        "engine": {"at_once", "conversion", "job", "kernels", "partition", "statistics", "tiles"},
        "arrays": {"engine", "job", "kernels", "partition"},
        "passes": {
            *("arrays", "coefficients", "engine", "job", "kernels", "partition", "scratch", "second", "statistics"),
        },
        "second": {"coefficients", "engine", "job", "kernels", "partition", "statistics", "tiles"},
        "plans": {"arrays", "coefficients", "engine", "job", "kernels"},
        "channels": {"arrays"},
        "scratch": {"arrays", "coefficients", "engine", "job", "kernels", "partition"},
        "slices": {"arrays", "coefficients", "engine", "job", "partition", "scratch", "statistics"},
        "calls": {"arrays", "channels", "coefficients", "engine", "job", "kernels", "scratch"},
        "running": {
            *("arrays", "calls", "coefficients", "engine", "job", "kernels", "partition", "scratch", "statistics"),
        },
    }
    paths = [p for p in SOURCES if p.suffix in (".pyx", ".pxd")]
    assert {path.stem for path in paths} == set(allowed)
    for path in paths:
        found = set(re.findall(r"^from \.(\w*) c?import", path.read_text(), re.M))
        assert found - {path.stem} <= allowed[path.stem], path
        assert "cbn" not in re.findall(r"^(?:from|c?import) (\w+)", path.read_text(), re.M), path


@pytest.mark.parametrize("module", MODULES, ids=kernels.__all__)
def test_symbols_are_hidden(module):
    try:
        done = subprocess.run(["nm", "-D", "--defined-only", module.__file__], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    assert symbols <= {f"PyInit_{module.__name__.split('.')[-1]}", "_init", "_fini", "_edata", "_end", "__bss_start"}, (
        symbols
    )


def build(arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


NOT_PACKED = {".gitignore"}  # of what is tracked
ONLY_PACKED = {"PKG-INFO", "setup.cfg"} | {
    f"cbn.egg-info/{name}"
    for name in ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "requires.txt", "top_level.txt")
}
# What work leaves in a checkout, and git ignores
LITTER = (
    *(f"cbn/kernels/{name}.c" for name in kernels.__all__), "cbn/kernels/passes.so", "cbn/__pycache__/a.pyc",
    "examples/out/a.md", "benchmarks/out/accuracy.md", "benchmarks/out/native/limits.so", "examples/extension/frames.c",
    "examples/extension/build/a.c", "docs/_build/html/a.html", "build/a.py", ".venv/a.py", "dist/a.md",
    ".hypothesis/a.py",
)  # fmt: skip


def tracked(*others):
    """What git tracks; in an unpacked source distribution, what was packed."""
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", *others], cwd=ROOT, capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    else:
        names = (ROOT / "cbn.egg-info" / "SOURCES.txt").read_text().splitlines()
    return {name for name in names if (ROOT / name).exists()} - ONLY_PACKED


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked; made from a copy, which has nothing of an older build."""
    folder = tmp_path_factory.mktemp("sdist")
    clone = folder / "clone"
    for name in tracked("--cached", "--others", "--exclude-standard"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    for name in LITTER:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = build(["-c", code], clone)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("cbn-*/"))


def test_the_sdist_holds_what_git_tracks_and_nothing_of_a_build(sdist):
    packed = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    wanted = tracked() - NOT_PACKED
    assert wanted >= {"setup.py", ".ci/run", "docs/update_readme.py", "benchmarks/native/limits.c", "cbn/py.typed"}
    assert wanted <= packed, f"MANIFEST.in leaves out {sorted(wanted - packed)}"
    extra = packed - ONLY_PACKED - tracked("--cached", "--others", "--exclude-standard")
    assert not extra, f"MANIFEST.in packs {sorted(extra)}"


@pytest.mark.slow
def test_the_readmes_install_lines_work_and_what_they_install_passes_the_tests(sdist, tmp_path):
    """In an empty environment, in the unpacked source distribution, which is what a clone is too."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    block = next(b for b in blocks if "pip" in b)
    assert block.splitlines()[0] == "pip install ."

    def run(*command, folder=tmp_path):
        path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    done = run(sys.executable, "-m", "venv", "venv")
    assert done.returncode == 0, done.stderr
    done = run("bash", "-e", "-c", block, folder=sdist)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree with the reference" in done.stdout
    done = run("python", "-m", "cbn", folder=sdist)  # what the page warns of
    assert f"ImportError: cbn is imported from its source folder {sdist}, which has no compiled" in done.stderr
    code = "from importlib.metadata import *; print(*files('cbn'), '', *requires('cbn'), sep='\\n')"
    done = run("python", "-I", "-c", code)
    files, requirements = done.stdout.split("\n\n")
    installed = {name for name in files.splitlines() if name.startswith("cbn/") and not name.endswith(".pyc")}
    libraries = {f"cbn/kernels/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in kernels.__all__}
    stubs = {f"cbn/kernels/{name}.pyi" for name in kernels.__all__}
    needed = {"cbn/py.typed", "cbn/kernels/passes.pxd"} | stubs | libraries
    assert installed == needed | {str(p.relative_to(ROOT)) for p in SOURCES if p.suffix == ".py"}
    wanted = [r.split(";")[0] for r in requirements.splitlines() if r.endswith('extra == "test"')]
    done = run("python", "-m", "pip", "install", "-q", *wanted, "cython", "setuptools")
    assert done.returncode == 0, done.stderr
    # A folder without cbn/ in it, so that the tests import what was installed
    for name in ("tests", "conftest.py", "pyproject.toml", "examples"):
        (sdist / name).rename(tmp_path / name)
    names = ("layers", "functional", "errors", "storage", "threads", "moments", "extension")
    done = run("python", "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in names))
    assert done.returncode == 0, done.stdout[-3000:]


def refused(folder, **environment):
    """What setup.py says when it refuses to compile."""
    done = build(["setup.py", "-q", "build_ext", "-t", str(folder), "-b", str(folder)], ROOT, **environment)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_compiler_that_is_not_there_is_said_not_to_be_found(tmp_path):
    error = refused(tmp_path, PATH=str(tmp_path))
    assert re.search(r"^cbn: the C compiler '[^']+' was not found\. The kernels need gcc or clang", error, re.MULTILINE)
    for remedy in ("apt-get install build-essential", "dnf install gcc", "conda install -c conda-forge c-compiler"):
        assert remedy in error
    assert "neither" not in error


@pytest.mark.parametrize("name", ["/nonexistent/gcc", "nonexistent-gcc -pipe"])
def test_a_compiler_that_cc_names_and_that_is_not_there(tmp_path, name):
    error = refused(tmp_path, PATH=str(tmp_path), CC=name)
    words = f"the C compiler '{name.split()[0]}', which the environment variable CC names, was not found. The kernels"
    assert words in error
    for other in ("gcc", "clang"):
        (tmp_path / other).write_text("#!/bin/sh\n")
        (tmp_path / other).chmod(0o755)
        error = refused(tmp_path, PATH=str(tmp_path), CC=name)
        assert f"was not found. But {other} is there: set the environment variable CC, as in CC={other}." in error
        (tmp_path / other).unlink()


def test_an_empty_cc_is_named(tmp_path):
    assert "the environment variable CC is set but empty" in refused(tmp_path, CC=" ")


def script(folder, text):
    fake = folder / "fake"
    fake.write_text(f"#!/bin/sh\n{text}\n")
    fake.chmod(0o755)
    return str(fake)


def test_a_foreign_compiler_is_refused_in_clear_words(tmp_path):
    error = refused(tmp_path, CC=script(tmp_path, "echo 'unknown option' >&2; exit 2"))
    assert "does not answer as gcc or clang do: unknown option. The kernels are written in their vector" in error
    assert "set the environment variable CC" in error
    assert "not found" not in error
    assert "does not answer as gcc or clang do. The kernels" in refused(tmp_path, CC="false")


def test_a_compiler_without_headers_says_which(tmp_path):
    error = refused(tmp_path, CC="cc -nostdinc")
    for words in ("'cc' cannot build a C program:", "stdlib.h", "build-essential", "glibc-devel", "c-compiler"):
        assert words in error
    without_python = """for a in "$@"; do case $a in *.c)
        grep -q Python.h "$a" && { echo "fatal error: Python.h" >&2; exit 1; };; esac; done; exec cc "$@"
    """
    error = refused(tmp_path, CC=script(tmp_path, without_python))
    for words in ("cannot build a program with Python's headers:", "error: Python.h", "python3-dev on Debian", "Conda"):
        assert words in error
    assert f"of the version {sys.version_info[0]}.{sys.version_info[1]}:" in error


def compiler_without_openmp(folder):
    return script(
        folder, 'for a in "$@"; do [ "$a" = -fopenmp ] && { echo "no omp.h" >&2; exit 1; }; done\nexec cc "$@"'
    )


def test_missing_openmp_is_an_error_with_its_remedy(tmp_path):
    error = refused(tmp_path, CC=compiler_without_openmp(tmp_path))
    for words in ("cannot build an OpenMP program", "no omp.h", "libgomp", "libomp-dev", "CBN_WITHOUT_OPENMP=1"):
        assert words in error


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
    assert "agree with the reference" in done.stdout
