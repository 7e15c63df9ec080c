"""The sample order where samples are neighbours, channels first: ``x (I, B, C, S)`` with S above 1.

Neighbouring channels are taken together. Long ones go through a buffer each, a block at a time, and
are reduced there as in buffers_numba. Short ones are transposed some samples at a time, so that
each is a lane of a vector, and lanes are reduced as columns_numba reduces columns: the end of a
channel, where steps wait for each other, comes once for all of them.
"""

from typing import Any

import numpy as np

from gpubn.kernels.buffers_numba import (
    block,
    buffer_of,
    buffers_of,
    copy_less,
    finish_moments,
    finish_sum,
    leaf_moments,
    put_moments,
    put_sum,
    workspace,
)
from gpubn.kernels.columns_numba import (
    counter,
    fold_moments,
    fold_sums,
    push_moments,
    push_sum,
    short_leaf_moments,
    sum_rows,
)
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
    touch,
    transpose,
    where_positive,
)

_RUN = 1 << 16  # bytes of neighbouring channels that memory is read in at once
_GROUP = 1 << 22  # bytes of a thread's group of channels, which is to stay in the last cache
_MOST = 64  # channels of a group: each has buffers of its own, which are to stay in a nearer one
ALONE = 3  # more channels than that are faster as lanes, if they are short
SHORT = 8192  # samples of a short channel, at most
_CHUNK = 256  # samples that are transposed at a time, to stay in the first cache


@inlined
def plane(x: Any, channel: int, n: int) -> Any:
    """Return the place of the neighbouring samples of a channel among all elements of x."""
    batch, channels = x.shape[1:3]
    jump = 0 if x.shape[0] == 1 else channel // channels * (batch - 1)  # divisions are slow
    return ((jump + n) * channels + channel) * x.shape[3]


