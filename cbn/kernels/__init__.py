"""The compiled modules: passes over arrays, and reads and writes of arrays per channel."""

__all__ = ["arrays", "channels", "engine", "passes", "plans"]


def _is_compiled() -> bool:
    """Whether there is a module for this Python, whose own error then says why it cannot be loaded."""
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    return any((Path(__file__).parent / f"engine{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _explain(error: ImportError) -> str:
    """Why the compiled module is not there, and what to do about it, in one sentence."""
    import sysconfig
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    import numpy

    folder = Path(__file__).resolve().parent
    root = folder.parents[1]
    compiled = sorted(path.name for path in folder.glob("engine*.so"))
    for name in compiled:
        if name.removeprefix("engine") in EXTENSION_SUFFIXES:
            text = f"cbn's compiled module {folder / name} cannot be loaded: {error}"
            if "libgomp" in str(error):
                text += " (install OpenMP's runtime: libgomp1 on Debian and Ubuntu, libgomp on Fedora and conda)"
            if int(numpy.__version__.split(".")[0]) < 2:
                text += f" (cbn needs numpy 2.0 or newer, and this one is {numpy.__version__})"
            return text
    lacks = "has no compiled module"
    if compiled:
        here = sysconfig.get_config_var("SOABI")
        lacks = f"was compiled for another Python ({', '.join(compiled)}; this one is {here})"
    if (folder / "engine.pyx").exists():
        return (
            f"cbn is imported from its source folder {root}, which {lacks}: run from another folder, "
            "where Python finds the cbn that `pip install .` has installed, or compile in place with "
            f"`pip install -e {root}`"
        )
    return f"cbn in {root} {lacks}: install it again"


try:
    from . import arrays, channels, engine, passes, plans
except ImportError as error:
    raise ImportError(_explain(error), name="cbn.kernels.engine") from (error if _is_compiled() else None)
