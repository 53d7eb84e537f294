# Calls that repeat: an evaluation with everything prepared that does not depend on the values of its arrays.
"""Plans of evaluations, and the base of the layers, whose calls go through them. Internal."""
cimport cython
cimport numpy as cnp
from cpython.dict cimport PyDict_Size
from cpython.object cimport PyObject_GenericSetAttr
from libc.string cimport memcmp, memcpy

from .arrays cimport (
    Input,
    Kind,
    Layout,
    act_of,
    element_of,
    empty_like,
    is_of,
    kind_of,
    overlap_partly,
    phantom_like,
)
from .coefficients cimport FORWARD_ROWS
from .engine cimport (
    active,
    choose_and_apply,
    make_job,
    set_coefficients,
    set_output,
)
from .job cimport Job, set_epilogue
from .kernels cimport cbn_isa

import inspect
import types

import numpy as np

cnp.import_array()

cdef extern from *:
    """
    /* What CPython's cache of attributes goes by: a new number after each change of the type or of a base; 0: none. */
    #if PY_VERSION_HEX < 0x030c0000
    #define TYPE_VERSION(self) \
        (PyType_HasFeature(Py_TYPE(self), Py_TPFLAGS_VALID_VERSION_TAG) ? Py_TYPE(self)->tp_version_tag : 0)
    #else
    #define TYPE_VERSION(self) (Py_TYPE(self)->tp_version_tag)
    #endif
    """
    unsigned int TYPE_VERSION(object self)
    object PyObject_GenericGetDict(object self, void *context)
    int delete_attribute "PyObject_GenericSetAttr"(object self, object name, void *none) except -1


class _CallSignature:
    """`inspect.signature` of an instance is that of its forward; of a class that of its constructor, as ever."""
    def __get__(self, instance, owner=None):
        if instance is None:
            raise AttributeError("__signature__")
        called = owner.__call__ if owner.__call__ is not Planned.__call__ else None    # one of the user's own
        return inspect.signature(instance.forward if called is None else types.MethodType(called, instance))


cdef bint usable(cnp.ndarray a, Py_ssize_t C, int type_num) noexcept:
    """Whether `a` is a contiguous (C,) array of this type."""
    return cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == C and cnp.PyArray_TYPE(a) == type_num \
        and cnp.PyArray_ISCARRAY_RO(a)


