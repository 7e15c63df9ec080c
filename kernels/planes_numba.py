"""The sample order where samples are neighbours: channels first, and the values of a row.

A channel goes through a buffer, some samples at a time: a subtree whose leaves lie side by side, so
that a level of the tree is one vectorised pass over pairs. A binary counter merges the buffers.
"""

from typing import Any

import numpy as np

from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.real_numba import narrow, widen

SAMPLES = 1024  # taken together, 8 times a power of two: a few buffers stay in the first cache
_LEVELS = 64


# --- Rows of numbers that lie in a buffer --------------------------------------------------------


@compiled
def workspace(like: Any) -> Any:
    """Return the memory that sums and moments of a buffer need, of the dtype of ``like``."""
    return np.empty((6, max(SAMPLES // 8, _LEVELS)), like.dtype)


@compiled
def _leaf_sums(v: Any, out: Any) -> Any:
    """Write the sums of the leaves of ``v (n,)`` to ``out``; return their number."""
    full, rest = v.shape[0] // 8, v.shape[0] % 8
    for i in range(full):
        left = (v[8 * i] + v[8 * i + 1]) + (v[8 * i + 2] + v[8 * i + 3])
        out[i] = left + ((v[8 * i + 4] + v[8 * i + 5]) + (v[8 * i + 6] + v[8 * i + 7]))
    if rest:
        out[full] = _sum_of_short(v[8 * full :])
        return full + 1
    return full


@compiled
def _sum_of_short(v: Any) -> Any:
    """Return the sum of a leaf of fewer than eight values; the others add +0."""
    zero = v.dtype.type(0)
    n = v.shape[0]
    v0, v1, v2, v3 = v[0], v[1] if n > 1 else zero, v[2] if n > 2 else zero, v[3] if n > 3 else zero
    v4, v5, v6 = v[4] if n > 4 else zero, v[5] if n > 5 else zero, v[6] if n > 6 else zero
    return ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + zero))


@compiled
def _buffer_sum(v: Any, work: Any) -> Any:
    """Return the sum of ``v``, of at most ``SAMPLES`` values."""
    a, b = work[0], work[1]
    count = _leaf_sums(v, a)
    while count > 1:
        pairs = count // 2
        for i in range(pairs):
            b[i] = a[2 * i] + a[2 * i + 1]
        if count % 2:
            b[pairs] = a[count - 1]
        count -= pairs
        a, b = b, a
    return a[0]


@compiled
def _push_sum(levels: Any, count: int, total: Any) -> None:
    level = 0
    while count & 1:
        total = levels[level] + total
        count >>= 1
        level += 1
    levels[level] = total


@compiled
def _fold_sum(levels: Any, count: int, total: Any, started: bool) -> Any:
    level = 0
    while count:
        if count & 1:
            total = levels[level] + total if started else levels[level]
            started = True
        count >>= 1
        level += 1
    return total


@compiled
def row_sum(v: Any, work: Any) -> Any:
    """Return the sum of a row of any length."""
    full = v.shape[0] // SAMPLES
    for i in range(full):
        _push_sum(work[2], i, _buffer_sum(v[i * SAMPLES : (i + 1) * SAMPLES], work))
    rest = v[full * SAMPLES :]
    total = v[0]
    if rest.shape[0]:
        total = _buffer_sum(rest, work)
    return _fold_sum(work[2], full, total, rest.shape[0] > 0)


@compiled
def _merge(left_mean: Any, left_var: Any, left_rows: int, mean: Any, var: Any, rows: int) -> Any:
    """Return the moments of two neighbours; the right one has as many rows, or fewer.

    Chan, Golub and LeVeque 1979, in means instead of sums. Equal halves need no division.
    """
    real = type(mean)
    if rows == left_rows:
        half = real(0.5)
        h = (left_mean - mean) * half
        return (left_mean + mean) * half, (left_var * half + var * half) + h * h
    total = real(left_rows + rows)
    u, w = real(left_rows) / total, real(rows) / total
    delta = mean - left_mean
    return left_mean + delta * w, (left_var * u + var * w) + (delta * u) * (delta * w)


@compiled
def _leaf_moments(d: Any, mean: Any, var: Any) -> None:
    real = d.dtype.type
    full, rest = d.shape[0] // 8, d.shape[0] % 8
    eighth = real(0.125)  # a power of two: multiplying is dividing by 8, and exact
    for i in range(full):
        d0, d1, d2, d3 = d[8 * i], d[8 * i + 1], d[8 * i + 2], d[8 * i + 3]
        d4, d5, d6, d7 = d[8 * i + 4], d[8 * i + 5], d[8 * i + 6], d[8 * i + 7]
        m = (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))) * eighth
        e0, e1, e2, e3 = d0 - m, d1 - m, d2 - m, d3 - m
        e4, e5, e6, e7 = d4 - m, d5 - m, d6 - m, d7 - m
        # Divided before they are summed: eight squares overflow where their mean does not.
        s0, s1, s2, s3 = e0 * eighth * e0, e1 * eighth * e1, e2 * eighth * e2, e3 * eighth * e3
        s4, s5, s6, s7 = e4 * eighth * e4, e5 * eighth * e5, e6 * eighth * e6, e7 * eighth * e7
        mean[i] = m
        var[i] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    if rest:
        last, count = d[8 * full :], real(rest)
        m = _sum_of_short(last) / count
        squares = np.zeros(7, d.dtype)
        for i in range(rest):
            e = last[i] - m
            squares[i] = e * eighth * e
        mean[full] = m
        var[full] = _sum_of_short(squares) / (count * eighth)


