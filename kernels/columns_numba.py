"""The sample order where channels are neighbours: ``x (I, B, C, 1)``, rows of C channels.

A task takes some instances, tiles of rows and columns. Within a tile it walks leaf by leaf and
keeps a binary counter of finished subtrees: level l holds the node of 2^l leaves while bit l of the
number of leaves is set. A node is an array ``(K, W)``: K values for each of W columns.
"""

from typing import Any

import numpy as np

from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.real_numba import narrow, widen

BLOCK = 256  # columns walked together: the counter's levels stay in the first cache


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
def _push_sums(levels: Any, count: int, node: Any) -> None:
    """Add a finished leaf to a counter that holds ``count``; ``node (K, W)`` is used up."""
    level = 0
    while count & 1:
        _add_to(node, levels[level])
        count >>= 1
        level += 1
    levels[level] = node


@compiled
def _fold_sums(levels: Any, count: int, node: Any, started: bool) -> None:
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
def merge_sums(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    """Merge the sums ``(K, P, C)`` of parts into ``out (K, C)``."""
    width, count, columns = parts.shape
    levels = np.empty((levels_for(count), width, columns), parts.dtype)
    node = np.empty((width, columns), parts.dtype)
    for part in range(count):  # a shorter last part is a sum like any other
        node[:] = parts[:, part]
        _push_sums(levels, part, node)
    _fold_sums(levels, count, out, False)


@compiled
def _merge_into(node: Any, rows: int, left: Any, left_rows: int) -> None:
    """Let ``node`` become the merger of ``left`` and ``node``, a shorter or equal neighbour.

    Chan, Golub and LeVeque 1979, in means instead of sums. Equal halves need no division.
    """
    real = node.dtype.type
    left_mean, left_var, mean, var = left[0], left[1], node[0], node[1]
    if rows == left_rows:
        half = real(0.5)
        for j in range(mean.shape[0]):
            h = (left_mean[j] - mean[j]) * half
            mean[j] = (left_mean[j] + mean[j]) * half
            var[j] = (left_var[j] * half + var[j] * half) + h * h
    else:
        total = real(left_rows + rows)
        u, w = real(left_rows) / total, real(rows) / total
        for j in range(mean.shape[0]):
            delta = mean[j] - left_mean[j]
            mean[j] = left_mean[j] + delta * w
            var[j] = (left_var[j] * u + var[j] * w) + (delta * u) * (delta * w)


@compiled
def _push_moments(levels: Any, count: int, unit: int, node: Any) -> None:
    """Add a finished node of ``unit`` rows to a counter that holds ``count`` such nodes."""
    level = 0
    while count & 1:
        _merge_into(node, unit << level, levels[level], unit << level)
        count >>= 1
        level += 1
    levels[level] = node


@compiled
def _fold_moments(levels: Any, count: int, unit: int, node: Any, rows: int) -> None:
    """Merge what a counter holds into ``node``, which has the last ``rows`` rows, perhaps none."""
    level = 0
    while count:
        if count & 1:
            if rows:
                _merge_into(node, rows, levels[level], unit << level)
            else:
                node[:] = levels[level]
            rows += unit << level
        count >>= 1
        level += 1


@compiled
def merge_moments(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    """Merge the moments ``(2, P, C)`` of parts into ``out (2, C)``."""
    columns = parts.shape[2]
    full, rest = rows // part_rows, rows % part_rows
    levels = np.empty((levels_for(full), 2, columns), parts.dtype)
    for part in range(full):
        out[:] = parts[:, part]
        _push_moments(levels, part, part_rows, out)
    if rest:
        out[:] = parts[:, full]
    _fold_moments(levels, full, part_rows, out, rest)


@compiled
def _sum8(v: Any, out: Any) -> None:
    """Sum the eight rows of ``v (8, W)`` pairwise into ``out (W,)``."""
    for j in range(out.shape[0]):
        left = (v[0, j] + v[1, j]) + (v[2, j] + v[3, j])
        out[j] = left + ((v[4, j] + v[5, j]) + (v[6, j] + v[7, j]))


@compiled
def _row(x: Any, instance: int, r: int) -> Any:
    """Return a row ``(C,)`` of ``x (I, B, C, 1)``."""
    return x[instance, r].reshape(x.shape[2])


# --- Moments -------------------------------------------------------------------------------------


@compiled
def _moments_leaf(x: Any, shift: Any, r: int, a: int, b: int, node: Any) -> None:
    eighth = node.dtype.type(0.125)  # a power of two: multiplying is dividing by 8, and exact
    x0, x1, x2, x3 = x[r, a:b], x[r + 1, a:b], x[r + 2, a:b], x[r + 3, a:b]
    x4, x5, x6, x7 = x[r + 4, a:b], x[r + 5, a:b], x[r + 6, a:b], x[r + 7, a:b]
    shift, mean, var = shift[a:b], node[0], node[1]
    for j in range(b - a):
        k = shift[j]
        d0, d1, d2, d3 = widen(x0[j]) - k, widen(x1[j]) - k, widen(x2[j]) - k, widen(x3[j]) - k
        d4, d5, d6, d7 = widen(x4[j]) - k, widen(x5[j]) - k, widen(x6[j]) - k, widen(x7[j]) - k
        m = (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))) * eighth
        e0, e1, e2, e3 = d0 - m, d1 - m, d2 - m, d3 - m
        e4, e5, e6, e7 = d4 - m, d5 - m, d6 - m, d7 - m
        # Divided before they are summed: eight squares overflow where their mean does not.
        s0, s1, s2, s3 = e0 * eighth * e0, e1 * eighth * e1, e2 * eighth * e2, e3 * eighth * e3
        s4, s5, s6, s7 = e4 * eighth * e4, e5 * eighth * e5, e6 * eighth * e6, e7 * eighth * e7
        mean[j] = m
        var[j] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@compiled
