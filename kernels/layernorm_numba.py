"""Layer norm of every row of ``x (N, D)``, on the CPU. The same bits as layernorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import gradient_sums
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.rows_numba import buffer_for, row_sum, scratch_for
from gpubn.kernels.threads import split


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    x, gamma, beta = plain(x, gamma, beta)
    rows, columns = x.shape
    out = np.empty_like(x)
    shift, mean, invstd = (np.empty(rows, x.dtype) for _ in range(3))
    square_scale = x.dtype.type(0.5 ** (columns - 1).bit_length())
    split(
        lambda a, b: _forward(
            x, gamma, beta, out, shift, mean, invstd, x.dtype.type(eps), square_scale, a, b
        ),
        rows,
        x.size,
    )
    return out, shift, mean, invstd


def backward_dx(
    dout: Array, x: Array, gamma: Array, shift: Array, mean: Array, invstd: Array
) -> Array:
    """Return dx ``(N, D)``."""
    arrays = plain(dout, x, gamma, shift, mean, invstd)
    dx = np.empty_like(arrays[1])
    split(lambda a, b: _backward_dx(*arrays, dx, a, b), dx.shape[0], dx.size)
    return dx


def backward_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return dgamma and dbeta ``(D,)``: the sums over rows of ``dout * xhat`` and of ``dout``."""
    return gradient_sums(dout, x, shift, mean, invstd, per_row=True)


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
    square_scale: Any,
    first: int,
    last: int,
) -> None:
    real = x.dtype.type
    columns = x.shape[1]
    scratch, d, squares = scratch_for(x), buffer_for(x), buffer_for(x)
    for r in range(first, last):
        xr, y = x[r], out[r]
        # The middle of three values, as in real.cuh.
        a, k, c = xr[0], xr[columns // 2], xr[columns - 1]
        if a > k:
            a, k = k, a
        if k > c:
            k = a if a > c else c
        for j in range(columns):
            d[j] = xr[j] - k
        m = row_sum(d, scratch) / real(columns)
        for j in range(columns):
            d[j] = d[j] - m
            squares[j] = (d[j] * square_scale) * d[j]
        var = row_sum(squares, scratch) / (real(columns) * square_scale)
        s = real(1) / np.sqrt(var + eps)
        for j in range(columns):
            y[j] = (d[j] * s) * gamma[j] + beta[j]
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
    count = x.dtype.type(columns)
    scratch, g, gx, xhat = scratch_for(x), buffer_for(x), buffer_for(x), buffer_for(x)
    for r in range(first, last):
        dr, xr, y = dout[r], x[r], dx[r]
        k, m, s = shift[r], mean[r], invstd[r]
        for j in range(columns):
            g[j] = dr[j] * gamma[j]
            xhat[j] = ((xr[j] - k) - m) * s
            gx[j] = g[j] * xhat[j]
        mean_g = row_sum(g, scratch) / count
        mean_gx = row_sum(gx, scratch) / count
        for j in range(columns):
            y[j] = s * ((g[j] - mean_g) - xhat[j] * mean_gx)
