"""Layer norm of every row of ``x (N, D)``, on the CPU. The same bits as layernorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.batchnorm_numba import middle
from gpubn.kernels.columns_numba import counter, fold_sums, gradient_leaf, put_parts
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.memory import empty
from gpubn.kernels.planes_numba import buffer_of, copy_less, row_moments, row_sum, workspace
from gpubn.kernels.real_numba import stored, widen
from gpubn.kernels.samples_numba import reduce_rows
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import split
from gpubn.kernels.vectors_numba import fill, lanes, load, load_part, read, store, store_part


def forward(
    x: Array, gamma: Array, beta: Array, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    rows, real = x.shape[0], accumulator(x)
    out = empty(x.shape, x.dtype) if out is None else out
    shift, mean, invstd = np.empty((3, rows), real)
    arguments = (*stored(x), *plain(gamma, beta), *stored(out), shift, mean, invstd, real.type(eps))
    split(lambda a, b: _forward(*arguments, a, b), rows, x.size)
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
    arguments = (*stored(dout, x), *plain(gamma, shift, mean, invstd), *stored(dx))
    dgamma, dbeta = reduce_rows(_backward, x, arguments)
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
    columns, one = x.shape[1], gamma.dtype.type(1)
    work, d = workspace(gamma, 1, columns), buffer_of(gamma, columns)
    for r in range(first, last):
        xr, y = x[r], out[r]
        k = middle(widen(xr[0]), widen(xr[columns // 2]), widen(xr[columns - 1]))
        copy_less(x, r * columns, columns, fill(k), d, 0)
        m, var = row_moments(d, columns, work)
        s = one / np.sqrt(var + eps)
        _normalize_row(d, fill(m), fill(s), gamma, beta, y)
        shift[r], mean[r], invstd[r] = k, m, s


@inlined
def _normalize_row(d: Any, m: Any, s: Any, gamma: Any, beta: Any, out: Any) -> None:
    columns, w = out.shape[0], lanes(out)
    for j in range(0, columns - w + 1, w):
        store(out, j, ((load(d, j) - m) * s) * load(gamma, j) + load(beta, j))
    c = columns % w
    if c:
        j = columns - c
        value = ((load(d, j) - m) * s) * load_part(gamma, j, c) + load_part(beta, j, c)
        store_part(out, j, c, value)


@compiled
def _backward(
    dout: Any,
    x: Any,
    gamma: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    dx: Any,
    parts: Any,
    tile_rows: int,
    first: int,
    last: int,
) -> None:
    """Write dx of tiles of rows, and the tiles' sums to ``parts``: a row is read once."""
    rows, columns = x.shape
    dout4, x4 = dout.reshape(1, rows, columns, 1), x.reshape(1, rows, columns, 1)
    statistics, work = (shift, mean, invstd), workspace(gamma, 1, columns)
    g, gx, xhat = buffer_of(gamma, columns), buffer_of(gamma, columns), buffer_of(gamma, columns)
    for tile in range(first, last):
        start = tile * tile_rows
        end = min(start + tile_rows, rows)
        levels = counter(parts, 2, (end - start) // 8, columns)
        node = np.empty_like(levels[0])
        for r in range(start, end, 8):
            count = min(8, end - r)
            for i in range(r, r + count):
                k, m, s = fill(shift[i]), fill(mean[i]), fill(invstd[i])
                _dx_row(dout, x, i * columns, gamma, k, m, s, g, gx, xhat, work, dx)
            gradient_leaf(
                *(dout4, x4, statistics, None, None, True),
                *(0, r, count, 0, columns, levels, (r - start) // 8, node),
            )
        fold_sums(levels, (end - start) // 8, node, (end - start) % 8 > 0)
        put_parts(node, parts, tile, 0, columns)


@compiled
def _dx_row(
    dout: Any,
    x: Any,
    first: int,
    gamma: Any,
    k: Any,
    m: Any,
    s: Any,
    g: Any,
    gx: Any,
    xhat: Any,
    work: Any,
    dx: Any,
) -> None:
    """Write a row of dx, the elements from ``first`` on; ``g``, ``gx`` and ``xhat`` are buffers."""
    columns, w, part = gamma.shape[0], lanes(gamma), gamma.shape[0] % lanes(gamma)
    count = gamma.dtype.type(columns)
    for j in range(0, columns - w + 1, w):
        _put_values(dout, x, first, gamma, k, m, s, j, None, g, gx, xhat)
    if part:
        _put_values(dout, x, first, gamma, k, m, s, columns - part, part, g, gx, xhat)
    mean_g = fill(row_sum(g, columns, work) / count)
    mean_gx = fill(row_sum(gx, columns, work) / count)
    for j in range(0, columns - w + 1, w):
        store(dx, first + j, s * ((load(g, j) - mean_g) - load(xhat, j) * mean_gx))
    if part:
        j = columns - part
        value = s * ((load(g, j) - mean_g) - load(xhat, j) * mean_gx)
        store_part(dx, first + j, part, value)


@inlined
def _put_values(
    dout: Any,
    x: Any,
    first: int,
    gamma: Any,
    k: Any,
    m: Any,
    s: Any,
    j: int,
    part: int | None,
    g: Any,
    gx: Any,
    xhat: Any,
) -> None:
    gv = read(dout, first + j, part) * read(gamma, j, part)
    xv = ((read(x, first + j, part) - k) - m) * s
    store(g, j, gv)
    store(xhat, j, xv)
    store(gx, j, gv * xv)