def _moments_short_leaf(x: Any, shift: Any, r: int, rows: int, a: int, b: int, node: Any) -> None:
    count, eighth = node.dtype.type(rows), node.dtype.type(0.125)
    v = np.zeros((8, b - a), node.dtype)  # rows beyond the last one add +0
    for i in range(rows):
        for j in range(b - a):
            v[i, j] = widen(x[r + i, a + j]) - shift[a + j]
    _sum8(v, node[0])
    for j in range(b - a):
        node[0, j] /= count
    for i in range(rows):
        for j in range(b - a):
            e = v[i, j] - node[0, j]
            v[i, j] = e * eighth * e
    _sum8(v, node[1])
    for j in range(b - a):
        node[1, j] /= count * eighth


@compiled
def moments(
    x: Any,
    shift: Any,
    parts: Any,
    tile_rows: int,
    first_instance: int,
    last_instance: int,
    first_tile: int,
    last_tile: int,
    first: int,
    last: int,
) -> None:
    """Write the moments of ``x (I, B, C, 1)`` after the shift to ``parts``, a tile each."""
    columns = x.shape[2]
    for instance in range(first_instance, last_instance):
        xi, base = x[instance].reshape(x.shape[1], columns), instance * columns
        k = shift[base : base + columns]
        for tile in range(first_tile, last_tile):
            start = tile * tile_rows
            rows = min(tile_rows, xi.shape[0] - start)
            leaves, rest = rows // 8, rows % 8
            for a in range(first, last, BLOCK):
                b = min(a + BLOCK, last)
                levels = np.empty((levels_for(leaves), 2, b - a), parts.dtype)
                node = np.empty((2, b - a), parts.dtype)
                for leaf in range(leaves):
                    _moments_leaf(xi, k, start + leaf * 8, a, b, node)
                    _push_moments(levels, leaf, 8, node)
                if rest:
                    _moments_short_leaf(xi, k, start + leaves * 8, rest, a, b, node)
                _fold_moments(levels, leaves, 8, node, rest)
                parts[0, tile, base + a : base + b] = node[0]
                parts[1, tile, base + a : base + b] = node[1]


# --- Sums ----------------------------------------------------------------------------------------


