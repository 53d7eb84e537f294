# Arrays per channel of a layer: read at one moment, changed at one moment. It knows no layout and opens no thread.
"""Parameters and statistics, read and written as one.

A signal handler and another thread can run wherever Python code runs, so a change in several steps can be seen, or
left, half done. Each function here first checks its arguments and allocates, then reads or writes everything in plain C
under the GIL, where no handler and no other thread can run and nothing can fail. Methods of ndarray subclasses are not
called.

Arrays are checked by the caller: (C,), float32 or float64, of any strides, alignment and byte order, unless said
otherwise.
"""
cimport numpy as cnp
from libc.math cimport isfinite
from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memcpy

import numpy as np

from .arrays import empty_cache

cnp.import_array()

cdef extern from "Python.h":
    int PyDict_SetItem(object d, object key, object value) except -1


cdef struct Vector:
    char *data
    Py_ssize_t n, stride, size    # elements, bytes from one to the next, bytes of one
    bint swapped


cdef Vector vector_of(cnp.ndarray a) noexcept:
    """Where the elements of an array of one dimension, or none, are; of None no elements."""
    cdef Vector v
    if a is None:
        return Vector(NULL, 0, 0, 0, False)
    v.data = cnp.PyArray_BYTES(a)
    v.n = cnp.PyArray_SIZE(a)
    v.stride = cnp.PyArray_STRIDE(a, 0) if cnp.PyArray_NDIM(a) else 0
    v.size = cnp.PyArray_ITEMSIZE(a)
    v.swapped = not cnp.PyArray_ISNOTSWAPPED(a)
    return v


cdef inline void copy_element(char *to, const char *of, Py_ssize_t size, bint swapped) noexcept nogil:
    cdef Py_ssize_t i
    if not swapped:
        memcpy(to, of, size)
    else:
        for i in range(size):
            to[i] = of[size - 1 - i]


cdef inline double load(Vector *v, Py_ssize_t c) noexcept nogil:
    cdef float f
    cdef double d
    if v.size == sizeof(float):
        copy_element(<char *>&f, v.data + c * v.stride, sizeof(float), v.swapped)
        return f
    copy_element(<char *>&d, v.data + c * v.stride, sizeof(double), v.swapped)
    return d


cdef inline void store(Vector *v, Py_ssize_t c, double value) noexcept nogil:
    """What overflows in float32 becomes infinite."""
    cdef float f
    if v.size == sizeof(float):
        f = <float>value
        copy_element(v.data + c * v.stride, <char *>&f, sizeof(float), v.swapped)
    else:
        copy_element(v.data + c * v.stride, <char *>&value, sizeof(double), v.swapped)


cdef inline bint is_plain_float32(const Vector *v) noexcept:
    return v.size == sizeof(float) and v.stride == sizeof(float) and not v.swapped


cdef void widen(double *to, const float *of, Py_ssize_t n) noexcept:
    """Copy float32 values in a loop that the compiler makes vectors of."""
    cdef Py_ssize_t c
    for c in range(n):
        to[c] = of[c]


cdef bint is_float(cnp.ndarray a) noexcept:
    return cnp.PyArray_NDIM(a) == 1 and (cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT or cnp.PyArray_TYPE(a) == cnp.NPY_DOUBLE)


cdef Vector writable(cnp.ndarray a, Py_ssize_t n, str name) except *:
    """Refuse what has become unfit since the caller checked it: another shape or dtype, or read-only. None passes."""
    if a is None:
        return vector_of(a)
    if not is_float(a) or cnp.PyArray_SIZE(a) != n:
        raise ValueError(f"{name} has become an array of {a.dtype} of shape {np.shape(a)}; expected ({n},) floats")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} is read-only, but has to be updated")
    return vector_of(a)


def check_writable(tuple arrays, tuple names):
    """Refuse a read-only array by its name; None passes."""
    cdef cnp.ndarray a
    cdef Py_ssize_t i
    for i in range(len(arrays)):
        a = arrays[i]
        if a is not None and not cnp.PyArray_ISWRITEABLE(a):
            raise ValueError(f"{names[i]} is read-only, but has to be updated")


cdef cnp.ndarray new_doubles(cnp.npy_intp n):
    return cnp.PyArray_SimpleNew(1, &n, cnp.NPY_DOUBLE)


