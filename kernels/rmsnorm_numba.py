"""RMS norm of every row of ``x (N, D)``, on the CPU. The same bits as rmsnorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import counter, fold_sums, gradient_leaf, put_parts
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.memory import empty
from gpubn.kernels.planes_numba import buffer_of, copy_less, row_sum, workspace
from gpubn.kernels.real_numba import stored
from gpubn.kernels.samples_numba import reduce_rows
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import split
from gpubn.kernels.vectors_numba import fill, lanes, load, load_part, read, store, store_part


def forward(x: Array, gamma: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
    """Return out ``(N, D)`` and the rows' ``1 / sqrt(mean(x**2) + eps)``, ``(N,)``."""
    rows, columns = x.shape
    real = accumulator(x).type
    out = empty(x.shape, x.dtype) if out is None else out
    invrms = np.empty(rows, real)
    square_scale = real(0.5 ** (columns - 1).bit_length())
    arguments = (*stored(x), *plain(gamma), *stored(out), invrms, real(eps), square_scale)
    split(lambda a, b: _forward(*arguments, a, b), rows, x.size)
    return out, invrms


def backward(
    dout: Array, x: Array, gamma: Array, invrms: Array, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, and dgamma ``(D,)``.

    That is the sum over rows of ``dout * xhat``.
    """
    dx = empty(x.shape, x.dtype) if out is None else out
    zeros = np.zeros_like(invrms)  # layer norm's shift and mean, of a row that has none
    arguments = (*stored(dout, x), *plain(gamma, invrms), zeros, *stored(dx))
    return dx, reduce_rows(_backward, x, arguments)[0]


@compiled
def _forward(
    x: Any, gamma: Any, out: Any, invrms: Any, eps: Any, square_scale: Any, first: int, last: int
) -> None:
    real, w = gamma.dtype.type, lanes(gamma)
    columns = x.shape[1]
    zero, scale = fill(real(0)), fill(square_scale)
    work, v, squares = (
        workspace(gamma, 1, columns),
        buffer_of(gamma, columns),
        buffer_of(gamma, columns),
    )
    for r in range(first, last):
        copy_less(x, r * columns, columns, zero, v, 0)
        for j in range(0, columns, w):
            store(squares, j, (load(v, j) * scale) * load(v, j))
        mean = row_sum(squares, columns, work) / (real(columns) * square_scale)
        s = real(1) / np.sqrt(mean + eps)
        _normalize_row(v, fill(s), gamma, out[r])
        invrms[r] = s


@inlined
def _normalize_row(v: Any, s: Any, gamma: Any, out: Any) -> None:
    columns, w = out.shape[0], lanes(out)
    for j in range(0, columns - w + 1, w):
        store(out, j, (load(v, j) * s) * load(gamma, j))
    c = columns % w
    if c:
        store_part(
            out, columns - c, c, (load(v, columns - c) * s) * load_part(gamma, columns - c, c)
        )


@compiled
def _backward(
    dout: Any,
    x: Any,
    gamma: Any,
    invrms: Any,
    zeros: Any,
    dx: Any,
    parts: Any,
    tile_rows: int,
    first: int,
    last: int,
) -> None:
    """Write dx of tiles of rows, and the tiles' sums to ``parts``: a row is read once."""
    rows, columns = x.shape
    dout4, x4 = dout.reshape(1, rows, columns, 1), x.reshape(1, rows, columns, 1)
    statistics, work = (zeros, zeros, invrms), workspace(gamma, 1, columns)
    g, gx, xhat = buffer_of(gamma, columns), buffer_of(gamma, columns), buffer_of(gamma, columns)
    for tile in range(first, last):
        start = tile * tile_rows
        end = min(start + tile_rows, rows)
        levels = counter(parts, 2, (end - start) // 8, columns)
        node = np.empty_like(levels[0])
        for r in range(start, end, 8):
            count = min(8, end - r)
            for i in range(r, r + count):
                _dx_row(dout, x, i * columns, gamma, fill(invrms[i]), g, gx, xhat, work, dx)
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
    s: Any,
    g: Any,
    gx: Any,
    xhat: Any,
    work: Any,
    dx: Any,
) -> None:
    """Write a row of dx, the elements from ``first`` on; ``g``, ``gx`` and ``xhat`` are buffers."""
    columns, w, part = gamma.shape[0], lanes(gamma), gamma.shape[0] % lanes(gamma)
    for j in range(0, columns - w + 1, w):
        _put_values(dout, x, first, gamma, s, j, None, g, gx, xhat)
    if part:
        _put_values(dout, x, first, gamma, s, columns - part, part, g, gx, xhat)
    mean_gx = fill(row_sum(gx, columns, work) / gamma.dtype.type(columns))
    for j in range(0, columns - w + 1, w):
        store(dx, first + j, s * (load(g, j) - load(xhat, j) * mean_gx))
    if part:
        j = columns - part
        store_part(dx, first + j, part, s * (load(g, j) - load(xhat, j) * mean_gx))


@inlined
def _put_values(
    dout: Any,
    x: Any,
    first: int,
    gamma: Any,
    s: Any,
    j: int,
    part: int | None,
    g: Any,
    gx: Any,
    xhat: Any,
) -> None:
    gv, xv = read(dout, first + j, part) * read(gamma, j, part), read(x, first + j, part) * s
    store(g, j, gv)
    store(xhat, j, xv)
    store(gx, j, gv * xv)
