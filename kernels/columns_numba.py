"""The sample order where channels are neighbours: ``x (I, B, C, 1)``, rows of C channels.

A task takes some instances, tiles of rows and columns. Within a tile it walks leaf by leaf, a
vector of columns at a time, and keeps a binary counter of finished subtrees: level l holds the node
of 2^l leaves while bit l of the number of leaves is set. A node is an array ``(K, P)``: K values
for each column, and P a whole number of vectors.
"""

from typing import Any

import numpy as np

from gpubn.kernels.buffers_numba import leaf_moments, merged_equal
from gpubn.kernels.compile_numba import compiled, inlined
from gpubn.kernels.vectors_numba import (
    fill,
    lanes,
    load,
    load_part,
    put_relu_gradient,
    read,
    rounded,
    store,
    store_part,
    touch,
    where_positive,
)

BLOCK = 4096  # columns walked together: long rows are read fastest, and a few must fit in a cache
_SHORT = 1024  # bytes of a row of which two leaves of eight stay in the first cache


# What a kernel's units of work are, of which it is given a range; of all else it takes all.
INSTANCES, TILES, COLUMNS = 0, 1, 2
BLOCK_COLUMNS = 1024  # of a unit, where columns are


@inlined
def _ranges(x: Any, units: int, first: int, last: int) -> Any:
    """Return the instances, tiles and columns, each a first and a last, of a range of units.

    There is one tile where tiles are not the units, one instance where instances are not.
    """
    columns = x.shape[2]
    if units == INSTANCES:
        return first, last, 0, 1, 0, columns
    if units == TILES:
        return 0, 1, first, last, 0, columns
    return 0, 1, 0, 1, first * BLOCK_COLUMNS, min(last * BLOCK_COLUMNS, columns)


# --- Rows ----------------------------------------------------------------------------------------


@inlined
def row(x: Any, instance: int, r: int) -> Any:
    """Return the place of a row of ``x (I, B, C, 1)`` among all elements."""
    return (instance * x.shape[1] + r) * x.shape[2]


@inlined
def _touch_rows(x: Any, instance: int, r: int, count: int, a: int, b: int) -> None:
    """Touch columns a to b of some rows, if they are short: of long ones no more would stay."""
    if (b - a) * x.itemsize <= _SHORT:
        for i in range(r, r + count):
            touch(x, row(x, instance, i) + a, b - a)


@inlined
def copy_row(x: Any, first: int, out: Any, at: int, count: int) -> None:
    """Copy ``count`` elements of x, from ``first`` on, to those of ``out`` from ``at`` on."""
    w, part = lanes(x), count % lanes(x)
    for j in range(0, count - w + 1, w):
        store(out, at + j, load(x, first + j))
    if part:
        j = count - part
        store_part(out, at + j, part, load_part(x, first + j, part))


# --- The binary counter --------------------------------------------------------------------------