@compiled
def sums(
    x: Any,
    square: bool,
    parts: Any,
    tile_rows: int,
    first_instance: int,
    last_instance: int,
    first_tile: int,
    last_tile: int,
    first: int,
    last: int,
) -> None:
    """Write the sums of ``x (I, B, C, 1)``, or of its squares, to ``parts``, a tile each."""
    columns = x.shape[2]
    for instance in range(first_instance, last_instance):
        xi, base = x[instance].reshape(x.shape[1], columns), instance * columns
        for tile in range(first_tile, last_tile):
            start = tile * tile_rows
            rows = min(tile_rows, xi.shape[0] - start)
            for a in range(first, last, BLOCK):
                b = min(a + BLOCK, last)
                levels = np.empty((levels_for(rows // 8), 1, b - a), parts.dtype)
                node = np.empty((1, b - a), parts.dtype)
                v = np.empty((8, b - a), parts.dtype)
                for leaf in range((rows + 7) // 8):
                    count = min(8, rows - leaf * 8)
                    for i in range(count):
                        _values(xi[start + leaf * 8 + i, a:b], square, v[i])
                    v[count:] = 0  # rows beyond the last one add +0
                    _sum8(v, node[0])
                    if count == 8:
                        _push_sums(levels, leaf, node)
                _fold_sums(levels, rows // 8, node, rows % 8 > 0)
                parts[0, tile, base + a : base + b] = node[0]


@compiled
def _values(x: Any, square: bool, out: Any) -> None:
    for j in range(out.shape[0]):
        value = widen(x[j])
        out[j] = value * value if square else value


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
    first_instance: int,
    last_instance: int,
    first_tile: int,
    last_tile: int,
    first: int,
    last: int,
) -> None:
    """Write the sums of ``g * xhat`` and of ``g`` to ``parts``, a tile each.

    ``g`` is dout; where ``out`` is given, 0 unless it is above 0, and written to ``dresidual``;
    where ``beta`` is, 0 unless the normalized value is above 0. Statistics are a channel's.
    """
    columns = x.shape[2]
    for instance in range(first_instance, last_instance):
        base = instance * columns
        for tile in range(first_tile, last_tile):
            start = tile * tile_rows
            rows = min(tile_rows, x.shape[1] - start)
            for a in range(first, last, BLOCK):
                b = min(a + BLOCK, last)
                levels = np.empty((levels_for(rows // 8), 2, b - a), parts.dtype)
                node = np.empty((2, b - a), parts.dtype)
                g = np.empty((8, b - a), parts.dtype)
                h = np.empty((8, b - a), parts.dtype)
                c, d = base + a, base + b
                for leaf in range((rows + 7) // 8):
                    count = min(8, rows - leaf * 8)
                    for i in range(count):
                        r = start + leaf * 8 + i
                        gr, xr = _row(dout, instance, r)[a:b], _row(x, instance, r)[a:b]
                        if out is not None:
                            y, z = _row(out, instance, r)[a:b], _row(dresidual, instance, r)[a:b]
                            _masked(gr, y, g[i], z)
                        elif beta is not None:
                            k, m = shift[c:d], mean[c:d]
                            relu_gradient(gr, xr, k, m, scale[c:d], beta[c:d], g[i])
                        else:
                            _values(gr, False, g[i])
                        _times_xhat(g[i], xr, shift[c:d], mean[c:d], invstd[c:d], h[i])
                    g[count:] = 0  # rows beyond the last one add +0
                    h[count:] = 0
                    _sum8(h, node[0])
                    _sum8(g, node[1])
                    if count == 8:
                        _push_sums(levels, leaf, node)
                _fold_sums(levels, rows // 8, node, rows % 8 > 0)
                parts[0, tile, c:d] = node[0]
                parts[1, tile, c:d] = node[1]


@compiled
def _masked(dout: Any, out: Any, g: Any, dresidual: Any) -> None:
    zero = g.dtype.type(0)
    for j in range(g.shape[0]):
        g[j] = widen(dout[j]) if widen(out[j]) > zero else zero
        dresidual[j] = narrow(g[j], dresidual)


@compiled
def relu_gradient(dout: Any, x: Any, shift: Any, mean: Any, scale: Any, beta: Any, g: Any) -> None:
    """Let ``g`` be dout where the normalized row, as it is stored, is above 0, and else 0."""
    zero = g.dtype.type(0)
    for j in range(g.shape[0]):
        y = narrow(((widen(x[j]) - shift[j]) - mean[j]) * scale[j] + beta[j], x)
        g[j] = widen(dout[j]) if widen(y) > zero else zero


@compiled
def _times_xhat(g: Any, x: Any, shift: Any, mean: Any, invstd: Any, h: Any) -> None:
    for j in range(h.shape[0]):
        h[j] = g[j] * (((widen(x[j]) - shift[j]) - mean[j]) * invstd[j])


@compiled
def row_gradients(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    parts: Any,
    tile_rows: int,
    first_instance: int,
    last_instance: int,
    first_tile: int,
    last_tile: int,
    first: int,
    last: int,
) -> None:
    """Write the sums of ``dout * xhat`` and of dout to ``parts``; statistics are a row's."""
    for tile in range(first_tile, last_tile):
        start = tile * tile_rows
        rows = min(tile_rows, x.shape[1] - start)
        for a in range(first, last, BLOCK):
            b = min(a + BLOCK, last)
            levels = np.empty((levels_for(rows // 8), 2, b - a), parts.dtype)
            node = np.empty((2, b - a), parts.dtype)
            g = np.empty((8, b - a), parts.dtype)
            h = np.empty((8, b - a), parts.dtype)
            for leaf in range((rows + 7) // 8):
                count = min(8, rows - leaf * 8)
                for i in range(count):
                    r = start + leaf * 8 + i
                    _values(_row(dout, 0, r)[a:b], False, g[i])
                    xr = _row(x, 0, r)[a:b]
                    _times_row_xhat(g[i], xr, shift[r], mean[r], invstd[r], h[i])
                g[count:] = 0  # rows beyond the last one add +0
                h[count:] = 0
                _sum8(h, node[0])
                _sum8(g, node[1])
                if count == 8:
                    _push_sums(levels, leaf, node)
            _fold_sums(levels, rows // 8, node, rows % 8 > 0)
            parts[0, tile, a:b] = node[0]
            parts[1, tile, a:b] = node[1]


@compiled
def _times_row_xhat(g: Any, x: Any, shift: Any, mean: Any, invstd: Any, h: Any) -> None:
    for j in range(h.shape[0]):
        h[j] = g[j] * (((widen(x[j]) - shift) - mean) * invstd)
