"""Arrays of other libraries, such as PyTorch's and JAX's: taken and given back without a copy.

Whatever has ``__dlpack__`` shares its memory with a NumPy array, or on CUDA a CuPy array, while a
function runs, and what the function returns goes back as the same library's. No other library is
imported here: one whose array comes in has been already.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain, repeat
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from gpubn.backend import Array, DeviceError, is_array, is_cuda_error, probe, scope_of

P = ParamSpec("P")
R = TypeVar("R")

# DLPack's numbers, from dlpack.h: device types, and the codes of types.
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_UINT, _BFLOAT = 1, 4


def take(value: Any, name: str = "x") -> Array:
    """Return a NumPy or CuPy array that shares the memory of another library's array.

    Parameters
    ----------
    value : array
        Anything with ``__dlpack__``. NumPy and CuPy arrays, and what is no array, are returned as
        they are.
    name : str
        What errors call it.

    Returns
    -------
    array
        CuPy's where the memory is on CUDA, else NumPy's; read-only where the library says so.
        bfloat16 has the dtype of ``ml_dtypes``.

    Raises
    ------
    TypeError
        The library does not share this array: it requires a gradient, is sparse, or the like.
    ValueError
        It is neither on the CPU nor on CUDA.
    DeviceError
        It is on CUDA, which CuPy cannot use; the message has the reason.
    ImportError
        It is of bfloat16 and ml_dtypes is missing.
    """
    if not _is_foreign(value):
        return value
    with _refusals(value, name):
        device, index = map(int, value.__dlpack_device__())
        # PyTorch exports a tensor whose signs are still to be turned as if they were not.
        if hasattr(value, "is_neg") and value.is_neg():
            raise BufferError("its negative bit is set, use tensor.resolve_neg()")
    if device in (_CPU, _CUDA_HOST):
        xp: Any = np
    elif device in (_CUDA, _CUDA_MANAGED):
        outcome = probe(index)
        if not outcome.usable:
            raise DeviceError(f"{name} is on cuda:{index}, which CuPy cannot use: {outcome.reason}")
        xp = sys.modules["cupy"]
    else:
        place = getattr(value, "device", f"DLPack's device type {device}")
        raise ValueError(f"{name} is on {place}, expected the CPU or CUDA")
    exporter = _Retyped(value, _BFLOAT, _UINT)
    with _refusals(value, name):
        array = xp.from_dlpack(exporter)
    if not exporter.done:
        return array
    try:
        return array.view(importlib.import_module("ml_dtypes").bfloat16)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} is of bfloat16, which NumPy has from ml_dtypes: pip install ml_dtypes"
        ) from error


def giver(value: Any) -> Callable[[Array], Any] | None:
    """Return what turns NumPy and CuPy arrays into arrays of the library that ``value`` is of.

    Parameters
    ----------
    value : array
        As ``take`` takes it.

    Returns
    -------
    function or None
        It shares the memory, save of arrays that are read-only or have negative strides, which it
        copies. (JAX on a CPU copies what does not start at a multiple of 64 bytes.) None for NumPy
        and CuPy arrays, and for what is no array.

    Raises
    ------
    TypeError
        The library has no ``from_dlpack``.
    """
    if not _is_foreign(value):
        return None
    from_dlpack = _from_dlpack_of(value)

    def give(array: Array) -> Any:
        with scope_of(array):
            # A tensor of PyTorch's has no negative strides (it ends the process at one), and none
            # is read-only: it would write into what was not to be written to.
            if min(array.strides, default=0) < 0 or not getattr(array.flags, "writeable", True):
                array = array.copy()
            if array.dtype.name == "bfloat16":
                return from_dlpack(_Retyped(array.view(np.uint16), _UINT, _BFLOAT))
            return from_dlpack(array)

    return give


def foreign(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of NumPy and CuPy arrays take other libraries' arrays, and return the same.

    Parameters
    ----------
    function : callable
        Arrays among its arguments, and among the values of dicts there, are taken by ``take``.

    Returns
    -------
    callable
        Arrays and NumPy's numbers that ``function`` returns, alone or in a tuple, come back as
        arrays of the library of the first argument from another; anything else in its result,
        caches above all, as it is. What it sets in a dict comes back as the dict's other arrays,
        or else as the result. Where it raises, and where an array cannot be taken or given back,
        dicts stay as they were.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        values: Any = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            role = _roles[type(value)]
            if role and (role == _FOREIGN or _has_foreign(value)):
                return _Exchange().call(function, names, args, kwargs)
        return function(*args, **kwargs)

    return call


# --- A call with other libraries' arrays ---------------------------------------------------------

_PLAIN, _DICT, _FOREIGN = 0, 1, 2


class _Roles(dict[type, int]):
    """What a type of argument is here. Every layer call asks, so each type is looked at once."""

    def __missing__(self, kind: type) -> int:
        cupy_array = getattr(sys.modules.get("cupy"), "ndarray", ())
        role = _PLAIN
        if issubclass(kind, MutableMapping):
            role = _DICT
        elif hasattr(kind, "__dlpack__") and not issubclass(kind, (np.ndarray, cupy_array)):
            role = _FOREIGN
        self[kind] = role
        return role


_roles = _Roles()


def _is_foreign(value: Any) -> bool:
    return _roles[type(value)] == _FOREIGN


def _has_foreign(holder: Mapping[Any, Any]) -> bool:
    # A plain loop: any() makes a generator, which doubles what this adds to every layer's call.
    for value in holder.values():  # noqa: SIM110 - see above
        if _roles[type(value)] == _FOREIGN:
            return True
    return False


def _first_giver(values: Iterable[Any]) -> Callable[[Array], Any] | None:
    return next((giver(value) for value in values if _is_foreign(value)), None)


def _giver_of_dict(holder: Mapping[Any, Any]) -> Callable[[Array], Any] | None:
    """Return how a dict's arrays come back: as the first of those in it, None if it has none."""
    for value in holder.values():
        if is_array(value):
            return lambda array: array
        if _is_foreign(value):
            return giver(value)
    return None


