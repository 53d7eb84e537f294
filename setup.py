"""Build of the compiled modules. Everything that is not about compiling is in pyproject.toml.

No instruction-set flags: the sources name what they need (see cbn/kernels/sets/), so that one build runs
on every processor of its architecture.

Environment:
    CBN_WITHOUT_OPENMP=1   build without OpenMP, single-threaded
    CBN_WERROR=1           warnings of our own C are errors, and it is quickly compiled (continuous integration)
    CBN_DEBUG=1            bounds checks in Cython, no optimization, for a debugger
    CBN_SANITIZE=address,undefined   build with these sanitizers
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("cbn/kernels")
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
# The instruction sets above the baseline, by architecture: those first that take longest to compile.
SETS = {
    "x86_64": ["avx2", "avx512", "avx512_bf16"],
    "aarch64": ["neon"],
}.get(MACHINE, [])
# What is built before the passes, one thing more each time, so that what is missing has its name: the program, the
# flags that it takes, and what to install where it cannot be built.
C_PROGRAM = (
    "a C program",
    "#include <stdlib.h>\nint main(void) { return EXIT_SUCCESS; }\n",
    (),
    "Install what belongs to it: build-essential on Debian and Ubuntu, gcc and glibc-devel on Fedora, c-compiler from "
    "conda-forge in conda.",
)
PYTHON_PROGRAM = (
    "a program with Python's headers",
    "#include <Python.h>\nint main(void) { return 0; }\n",
    ("-c",),
    "Install Python's headers, of the version {}.{}: python3-dev on Debian and Ubuntu, python3-devel on Fedora. "
    "Conda's Python has them.".format(*sys.version_info),
)
OPENMP_PROGRAM = (
    "an OpenMP program",
    "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n",
    ("-fopenmp",),
    "Install its OpenMP runtime (gcc: libgomp, part of the gcc package; clang: libomp-dev on Debian and Ubuntu, "
    "libomp-devel on Fedora, llvm-openmp from conda-forge in conda), or choose another compiler by the environment "
    "variable CC. To build without threads all the same, set CBN_WITHOUT_OPENMP=1.",
)


def asked(name):
    """Whether the environment variable is set to something that means yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "no", "false")


def check_found(command):
    """End with words for a user where the compiler is not there."""
    if shutil.which(command[0]):
        return
    asked_for = os.environ.get("CC")
    if asked_for is not None and not asked_for.strip():
        sys.exit(
            "cbn: the environment variable CC is set but empty: unset it, or set it to a C compiler, as in CC=gcc."
        )
    named = ", which the environment variable CC names," if asked_for else ""
    remedy = (
        "The kernels need gcc or clang. Install one: `apt-get install build-essential` on Debian and Ubuntu, "
        "`dnf install gcc` on Fedora, `conda install -c conda-forge c-compiler` in conda. One that is not on PATH can "
        "be named by the environment variable CC, as in CC=/opt/bin/gcc."
    )
    for name in ("gcc", "clang"):
        if shutil.which(name):
            remedy = f"But {name} is there: set the environment variable CC, as in CC={name}."
    sys.exit(f"cbn: the C compiler {command[0]!r}{named} was not found. {remedy}")


