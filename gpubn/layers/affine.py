"""The fully connected layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpubn.backend import Array, is_cuda, namespace, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check


class _Cache(NamedTuple):
    x: Array
    w: Array


def affine_forward(x: Array, w: Array, b: Array) -> tuple[Array, Any]:
    """Return ``x.reshape(N, -1) @ w + b`` and a cache.

    Parameters
    ----------
    x : array (N, d1, ..., dk), float32 or float64
    w : array (D, M), with D = d1 * ... * dk
    b : array (M,)

    Returns
    -------
    out : array (N, M), x's dtype
    cache
        For ``affine_backward``.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices do not fit.

    Notes
    -----
    The product runs on the device's BLAS, whose rounding differs between devices.
    """
    _check.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}, expected (N, d1, ...)")
    _check.floating("w", w, ndim=2)
    _check.like("w", w, (math.prod(x.shape[1:]), w.shape[1]), x)
    _check.like("b", b, (w.shape[1],), x)
    with scope_of(x):
        out = _rows(x) @ _plain(w)
        out += b
    return out, _Cache(x, w)


def affine_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return dx (in x's shape), dw and db for ``dout (N, M)``."""
    _check.cache_of("affine", cache, _Cache)
    x, w = cache
    _check.like("dout", dout, (x.shape[0], w.shape[1]), x)
    with scope_of(x):
        dout = _plain(dout)
        dx = (dout @ _plain(w).T).reshape(x.shape)
        dw = _rows(x).T @ dout
        db = for_array("columns", dout).column_sum(dout)
    return dx, dw, db


def _rows(x: Array) -> Array:
    return _plain(x).reshape(x.shape[0], -1)


def _plain(array: Array) -> Array:
    """Return the array in C order, aligned: a BLAS adds in another order for another layout."""
    if is_cuda(array):
        array = namespace(array).ascontiguousarray(array)
        return array.copy() if array.data.ptr % 16 else array
    return np.require(np.asarray(array), requirements=["C", "A"])