@compiled
def group_of(x: Any) -> Any:
    """Return how many neighbouring channels are best taken together.

    Memory is read faster in long runs, and a group is read twice: from memory, then from a cache.
    """
    size = x.shape[3] * x.itemsize
    return max(1, min(_RUN // size, _GROUP // (x.shape[1] * size), _MOST))


@compiled
def moments(x: Any, shift: Any, parts: Any, tile_rows: int, first: int, last: int) -> None:
    """Write the moments of channels' tiles, ``first`` to ``last`` of all of them, to ``parts``."""
    tiles, samples = parts.shape[1], x.shape[1] * x.shape[3]
    group = min(group_of(x), last - first) if tiles == 1 else 1
    work = workspace(parts, group, min(tile_rows, samples))
    buffers = buffers_of(parts, group)
    for unit in range(first, last, group):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        count, rows = min(group, last - unit), min(tile_rows, samples - start)
        group_moments(x, shift, channel, count, start, rows, work, buffers, parts[:, tile])


@compiled
def group_moments(
    x: Any,
    shift: Any,
    channel: int,
    count: int,
    start: int,
    rows: int,
    work: Any,
    buffers: Any,
    out: Any,
) -> None:
    """Write mean and variance of ``count`` channels' samples less their shifts to ``out (2, C)``.

    The channels from ``channel`` on, each ``rows`` samples from ``start`` on.
    """
    inner, size, w = x.shape[3], block(buffers), lanes(buffers)
    if as_lanes(x, count, rows):
        chunk = chunk_of(buffers)
        for c in range(channel, channel + count, w):
            _lane_moments(x, shift, c, min(w, channel + count - c), start, rows, chunk, out)
        return
    at, blocks, sample = 0, 0, start
    while sample < start + rows:  # every channel's buffer holds as many samples: `at`
        n, p = sample // inner, sample % inner
        run = min(inner - p, start + rows - sample)
        for c in range(count):
            k, d = fill(shift[channel + c]), buffers[c]
            source = plane(x, channel + c, n) + p
            filled, number, left = at, blocks, run
            while left:
                take = min(size - filled, left)
                copy_less(x, source, take, k, d, filled)
                source, left, filled = source + take, left - take, filled + take
                if filled == size:
                    put_moments(work[c], number, d, 0)
                    filled, number = 0, number + 1
        blocks += (at + run) // size
        at = (at + run) % size
        sample += run
    for c in range(count):
        mean, var = finish_moments(work[c], work[-1], blocks, buffers[c], 0, at)
        out[0, channel + c], out[1, channel + c] = mean, var


@compiled
def sums(x: Any, square: bool, parts: Any, tile_rows: int, first: int, last: int) -> None:
    """Write the sums of channels' tiles, or of their squares, to ``parts``."""
    tiles, samples, inner = parts.shape[1], x.shape[1] * x.shape[3], x.shape[3]
    size, w = block(parts), lanes(parts)
    work, v = workspace(parts, 1, min(tile_rows, samples)), buffer_of(parts, size)
    zero = fill(parts.dtype.type(0))
    for unit in range(first, last):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        rows = min(tile_rows, samples - start)
        full, rest = rows // size, rows % size
        for i in range(full + 1):
            at, count, sample = 0, size if i < full else rest, start + i * size
            while at < count:
                n, p = sample // inner, sample % inner
                run = min(inner - p, count - at)
                copy_less(x, plane(x, channel, n) + p, run, zero, v, at)
                at, sample = at + run, sample + run
            if square:
                for j in range(0, count, w):
                    store(v, j, load(v, j) * load(v, j))
            if i < full:
                put_sum(work[0], i, v, 0)
        parts[0, tile, channel] = finish_sum(work[0], work[1], full, v, 0, rest)


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
    statistics = shift, mean, invstd
    group = max(1, min(group_of(x) // 2, last - first)) if tiles == 1 else 1  # of two arrays
    work = workspace(parts, 2 * group, min(tile_rows, samples))
    buffers = buffers_of(parts, 2 * group)
    for unit in range(first, last, group):
        channel, tile = unit // tiles, unit % tiles
        start = tile * tile_rows
        count, rows = min(group, last - unit), min(tile_rows, samples - start)
        group_gradients(
            *(dout, x, statistics, scale, beta, out, dresidual, channel, count, start, rows),
            *(work, buffers, parts[:, tile]),
        )


@compiled
def group_gradients(
    dout: Any,
    x: Any,
    statistics: Any,
    scale: Any,
    beta: Any,
    out: Any,
    dresidual: Any,
    channel: int,
    count: int,
    start: int,
    rows: int,
    work: Any,
    buffers: Any,
    sums: Any,
) -> None:
    """Write the sums of ``g * xhat`` and of ``g`` of ``count`` channels to ``sums (2, C)``.

    ``statistics`` are all channels' shift, mean and invstd; the rest is as in ``group_moments``.
    """
    shift, mean, invstd = statistics
    inner, size, w = x.shape[3], block(buffers), lanes(buffers)
    if as_lanes(x, count, rows):
        if out is not None:
            _put_relu_gradients(dout, out, dresidual, channel, count, start, rows)
        chunks = chunk_of(buffers), chunk_of(buffers)
        for c in range(channel, channel + count, w):
            n = min(w, channel + count - c)
            if out is not None:
                _lane_gradients(
                    *(dresidual, x, statistics, None, None, c, n, start, rows, chunks, sums),
                )
            else:
                _lane_gradients(
                    *(dout, x, statistics, scale, beta, c, n, start, rows, chunks, sums),
                )
        return
    at, blocks, sample = 0, 0, start
    while sample < start + rows:
        n, p = sample // inner, sample % inner
        run = min(inner - p, start + rows - sample)
        for c in range(count):
            j = channel + c
            h, g = buffers[2 * c], buffers[2 * c + 1]
            k, m, s = fill(shift[j]), fill(mean[j]), fill(invstd[j])
            source = plane(x, j, n) + p
            filled, number, left = at, blocks, run
            while left:
                take = min(size - filled, left)
                if out is not None:
                    put_relu_gradient(dout, out, dresidual, source, take)
                    _gradient_row(dresidual, x, source, take, k, m, s, None, None, j, h, g, filled)
                else:
                    _gradient_row(dout, x, source, take, k, m, s, scale, beta, j, h, g, filled)
                source, left, filled = source + take, left - take, filled + take
                if filled == size:
                    put_sum(work[2 * c], number, h, 0)
                    put_sum(work[2 * c + 1], number, g, 0)
                    filled, number = 0, number + 1
        blocks += (at + run) // size
        at = (at + run) % size
        sample += run
    for c in range(count):
        j = channel + c
        sums[0, j] = finish_sum(work[2 * c], work[-1], blocks, buffers[2 * c], 0, at)
        sums[1, j] = finish_sum(work[2 * c + 1], work[-1], blocks, buffers[2 * c + 1], 0, at)


@inlined
def _gradient_row(
    dout: Any,
    x: Any,
    source: int,
    count: int,
    k: Any,
    m: Any,
    s: Any,
    scale: Any,
    beta: Any,
    channel: int,
    h: Any,
    g: Any,
    at: int,
) -> None:
    """Write ``g * xhat`` and ``g`` of neighbouring samples to buffers, as ``copy_less`` does."""
    w, part = lanes(x), count % lanes(x)
    for i in range(0, count - w + 1, w):
        hv, gv = _gradient(dout, x, source + i, k, m, s, scale, beta, channel, None)
        store(g, at + i, gv)
        store(h, at + i, hv)
    if part:
        i = count - part
        hv, gv = _gradient(dout, x, source + i, k, m, s, scale, beta, channel, part)
        store(g, at + i, gv)
        store(h, at + i, hv)


@inlined
def _gradient(
    dout: Any,
    x: Any,
    i: int,
    k: Any,
    m: Any,
    s: Any,
    scale: Any,
    beta: Any,
    channel: int,
    part: int | None,
) -> Any:
    """Return ``g * xhat`` and ``g`` of a channel's elements from ``i`` on."""
    g, d = read(dout, i, part), (read(x, i, part) - k) - m
    if beta is not None:
        g = where_positive(rounded(d * fill(scale[channel]) + fill(beta[channel]), x), g)
    return g * (d * s), g


@compiled
def _put_relu_gradients(
    dout: Any, out: Any, dresidual: Any, channel: int, count: int, start: int, rows: int
) -> None:
    """Let samples of neighbouring channels of ``dresidual`` be dout's where ``out > 0``, else 0."""
    inner, sample, end = out.shape[3], start, start + rows
    while sample < end:
        n, p = sample // inner, sample % inner
        run = min(inner - p, end - sample)
        for c in range(channel, channel + count):
            put_relu_gradient(dout, out, dresidual, plane(out, c, n) + p, run)
        sample += run


# --- Short channels, each a lane -----------------------------------------------------------------


@inlined
def as_lanes(x: Any, count: int, rows: int) -> bool:
    """Return whether ``rows`` samples of ``count`` neighbouring channels are best taken as lanes.

    Neighbours must be equally far from each other; from one instance to the next they are not.
    """
    return count > ALONE and rows <= SHORT and (x.shape[0] == 1 or x.shape[1] == 1)


@compiled
def chunk_of(like: Any) -> Any:
    """Return room for transposed samples, ``(1, n, W, 1)``."""
    w = lanes(like)
    return np.empty((1, _CHUNK + w, w, 1), like.dtype)


@inlined
def _transpose_samples(x: Any, first: int, n: int, count: int, chunk: Any, at: int) -> None:
    """Write ``count`` samples of ``n`` channels to a chunk from ``at`` on; those of one to a lane.

    Lanes that are left repeat the last channel. Up to a vector's samples behind are overwritten.
    """
    w, inner, part = lanes(chunk), x.shape[3], count % lanes(chunk)
    for j in range(0, count - w + 1, w):
        transpose(x, first + j, inner, n, None, chunk, (at + j) * w)
    if part:
        j = count - part
        transpose(x, first + j, inner, n, part, chunk, (at + j) * w)


@compiled
def _lane_moments(
    x: Any, shift: Any, channel: int, n: int, start: int, rows: int, chunk: Any, out: Any
) -> None:
    """Do what ``group_moments`` does, for up to W short channels."""
    w, inner, real = lanes(chunk), x.shape[3], chunk.dtype.type
    shifts = np.zeros(w, chunk.dtype)
    shifts[:n] = shift[channel : channel + n]
    k, eighth, half = load(shifts, 0), fill(real(0.125)), fill(real(0.5))
    levels = counter(chunk, 2, rows // 8, w)
    node = np.empty_like(levels[0])
    at, leaves, sample, end = 0, 0, start, start + rows
    while sample < end:
        b, p = sample // inner, sample % inner
        run = min(inner - p, end - sample, _CHUNK - at)
        first = plane(x, channel, b) + p
        if p == 0:
            touch(x, first, n * inner)
        _transpose_samples(x, first, n, run, chunk, at)
        at, sample = at + run, sample + run
        if at == _CHUNK or sample == end:
            for leaf in range(at // 8):
                i = leaf * 8 * w
                d0, d1 = load(chunk, i) - k, load(chunk, i + w) - k
                d2, d3 = load(chunk, i + 2 * w) - k, load(chunk, i + 3 * w) - k
                d4, d5 = load(chunk, i + 4 * w) - k, load(chunk, i + 5 * w) - k
                d6, d7 = load(chunk, i + 6 * w) - k, load(chunk, i + 7 * w) - k
                of_leaf = leaf_moments((d0, d1, d2, d3, d4, d5, d6, d7), eighth)
                push_moments(levels, 0, leaves + leaf, of_leaf, half)
            leaves += at // 8
            if at % 8:  # only at the end: a chunk is a whole number of leaves
                short_leaf_moments(chunk, shifts, 0, at - at % 8, at % 8, 0, w, node)
            at = 0
    fold_moments(levels, leaves, 8, node, rows % 8)
    for i in range(n):
        out[0, channel + i], out[1, channel + i] = node[0, i], node[1, i]


@compiled
def _lane_gradients(
    dout: Any,
    x: Any,
    statistics: Any,
    scale: Any,
    beta: Any,
    channel: int,
    n: int,
    start: int,
    rows: int,
    chunks: Any,
    sums: Any,
) -> None:
    """Do what ``group_gradients`` does, for up to W short channels."""
    tx, tg = chunks
    w, inner, zero = lanes(tx), x.shape[3], fill(tx.dtype.type(0))
    shift, mean, invstd = statistics
    k, m = load_part(shift, channel, n), load_part(mean, channel, n)
    s = load_part(invstd, channel, n)
    if beta is not None:
        f, t = load_part(scale, channel, n), load_part(beta, channel, n)
    levels = counter(tx, 2, rows // 8, w)
    node = np.empty_like(levels[0])
    at, leaves, sample, end = 0, 0, start, start + rows
    while sample < end:
        b, p = sample // inner, sample % inner
        run = min(inner - p, end - sample, _CHUNK - at)
        first = plane(x, channel, b) + p
        if p == 0:
            touch(x, first, n * inner)
            touch(dout, first, n * inner)
        _transpose_samples(x, first, n, run, tx, at)
        _transpose_samples(dout, first, n, run, tg, at)
        at, sample = at + run, sample + run
        if at == _CHUNK or sample == end:
            for i in range(0, at * w, w):
                g, d = load(tg, i), (load(tx, i) - k) - m
                if beta is not None:
                    g = where_positive(rounded(d * f + t, x), g)
                store(tg, i, g)
                store(tx, i, g * (d * s))
            for i in range(at * w, (at + 7) // 8 * 8 * w, w):
                store(tg, i, zero)  # values beyond the last one add +0
                store(tx, i, zero)
            for leaf in range((at + 7) // 8):
                h, g = sum_rows(tx, leaf * 8 * w), sum_rows(tg, leaf * 8 * w)
                if leaf < at // 8:
                    push_sum(levels, 0, leaves + leaf, h)
                    push_sum(levels, w, leaves + leaf, g)
                else:
                    store(node, 0, h)
                    store(node, w, g)
            leaves += at // 8
            at = 0
    fold_sums(levels, leaves, node, rows % 8 > 0)
    for i in range(n):
        sums[0, channel + i], sums[1, channel + i] = node[0, i], node[1, i]