class _Exchange:
    """One call with other libraries' arrays: what came, and what the function has in its place."""

    def __init__(self) -> None:
        self.ours: dict[int, Array] = {}  # by the id of theirs
        self.theirs: dict[int, Any] = {}  # by the id of ours
        self.dicts: list[tuple[Any, dict[Any, Any], dict[Any, Any], Any]] = []

    def call(
        self,
        function: Callable[..., R],
        names: Iterable[str],
        args: Iterable[Any],
        kwargs: Mapping[str, Any],
    ) -> R:
        """Call ``function`` with arrays of ours, and give back what it returns and sets."""
        give = _first_giver(chain(args, kwargs.values()))
        positional = zip(args, chain(names, repeat("an argument")), strict=False)
        result: Any = function(
            *(self.enter(value, name) for value, name in positional),
            **{name: self.enter(value, name) for name, value in kwargs.items()},
        )
        alone = type(result) is not tuple  # as a cache is, a tuple of a type of its own
        parts = [result] if alone else result
        if give is not None:  # what is a number of NumPy's here is a 0-d array on CUDA
            parts = [np.asarray(v) if isinstance(v, np.generic) else v for v in parts]
        parts = [self.leave(value, give) for value in parts]
        # Giving back may fail, so the caller's dicts are changed last.
        changes = []
        for theirs, before, ours, own in self.dicts:
            new = {k: v for k, v in ours.items() if k not in before or before[k] is not v}
            new = {key: self.leave(value, own or give) for key, value in new.items()}
            changes.append((theirs, before.keys() - ours.keys(), new))
        for theirs, gone, new in changes:
            for key in gone:
                del theirs[key]
            theirs.update(new)
        return cast(R, parts[0] if alone else tuple(parts))

    def enter(self, value: Any, name: str) -> Any:
        """Return an argument as the function takes it."""
        role = _roles[type(value)]
        if role == _FOREIGN:
            # What comes twice is one array inside too.
            if id(value) not in self.ours:
                array = take(value, name)
                self.ours[id(value)], self.theirs[id(array)] = array, value
            return self.ours[id(value)]
        if role == _DICT:
            before = {
                key: self.enter(item, f"{name}[{key!r}]") if _is_foreign(item) else item
                for key, item in value.items()
            }
            ours = dict(before)
            self.dicts.append((value, before, ours, _giver_of_dict(value)))
            return ours
        return value

    def leave(self, value: Any, give: Callable[[Array], Any] | None) -> Any:
        """Return a result as the caller is to have it: his own array, if it is one that came."""
        if id(value) in self.theirs:
            return self.theirs[id(value)]
        return give(value) if give is not None and is_array(value) else value


# --- DLPack --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals(value: Any, name: str) -> Iterator[None]:
    """Name the argument where its library does not share it, in the library's own words."""
    try:
        yield
    # Any library's arrays come here, and each raises types of its own, which cannot be named where
    # the library is not installed. Every one is raised anew, as a TypeError that keeps its text.
    except Exception as error:
        if is_cuda_error(error):
            raise
        if getattr(value, "requires_grad", False):
            reason = f"{name} requires a gradient, and gpubn does not record any"
            raise TypeError(f"{reason}: pass {name}.detach()") from error
        kind = f"{_library(type(value))}.{type(value).__name__}"
        raise TypeError(f"{name} is a {kind} that cannot be shared: {error}") from error


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _from_dlpack_of(value: Any) -> Callable[[Any], Any]:
    """Return the function ``from_dlpack`` of an array's library."""
    places: list[Any] = []
    if hasattr(value, "__array_namespace__"):
        places.append(value.__array_namespace__())
    # A class derived from a library's is not always defined in that library.
    kinds = [kind for kind in type(value).__mro__ if hasattr(kind, "__dlpack__")]
    places += [sys.modules.get(_library(kind)) for kind in kinds]
    for place in places:
        function: Callable[[Any], Any] | None = getattr(place, "from_dlpack", None)
        if function is not None:
            return function
    raise TypeError(
        f"{_library(type(value))} has no from_dlpack, which results would go back through: "
        f"pass NumPy or CuPy arrays in the place of {type(value).__name__}"
    )


class _Retyped:
    """An array that goes through DLPack as one of another type of 16 bits.

    NumPy neither imports nor exports bfloat16, and not every CuPy does, but all know uint16.
    """

    def __init__(self, array: Any, old: int, new: int) -> None:
        self.array, self.old, self.new = array, old, new
        self.done = False

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        capsule = self.array.__dlpack__(*args, **kwargs)
        # Nobody else has seen this capsule, so what is written in it stays between two libraries.
        tensor = _tensor_in(capsule)
        if tensor is not None and (tensor.code, tensor.bits, tensor.lanes) == (self.old, 16, 1):
            tensor.code, self.done = self.new, True
        return capsule


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, up to its type."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h, up to its tensor's type."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Of our own: the functions that ctypes.pythonapi holds have types that others may set.
_capsule_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor_in(capsule: Any) -> _Tensor | None:
    """Return the tensor that a DLPack capsule holds, or None where its layout is not known."""
    if _capsule_is(capsule, b"dltensor"):  # DLManagedTensor, which begins with its tensor
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        return managed.tensor if managed.major == 1 else None
    return None
