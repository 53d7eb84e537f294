# cython: boundscheck=False, wraparound=False
"""A Cython extension that embeds cbn: it normalizes frames as they come, while other Python threads run.

Each frame, (pixels, channels) of float32, is normalized with its own statistics, whose average over all frames
is kept. The whole loop holds no GIL and makes no Python object; the passes are cbn's, and so are their threads.
"""
import numpy as np

from cbn.kernels.passes cimport Passes


def normalize_frames(float[:, :, ::1] frames, float[:, :, ::1] out, double eps=1e-5):
    """Normalize every frame; returns (mean, variance) of each channel, averaged over the frames.

    frames and out are (frames, pixels, channels); they may be the same memory.
    """
    if frames.shape[0] == 0:
        raise ValueError("there are no frames")
    cdef Passes passes = Passes(np.asarray(frames[0]), channel_axis=1)
    cdef Py_ssize_t f, c, C = passes.C, n = frames.shape[0]
    cdef double[:, ::1] of_frame = np.empty((3, C)), of_all = np.zeros((2, C))
    if tuple(out.shape) != tuple(frames.shape):
        raise ValueError("out has another shape than frames")
    with nogil:
        for f in range(n):
            passes.normalize(&frames[f, 0, 0], &out[f, 0, 0], NULL, NULL, eps,
                             &of_frame[0, 0], &of_frame[1, 0], &of_frame[2, 0])
            for c in range(C):
                of_all[0, c] += of_frame[0, c] / n
                of_all[1, c] += of_frame[1, c] / passes.count / n
    return np.asarray(of_all[0]), np.asarray(of_all[1])


def gradient(float[:, ::1] dy, float[:, ::1] x):
    """Gradient of one frame's normalization with respect to it, eps 1e-5: moments, then backward."""
    cdef Passes passes = Passes(np.asarray(x), channel_axis=1)
    cdef Py_ssize_t c, C = passes.C
    cdef double[:, ::1] room = np.empty((5, C))
    cdef float[:, ::1] dx = np.empty_like(x)
    with nogil:
        passes.moments(&x[0, 0], &room[0, 0], &room[1, 0])
        for c in range(C):
            room[2, c] = 1 / (room[1, c] / passes.count + 1e-5) ** 0.5
        passes.backward(&dy[0, 0], &x[0, 0], &dx[0, 0], NULL, &room[0, 0], &room[2, 0], &room[3, 0], &room[4, 0])
    return np.asarray(dx)


def affine(float[:, ::1] x, double[:, ::1] coef):
    """(x - coef[0])*coef[1] + coef[2], in place."""
    cdef Passes passes = Passes(np.asarray(x), channel_axis=1)
    with nogil:
        passes.apply(&x[0, 0], &x[0, 0], &coef[0, 0])
