"""What layers refuse, in one voice: the argument's name, what came, what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from gpubn.backend import Array, is_array, place, scope_of, to_host

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def array(name: str, value: Any) -> None:
    """Require a NumPy or CuPy array, and no masked one, whose mask would go unheeded."""
    if not is_array(value):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a NumPy or CuPy array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, expected a plain array: fill its gaps first")
    if isinstance(value, np.matrix):
        raise TypeError(f"{name} is a matrix, expected a plain array: numpy.asarray makes one")


def floating(name: str, value: Array, ndim: int | None = None) -> None:
    """Require a float32 or float64 array that is not empty, of ``ndim`` dimensions if given."""
    array(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32 or float64")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {value.shape}, expected {ndim} dimensions")
    if value.size == 0:
        raise ValueError(f"{name} has shape {value.shape}, expected at least one value")


def like(name: str, value: Array, shape: tuple[int, ...], x: Array, x_name: str = "x") -> None:
    """Require an array of this shape, of ``x``'s dtype and on ``x``'s device."""
    array(name, value)
    same_place(name, value, x, x_name)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {x.dtype} as {x_name} has")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, expected {shape}")


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
    eps = number("eps", value)
    if not eps > 0:
        raise ValueError(f"eps is {value!r}, expected a number above 0")
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.dtype(dtype).type(eps))
    if rounded == 0 or math.isinf(rounded):
        raise ValueError(f"eps is {value!r}, which is {rounded} in {np.dtype(dtype)}")
    return eps


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