@compiled
def _buffer_moments(d: Any, work: Any) -> Any:
    """Return mean and variance of ``d``, of at most ``SAMPLES`` values."""
    half = d.dtype.type(0.5)
    mean, var, next_mean, next_var = work[0], work[1], work[2], work[3]
    _leaf_moments(d, mean, var)
    count, unit = (d.shape[0] + 7) // 8, 8
    last = d.shape[0] - 8 * (count - 1)  # rows of the last node; the others have `unit`
    while count > 1:
        pairs = count // 2
        for i in range(pairs):
            h = (mean[2 * i] - mean[2 * i + 1]) * half
            next_mean[i] = (mean[2 * i] + mean[2 * i + 1]) * half
            next_var[i] = (var[2 * i] * half + var[2 * i + 1] * half) + h * h
        if count % 2:
            next_mean[pairs], next_var[pairs] = mean[count - 1], var[count - 1]
        else:
            if last < unit:
                m, v = mean[count - 2], var[count - 2]
                m, v = _merge(m, v, unit, mean[count - 1], var[count - 1], last)
                next_mean[pairs - 1], next_var[pairs - 1] = m, v
            last += unit
        mean, var, next_mean, next_var = next_mean, next_var, mean, var
        count -= pairs
        unit *= 2
    return mean[0], var[0]


@compiled
def _push_moments(means: Any, variances: Any, count: int, mean: Any, var: Any) -> None:
    level = 0
    while count & 1:
        mean, var = _merge(means[level], variances[level], 1, mean, var, 1)
        count >>= 1
        level += 1
    means[level], variances[level] = mean, var


@compiled
def _fold_moments(means: Any, variances: Any, count: int, mean: Any, var: Any, rows: int) -> Any:
    level = 0
    while count:
        if count & 1:
            unit = SAMPLES << level
            if rows:
                mean, var = _merge(means[level], variances[level], unit, mean, var, rows)
            else:
                mean, var = means[level], variances[level]
            rows += unit
        count >>= 1
        level += 1
    return mean, var


@compiled
def row_moments(d: Any, work: Any) -> Any:
    """Return mean and variance of a row of any length."""
    full = d.shape[0] // SAMPLES
    for i in range(full):
        mean, var = _buffer_moments(d[i * SAMPLES : (i + 1) * SAMPLES], work)
        _push_moments(work[4], work[5], i, mean, var)
    rest = d[full * SAMPLES :]
    mean, var = d[0], d[0]
    if rest.shape[0]:
        mean, var = _buffer_moments(rest, work)
    return _fold_moments(work[4], work[5], full, mean, var, rest.shape[0])


# --- Channels of x (I, B, C, S) ------------------------------------------------------------------


@compiled
def gather(x: Any, channel: int, first: int, shift: Any, out: Any) -> None:
    """Fill ``out`` with samples of a channel, from number ``first`` on, less the shift."""
    channels, inner = x.shape[2:]
    instance, c = channel // channels, channel % channels
    n, s, at = first // inner, first % inner, 0
    while at < out.shape[0]:
        run = min(inner - s, out.shape[0] - at)
        xs, y = x[instance, n, c, s : s + run], out[at : at + run]
        for i in range(run):
            y[i] = widen(xs[i]) - shift
        at += run
        n, s = n + 1, 0


