"""How the CPU kernels are compiled, and the one form of array that they are given."""

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from gpubn.backend import Array
from gpubn.kernels.cache_numba import KernelCache, Unkept

# error_model="numpy": a division by zero gives an infinity, as on CUDA, and costs no branch.
# fastmath stays off: no fused multiply-add, no other order of additions, no flushing to zero.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel at its first call, for the dtypes that it meets; kept on disk."""
    kernel: Any = numba.njit(**OPTIONS)(function)
    try:
        kernel._cache = KernelCache(function)
    except RuntimeError:  # Numba found no folder that it may write to
        kernel._cache = Unkept()
    return cast(Callable[..., Any], kernel)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of kernels, which becomes one with each kernel that calls it."""
    return cast(Callable[..., Any], numba.njit(forceinline=True, **OPTIONS)(function))


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded once; for compiled code, of scalars of one dtype.

    A processor without the instruction calls the C library's function, which is as exact.
    """
    return a(a, a, a), lambda context, builder, signature, values: builder.fma(*values)


@intrinsic
def bits(context: Any, value: Any) -> Any:
    """Return the bits of a float as a signed integer of its size; for compiled code."""
    return _reinterpret(value, types.int32 if value == types.float32 else types.int64)


@intrinsic
def from_bits(context: Any, value: Any) -> Any:
    """Return the float of these bits, an int32 or int64; for compiled code."""
    return _reinterpret(value, types.float32 if value == types.int32 else types.float64)


def _reinterpret(old: Any, new: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], context.get_value_type(new))

    return new(old), generate


def plain(*arrays: Array) -> tuple[Any, ...]:
    """Return the arrays in C order, aligned and writable: one array type, so one compilation.

    Only what is not in C order is copied. A read-only array gives a view that Numba takes for
    writable; no kernel writes to its inputs.
    """
    return tuple(map(_plain, arrays))


class _Lent:
    """Lends a read-only array's memory to a view that does not know that it is read-only."""

    def __init__(self, array: Array) -> None:
        self._owner = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _plain(array: Array) -> Any:
    if type(array) is np.ndarray and array.flags.carray:  # C order, aligned, writable
        return array
    array = np.asarray(array)  # of a subclass, a memmap say, the plain array
    if array.flags.carray:
        return array
    array = np.require(array, requirements=["C", "A"])
    return array if array.flags.writeable or array.size == 0 else np.asarray(_Lent(array))
