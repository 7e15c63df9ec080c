"""Batch norm of ``x (N, D)`` over its rows, on the CPU. The same bits as batchnorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import (
    BLOCK,
    gradient_sums,
    levels_for,
    merge_parts,
    reduce_columns,
    sum8,
)
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.threads import split


def shift(x: Array) -> Array:
    """Return K ``(D,)``: of every column, the middle value of its first, central and last row."""
    (x,) = plain(x)
    out = np.empty(x.shape[1], x.dtype)
    _shift(x, out)
    return out


def moments(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance ``(D,)`` of ``x - shift`` over the rows."""
    x, shift = plain(x, shift)
    mean, var = reduce_columns(_moments_tiles, (x, shift), x, _merge_moments_parts, 2)
    return mean, var


def merge_moments(mean: Array, var: Array, part_rows: int, rows: int) -> tuple[Array, Array]:
    """Merge the moments ``(P, D)`` of parts after one common shift, as if taken over all rows.

    Every part has ``part_rows`` rows, the last one what is left of ``rows``. Where ``part_rows`` is
    8 times a power of two, the result has the bits of ``moments`` over the rows together.

    Raises
    ------
    ValueError
        There are not as many parts as the rows make.
    """
    if mean.shape != var.shape or len(mean) != -(-rows // part_rows):
        raise ValueError(
            f"mean has shape {mean.shape} and var {var.shape}, expected {-(-rows // part_rows)} "
            f"parts of both: {rows} rows in parts of {part_rows}"
        )
    merged = merge_parts(_merge_moments_parts, np.stack([mean, var]), part_rows, rows)
    return merged[0], merged[1]


def statistics(var: Array, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return ``invstd = 1 / sqrt(var + eps)`` and ``scale = gamma * invstd``, each ``(D,)``."""
    var, gamma = plain(var, gamma)
    invstd, scale = np.empty_like(var), np.empty_like(var)
    _statistics(var, gamma, var.dtype.type(eps), invstd, scale)
    return invstd, scale


def running_update(
    running_mean: Array, running_var: Array, shift: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """Return ``momentum * running + (1 - momentum) * sample`` for the mean and the variance."""
    arrays = plain(running_mean, running_var, shift, mean, var)
    real = var.dtype.type
    next_mean, next_var = np.empty_like(arrays[0]), np.empty_like(arrays[0])
    _running_update(*arrays, real(momentum), real(1.0 - momentum), next_mean, next_var)
    return next_mean, next_var


def normalize(x: Array, shift: Array, mean: Array, scale: Array, beta: Array) -> Array:
    """Return ``((x - shift) - mean) * scale + beta``, ``(N, D)``."""
    x, shift, mean, scale, beta = plain(x, shift, mean, scale, beta)
    out = np.empty_like(x)
    split(lambda a, b: _normalize(x, shift, mean, scale, beta, out, a, b), x.shape[0], x.size)
    return out


def backward_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return dgamma and dbeta ``(D,)``: the sums over rows of ``dout * xhat`` and of ``dout``."""
    return gradient_sums(dout, x, shift, mean, invstd, per_row=False)


def backward_dx(
    dout: Array,
    x: Array,
    shift: Array,
    mean: Array,
    invstd: Array,
    scale: Array,
    dgamma: Array,
    dbeta: Array,
    rows: int,
) -> Array:
    """Return dx ``(N, D)``, where the sums dgamma and dbeta run over ``rows`` rows."""
    dout, x, *channels = plain(dout, x, shift, mean, invstd, scale, dgamma, dbeta)
    dx = np.empty_like(x)
    count = x.dtype.type(rows)
    split(lambda a, b: _dx(dout, x, *channels, count, dx, a, b), x.shape[0], x.size)
    return dx


def backward_dx_fixed(dout: Array, scale: Array) -> Array:
    """Return dx ``(N, D)`` where the statistics were given, as in test mode: ``dout * scale``."""
    dout, scale = plain(dout, scale)
    dx = np.empty_like(dout)
    split(lambda a, b: _dx_fixed(dout, scale, dx, a, b), dout.shape[0], dout.size)
    return dx


@compiled
def _shift(x: Any, out: Any) -> None:
    rows = x.shape[0]
    first, central, last = x[0], x[rows // 2], x[rows - 1]
    for j in range(out.shape[0]):
        a, b, c = first[j], central[j], last[j]
        if a > b:
            a, b = b, a
        if b > c:
            b = a if a > c else c
        out[j] = b


# --- Moments; a node is (2, W): means and variances ----------------------------------------------


@compiled
def _moments_leaf(x: Any, shift: Any, r: int, a: int, b: int, node: Any) -> None:
    eighth = x.dtype.type(0.125)  # a power of two: multiplying is dividing by 8, and exact
    x0, x1, x2, x3 = x[r, a:b], x[r + 1, a:b], x[r + 2, a:b], x[r + 3, a:b]
    x4, x5, x6, x7 = x[r + 4, a:b], x[r + 5, a:b], x[r + 6, a:b], x[r + 7, a:b]
    k, mean, var = shift[a:b], node[0], node[1]
    for j in range(b - a):
        d0, d1, d2, d3 = x0[j] - k[j], x1[j] - k[j], x2[j] - k[j], x3[j] - k[j]
        d4, d5, d6, d7 = x4[j] - k[j], x5[j] - k[j], x6[j] - k[j], x7[j] - k[j]
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
    count, eighth = x.dtype.type(rows), x.dtype.type(0.125)
    v = np.zeros((8, b - a), x.dtype)  # rows beyond the last one add +0
    for i in range(rows):
        for j in range(b - a):
            v[i, j] = x[r + i, a + j] - shift[a + j]
    sum8(v, node[0])
    for j in range(b - a):
        node[0, j] /= count
    for i in range(rows):
        for j in range(b - a):
            e = v[i, j] - node[0, j]
            v[i, j] = e * eighth * e
    sum8(v, node[1])
    for j in range(b - a):
        node[1, j] /= count * eighth


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
def _push(levels: Any, count: int, unit: int, node: Any) -> None:
    """Add a finished node of ``unit`` rows to a counter that holds ``count`` such nodes."""
    level = 0
    while count & 1:
        _merge_into(node, unit << level, levels[level], unit << level)
        count >>= 1
        level += 1
    levels[level] = node


@compiled
def _fold(levels: Any, count: int, unit: int, node: Any, rows: int) -> None:
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
def _moments_tiles(
    x: Any,
    shift: Any,
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
        leaves, rest = rows // 8, rows % 8
        for a in range(first, last, BLOCK):
            b = min(a + BLOCK, last)
            levels = np.empty((levels_for(leaves), 2, b - a), x.dtype)
            node = np.empty((2, b - a), x.dtype)
            for leaf in range(leaves):
                _moments_leaf(x, shift, start + leaf * 8, a, b, node)
                _push(levels, leaf, 8, node)
            if rest:
                _moments_short_leaf(x, shift, start + leaves * 8, rest, a, b, node)
            _fold(levels, leaves, 8, node, rest)
            parts[0, tile, a:b] = node[0]
            parts[1, tile, a:b] = node[1]


@compiled
def _merge_moments_parts(parts: Any, part_rows: int, rows: int, out: Any) -> None:
    columns = parts.shape[2]
    full, rest = rows // part_rows, rows % part_rows
    levels = np.empty((levels_for(full), 2, columns), parts.dtype)
    for part in range(full):
        out[:] = parts[:, part]
        _push(levels, part, part_rows, out)
    if rest:
        out[:] = parts[:, full]
    _fold(levels, full, part_rows, out, rest)


# --- Elementwise ---------------------------------------------------------------------------------


@compiled
def _statistics(var: Any, gamma: Any, eps: Any, invstd: Any, scale: Any) -> None:
    one = var.dtype.type(1)
    for j in range(var.shape[0]):
        invstd[j] = one / np.sqrt(var[j] + eps)
        scale[j] = gamma[j] * invstd[j]


@compiled
def _running_update(
    running_mean: Any,
    running_var: Any,
    shift: Any,
    mean: Any,
    var: Any,
    momentum: Any,
    complement: Any,
    next_mean: Any,
    next_var: Any,
) -> None:
    for j in range(var.shape[0]):
        next_mean[j] = momentum * running_mean[j] + complement * (shift[j] + mean[j])
        next_var[j] = momentum * running_var[j] + complement * var[j]


@compiled
def _normalize(
    x: Any, shift: Any, mean: Any, scale: Any, beta: Any, out: Any, first: int, last: int
) -> None:
    for r in range(first, last):
        xr, y = x[r], out[r]
        for j in range(y.shape[0]):
            y[j] = ((xr[j] - shift[j]) - mean[j]) * scale[j] + beta[j]


@compiled
def _dx(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    dgamma: Any,
    dbeta: Any,
    count: Any,
    dx: Any,
    first: int,
    last: int,
) -> None:
    dgamma_over_n, dbeta_over_n = dgamma / count, dbeta / count
    for r in range(first, last):
        g, xr, y = dout[r], x[r], dx[r]
        for j in range(y.shape[0]):
            xhat = ((xr[j] - shift[j]) - mean[j]) * invstd[j]
            y[j] = scale[j] * ((g[j] - dbeta_over_n[j]) - xhat * dgamma_over_n[j])


@compiled
def _dx_fixed(dout: Any, scale: Any, dx: Any, first: int, last: int) -> None:
    for r in range(first, last):
        g, y = dout[r], dx[r]
        for j in range(y.shape[0]):
            y[j] = g[j] * scale[j]
