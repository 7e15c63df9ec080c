"""Sums of columns on the CPU, in the column order, and what other ops need to reduce columns.

A task takes some tiles of rows and some columns. Within a tile it walks leaf by leaf and keeps a
binary counter of finished subtrees: level l holds the node of 2^l leaves while bit l of the number
of leaves is set. A node is an array ``(K, W)``: K values for each of W columns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.threads import get_num_threads, split

BLOCK = 256  # columns walked together: the counter's levels stay in the first cache
TILE_ROWS = 1024  # the least rows of a tile: 8 times a power of two


def column_sum(x: Array) -> Array:
    """Return the sum of every column of ``x (N, D)``, shape ``(D,)``."""
    (x,) = plain(x)
    return reduce_columns(_column_sum_tiles, (x,), x, _merge_sums_parts, 1)[0]


def gradient_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array, per_row: bool
) -> tuple[Array, Array]:
    """Return the sums over rows of ``dout * xhat`` and of ``dout``, each ``(D,)``.

    ``xhat = ((x - shift) - mean) * invstd``, with statistics ``(N,)`` if ``per_row`` else ``(D,)``.
    """
    dout, x, shift, mean, invstd = plain(dout, x, shift, mean, invstd)
    inputs = (dout, x, shift, mean, invstd, per_row)
    sums = reduce_columns(_gradient_sums_tiles, inputs, x, _merge_sums_parts, 2)
    return sums[0], sums[1]


def reduce_columns(
    tiles_kernel: Callable[..., None],
    inputs: tuple[Any, ...],
    x: Array,
    merge: Callable[..., None],
    width: int,
) -> Any:
    """Run ``tiles_kernel`` over the tiles of ``x (N, D)``, then ``merge`` them: ``(width, D)``."""
    rows, columns = x.shape
    tile_rows = _tile_rows(rows, columns)
    tiles = -(-rows // tile_rows)
    parts = np.empty((width, tiles, columns), x.dtype)
    if tiles > 1:
        split(
            lambda start, stop: tiles_kernel(*inputs, parts, tile_rows, start, stop, 0, columns),
            tiles,
            x.size,
        )
    else:
        blocks = -(-columns // BLOCK)
        split(
            lambda start, stop: tiles_kernel(
                *inputs, parts, tile_rows, 0, 1, start * BLOCK, min(stop * BLOCK, columns)
            ),
            blocks,
            x.size,
        )
    return merge_parts(merge, parts, tile_rows, rows)


def _tile_rows(rows: int, columns: int) -> int:
    """Choose a tile: all rows where the columns alone occupy the threads, else a power of two."""
    threads = get_num_threads()
    if threads == 1 or columns >= 4 * threads * BLOCK:
        return max(TILE_ROWS, 8 << (-(-rows // 8) - 1).bit_length())
    share = -(-rows // (4 * threads))  # a few tiles a thread even out their speed
    return max(TILE_ROWS, 1 << (share - 1).bit_length())


def merge_parts(merge: Callable[..., None], parts: Any, part_rows: int, rows: int) -> Any:
    """Merge ``parts (K, P, D)``, of ``part_rows`` rows each but the last: ``(K, D)``."""
    if parts.shape[1] == 1:
        return parts[:, 0]
    out = np.empty((parts.shape[0], parts.shape[2]), parts.dtype)
    merge(parts, part_rows, rows, out)
    return out


# --- The binary counter --------------------------------------------------------------------------


@compiled
def levels_for(count: int) -> int:
    """Return how many levels a counter needs to count to ``count``."""
    levels = 1
    while count:
        count >>= 1
        levels += 1
    return levels


@compiled
def _add_to(node: Any, left: Any) -> None:
    for k in range(node.shape[0]):
        a, b = left[k], node[k]
        for j in range(b.shape[0]):
            b[j] = a[j] + b[j]


@compiled
def push_sums(levels: Any, count: int, node: Any) -> None:
    """Add a finished leaf to a counter that holds ``count``; ``node (K, W)`` is used up."""
    level = 0
    while count & 1:
        _add_to(node, levels[level])
        count >>= 1
        level += 1
    levels[level] = node


@compiled
def fold_sums(levels: Any, count: int, node: Any, started: bool) -> None:
    """Sum what a counter holds into ``node``, which has a last, shorter leaf if ``started``."""
    level = 0
    while count:
        if count & 1:
            if started:
                _add_to(node, levels[level])
            else:
                node[:] = levels[level]
                started = True
        count >>= 1
        level += 1


@compiled
def _merge_sums_parts(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    width, count, columns = parts.shape
    levels = np.empty((levels_for(count), width, columns), parts.dtype)
    node = np.empty((width, columns), parts.dtype)
    for part in range(count):  # a shorter last part is a sum like any other
        node[:] = parts[:, part]
        push_sums(levels, part, node)
    fold_sums(levels, count, out, False)


# --- Leaves: the sum of eight rows, pairwise -----------------------------------------------------


@compiled
def sum8(v: Any, out: Any) -> None:
    """Sum the eight rows of ``v (8, W)`` pairwise into ``out (W,)``."""
    for j in range(out.shape[0]):
        left = (v[0, j] + v[1, j]) + (v[2, j] + v[3, j])
        out[j] = left + ((v[4, j] + v[5, j]) + (v[6, j] + v[7, j]))


@compiled
def _column_sum_leaf(x: Any, r: int, a: int, b: int, out: Any) -> None:
    x0, x1, x2, x3 = x[r, a:b], x[r + 1, a:b], x[r + 2, a:b], x[r + 3, a:b]
    x4, x5, x6, x7 = x[r + 4, a:b], x[r + 5, a:b], x[r + 6, a:b], x[r + 7, a:b]
    for j in range(b - a):
        left = (x0[j] + x1[j]) + (x2[j] + x3[j])
        out[j] = left + ((x4[j] + x5[j]) + (x6[j] + x7[j]))


@compiled
def _column_sum_tiles(
    x: Any, parts: Any, tile_rows: int, first_tile: int, last_tile: int, first: int, last: int
) -> None:
    for tile in range(first_tile, last_tile):
        start = tile * tile_rows
        rows = min(tile_rows, x.shape[0] - start)
        leaves = rows // 8
        for a in range(first, last, BLOCK):
            b = min(a + BLOCK, last)
            levels = np.empty((levels_for(leaves), 1, b - a), x.dtype)
            node = np.empty((1, b - a), x.dtype)
            for leaf in range(leaves):
                _column_sum_leaf(x, start + leaf * 8, a, b, node[0])
                push_sums(levels, leaf, node)
            if rows % 8:
                v = np.zeros((8, b - a), x.dtype)  # rows beyond the last one add +0
                for i in range(rows % 8):
                    v[i] = x[start + leaves * 8 + i, a:b]
                sum8(v, node[0])
            fold_sums(levels, leaves, node, rows % 8 > 0)
            parts[0, tile, a:b] = node[0]


@compiled
def _gradient_leaf(
    dout: Any, x: Any, shift: Any, mean: Any, invstd: Any, r: int, a: int, b: int, node: Any
) -> None:
    k, m, s = shift[a:b], mean[a:b], invstd[a:b]
    x0, x1, x2, x3 = x[r, a:b], x[r + 1, a:b], x[r + 2, a:b], x[r + 3, a:b]
    x4, x5, x6, x7 = x[r + 4, a:b], x[r + 5, a:b], x[r + 6, a:b], x[r + 7, a:b]
    g0, g1, g2, g3 = dout[r, a:b], dout[r + 1, a:b], dout[r + 2, a:b], dout[r + 3, a:b]
    g4, g5, g6, g7 = dout[r + 4, a:b], dout[r + 5, a:b], dout[r + 6, a:b], dout[r + 7, a:b]
    sum_gx, sum_g = node[0], node[1]
    for j in range(b - a):
        left = (g0[j] + g1[j]) + (g2[j] + g3[j])
        sum_g[j] = left + ((g4[j] + g5[j]) + (g6[j] + g7[j]))
        h0 = g0[j] * (((x0[j] - k[j]) - m[j]) * s[j])
        h1 = g1[j] * (((x1[j] - k[j]) - m[j]) * s[j])
        h2 = g2[j] * (((x2[j] - k[j]) - m[j]) * s[j])
        h3 = g3[j] * (((x3[j] - k[j]) - m[j]) * s[j])
        h4 = g4[j] * (((x4[j] - k[j]) - m[j]) * s[j])
        h5 = g5[j] * (((x5[j] - k[j]) - m[j]) * s[j])
        h6 = g6[j] * (((x6[j] - k[j]) - m[j]) * s[j])
        h7 = g7[j] * (((x7[j] - k[j]) - m[j]) * s[j])
        sum_gx[j] = ((h0 + h1) + (h2 + h3)) + ((h4 + h5) + (h6 + h7))


@compiled
def _gradient_row(
    dout: Any, x: Any, shift: Any, mean: Any, invstd: Any, r: int, a: int, b: int, h: Any
) -> None:
    g, xr, k, m, s = dout[r, a:b], x[r, a:b], shift[a:b], mean[a:b], invstd[a:b]
    for j in range(b - a):
        h[j] = g[j] * (((xr[j] - k[j]) - m[j]) * s[j])


@compiled
def _gradient_row_per_row(
    dout: Any, x: Any, shift: Any, mean: Any, invstd: Any, r: int, a: int, b: int, h: Any
) -> None:
    g, xr, k, m, s = dout[r, a:b], x[r, a:b], shift[r], mean[r], invstd[r]
    for j in range(b - a):
        h[j] = g[j] * (((xr[j] - k) - m) * s)


@compiled
def _gradient_sums_tiles(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    per_row: bool,
    parts: Any,
    tile_rows: int,
    first_tile: int,
    last_tile: int,
    first: int,
    last: int,
) -> None:
    for tile in range(first_tile, last_tile):
        start = tile * tile_rows
        rows = min(tile_rows, x.shape[0] - start)
        leaves = rows // 8
        for a in range(first, last, BLOCK):
            b = min(a + BLOCK, last)
            levels = np.empty((levels_for(leaves), 2, b - a), x.dtype)
            node = np.empty((2, b - a), x.dtype)
            g = np.zeros((8, b - a), x.dtype)
            h = np.zeros((8, b - a), x.dtype)
            for leaf in range(leaves):
                r = start + leaf * 8
                if per_row:
                    for i in range(8):
                        _gradient_row_per_row(dout, x, shift, mean, invstd, r + i, a, b, h[i])
                    sum8(h, node[0])
                    _column_sum_leaf(dout, r, a, b, node[1])
                else:
                    _gradient_leaf(dout, x, shift, mean, invstd, r, a, b, node)
                push_sums(levels, leaf, node)
            if rows % 8:
                h[:] = 0  # rows beyond the last one add +0
                for i in range(rows % 8):
                    r = start + leaves * 8 + i
                    g[i] = dout[r, a:b]
                    if per_row:
                        _gradient_row_per_row(dout, x, shift, mean, invstd, r, a, b, h[i])
                    else:
                        _gradient_row(dout, x, shift, mean, invstd, r, a, b, h[i])
                sum8(h, node[0])
                sum8(g, node[1])
            fold_sums(levels, leaves, node, rows % 8 > 0)
            parts[0, tile, a:b] = node[0]
            parts[1, tile, a:b] = node[1]
