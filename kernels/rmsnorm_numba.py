"""RMS norm of every row of ``x (N, D)``, on the CPU. The same bits as rmsnorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.layernorm_numba import row_gradients
from gpubn.kernels.planes_numba import row_sum, workspace
from gpubn.kernels.real_numba import narrow, stored, widen
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import split


def forward(x: Array, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return out ``(N, D)`` and the rows' ``1 / sqrt(mean(x**2) + eps)``, ``(N,)``."""
    rows, columns = x.shape
    real = accumulator(x).type
    out, invrms = np.empty(x.shape, x.dtype), np.empty(rows, real)
    square_scale = real(0.5 ** (columns - 1).bit_length())
    arguments = (*stored(x), *plain(gamma), *stored(out), invrms, real(eps), square_scale)
    split(lambda a, b: _forward(*arguments, a, b), rows, x.size)
    return out, invrms


def backward_dx(dout: Array, x: Array, gamma: Array, invrms: Array) -> Array:
    """Return dx ``(N, D)``."""
    dx = np.empty(x.shape, x.dtype)
    arguments = (*stored(dout, x), *plain(gamma, invrms), *stored(dx))
    split(lambda a, b: _backward_dx(*arguments, a, b), dx.shape[0], dx.size)
    return dx


def backward_sums(dout: Array, x: Array, invrms: Array) -> Array:
    """Return dgamma ``(D,)``: the sum over rows of ``dout * xhat``."""
    zeros = np.zeros_like(invrms)  # layer norm's, of a row that has no mean
    return row_gradients(dout, x, zeros, zeros, *plain(invrms))[0]


@compiled
def _forward(
    x: Any, gamma: Any, out: Any, invrms: Any, eps: Any, square_scale: Any, first: int, last: int
) -> None:
    real = gamma.dtype.type
    columns = x.shape[1]
    work, squares = workspace(gamma), np.empty(columns, gamma.dtype)
    for r in range(first, last):
        xr, y = x[r], out[r]
        for j in range(columns):
            squares[j] = (widen(xr[j]) * square_scale) * widen(xr[j])
        s = real(1) / np.sqrt(row_sum(squares, work) / (real(columns) * square_scale) + eps)
        for j in range(columns):
            y[j] = narrow((widen(xr[j]) * s) * gamma[j], y)
        invrms[r] = s


@compiled
def _backward_dx(
    dout: Any, x: Any, gamma: Any, invrms: Any, dx: Any, first: int, last: int
) -> None:
    columns = x.shape[1]
    count = gamma.dtype.type(columns)
    work, rows = workspace(gamma), np.empty((3, columns), gamma.dtype)
    g, gx, xhat = rows[0], rows[1], rows[2]
    for r in range(first, last):
        dr, xr, y, s = dout[r], x[r], dx[r], invrms[r]
        for j in range(columns):
            g[j] = widen(dr[j]) * gamma[j]
            xhat[j] = widen(xr[j]) * s
            gx[j] = g[j] * xhat[j]
        mean_gx = row_sum(gx, work) / count
        for j in range(columns):
            y[j] = narrow(s * (g[j] - xhat[j] * mean_gx), y)