@compiled
def counter(like: Any, width: int, leaves: int, columns: int) -> Any:
    """Return a counter of so many leaves, ``(levels, K, P)``, for K values of each column.

    A node's rows are whole vectors; what lies behind the last column is of no account.
    """
    w, levels = lanes(like), 1
    while leaves:
        leaves >>= 1
        levels += 1
    return np.empty((levels, width, (columns + w - 1) // w * w), like.dtype)


@inlined
def push_sum(levels: Any, at: int, count: int, total: Any) -> None:
    """Add a leaf's sums of the columns at ``at`` in a node to a counter that holds ``count``."""
    step = levels.shape[1] * levels.shape[2]
    while count & 1:
        total = load(levels, at) + total
        count >>= 1
        at += step
    store(levels, at, total)


@compiled
def fold_sums(levels: Any, count: int, node: Any, started: bool) -> None:
    """Sum what a counter holds into ``node (K, P)``, which has a shorter leaf if ``started``."""
    level, size = 0, node.size
    while count:
        if count & 1:
            for j in range(0, size, lanes(node)):
                left = load(levels, level * size + j)
                store(node, j, left + load(node, j) if started else left)
            started = True
        count >>= 1
        level += 1


@inlined
def push_moments(levels: Any, at: int, count: int, node: Any, half: Any) -> None:
    """Add a leaf's moments, a pair of vectors, as ``push_sum`` adds its sums."""
    padded = levels.shape[2]
    while count & 1:
        node = merged_equal((load(levels, at), load(levels, at + padded)), node, half)
        count >>= 1
        at += 2 * padded
    store(levels, at, node[0])
    store(levels, at + padded, node[1])


@compiled
def fold_moments(levels: Any, count: int, unit: int, node: Any, rows: int) -> None:
    """Merge what a counter holds, of ``unit`` rows a leaf, into ``node (2, P)``.

    ``node`` has the last ``rows`` rows, perhaps none.
    """
    real, padded, level = node.dtype.type, node.shape[1], 0
    while count:
        if count & 1:
            left_rows = unit << level
            # Chan, Golub and LeVeque 1979, in means instead of sums.
            total = real(left_rows + rows)
            u, t = fill(real(left_rows) / total), fill(real(rows) / total)
            for j in range(0, padded, lanes(node)):
                at = level * 2 * padded + j
                a = load(levels, at), load(levels, at + padded)
                b = load(node, j), load(node, padded + j)
                if rows == 0:
                    b = a
                else:  # shorter than what is left of it
                    delta = b[0] - a[0]
                    v = (a[1] * u + b[1] * t) + (delta * u) * (delta * t)
                    b = a[0] + delta * t, v
                store(node, j, b[0])
                store(node, padded + j, b[1])
            rows += left_rows
        count >>= 1
        level += 1


@compiled
def merge_sums(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    """Merge the sums ``(K, P, C)`` of parts into ``out (K, C)``."""
    width, count, columns = parts.shape
    levels = counter(parts, 1, count, columns)
    node, w = np.empty((1, levels.shape[2]), parts.dtype), lanes(parts)
    for k in range(width):
        for part in range(count):  # a shorter last part is a sum like any other
            at = (k * count + part) * columns
            for j in range(0, columns, w):
                push_sum(levels, j, part, load_part(parts, at + j, min(w, columns - j)))
        fold_sums(levels, count, node, False)
        copy_row(node, 0, out, k * columns, columns)


@compiled
def merge_moments(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    """Merge the moments ``(2, P, C)`` of parts into ``out (2, C)``."""
    count, columns = parts.shape[1:]
    full, rest = rows // part_rows, rows % part_rows
    levels = counter(parts, 2, full, columns)
    node, w, half = np.empty_like(levels[0]), lanes(parts), fill(parts.dtype.type(0.5))
    for part in range(count):
        mean, var = part * columns, (count + part) * columns
        for j in range(0, columns, w):
            n = min(w, columns - j)
            moments = load_part(parts, mean + j, n), load_part(parts, var + j, n)
            if part < full:
                push_moments(levels, j, part, moments, half)
            else:
                store(node, j, moments[0])
                store(node, node.shape[1] + j, moments[1])
    fold_moments(levels, full, part_rows, node, rest)
    copy_row(node, 0, out, 0, columns)
    copy_row(node, node.shape[1], out, columns, columns)


@inlined
def sum8(v0: Any, v1: Any, v2: Any, v3: Any, v4: Any, v5: Any, v6: Any, v7: Any) -> Any:
    """Return the sum of a leaf's eight rows."""
    return ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))


@inlined
def sum_rows(v: Any, first: int) -> Any:
    """Return the sum of eight rows of a vector each, the elements of ``v`` from ``first`` on."""
    w = lanes(v)
    a, b = load(v, first), load(v, first + w)
    c, d = load(v, first + 2 * w), load(v, first + 3 * w)
    e, f = load(v, first + 4 * w), load(v, first + 5 * w)
    return sum8(a, b, c, d, e, f, load(v, first + 6 * w), load(v, first + 7 * w))


# --- Moments -------------------------------------------------------------------------------------


@compiled
def moments(
    x: Any,
    shift: Any,
    parts: Any,
    tile_rows: int,
    units: int,
    first: int,
    last: int,
) -> None:
    """Write the moments of ``x (I, B, C, 1)`` after the shift to ``parts``, a tile each."""
    i0, i1, tile0, tile1, column0, column1 = _ranges(x, units, first, last)
    for instance in range(i0, i1):
        for tile in range(tile0, tile1):
            start = tile * tile_rows
            rows = min(tile_rows, x.shape[1] - start)
            leaves, rest = rows // 8, rows % 8
            for a in range(column0, column1, BLOCK):
                b = min(a + BLOCK, column1)
                levels = counter(parts, 2, leaves, b - a)
                node = np.empty_like(levels[0])
                for leaf in range(leaves):
                    _moments_leaf(x, shift, instance, start + leaf * 8, a, b, levels, leaf)
                if rest:
                    short_leaf_moments(x, shift, instance, start + leaves * 8, rest, a, b, node)
                fold_moments(levels, leaves, 8, node, rest)
                put_parts(node, parts, tile, instance * x.shape[2] + a, b - a)


@compiled
def _moments_leaf(
    x: Any, shift: Any, instance: int, r: int, a: int, b: int, levels: Any, count: int
) -> None:
    w, part = lanes(levels), (b - a) % lanes(levels)
    _touch_rows(x, instance, r, 8, a, b)
    for j in range(a, b - w + 1, w):
        _moments_of_leaf(x, shift, instance, r, j, None, levels, j - a, count)
    if part:
        _moments_of_leaf(x, shift, instance, r, b - part, part, levels, b - part - a, count)


@inlined
def _moments_of_leaf(
    x: Any,
    shift: Any,
    i: int,
    r: int,
    j: int,
    part: int | None,
    levels: Any,
    place: int,
    count: int,
) -> None:
    real = levels.dtype.type
    step, at = x.shape[2], row(x, i, r) + j
    k = read(shift, i * step + j, part)
    d0, d1 = read(x, at, part) - k, read(x, at + step, part) - k
    d2, d3 = read(x, at + 2 * step, part) - k, read(x, at + 3 * step, part) - k
    d4, d5 = read(x, at + 4 * step, part) - k, read(x, at + 5 * step, part) - k
    d6, d7 = read(x, at + 6 * step, part) - k, read(x, at + 7 * step, part) - k
    node = leaf_moments((d0, d1, d2, d3, d4, d5, d6, d7), fill(real(0.125)))
    push_moments(levels, place, count, node, fill(real(0.5)))


@compiled
def short_leaf_moments(
    x: Any, shift: Any, instance: int, r: int, rows: int, a: int, b: int, node: Any
) -> None:
    """Write the moments of columns a to b of fewer than eight rows, from ``r`` on, to ``node``."""
    w, real = lanes(node), node.dtype.type
    count, eighth = fill(real(rows)), fill(real(0.125))
    v = np.zeros((8, w), node.dtype)  # rows beyond the last one add +0
    for j in range(a, b, w):
        part = min(w, b - j)
        k = read(shift, instance * x.shape[2] + j, part)
        for i in range(rows):
            store(v, i * w, read(x, row(x, instance, r + i) + j, part) - k)
        mean = sum_rows(v, 0) / count
        for i in range(rows):
            e = load(v, i * w) - mean
            store(v, i * w, e * eighth * e)
        store(node, j - a, mean)
        store(node, node.shape[1] + j - a, sum_rows(v, 0) / (count * eighth))


# --- Sums ----------------------------------------------------------------------------------------


@compiled
def sums(
    x: Any,
    square: bool,
    parts: Any,
    tile_rows: int,
    units: int,
    first: int,
    last: int,
) -> None:
    """Write the sums of ``x (I, B, C, 1)``, or of its squares, to ``parts``, a tile each."""
    columns, w = x.shape[2], lanes(parts)
    v = np.empty((8, w), parts.dtype)
    i0, i1, tile0, tile1, column0, column1 = _ranges(x, units, first, last)
    for instance in range(i0, i1):
        for tile in range(tile0, tile1):
            start = tile * tile_rows
            rows = min(tile_rows, x.shape[1] - start)
            for a in range(column0, column1, BLOCK):
                b = min(a + BLOCK, column1)
                levels = counter(parts, 1, rows // 8, b - a)
                node = np.empty_like(levels[0])
                for leaf in range((rows + 7) // 8):
                    count, r = min(8, rows - leaf * 8), start + leaf * 8
                    for i in range(count, 8):
                        store(v, i * w, fill(v.dtype.type(0)))  # rows beyond the last one add +0
                    for j in range(a, b, w):
                        for i in range(count):
                            value = read(x, row(x, instance, r + i) + j, min(w, b - j))
                            store(v, i * w, value * value if square else value)
                        if count == 8:
                            push_sum(levels, j - a, leaf, sum_rows(v, 0))
                        else:
                            store(node, j - a, sum_rows(v, 0))
                fold_sums(levels, rows // 8, node, rows % 8 > 0)
                at = tile * parts.shape[2] + instance * columns + a
                copy_row(node, 0, parts, at, b - a)


# --- Gradients of gamma and beta -----------------------------------------------------------------


@compiled
def gradients(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    beta: Any,
    out: Any,
    dresidual: Any,
    parts: Any,
    tile_rows: int,
    units: int,
    first: int,
    last: int,
) -> None:
    """Write the sums of ``g * xhat`` and of ``g`` to ``parts``, a tile each.

    ``g`` is dout; where ``out`` is given, 0 unless it is above 0, and written to ``dresidual``;
    where ``beta`` is, 0 unless the normalized value is above 0. Statistics are a channel's.
    """
    statistics = shift, mean, invstd
    i0, i1, tile0, tile1, column0, column1 = _ranges(x, units, first, last)
    for instance in range(i0, i1):
        for tile in range(tile0, tile1):
            start = tile * tile_rows
            rows = min(tile_rows, x.shape[1] - start)
            for a in range(column0, column1, BLOCK):
                b = min(a + BLOCK, column1)
                levels = counter(parts, 2, rows // 8, b - a)
                node = np.empty_like(levels[0])
                for leaf in range((rows + 7) // 8):
                    count, r = min(8, rows - leaf * 8), start + leaf * 8
                    if out is not None:
                        for i in range(r, r + count):
                            put_relu_gradient(dout, out, dresidual, row(x, instance, i) + a, b - a)
                        gradient_leaf(
                            *(dresidual, x, statistics, None, None, None),
                            *(instance, r, count, a, b, levels, leaf, node),
                        )
                    else:
                        gradient_leaf(
                            *(dout, x, statistics, scale, beta, None),
                            *(instance, r, count, a, b, levels, leaf, node),
                        )
                fold_sums(levels, rows // 8, node, rows % 8 > 0)
                put_parts(node, parts, tile, instance * x.shape[2] + a, b - a)


@inlined
def put_parts(node: Any, parts: Any, tile: int, column: int, count: int) -> None:
    """Write the two values of a node's columns to ``parts (2, P, C)``."""
    at = tile * parts.shape[2] + column
    copy_row(node, 0, parts, at, count)
    copy_row(node, node.shape[1], parts, at + parts.shape[1] * parts.shape[2], count)


@compiled
def gradient_leaf(
    dout: Any,
    x: Any,
    statistics: Any,
    scale: Any,
    beta: Any,
    by_row: bool | None,
    instance: int,
    r: int,
    count: int,
    a: int,
    b: int,
    levels: Any,
    leaf: int,
    node: Any,
) -> None:
    """Sum ``g * xhat`` and ``g`` of columns a to b over ``count`` rows from ``r`` on.

    Eight rows go to the counter, which has ``leaf`` leaves, fewer to ``node``. ``statistics`` are
    shift, mean and invstd of channels; with ``by_row`` of x's rows. With scale and beta, ``g`` is 0
    unless the normalized value is above 0.
    """
    w, part = lanes(node), (b - a) % lanes(node)
    _touch_rows(x, instance, r, count, a, b)
    _touch_rows(dout, instance, r, count, a, b)
    if count == 8:
        for j in range(a, b - w + 1, w):
            _gradient_of_leaf(
                *(dout, x, statistics, scale, beta, by_row, instance, r, j, None),
                *(levels, j - a, leaf),
            )
        if part:
            j = b - part
            _gradient_of_leaf(
                *(dout, x, statistics, scale, beta, by_row, instance, r, j, part),
                *(levels, j - a, leaf),
            )
        return
    g, h = np.zeros((8, w), node.dtype), np.zeros((8, w), node.dtype)  # beyond the last one add +0
    for j in range(a, b, w):
        for i in range(count):
            hv, gv = _gradient(
                *(dout, x, statistics, scale, beta, by_row, instance, r + i, j, min(w, b - j))
            )
            store(h, i * w, hv)
            store(g, i * w, gv)
        store(node, j - a, sum_rows(h, 0))
        store(node, node.shape[1] + j - a, sum_rows(g, 0))


@inlined
def _gradient_of_leaf(
    dout: Any,
    x: Any,
    statistics: Any,
    scale: Any,
    beta: Any,
    by_row: bool | None,
    i: int,
    r: int,
    j: int,
    part: int | None,
    levels: Any,
    place: int,
    count: int,
) -> None:
    h0, g0 = _gradient(dout, x, statistics, scale, beta, by_row, i, r, j, part)
    h1, g1 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 1, j, part)
    h2, g2 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 2, j, part)
    h3, g3 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 3, j, part)
    h4, g4 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 4, j, part)
    h5, g5 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 5, j, part)
    h6, g6 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 6, j, part)
    h7, g7 = _gradient(dout, x, statistics, scale, beta, by_row, i, r + 7, j, part)
    push_sum(levels, place, count, sum8(h0, h1, h2, h3, h4, h5, h6, h7))
    push_sum(levels, levels.shape[2] + place, count, sum8(g0, g1, g2, g3, g4, g5, g6, g7))


@inlined
def _gradient(
    dout: Any,
    x: Any,
    statistics: Any,
    scale: Any,
    beta: Any,
    by_row: bool | None,
    instance: int,
    r: int,
    j: int,
    part: int | None,
) -> Any:
    """Return ``g * xhat`` and ``g`` of a row's columns from ``j`` on."""
    shift, mean, invstd = statistics
    at, c = row(x, instance, r) + j, instance * x.shape[2] + j
    g = read(dout, at, part)
    if by_row is None:
        d = (read(x, at, part) - read(shift, c, part)) - read(mean, c, part)
        xhat = d * read(invstd, c, part)
    else:
        d = (read(x, at, part) - fill(shift[r])) - fill(mean[r])
        xhat = d * fill(invstd[r])
    if beta is not None:
        g = where_positive(rounded(d * read(scale, c, part) + read(beta, c, part), x), g)
    return g * xhat, g
