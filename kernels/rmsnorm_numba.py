"""RMS norm of every row of ``x (N, D)``, on the CPU. The same bits as rmsnorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import counter
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.memory import empty
from gpubn.kernels.real_numba import stored
from gpubn.kernels.rows_numba import backward as backward_of_rows
from gpubn.kernels.rows_numba import chunk_of, squares_of_rows
from gpubn.kernels.samples_numba import groups_of_rows, reduce_rows
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads_numba import split
from gpubn.kernels.vectors_numba import fill, lanes, load, load_part, store, store_part


def forward(x: Array, gamma: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
    """Return out ``(N, D)`` and the rows' ``1 / sqrt(mean(x**2) + eps)``, ``(N,)``."""
    rows, columns = x.shape
    real = accumulator(x).type
    out = empty(x.shape, x.dtype) if out is None else out
    invrms = np.empty(rows, real)
    square_scale = real(0.5 ** (columns - 1).bit_length())
    arguments = (*stored(x), *plain(gamma), *stored(out), invrms, real(eps), square_scale)
    split(_forward, arguments, groups_of_rows(x), x.size)
    return out, invrms


def backward(
    dout: Array, x: Array, gamma: Array, invrms: Array, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, and dgamma ``(D,)``.

    That is the sum over rows of ``dout * xhat``.
    """
    dx = empty(x.shape, x.dtype) if out is None else out
    zeros = np.zeros_like(invrms)  # layer norm's shift and mean, of a row that has none
    arguments = (*stored(dout, x), *plain(gamma, zeros, zeros, invrms), False, *stored(dx))
    return dx, reduce_rows(backward_of_rows, x, arguments)[0]


@compiled
def _forward(
    x: Any, gamma: Any, out: Any, invrms: Any, eps: Any, square_scale: Any, first: int, last: int
) -> None:
    """Normalize groups of W rows."""
    (rows, columns), w, real = x.shape, lanes(gamma), gamma.dtype.type
    chunk, levels = chunk_of(gamma, columns), counter(gamma, 1, columns // 8, w)
    node, total = np.empty_like(levels[0]), real(columns) * square_scale
    for r in range(first * w, min(last * w, rows), w):
        n = min(w, rows - r)
        squares_of_rows(x, r, n, square_scale, chunk, levels, node)
        for i in range(n):
            s = real(1) / np.sqrt(node[0, i] / total + eps)
            invrms[r + i] = s
            _normalize_row(x, (r + i) * columns, fill(s), gamma, out)


@inlined
def _normalize_row(x: Any, first: int, s: Any, gamma: Any, out: Any) -> None:
    """Normalize a row, the elements from ``first`` on."""
    columns, w, part = x.shape[1], lanes(gamma), x.shape[1] % lanes(gamma)
    for j in range(0, columns - w + 1, w):
        store(out, first + j, (load(x, first + j) * s) * load(gamma, j))
    if part:
        j = columns - part
        value = (load_part(x, first + j, part) * s) * load_part(gamma, j, part)
        store_part(out, first + j, part, value)
