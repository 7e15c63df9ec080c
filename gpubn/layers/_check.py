"""What layers refuse, in one voice: the argument's name, what came, what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from gpubn.backend import Array, is_array, place, scope_of, to_host
from gpubn.kernels.statistics import accumulator

FLOATS = ("float32", "float64")
_DTYPES = frozenset(np.dtype(name) for name in FLOATS)  # in the machine's own order of bytes
HALVES = ("float16", "bfloat16")
"""Of the layers that take them; bfloat16 is ml_dtypes', which is not imported for its name."""


def array(name: str, value: Any) -> None:
    """Require a NumPy or CuPy array, and no masked one, whose mask would go unheeded."""
    if type(value) is np.ndarray:  # as most are
        return
    if not is_array(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a NumPy or CuPy array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, expected a plain array: fill its gaps first")
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} is a matrix, expected a plain array: numpy.asarray makes one")


def floating(name: str, value: Array, ndim: int | None = None, half: bool = False) -> None:
    """Require a float32 or float64 array that is not empty, of ``ndim`` dimensions if given.

    With ``half`` one of float16 or bfloat16 will do.
    """
    array(name, value)
    if not is_floating(value.dtype, half):
        expected = "float16, bfloat16, float32 or float64" if half else "float32 or float64"
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {value.shape}, expected {ndim} dimensions")
    if value.size == 0:
        raise ValueError(f"{name} has shape {value.shape}, expected at least one value")


def like(name: str, value: Array, shape: tuple[int, ...], x: Array, x_name: str = "x") -> None:
    """Require an array of this shape, of ``x``'s dtype and on ``x``'s device."""
    if type(value) is type(x) is np.ndarray and value.shape == shape and value.dtype == x.dtype:
        return  # as most are
    array(name, value)
    same_place(name, value, x, x_name)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {x.dtype} as {x_name} has")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, expected {shape}")


def is_floating(dtype: np.dtype[Any], half: bool = False) -> bool:
    """Tell whether layers take arrays of this dtype, in the machine's own order of bytes."""
    if dtype in _DTYPES:  # as most are: their names take longer
        return True
    return half and dtype.isnative and dtype.name in HALVES


def boolean(name: str, value: Any) -> bool:
    """Require True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def parameter(name: str, value: Array, shape: tuple[int, ...], x: Array) -> None:
    """Require a parameter or statistic of this shape, of the dtype that ``x`` is computed with."""
    usual = type(value) is type(x) is np.ndarray and value.shape == shape
    if usual and value.dtype == (x.dtype if x.itemsize > 2 else np.float32):
        return
    array(name, value)
    same_place(name, value, x)
    dtype = accumulator(x)
    if value.dtype != dtype:
        why = "as x has" if dtype == x.dtype else f"as parameters have beside {x.dtype} arrays"
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype} {why}")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, expected {shape}")


def last_axes(name: str, value: Any, x: Array) -> tuple[int, ...]:
    """Return the shape of x's last axes, as many as the parameter has: at least one."""
    array(name, value)
    if not 1 <= value.ndim <= x.ndim:
        raise ValueError(
            f"{name} has shape {value.shape}, expected the shape of the last axes of x {x.shape}"
        )
    shape: tuple[int, ...] = x.shape[x.ndim - value.ndim :]
    return shape


def axis(value: Any, ndim: int, least: int = 0) -> int:
    """Require an axis of so many dimensions, counted from the end if negative; return it from 0."""
    number = _index("axis", value)
    if isinstance(value, bool) or not -ndim <= number < ndim:
        raise ValueError(f"axis is {value!r}, expected one of {ndim} dimensions")
    number %= ndim
    if number < least:
        raise ValueError(f"axis is {value!r}, expected a channel axis after the samples' axis 0")
    return number


def same_place(name: str, value: Array, x: Array, x_name: str = "x") -> None:
    """Require an array on ``x``'s device."""
    if place(value) != place(x):
        raise ValueError(
            f"{name} is on {place(value)} and {x_name} on {place(x)}, expected one device"
        )


def labels(y: Array, x: Array) -> Array:
    """Require labels ``(N,)`` for scores ``x (N, C)``; return them as int64 on ``x``'s device."""
    label_array(y, x.shape[0])
    same_place("y", y, x)
    label_range(y, x.shape[1])
    return y.astype(np.int64, copy=False)


def label_array(y: Array, count: int, name: str = "y") -> None:
    """Require an integer array ``(count,)``."""
    array(name, y)
    if y.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {y.dtype}, expected integers")
    if y.shape != (count,):
        raise ValueError(f"{name} has shape {y.shape}, expected ({count},)")


def label_range(y: Array, classes: int, name: str = "y") -> None:
    """Require labels from 0 to ``classes - 1``. On CUDA this copies two numbers to the host."""
    with scope_of(y):
        low, high = int(to_host(y.min())), int(to_host(y.max()))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} has a label {wrong}, expected 0 to {classes - 1}")


def mapping(name: str, value: Any, *, mutable: bool = False) -> None:
    """Require a dict, or what behaves like one."""
    if not isinstance(value, MutableMapping if mutable else Mapping):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a dict")


def number(name: str, value: Any) -> float:
    """Require a finite real number, not a bool."""
    if type(value) is float and math.isfinite(value):  # as most are
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return number


def whole(name: str, value: Any, least: int = 1) -> int:
    """Require a whole number of at least ``least``, not a bool."""
    number = _index(name, value)
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return number


def counter(name: str, value: Any, bits: int) -> int:
    """Require a whole number of so many bits: a seed, or a count of the random generator."""
    number = _index(name, value)
    if isinstance(value, bool) or not 0 <= number < 2**bits:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 0 to 2**{bits} - 1")
    return number


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a whole number") from None


def epsilon(value: Any, dtype: Any) -> float:
    """Require an ``eps`` above 0 that is so in ``dtype`` too."""
    if type(value) is float and (value, dtype) in _epsilons:  # every layer's call asks
        return value
    eps = number("eps", value)
    if not eps > 0:
        raise ValueError(f"eps is {value!r}, expected a number above 0")
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.dtype(dtype).type(eps))
    if rounded == 0 or math.isinf(rounded):
        raise ValueError(f"eps is {value!r}, which is {rounded} in {np.dtype(dtype)}")
    if len(_epsilons) < 100:
        _epsilons.add((eps, np.dtype(dtype)))
    return eps


_epsilons: set[tuple[float, np.dtype[Any]]] = set()


def mode(name: str, params: Mapping[str, Any]) -> str:
    """Require ``params["mode"]`` to be 'train' or 'test'."""
    if "mode" not in params:
        raise ValueError(f"{name} has no 'mode', expected 'train' or 'test'")
    value = params["mode"]
    if not isinstance(value, str) or value not in ("train", "test"):
        raise ValueError(f"{name}['mode'] is {value!r}, expected 'train' or 'test'")
    return str(value)


def cache_of(layer: str, cache: Any, kind: type) -> None:
    """Require the cache that this layer's forward returned."""
    if not isinstance(cache, kind):
        raise TypeError(
            f"cache is a {type(cache).__name__}, expected the one that {layer}_forward returned"
        )