def compiler_macros(command):
    """The macros that the C compiler predefines, and its words where it does not answer as gcc and clang do."""
    try:
        done = subprocess.run([*command, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True)
    except OSError as error:
        return "", str(error)
    return ("", done.stderr.strip()) if done.returncode else (done.stdout, "")


class BuildPasses(build_ext):
    """build_ext that knows which compilers can build cbn, and that insists on OpenMP."""

    def build_extensions(self):
        command = list(getattr(self.compiler, "compiler", None) or [self.compiler.compiler_type])
        if self.compiler.compiler_type == "unix":
            check_found(command)
        macros, words = compiler_macros(command)
        if "__GNUC__" not in macros:  # clang defines it too
            sys.exit(
                f"cbn: the C compiler {' '.join(command)!r} does not answer as gcc or clang do"
                f"{f': {words}' if words else ''}. The kernels are written in "
                "their vector extension and need one of the two: set the environment variable CC, as in CC=gcc."
            )
        self.check_builds(command, C_PROGRAM)
        self.check_builds([*command, *(f"-I{folder}" for folder in self.compiler.include_dirs)], PYTHON_PROGRAM)
        # -g0: debug information, which Python's own flags ask for, takes a third of the compiler's time
        # Nobody reads the flags of floating-point exceptions. Without them a loop with a condition (`factors` in
        # formulas.h) can be vectorized
        flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
        flags += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
        link_flags = ["-pthread"]
        if "__clang__" not in macros and SETS:
            # A call copies structs of half a kilobyte some times, and gcc takes `rep movs` for that, which is slow to
            # begin: 7 % of an evaluation of (2, 3, 64)
            flags += ["-mmemcpy-strategy=unrolled_loop:512:noalign,libcall:-1:noalign"]
        if "__clang__" not in macros:
            # What a loop tests once for some vectors (kind of store, copy) is not worth a body for each case
            flags += ["-fno-unswitch-loops"]
        if asked("CBN_DEBUG"):
            flags += ["-O0", "-g"]
        if asked("CBN_WERROR"):
            # What Cython writes is not ours: a parameter that a slot function must have but does not use.
            flags += ["-Werror", "-Wno-unused-parameter", "-O1"]
        if sanitizers := os.environ.get("CBN_SANITIZE"):
            # -O1: checks in every line of loops that are inlined into each other take the optimizer 8 minutes
            flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"]
            link_flags += [f"-fsanitize={sanitizers}"]
        if not asked("CBN_WITHOUT_OPENMP"):
            flags += ["-fopenmp"]
            link_flags += ["-fopenmp"]
            self.check_builds(command, OPENMP_PROGRAM)
        for extension in self.extensions:
            extension.extra_compile_args = flags
            extension.extra_link_args = link_flags
        # The loops of one instruction set are minutes of compiling: as many sources at once as there are processors
        compile_sources = self.compiler.compile
        processors = threading.Semaphore(os.cpu_count() or 1)

        def compile_one(source, options):
            if SETS and Path(source).name == "baseline.c" and not asked("CBN_DEBUG"):
                # On x86-64 for processors from before 2013 alone, and nearly half of all compiling: -O3 takes 2.5 times
                # as long, and its runs are 0 to 10 % faster, its rows 20 to 100 %
                options = {**options, "extra_postargs": [*options["extra_postargs"], "-O1"]}
            with processors:
                return compile_sources([source], **options)

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(len(sources)) as pool:
                files = pool.map(lambda source: compile_one(source, options), sources)
                return [file for of_source in files for file in of_source]

        self.compiler.compile = compile_at_once
        self.parallel = len(self.extensions)
        super().build_extensions()

    def check_builds(self, command, program):
        """End with words for a user where the compiler cannot build the program."""
        what, text, flags, remedy = program
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "program.c")
            source.write_text(text)
            done = subprocess.run(
                [*command, *flags, str(source), "-o", str(Path(folder, "program"))], capture_output=True, text=True
            )
        if done.returncode:
            sys.exit(f"cbn: the C compiler {command[0]!r} cannot build {what}:\n\n{done.stderr.strip()}\n\n{remedy}")


# Extensions and their sources, those that take longest first. See cbn/kernels/__init__.py for what each is.
EXTENSIONS = {
    "engine": [*(f"sets/{name}.c" for name in (*SETS, "baseline")), "engine.pyx", "select.c", "threads.c"],
    "passes": ["passes.pyx"],
    "arrays": ["arrays.pyx", "pool.c"],
    "calls": ["calls.pyx"],
    "running": ["running.pyx"],
    "slices": ["slices.pyx"],
    "plans": ["plans.pyx"],
    "channels": ["channels.pyx"],
}

extensions = [
    Extension(
        f"cbn.kernels.{name}",
        sources=[str(KERNELS / source) for source in sources],
        depends=[str(path) for path in sorted(KERNELS.rglob("*.h"))],
        include_dirs=[numpy.get_include(), str(KERNELS)],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
    )
    for name, sources in EXTENSIONS.items()
]

debug = asked("CBN_DEBUG")
setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": "3",
            "boundscheck": debug,
            "initializedcheck": debug,
            "cdivision": True,
            "embedsignature": True,
        },
    ),
    cmdclass={"build_ext": BuildPasses},
)
