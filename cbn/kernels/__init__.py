"""The compiled passes. This page is the map of the folder.

Every operation is measure → merge → solve → apply, once forward and once backward::

              measure                merge              solve                  apply
    forward   S(d), S(d*d) → mean    partial sums,      mean, scale, offset    y = (x - mean)*scale + offset
              and m2, d = x - shift  then again with
                                     a better shift
    backward  S(dh), S(dh*d)         partial sums       mean, scale,           dx = (dh - grad_mean)*scale
                                                        grad_mean, slope            - (x - mean)*slope
    second    five sums over x, dy   partial sums       nine coefficients      gradients of dy and of x
              and ggI

Where each line is, from a numpy array down to an instruction:

    passes.pyx        the entries: one function for each verb and for all of them fused; `Passes` for C and Cython
    calls.pyx         whole calls of the functions, for arguments of the kind that most calls have; scratch.pxd
    slices.pyx        a batch in slices, each normalized by itself: one job a slice
    running.pyx       whole calls of statistics: a stream's state moved in place, arrays standardized
    plans.pyx         calls that repeat: everything prepared that does not depend on values
    arrays.pyx        numpy's side: how an array lies in memory (`Layout`, `Input`), memory of outputs; pool.c
    channels.pyx      parameters and statistics of a layer, read and written as one
    ----------------  below this line a job touches no Python object, and needs no GIL
    engine.pyx        threads, instruction sets, knobs; runs a job: which items, two passes or one pipeline; threads.c
    job.pxd           `Job`: all that one call of a pass is
    partition.pxd     how a pass falls into items for the threads
    statistics.pxd    shifts, merge of partial sums, what has to be reduced again; statistics.h: its loops over channels
    coefficients.h    solve; whether float32 arithmetic does for a channel
    tiles.pxd         an item as the loops see it
    second.pxd        second derivatives: jobs over three arrays
    at_once.pxd       few rows: a job that is one loop
    conversion.pxd    apply from and to other types than the arithmetic's
    kernels.h         the table of loops, and what a loop is given; kernels.pxd is the same for Cython
    select.c          which instruction sets there are, and which of them this processor runs
    sets/             one file for each instruction set, which includes everything below; set.h
    types.h           the element types: a type is one word
    loops/            the loops, a template: formulas.h the arithmetic of an element, runs.h, rows.h and columns.h the
                      two layouts, stream.h apply alone to runs, counted.h reductions in which not every value counts
                      alike, second.h second derivatives, few.h few rows, prefetch.h what is fetched ahead, loops.h
                      the entries; integers.h exact sums of integers
    vec/              vectors: vec.h and sums.h for any size, and a header for what each set does better
    half.h            16-bit floats, one at a time

The words of this folder:

    run, row       contiguous elements of one channel (NCHW); one element of each channel in turn (NHWC)
    item           the work that a thread takes at once: a rectangle of runs (or rows) and channels
    tile           an item as a loop gets it, with pointers and coefficients
    block, piece   runs whose sums are added up together; a part of a long run. Each leaves one partial sum
    copies         rows of few channels that are walked as one longer row
    shift          what a reduction subtracts from x, near the mean, so that no digits cancel
    dh             the gradient behind the activation: dy times the slope of act
    coefficients   per channel, float64, (n, C): named rows in kernels.h and coefficients.h
    factors        the same in the arithmetic of a loop, for one channel or one column
    pipeline       reduction and apply tile by tile, so that memory is read once

So that a pass gives the same bits with one instruction set, what decides a sum is made from shape, dtype and layout
alone. What may change with the machine (threads, caches, kind of store, prefetch) decides no bit.
"""

__all__ = ["arrays", "calls", "channels", "engine", "passes", "plans", "running", "slices"]


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
    from . import arrays, calls, channels, engine, passes, plans, running, slices
except ImportError as error:
    raise ImportError(_explain(error), name="cbn.kernels.engine") from (error if _is_compiled() else None)
