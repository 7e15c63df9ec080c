"""Layer norm of every row of ``x (N, D)``, on the CPU. The same bits as layernorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.batchnorm_numba import middle
from gpubn.kernels.columns_numba import counter
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.memory import empty
from gpubn.kernels.real_numba import stored, widen
from gpubn.kernels.rows_numba import backward as backward_of_rows
from gpubn.kernels.rows_numba import chunk_of, moments_of_rows
from gpubn.kernels.samples_numba import groups_of_rows, reduce_rows
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads_numba import split
from gpubn.kernels.vectors_numba import fill, lanes, load, load_part, store, store_part


def forward(
    x: Array, gamma: Array, beta: Array, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    rows, real = x.shape[0], accumulator(x)
    out = empty(x.shape, x.dtype) if out is None else out
    shift, mean, invstd = np.empty((3, rows), real)
    arguments = (*stored(x), *plain(gamma, beta), *stored(out), shift, mean, invstd, real.type(eps))
    split(_forward, arguments, groups_of_rows(x), x.size)
    return out, shift, mean, invstd


def backward(
    dout: Array,
    x: Array,
    gamma: Array,
    shift: Array,
    mean: Array,
    invstd: Array,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, dgamma and dbeta ``(D,)``.

    These are the sums over rows of ``dout * xhat`` and of ``dout``.
    """
    dx = empty(x.shape, x.dtype) if out is None else out
    arguments = (*stored(dout, x), *plain(gamma, shift, mean, invstd), True, *stored(dx))
    dgamma, dbeta = reduce_rows(backward_of_rows, x, arguments)
    return dx, dgamma, dbeta


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
    """Normalize groups of W rows."""
    (rows, columns), w, one = x.shape, lanes(gamma), gamma.dtype.type(1)
    chunk, levels = chunk_of(gamma, columns), counter(gamma, 2, columns // 8, w)
    node, k = np.empty_like(levels[0]), np.zeros(w, gamma.dtype)
    for r in range(first * w, min(last * w, rows), w):
        n = min(w, rows - r)
        for i in range(n):
            xr = x[r + i]
            k[i] = middle(widen(xr[0]), widen(xr[columns // 2]), widen(xr[columns - 1]))
        moments_of_rows(x, r, n, k, chunk, levels, node)
        for i in range(n):
            m, s = node[0, i], one / np.sqrt(node[1, i] + eps)
            shift[r + i], mean[r + i], invstd[r + i] = k[i], m, s
            _normalize_row(x, (r + i) * columns, fill(k[i]), fill(m), fill(s), gamma, beta, out)


@inlined
def _normalize_row(
    x: Any, first: int, k: Any, m: Any, s: Any, gamma: Any, beta: Any, out: Any
) -> None:
    """Normalize a row, the elements from ``first`` on."""
    columns, w, part = x.shape[1], lanes(gamma), x.shape[1] % lanes(gamma)
    for j in range(0, columns - w + 1, w):
        xhat = ((load(x, first + j) - k) - m) * s
        store(out, first + j, xhat * load(gamma, j) + load(beta, j))
    if part:
        j = columns - part
        xhat = ((load_part(x, first + j, part) - k) - m) * s
        value = xhat * load_part(gamma, j, part) + load_part(beta, j, part)
        store_part(out, first + j, part, value)