@cython.final
cdef class Plan:
    """An evaluation of inputs of one type, shape and strides, with all prepared that does not depend on their values.

    The coefficients are those of arrays that others may write to at any time, so at each call the bytes of the arrays
    are compared with the bytes that the coefficients were made from: a fraction of what making them costs, and no
    change can be missed.
    """
    cdef Job job
    cdef Kind x_kind
    cdef Kind y_kind               # of the output that a call makes itself, for which `job` is
    cdef object y_dtype            # None for x's own
    cdef bint alike                # whether both are one kind
    cdef Py_ssize_t extent         # of the longer one
    cdef const cbn_isa *isa
    cdef tuple sources              # running mean and variance, weight, bias, as far as there are
    cdef int source_types[4]
    cdef cnp.ndarray seen           # their bytes
    cdef cnp.ndarray coef
    cdef Layout layout

    @staticmethod
    def of(Input inp, x, tuple sources, tuple values, cnp.ndarray coef, act=None):
        """The plan for arguments like x, of which inp was made, or None where it could not be used.

        sources: running mean and variance, weight, bias, or None for those that are not there; values: contiguous
        float64 copies of them, from which coef, (3, C), was made. Without sources the plan keeps to coef.
        """
        cdef Plan self
        cdef Layout layout = inp.layout
        cdef cnp.ndarray a, y
        if layout is None or type(x) is not np.ndarray or cnp.PyArray_DATA(x) != cnp.PyArray_DATA(inp.x):
            return None    # of an array that has to be converted or copied at each call
        a = x
        self = Plan()
        self.x_kind = kind_of(a)
        if self.x_kind.extent < 0:
            return None
        self.layout, self.coef = layout, coef
        self.sources = tuple([source for source in sources if source is not None])
        y = phantom_like(a, a.dtype if inp.y_dtype is None else inp.y_dtype)
        self.y_kind, self.y_dtype = kind_of(y), inp.y_dtype
        self.alike = is_of(&self.x_kind, y)
        self.extent = max(self.x_kind.extent, self.y_kind.extent)
        if cnp.PyArray_NDIM(coef) != 2 or coef.shape[0] != FORWARD_ROWS or coef.shape[1] != layout.extents.C:
            raise ValueError(f"there are coefficients of shape {np.shape(coef)} for {layout.extents.C} channels")
        self.job = make_job(&layout.extents, layout.view(a), element_of(a), cnp.PyArray_ITEMSIZE(a), inp.in_float64)
        set_coefficients(&self.job, <double *>cnp.PyArray_DATA(coef))
        set_epilogue(&self.job, self.job.z, act_of(act))
        set_output(&self.job, &layout.extents, layout.view(y), cnp.PyArray_ITEMSIZE(y))
        self.isa = active
        # From here on no Python code: what is seen must be what the values were made from
        self.seen = np.empty(len(self.sources) * layout.extents.C * sizeof(double), np.uint8)
        return self if self.see(tuple([value for value in values if value is not None])) else None

    cdef bint see(self, tuple values) noexcept:
        """Keep the bytes of the sources; False unless they are float arrays with just these values."""
        cdef cnp.ndarray a
        cdef Py_ssize_t c, C = self.layout.extents.C
        cdef double *value
        cdef float f
        cdef char *seen = cnp.PyArray_BYTES(self.seen)
        cdef int i
        for i in range(len(self.sources)):
            a = <cnp.ndarray>self.sources[i]
            self.source_types[i] = cnp.PyArray_TYPE(a)
            value = <double *>cnp.PyArray_DATA(<cnp.ndarray>values[i])
            if usable(a, C, cnp.NPY_DOUBLE):
                if memcmp(cnp.PyArray_DATA(a), value, C * sizeof(double)):
                    return False
            elif usable(a, C, cnp.NPY_FLOAT):
                for c in range(C):
                    f = (<float *>cnp.PyArray_DATA(a))[c]
                    if f != value[c] and (f == f or value[c] == value[c]):    # two NaNs are the same
                        return False
            else:
                return False
            memcpy(seen, cnp.PyArray_DATA(a), C * cnp.PyArray_ITEMSIZE(a))
            seen += C * cnp.PyArray_ITEMSIZE(a)
        return True

    cdef bint is_current(self) noexcept:
        """Whether the arrays hold what they held."""
        cdef int i
        cdef Py_ssize_t C = self.layout.extents.C
        cdef char *seen = cnp.PyArray_BYTES(self.seen)
        cdef cnp.ndarray a
        for i in range(len(self.sources)):
            a = <cnp.ndarray>self.sources[i]
            if not usable(a, C, self.source_types[i]) \
                    or memcmp(cnp.PyArray_DATA(a), seen, C * cnp.PyArray_ITEMSIZE(a)):
                return False
            seen += C * cnp.PyArray_ITEMSIZE(a)
        return True

    cdef cnp.ndarray run(self, object x, object out, object residual):
        """y, or None if this plan is not for this call."""
        cdef Job job
        cdef cnp.ndarray y
        cdef bint like_x
        if self.isa != active or type(x) is not cnp.ndarray or not is_of(&self.x_kind, x) or not self.is_current():
            return None
        if residual is not None and (type(residual) is not cnp.ndarray or not is_of(&self.y_kind, residual)):
            return None
        job = self.job
        if out is None:
            y = empty_like(x, self.y_dtype)
        else:
            if type(out) is not cnp.ndarray:
                return None
            y = out
            like_x = is_of(&self.x_kind, y)
            if not cnp.PyArray_ISWRITEABLE(y) or not (like_x or is_of(&self.y_kind, y)) \
                    or overlap_partly(x, y, self.extent, like_x) \
                    or (residual is not None and overlap_partly(residual, y, self.extent, self.alike or not like_x)):
                return None
            if like_x and not self.alike:
                if self.y_dtype is not None:
                    return None    # refused by forward
                # In place, with the gaps of x
                set_output(&job, &self.layout.extents, self.layout.view(y), cnp.PyArray_ITEMSIZE(y))
        job.x.data = job.g.data = cnp.PyArray_BYTES(x)
        job.y.data = cnp.PyArray_BYTES(y)
        if residual is not None:
            set_epilogue(&job, self.layout.view(residual), job.act)
        choose_and_apply(&job)
        return y


cdef list planned_classes = []    # (class, {name: attribute}) for which plans stand


