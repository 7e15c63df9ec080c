"""The sample order along rows of ``x (N, D)``, on the CPU: what layer and RMS norm share.

W rows are taken together, for W the lanes of a vector: they are transposed some columns at a time,
so that each row is a lane, and lanes are reduced as columns_numba reduces columns. Rows that are
left over, up to ``ALONE`` of them, are reduced one after the other, each as buffers_numba does.
"""

from typing import Any

import numpy as np

from gpubn.kernels.buffers_numba import (
    buffer_of,
    copy_less,
    leaf_moments,
    row_moments,
    row_sum,
    workspace,
)
from gpubn.kernels.columns_numba import (
    counter,
    fold_moments,
    fold_sums,
    gradient_leaf,
    push_moments,
    push_sum,
    put_parts,
    short_leaf_moments,
    sum_rows,
)
from gpubn.kernels.compile_numba import compiled, inlined
from gpubn.kernels.vectors_numba import (
    fill,
    lanes,
    load,
    read,
    store,
    store_part,
    touch,
    transpose,
)

ALONE = 3  # more rows than that are faster together
_CHUNK = 256  # columns that are transposed at a time, to stay in the first cache
_NEAR = 1 << 18  # bytes of rows that stay in the second cache until they are read again


@compiled
def chunk_of(like: Any, columns: int) -> Any:
    """Return room for transposed rows, ``(1, columns, W, 1)``."""
    w = lanes(like)
    return np.empty((1, (min(columns, _CHUNK) + w - 1) // w * w, w, 1), like.dtype)


@inlined
def touch_rows(x: Any, r: int, n: int) -> None:
    """Read rows in the order of memory, before they are read side by side."""
    columns = x.shape[1]
    if n * columns * x.itemsize <= _NEAR:
        touch(x, r * columns, n * columns)


@inlined
def _transpose_rows(x: Any, r: int, n: int, start: int, count: int, out: Any) -> None:
    """Write columns ``start`` on of rows ``r`` to ``r + n`` to ``out``, those of a row to a lane.

    Lanes that are left repeat the last row.
    """
    w, part, columns = lanes(out), count % lanes(out), x.shape[1]
    first = r * columns + start
    for j in range(0, count - w + 1, w):
        transpose(x, first + j, columns, n, None, out, j * w)
    if part:
        j = count - part
        transpose(x, first + j, columns, n, part, out, j * w)


# --- Moments -------------------------------------------------------------------------------------


@compiled
def moments_of_rows(x: Any, r: int, n: int, shift: Any, chunk: Any, levels: Any, node: Any) -> None:
    """Write mean and variance of ``n`` rows less their ``shift (W,)`` to ``node (2, W)``."""
    columns, w, real = x.shape[1], lanes(node), node.dtype.type
    if n <= ALONE:
        work, d = workspace(node, 1, columns), buffer_of(node, columns)
        for i in range(n):
            copy_less(x, (r + i) * columns, columns, fill(shift[i]), d, 0)
            node[0, i], node[1, i] = row_moments(d, columns, work)
        return
    touch_rows(x, r, n)
    k, eighth, half = load(shift, 0), fill(real(0.125)), fill(real(0.5))
    leaves, rest = columns // 8, columns % 8
    for start in range(0, columns, _CHUNK):
        count = min(_CHUNK, columns - start)
        _transpose_rows(x, r, n, start, count, chunk)
        for leaf in range(count // 8):
            at = leaf * 8 * w
            d0, d1 = load(chunk, at) - k, load(chunk, at + w) - k
            d2, d3 = load(chunk, at + 2 * w) - k, load(chunk, at + 3 * w) - k
            d4, d5 = load(chunk, at + 4 * w) - k, load(chunk, at + 5 * w) - k
            d6, d7 = load(chunk, at + 6 * w) - k, load(chunk, at + 7 * w) - k
            of_leaf = leaf_moments((d0, d1, d2, d3, d4, d5, d6, d7), eighth)
            push_moments(levels, 0, start // 8 + leaf, of_leaf, half)
        if count % 8:
            short_leaf_moments(chunk, shift, 0, count - rest, rest, 0, w, node)
    fold_moments(levels, leaves, 8, node, rest)


# --- Sums ----------------------------------------------------------------------------------------


@compiled
def squares_of_rows(x: Any, r: int, n: int, scale: Any, chunk: Any, levels: Any, node: Any) -> None:
    """Write the sums of ``(x * scale) * x`` of ``n`` rows to ``node (1, W)``."""
    columns, w = x.shape[1], lanes(node)
    zero, factor = fill(node.dtype.type(0)), fill(scale)
    if n <= ALONE:
        work, d = workspace(node, 1, columns), buffer_of(node, columns)
        for i in range(n):
            copy_less(x, (r + i) * columns, columns, zero, d, 0)
            for j in range(0, columns, w):
                store(d, j, (load(d, j) * factor) * load(d, j))
            node[0, i] = row_sum(d, columns, work)
        return
    touch_rows(x, r, n)
    for start in range(0, columns, _CHUNK):
        count = min(_CHUNK, columns - start)
        _transpose_rows(x, r, n, start, count, chunk)
        for at in range(0, count * w, w):
            store(chunk, at, (load(chunk, at) * factor) * load(chunk, at))
        for i in range(count, (count + 7) // 8 * 8):
            store(chunk, i * w, zero)  # values beyond the last one add +0
        for leaf in range((count + 7) // 8):
            total = sum_rows(chunk, leaf * 8 * w)
            if leaf < count // 8:
                push_sum(levels, 0, start // 8 + leaf, total)
            else:
                store(node, 0, total)
    fold_sums(levels, columns // 8, node, columns % 8 > 0)


@compiled
def gradients_of_rows(
    dout: Any,
    x: Any,
    gamma: Any,
    statistics: Any,
    r: int,
    n: int,
    chunks: Any,
    levels: Any,
    node: Any,
) -> None:
    """Write the sums of ``g * xhat`` and ``g`` of ``n`` rows to ``node (2, W)``, ``g`` times gamma.

    ``statistics (3, W)`` are the rows' shift, mean and invstd.
    """
    columns, w = x.shape[1], lanes(node)
    if n <= ALONE:
        work, h, g = workspace(node, 1, columns), buffer_of(node, columns), buffer_of(node, columns)
        for i in range(n):
            of_row = fill(statistics[0, i]), fill(statistics[1, i]), fill(statistics[2, i])
            first, part = (r + i) * columns, columns % w
            for j in range(0, columns - w + 1, w):
                _put_gradient(dout, x, gamma, of_row, first, j, None, h, g)
            if part:
                _put_gradient(dout, x, gamma, of_row, first, columns - part, part, h, g)
            node[0, i], node[1, i] = row_sum(h, columns, work), row_sum(g, columns, work)
        return
    touch_rows(x, r, n)
    touch_rows(dout, r, n)
    k, m, s = load(statistics, 0), load(statistics, w), load(statistics, 2 * w)
    zero, tx, tg = fill(node.dtype.type(0)), chunks[0], chunks[1]
    for start in range(0, columns, _CHUNK):
        count = min(_CHUNK, columns - start)
        _transpose_rows(x, r, n, start, count, tx)
        _transpose_rows(dout, r, n, start, count, tg)
        for j in range(count):
            g = load(tg, j * w) * fill(gamma[start + j])
            store(tg, j * w, g)
            store(tx, j * w, g * (((load(tx, j * w) - k) - m) * s))
        for j in range(count, (count + 7) // 8 * 8):
            store(tg, j * w, zero)  # values beyond the last one add +0
            store(tx, j * w, zero)
        for leaf in range((count + 7) // 8):
            at = leaf * 8 * w
            h, g = sum_rows(tx, at), sum_rows(tg, at)
            if leaf < count // 8:
                push_sum(levels, 0, start // 8 + leaf, h)
                push_sum(levels, w, start // 8 + leaf, g)
            else:
                store(node, 0, h)
                store(node, w, g)
    fold_sums(levels, columns // 8, node, columns % 8 > 0)


@inlined
def _put_gradient(
    dout: Any, x: Any, gamma: Any, of_row: Any, first: int, j: int, part: Any, h: Any, g: Any
) -> None:
    k, m, s = of_row
    value = read(dout, first + j, part) * read(gamma, j, part)
    store(g, j, value)
    store(h, j, value * (((read(x, first + j, part) - k) - m) * s))


# --- Backward ------------------------------------------------------------------------------------


@compiled
def backward(
    dout: Any,
    x: Any,
    gamma: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    centred: bool,
    dx: Any,
    parts: Any,
    tile_rows: int,
    first: int,
    last: int,
) -> None:
    """Write dx of tiles of rows, and the tiles' sums of ``dout * xhat`` and ``dout`` to ``parts``.

    With ``g = dout * gamma``, dx is ``invstd * ((g - mean(g)) - xhat * mean(g * xhat))``, without
    the mean of g where rows were not ``centred``. A row is read from memory once.
    """
    rows, columns = x.shape
    dout4, x4 = dout.reshape(1, rows, columns, 1), x.reshape(1, rows, columns, 1)
    w, count = lanes(gamma), gamma.dtype.type(columns)
    chunks = chunk_of(gamma, columns), chunk_of(gamma, columns)
    row_levels = counter(gamma, 2, columns // 8, w)
    sums, statistics = np.empty_like(row_levels[0]), np.zeros((3, w), gamma.dtype)
    for tile in range(first, last):
        start = tile * tile_rows
        end = min(start + tile_rows, rows)
        levels = counter(parts, 2, (end - start) // 8, columns)
        node = np.empty_like(levels[0])
        for r in range(start, end, w):
            n = min(w, end - r)
            for i in range(n):
                statistics[0, i], statistics[1, i] = shift[r + i], mean[r + i]
                statistics[2, i] = invstd[r + i]
            gradients_of_rows(dout, x, gamma, statistics, r, n, chunks, row_levels, sums)
            for i in range(n):
                of_row = fill(statistics[0, i]), fill(statistics[1, i]), fill(statistics[2, i])
                mean_gx, mean_g = fill(sums[0, i] / count), fill(sums[1, i] / count)
                _dx_row(dout, x, gamma, (r + i) * columns, of_row, mean_gx, mean_g, centred, dx)
            for leaf in range(r, r + n, 8):
                gradient_leaf(
                    *(dout4, x4, (shift, mean, invstd), None, None, True, 0, leaf),
                    *(min(8, end - leaf), 0, columns, levels, (leaf - start) // 8, node),
                )
        fold_sums(levels, (end - start) // 8, node, (end - start) % 8 > 0)
        put_parts(node, parts, tile, 0, columns)


@inlined
def _dx_row(
    dout: Any,
    x: Any,
    gamma: Any,
    first: int,
    of_row: Any,
    mean_gx: Any,
    mean_g: Any,
    centred: bool,
    dx: Any,
) -> None:
    """Write a row of dx, the elements from ``first`` on."""
    columns, w = gamma.shape[0], lanes(gamma)
    part = columns % w
    for j in range(0, columns - w + 1, w):
        value = _dx_of(dout, x, gamma, first, j, None, of_row, mean_gx, mean_g, centred)
        store(dx, first + j, value)
    if part:
        j = columns - part
        value = _dx_of(dout, x, gamma, first, j, part, of_row, mean_gx, mean_g, centred)
        store_part(dx, first + j, part, value)


@inlined
def _dx_of(
    dout: Any,
    x: Any,
    gamma: Any,
    first: int,
    j: int,
    part: int | None,
    of_row: Any,
    mean_gx: Any,
    mean_g: Any,
    centred: bool,
) -> Any:
    k, m, s = of_row
    g = read(dout, first + j, part) * read(gamma, j, part)
    xhat = ((read(x, first + j, part) - k) - m) * s
    return s * (((g - mean_g) if centred else g) - xhat * mean_gx)
