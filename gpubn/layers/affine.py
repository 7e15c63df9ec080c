"""The fully connected layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpubn import backend
from gpubn.backend import Array, is_cuda, namespace, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.layers import _check


class _Cache(NamedTuple):
    x: Array
    w: Array
    reproducible: bool


@foreign
def affine_forward(
    x: Array, w: Array, b: Array, reproducible: bool | None = None
) -> tuple[Array, Any]:
    """Return ``x.reshape(N, -1) @ w + b`` and a cache.

    Parameters
    ----------
    x : array (N, d1, ..., dk), float32 or float64
    w : array (D, M), with D = d1 * ... * dk
    b : array (M,)
    reproducible : bool, optional
        Whether the matrix products, the backward pass's too, are to have the same bits on every
        device; by default as ``GPUBN_REPRODUCIBLE`` says, else False.

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
    By default the products run on the device's BLAS, whose rounding differs between devices.
    Reproducible ones add up in one order, each output by one chain of fused multiply-adds.
    """
    reproducible = backend.reproducible(reproducible)
    _check.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}, expected (N, d1, ...)")
    _check.floating("w", w, ndim=2)
    _check.like("w", w, (math.prod(x.shape[1:]), w.shape[1]), x)
    _check.like("b", b, (w.shape[1],), x)
    with scope_of(x):
        rows, w_rows = _operands(reproducible, _rows(x), w)
        out = _product(rows, w_rows, reproducible)
        for_array("gemm", x).add_bias(out, b)
    return out, _Cache(x, w, reproducible)


@foreign
def affine_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return dx (in x's shape), dw and db for ``dout (N, M)``."""
    dw, db = affine_parameter_gradients(dout, cache)
    x, w, reproducible = cache
    with scope_of(x):
        w, dout = _operands(reproducible, w, dout)
        dx = _product(dout, w.T, reproducible).reshape(x.shape)
    return dx, dw, db


@foreign
def affine_parameter_gradients(dout: Array, cache: Any) -> tuple[Array, Array]:
    """Return dw and db alone, as ``affine_backward`` does: a network's input needs no gradient.

    There dx takes as long as dw.
    """
    _check.cache_of("affine", cache, _Cache)
    x, w, reproducible = cache
    _check.like("dout", dout, (x.shape[0], w.shape[1]), x)
    with scope_of(x):
        rows, dout = _operands(reproducible, _rows(x), dout)
        dw = _product(rows.T, dout, reproducible)
        db = for_array("samples", dout).channel_sum(dout[None, :, :, None])
    return dw, db


def _rows(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _operands(reproducible: bool, *matrices: Array) -> tuple[Array, ...]:
    """Return matrices as the products take them: ours any layout, a BLAS the plain one.

    For another layout a BLAS adds in another order.
    """
    return matrices if reproducible else tuple(map(_plain, matrices))


def _product(a: Array, b: Array, reproducible: bool) -> Array:
    return for_array("gemm", a).matmul(a, b) if reproducible else a @ b


def _plain(array: Array) -> Array:
    """Return the array in C order, aligned."""
    if is_cuda(array):
        array = namespace(array).ascontiguousarray(array)
        return array.copy() if array.data.ptr % 16 else array
    return np.require(np.asarray(array), requirements=["C", "A"])