cdef object class_attribute(type cls, str name):
    """What the MRO has under this name, as it is there; None for nothing."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None


def plans_stand_for(cls, *others):
    """Let plans answer for `forward` of a class while nothing overrides what it defines now, but for `others`."""
    bases = cls.__mro__[:cls.__mro__.index(Planned)]
    names = [name for base in bases for name in vars(base) if not name.startswith("__") and name not in others]
    names += ["__getattribute__", "__getattr__", "__setattr__", "__delattr__"]
    planned_classes.append((cls, {name: class_attribute(cls, name) for name in names}))


cdef object attributes_of(object self):
    return PyObject_GenericGetDict(self, NULL)


@cython.auto_pickle(False)
cdef class Planned:
    """Base of the layers: a call that repeats goes through its plan, every other one through `forward`.

    The invariant of a plan: it returns the bits that `forward` would return now. It stands for `forward` as cbn defines
    it and for all that this reads, so it is used only while

    * class: no class of the MRO overrides anything that cbn's class defined when it was imported, be it by a subclass,
      a mixin or a patch. This is looked up when a plan is kept; from then on the type's version tag is compared, which
      CPython changes when the type or one of its bases is changed, and which another class does not have.
    * instance: its `__dict__` has no entry that hides something of the class. An assignment and a deletion drop the
      plan, and the number of entries is compared, since one can be added without an assignment. (Not noticed is what is
      written into `__dict__` itself in the place of another entry: assign, or make a copy of the layer.)
    * attributes: nothing has been assigned since the plan was made (`_version`).
    * arrays: running statistics, weight and bias are of the type, and hold the bytes, that the coefficients were made
      from.
    * arguments: x, out and residual have the type, shape and strides that it was made for; x and out do not overlap in
      part.
    * the instruction set in use is the one that it was made for.
    """
    cdef Plan plan
    cdef unsigned int type_version    # of the type that the plan was kept for
    cdef Py_ssize_t n_attributes      # and entries of the instance's __dict__
    cdef readonly Py_ssize_t _version    # how often something has been assigned
    cdef readonly Py_ssize_t _plans      # kept so far

    def __call__(self, *args, **kwargs):
        """`forward`, which a subclass may override."""
        cdef object y
        cdef Plan plan = self.plan
        if plan is not None and len(args) == 1:
            if not self.is_as_kept():
                self.plan = y = None
            elif not kwargs:
                y = plan.run(args[0], None, None)
            elif len(kwargs) == 1 and "out" in kwargs:
                y = plan.run(args[0], kwargs["out"], None)
            elif len(kwargs) == ("out" in kwargs) + ("residual" in kwargs):
                y = plan.run(args[0], kwargs.get("out"), kwargs.get("residual"))
            else:
                y = None
            if y is not None:
                return y
        return self.forward(*args, **kwargs)

    cdef bint is_as_kept(self):
        """Whether class and instance have what they had when the plan was kept."""
        return TYPE_VERSION(self) == self.type_version and PyDict_Size(attributes_of(self)) == self.n_attributes

    def __setattr__(self, name, value):
        """Whatever is assigned to a layer may change what it computes, so its plan is dropped."""
        self.plan = None
        self._version += 1
        PyObject_GenericSetAttr(self, name, value)

    def __delattr__(self, name):
        """As an assignment."""
        self.plan = None
        self._version += 1
        delete_attribute(self, name, NULL)

    def __reduce_ex__(self, protocol):
        """Protocols 0 and 1 know no classes that are compiled: what protocol 2 does serves them too."""
        return object.__reduce_ex__(self, max(protocol, 2))

    def _has_plan(self, x):
        """Whether the plan is for inputs like x, and still holds."""
        cdef Plan plan = self.plan
        return plan is not None and type(x) is np.ndarray and self.is_as_kept() and plan.isa == active \
            and is_of(&plan.x_kind, x) and plan.is_current()

    def _keep(self, Plan plan, Py_ssize_t version):
        """Use this plan, if there is one, for calls like the last one, where the invariant allows it.

        version: `_version` when the layer's attributes were read.
        """
        cdef dict attributes = attributes_of(self)
        cdef type cls = type(self)
        cdef unsigned int type_version
        if plan is None or version != self._version:
            return
        cls.forward    # CPython gives the type a version now if it has none
        type_version = TYPE_VERSION(self)
        defined = next((defined for base, defined in planned_classes if base in cls.__mro__), None)
        if defined is None or not defined.keys().isdisjoint(attributes):
            return
        if type_version != self.type_version \
                and any([class_attribute(cls, name) is not value for name, value in defined.items()]):
            return
        # CPython runs out of versions after some thousand changes of a class
        if type_version != 0 and type_version == TYPE_VERSION(self):
            self.type_version, self.n_attributes = type_version, len(attributes)
            self._plans += 1
            self.plan = plan

    __signature__ = _CallSignature()
