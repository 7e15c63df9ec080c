"""What layers refuse, in one voice: the argument's name, what came, what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from gpubn.backend import Array, is_array, place, to_host

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def floating(name: str, array: Array, ndim: int | None = None) -> None:
    """Require a float32 or float64 array that is not empty, of ``ndim`` dimensions if given."""
    _array(name, array)
    if array.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {array.dtype}, expected float32 or float64")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}, expected {ndim} dimensions")
    if array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, expected at least one value")


def like(name: str, array: Array, shape: tuple[int, ...], x: Array, x_name: str = "x") -> None:
    """Require an array of this shape, of ``x``'s dtype and on ``x``'s device."""
    _array(name, array)
    if place(array) != place(x):
        raise ValueError(
            f"{name} is on {place(array)} and {x_name} on {place(x)}, expected one device"
        )
    if array.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {x.dtype} as {x_name} has")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")


def labels(y: Array, x: Array) -> Array:
    """Require labels ``(N,)`` for scores ``x (N, C)``; return them as int64 on ``x``'s device."""
    label_array(y, x.shape[0])
    if place(y) != place(x):
        raise ValueError(f"y is on {place(y)} and x on {place(x)}, expected one device")
    label_range(y, x.shape[1])
    return y.astype(np.int64, copy=False)


def label_array(y: Array, count: int, name: str = "y") -> None:
    """Require an integer array ``(count,)``."""
    if not is_array(y):
        raise TypeError(f"{name} is a {type(y).__name__}, expected a NumPy or CuPy array")
    if y.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {y.dtype}, expected integers")
    if y.shape != (count,):
        raise ValueError(f"{name} has shape {y.shape}, expected ({count},)")


def label_range(y: Array, classes: int, name: str = "y") -> None:
    """Require labels from 0 to ``classes - 1``. On CUDA this copies two numbers to the host."""
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
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return float(value)


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
    if value not in ("train", "test"):
        raise ValueError(f"{name}['mode'] is {value!r}, expected 'train' or 'test'")
    return str(value)


def cache_of(layer: str, cache: Any, kind: type) -> None:
    """Require the cache that this layer's forward returned."""
    if not isinstance(cache, kind):
        raise TypeError(
            f"cache is a {type(cache).__name__}, expected the one that {layer}_forward returned"
        )


def _array(name: str, array: Array) -> None:
    if not is_array(array):
        raise TypeError(f"{name} is a {type(array).__name__}, expected a NumPy or CuPy array")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, expected a plain array: fill its gaps first")