cdef bint same_kind(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether b can be a copy of a still: since b was made, other code may have run."""
    return cnp.PyArray_NDIM(a) <= 1 and cnp.PyArray_SIZE(a) == cnp.PyArray_SIZE(b) \
        and cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(b) and cnp.PyArray_ITEMSIZE(a) == cnp.PyArray_ITEMSIZE(b)


cdef tuple doubles_of(Py_ssize_t n, tuple arrays):
    cdef cnp.ndarray a, copy
    cdef Vector v
    cdef Py_ssize_t c
    cdef double *to
    cdef int i
    cdef bint torn = False
    cdef list copies = []
    for array in arrays:
        if array is None:
            copies.append(None)
        else:
            a = array
            if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_SIZE(a) != n or not (
                    is_float(a) or a.dtype.kind == "f" or a.dtype.name == "bfloat16"):    # assigned to in place
                raise ValueError(f"an array of the layer has become one of {a.dtype} of shape {np.shape(a)}; "
                                 f"expected ({n},) floats")
            copies.append(new_doubles(n) if is_float(a) else np.empty(n, a.dtype))
    for i in range(len(copies)):
        if copies[i] is None:
            continue
        a, copy = <cnp.ndarray>arrays[i], <cnp.ndarray>copies[i]
        v = vector_of(a)
        if is_float(a) and cnp.PyArray_TYPE(copy) == cnp.NPY_DOUBLE and cnp.PyArray_SIZE(copy) == v.n:
            to = <double *>cnp.PyArray_DATA(copy)
            if v.size == sizeof(double) and v.stride == sizeof(double) and not v.swapped:
                memcpy(to, v.data, v.n * sizeof(double))
            elif is_plain_float32(&v):
                widen(to, <float *>v.data, v.n)
            else:
                for c in range(v.n):
                    to[c] = load(&v, c)
        elif same_kind(a, copy):
            for c in range(v.n):
                memcpy(cnp.PyArray_BYTES(copy) + c * v.size, v.data + c * v.stride, v.size)
        else:
            torn = True
    if torn:
        raise ValueError("an array of parameters or statistics has been resized while it was read")
    for i in range(len(copies)):
        if copies[i] is not None and cnp.PyArray_TYPE(<cnp.ndarray>copies[i]) != cnp.NPY_DOUBLE:
            copies[i] = np.asarray(copies[i], np.float64)
    return tuple(copies)


def as_doubles(n, *arrays):
    """Contiguous float64 copies of (n,) arrays of any float dtype as they are at one moment; None for None."""
    try:
        return doubles_of(n, arrays)
    except MemoryError:
        empty_cache()
    return doubles_of(n, arrays)


def rounded(cnp.ndarray values, dtype):
    """Float64 values as a new array of a float dtype; what overflows becomes infinite, without a warning."""
    cdef Vector to
    cdef Py_ssize_t c
    new = np.empty(cnp.PyArray_SIZE(values), dtype)
    if not is_float(new):
        with np.errstate(all="ignore"):
            new[...] = values
        return new
    to = vector_of(new)
    for c in range(to.n):
        store(&to, c, (<double *>cnp.PyArray_DATA(values))[c])
    return new


cdef tuple copies_of(tuple arrays):
    cdef cnp.ndarray a, copy
    cdef Vector v
    cdef Py_ssize_t c
    cdef int i
    cdef bint torn = False
    cdef list new = []
    for array in arrays:
        if array is not None and (np.ndim(array) > 1 or array.dtype.hasobject):
            raise ValueError(f"an array of the layer has become one of {array.dtype} of shape {np.shape(array)}")
        new.append(None if array is None else np.empty(np.shape(array), array.dtype))
    for i in range(len(new)):
        if new[i] is None:
            continue
        a, copy = <cnp.ndarray>arrays[i], <cnp.ndarray>new[i]
        v = vector_of(a)
        torn |= not same_kind(a, copy)
        for c in range(0 if torn else v.n):
            memcpy(cnp.PyArray_BYTES(copy) + c * v.size, v.data + c * v.stride, v.size)
    if torn:
        raise ValueError("an array of parameters or statistics has been resized while it was read")
    return tuple(new)


def copies(*arrays):
    """Contiguous copies of arrays of one dimension, or none, as they are at one moment; None for None."""
    try:
        return copies_of(arrays)
    except MemoryError:
        empty_cache()
    return copies_of(arrays)


def replace(targets, values, names):
    """targets[i][...] = values[i] for all at one moment, or none; None is passed over.

    Both of one dimension or none, and of the same dtype, which may be any that holds no objects.
    """
    cdef cnp.ndarray a, value
    cdef Vector v
    cdef Py_ssize_t c
    cdef int i
    cdef tuple of = tuple([None if value is None else np.ascontiguousarray(value) for value in values])
    cdef tuple to = tuple(targets)
    for a, value, name in zip(to, of, names, strict=True):
        if a is None:
            continue
        if not same_kind(a, value) or cnp.PyArray_NDIM(a) > 1 or not cnp.PyArray_ISNOTSWAPPED(a):
            raise ValueError(f"{name} has become an array of {a.dtype} of shape {np.shape(a)}")
        if not cnp.PyArray_ISWRITEABLE(a):
            raise ValueError(f"{name} is read-only, but has to be updated")
    for i in range(len(to)):
        if to[i] is None:
            continue
        a, value = <cnp.ndarray>to[i], <cnp.ndarray>of[i]
        v = vector_of(a)
        for c in range(v.n):
            memcpy(v.data + c * v.stride, cnp.PyArray_BYTES(value) + c * v.size, v.size)


def add(targets, values, names):
    """targets[i] += values[i] in float64 for all at one moment, or none; None is passed over. values are float64."""
    cdef Vector v[2]
    cdef double *of[2]
    cdef Py_ssize_t c
    cdef int i, n = 0
    if len(targets) > 2:
        raise ValueError("weight and bias are two")
    for a, value, name in zip(targets, values, names, strict=True):
        if a is not None:
            v[n] = writable(a, cnp.PyArray_SIZE(value), name)
            of[n] = <double *>cnp.PyArray_DATA(value)
            n += 1
    for i in range(n):
        for c in range(v[i].n):
            store(&v[i], c, load(&v[i], c) + of[i][c])


cdef void move_floats(float *mean, float *var, const double *batch_mean, const double *batch_m2, double m,
                      double divisor, Py_ssize_t n) noexcept:
    """The usual case of `move_running`, in loops that the compiler makes vectors of."""
    cdef Py_ssize_t c
    for c in range(n):
        mean[c] = <float>((1 - m) * mean[c] + m * batch_mean[c])
    for c in range(n):
        var[c] = <float>((1 - m) * var[c] + m * (batch_m2[c] / divisor))


cpdef object move_running(cnp.ndarray mean, cnp.ndarray var, cnp.ndarray counter, cnp.ndarray batch_mean,
                          cnp.ndarray batch_m2, double count, momentum, bint unbiased=True, tuple old=None,
                          dict attributes=None, saved=None, cnp.ndarray skipped=None):
    """Count a batch and move the running statistics by it: (1 - momentum)*running + momentum*batch, in float64.

    mean, var, counter: those that there are; both statistics, or neither. batch_mean, batch_m2: contiguous float64.
    momentum: None for 1/(batches counted so far, this one too). old: mean and variance before, as float64, where an
    output has been written over them. attributes: of the layer, whose "_saved" becomes `saved` at the same moment.
    skipped: contiguous int64, one more for a channel whose batch statistics are not finite: its running ones stay.
    """
    cdef Vector to_mean, to_var, to_counter
    cdef Py_ssize_t c, n = cnp.PyArray_SIZE(batch_mean)
    cdef double m = 0, divisor = count - 1 if unbiased else count, old_mean, old_var
    cdef double *of_mean = <double *>cnp.PyArray_DATA(batch_mean)
    cdef double *of_m2 = <double *>cnp.PyArray_DATA(batch_m2)
    cdef double *from_mean = NULL
    cdef double *from_var = NULL
    cdef int64_t batches = 0
    to_mean, to_var, to_counter = writable(mean, n, "running_mean"), writable(var, n, "running_var"), vector_of(counter)
    if old is not None:
        from_mean, from_var = <double *>cnp.PyArray_DATA(old[0]), <double *>cnp.PyArray_DATA(old[1])
    if counter is not None:
        if cnp.PyArray_SIZE(counter) != 1 or counter.dtype != np.int64:
            raise ValueError(f"num_batches_tracked has become an array of {counter.dtype}; expected an int64 number")
        if not cnp.PyArray_ISWRITEABLE(counter):
            raise ValueError("num_batches_tracked is read-only, but has to be updated")
    if momentum is not None:
        m = momentum
    before = None    # dies behind the last write: a weak reference to an array of it may call anything
    if attributes is not None:
        before = attributes.get("_saved")
        PyDict_SetItem(attributes, "_saved", saved)
    if counter is not None:
        copy_element(<char *>&batches, to_counter.data, sizeof(int64_t), to_counter.swapped)
        batches += batches < INT64_MAX
        copy_element(to_counter.data, <char *>&batches, sizeof(int64_t), to_counter.swapped)
        if momentum is None:
            m = 1 / <double>batches
    if old is None and skipped is None and is_plain_float32(&to_mean) and is_plain_float32(&to_var):
        move_floats(<float *>to_mean.data, <float *>to_var.data, of_mean, of_m2, m, divisor, n)
        return before
    for c in range(to_mean.n):
        if skipped is not None and not (isfinite(of_mean[c]) and isfinite(of_m2[c])):
            (<int64_t *>cnp.PyArray_DATA(skipped))[c] += 1
            continue
        old_mean = from_mean[c] if from_mean != NULL else load(&to_mean, c)
        old_var = from_var[c] if from_var != NULL else load(&to_var, c)
        store(&to_mean, c, (1 - m) * old_mean + m * of_mean[c])
        store(&to_var, c, (1 - m) * old_var + m * (of_m2[c] / divisor))
    return before