@compiled
def _scatter(v: Any, channel: int, first: int, x: Any) -> None:
    """Write samples of a channel, from number ``first`` on."""
    channels, inner = x.shape[2:]
    instance, c = channel // channels, channel % channels
    n, s, at = first // inner, first % inner, 0
    while at < v.shape[0]:
        run = min(inner - s, v.shape[0] - at)
        xs, y = x[instance, n, c, s : s + run], v[at : at + run]
        for i in range(run):
            xs[i] = narrow(y[i], xs)
        at += run
        n, s = n + 1, 0


@compiled
def moments(x: Any, shift: Any, parts: Any, tile_rows: int, first: int, last: int) -> None:
    """Write the moments of channels' tiles, ``first`` to ``last`` of all of them, to ``parts``."""
    tiles, samples = parts.shape[1], x.shape[1] * x.shape[3]
    work, d = workspace(parts), np.empty(SAMPLES, parts.dtype)
    for unit in range(first, last):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        rows = min(tile_rows, samples - start)
        full, rest = rows // SAMPLES, rows % SAMPLES
        for i in range(full):
            gather(x, channel, start + i * SAMPLES, shift[channel], d)
            mean, var = _buffer_moments(d, work)
            _push_moments(work[4], work[5], i, mean, var)
        mean, var = shift[channel], shift[channel]
        if rest:
            gather(x, channel, start + full * SAMPLES, shift[channel], d[:rest])
            mean, var = _buffer_moments(d[:rest], work)
        mean, var = _fold_moments(work[4], work[5], full, mean, var, rest)
        parts[0, tile, channel], parts[1, tile, channel] = mean, var


@compiled
def sums(x: Any, square: bool, parts: Any, tile_rows: int, first: int, last: int) -> None:
    """Write the sums of channels' tiles, or of their squares, to ``parts``."""
    tiles, samples = parts.shape[1], x.shape[1] * x.shape[3]
    work, v = workspace(parts), np.empty(SAMPLES, parts.dtype)
    zero = parts.dtype.type(0)
    for unit in range(first, last):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        rows = min(tile_rows, samples - start)
        full, rest = rows // SAMPLES, rows % SAMPLES
        total = zero
        for i in range((rows + SAMPLES - 1) // SAMPLES):
            values = v[: min(SAMPLES, rows - i * SAMPLES)]
            gather(x, channel, start + i * SAMPLES, zero, values)
            if square:
                for j in range(values.shape[0]):
                    values[j] = values[j] * values[j]
            total = _buffer_sum(values, work)
            if i < full:
                _push_sum(work[2], i, total)
        parts[0, tile, channel] = _fold_sum(work[2], full, total, rest > 0)


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
    first: int,
    last: int,
) -> None:
    """Write the sums of ``g * xhat`` and of ``g`` to ``parts``; ``g`` as in columns_numba."""
    tiles, samples = parts.shape[1], x.shape[1] * x.shape[3]
    work, buffers = workspace(parts), np.empty((3, SAMPLES), parts.dtype)
    zero = parts.dtype.type(0)
    for unit in range(first, last):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        rows = min(tile_rows, samples - start)
        full, rest = rows // SAMPLES, rows % SAMPLES
        m, s = mean[channel], invstd[channel]
        sum_gx, sum_g = zero, zero
        for i in range((rows + SAMPLES - 1) // SAMPLES):
            at, count = start + i * SAMPLES, min(SAMPLES, rows - i * SAMPLES)
            d, g, h = buffers[0, :count], buffers[1, :count], buffers[2, :count]
            gather(x, channel, at, shift[channel], d)
            gather(dout, channel, at, zero, g)
            if out is not None:
                gather(out, channel, at, zero, h)
                for j in range(count):
                    g[j] = g[j] if h[j] > zero else zero
                _scatter(g, channel, at, dresidual)
            elif beta is not None:
                for j in range(count):
                    y = narrow((d[j] - m) * scale[channel] + beta[channel], x)
                    g[j] = g[j] if widen(y) > zero else zero
            for j in range(count):
                h[j] = g[j] * ((d[j] - m) * s)
            sum_gx, sum_g = _buffer_sum(h, work), _buffer_sum(g, work)
            if i < full:
                _push_sum(work[2], i, sum_gx)
                _push_sum(work[3], i, sum_g)
        parts[0, tile, channel] = _fold_sum(work[2], full, sum_gx, rest > 0)
        parts[1, tile, channel] = _fold_sum(work[3], full, sum_g, rest > 0)
