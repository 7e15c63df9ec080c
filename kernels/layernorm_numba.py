"""Layer norm of every row of ``x (N, D)``, on the CPU. The same bits as layernorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels import columns_numba
from gpubn.kernels.batchnorm_numba import middle
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.planes_numba import row_moments, row_sum, workspace
from gpubn.kernels.real_numba import narrow, stored, widen
from gpubn.kernels.samples_numba import reduce_channels
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import split


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    rows, real = x.shape[0], accumulator(x)
    out = np.empty(x.shape, x.dtype)
    shift, mean, invstd = (np.empty(rows, real) for _ in range(3))
    arguments = (*stored(x), *plain(gamma, beta), *stored(out), shift, mean, invstd, real.type(eps))
    split(lambda a, b: _forward(*arguments, a, b), rows, x.size)
    return out, shift, mean, invstd


def backward_dx(
    dout: Array, x: Array, gamma: Array, shift: Array, mean: Array, invstd: Array
) -> Array:
    """Return dx ``(N, D)``."""
    dx = np.empty(x.shape, x.dtype)
    arguments = (*stored(dout, x), *plain(gamma, shift, mean, invstd), *stored(dx))
    split(lambda a, b: _backward_dx(*arguments, a, b), dx.shape[0], dx.size)
    return dx


def backward_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return dgamma and dbeta ``(D,)``: the sums over rows of ``dout * xhat`` and of ``dout``."""
    return row_gradients(dout, x, *plain(shift, mean, invstd))


def row_gradients(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return the sums over rows of ``dout * xhat`` and ``dout``; for statistics of a row each."""
    dout, x = (array[None, :, :, None] for array in (dout, x))
    arguments = (*stored(dout, x), shift, mean, invstd)
    kernels = (columns_numba.row_gradients, None)
    dgamma, dbeta = reduce_channels(kernels, x, arguments, columns_numba.merge_sums, 2)
    return dgamma, dbeta


@compiled
def _forward(
    x: Any,
    gamma: Any,
    beta: Any,
    out: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    eps: Any,
    first: int,
    last: int,
) -> None:
    columns, one = x.shape[1], gamma.dtype.type(1)
    work, d = workspace(gamma), np.empty(columns, gamma.dtype)
    for r in range(first, last):
        xr, y = x[r], out[r]
        k = middle(widen(xr[0]), widen(xr[columns // 2]), widen(xr[columns - 1]))
        for j in range(columns):
            d[j] = widen(xr[j]) - k
        m, var = row_moments(d, work)
        s = one / np.sqrt(var + eps)
        for j in range(columns):
            y[j] = narrow(((d[j] - m) * s) * gamma[j] + beta[j], y)
        shift[r], mean[r], invstd[r] = k, m, s


@compiled
def _backward_dx(
    dout: Any,
    x: Any,
    gamma: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    dx: Any,
    first: int,
    last: int,
) -> None:
    columns = x.shape[1]
    count = gamma.dtype.type(columns)
    work, rows = workspace(gamma), np.empty((3, columns), gamma.dtype)
    g, gx, xhat = rows[0], rows[1], rows[2]
    for r in range(first, last):
        dr, xr, y = dout[r], x[r], dx[r]
        k, m, s = shift[r], mean[r], invstd[r]
        for j in range(columns):
            g[j] = widen(dr[j]) * gamma[j]
            xhat[j] = ((widen(xr[j]) - k) - m) * s
            gx[j] = g[j] * xhat[j]
        mean_g = row_sum(g, work) / count
        mean_gx = row_sum(gx, work) / count
        for j in range(columns):
            y[j] = narrow(s * ((g[j] - mean_g) - xhat[j] * mean_gx), y)
