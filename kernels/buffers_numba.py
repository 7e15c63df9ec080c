"""The sample order for values that lie side by side in a buffer: those of a channel, or of a row.

They are reduced a block of ``64 W`` at a time, for W the lanes of a vector: in registers, to a
vector of W nodes of 64 values. The nodes of 64 blocks are merged in passes over pairs, to one node,
and these go to a binary counter.
"""

from typing import Any

import numpy as np

from gpubn.kernels.compile_numba import compiled, inlined
from gpubn.kernels.vectors_numba import (
    evens,
    fill,
    lanes,
    load,
    load_leaves,
    load_part,
    odds,
    store,
)

NODE = 64  # values of a node that registers give
BLOCKS = 64  # merged in passes over pairs
_LEVELS = 64  # of a counter of any number


@inlined
def block(like: Any) -> Any:
    """Return the samples of a block."""
    return NODE * lanes(like)


@compiled
def buffer_of(like: Any, count: int) -> Any:
    """Return a buffer of ``count`` values, and room behind it that reductions read from."""
    return np.empty(count + 8 * lanes(like), like.dtype)


@compiled
def workspace(like: Any, groups: int, rows: int) -> Any:
    """Return the memory ``(groups + 1, 4, n)`` of reductions of ``rows`` values at once.

    For each a mean and a variance (or sum) of the blocks' nodes, and of the counter's levels; and
    at last for all of them those of a shorter block's leaves.
    """
    w = lanes(like)
    nodes = min(rows // NODE, BLOCKS * w) + 4 * w
    return np.empty((groups + 1, 4, max(nodes, _LEVELS, 12 * w)), like.dtype)


@compiled
def buffers_of(like: Any, count: int) -> Any:
    """Return buffers of a block each, ``(count, ...)``."""
    return np.empty((count, block(like) + 8 * lanes(like)), like.dtype)


@inlined
def copy_less(x: Any, first: int, count: int, shift: Any, out: Any, at: int) -> None:
    """Write elements of x less a vector to a buffer from ``at`` on.

    Vectors are written whole: what lies up to one behind is overwritten.
    """
    w, part = lanes(x), count % lanes(x)
    for i in range(0, count - w + 1, w):
        store(out, at + i, load(x, first + i) - shift)
    if part:
        i = count - part
        store(out, at + i, load_part(x, first + i, part) - shift)


# --- Sums of values in a buffer ------------------------------------------------------------------


@inlined
def _pair(a: Any, b: Any) -> Any:
    return evens(a, b) + odds(a, b)


@inlined
def _leaf_sums(v: Any, i: int) -> Any:
    """Return the sums of W leaves of ``v``, from value ``i`` on."""
    w = lanes(v)
    a = _pair(load(v, i), load(v, i + w))
    b = _pair(load(v, i + 2 * w), load(v, i + 3 * w))
    c = _pair(load(v, i + 4 * w), load(v, i + 5 * w))
    d = _pair(load(v, i + 6 * w), load(v, i + 7 * w))
    return _pair(_pair(a, b), _pair(c, d))


@compiled
def put_sum(work: Any, count: int, v: Any, first: int) -> None:
    """Add block ``count`` of a sum, which ``v`` has from ``first`` on."""
    w = lanes(v)
    step, slot = 8 * w, count % BLOCKS
    a = _pair(_leaf_sums(v, first), _leaf_sums(v, first + step))
    b = _pair(_leaf_sums(v, first + 2 * step), _leaf_sums(v, first + 3 * step))
    c = _pair(_leaf_sums(v, first + 4 * step), _leaf_sums(v, first + 5 * step))
    d = _pair(_leaf_sums(v, first + 6 * step), _leaf_sums(v, first + 7 * step))
    store(work[0], slot * w, _pair(_pair(a, b), _pair(c, d)))
    if slot == BLOCKS - 1:
        total, level, count = _sum_nodes(work[0], BLOCKS * w), 0, count // BLOCKS
        while count & 1:
            total = work[2, level] + total
            count >>= 1
            level += 1
        work[2, level] = total


@compiled
def _sum_nodes(nodes: Any, count: int) -> Any:
    """Return the sum of ``count`` neighbours, which are overwritten; there is room behind them."""
    w = lanes(nodes)
    while count > 1:
        pairs, last = count // 2, nodes[count - 1]
        for i in range(0, pairs, w):
            store(nodes, i, _pair(load(nodes, 2 * i), load(nodes, 2 * i + w)))
        if count % 2:
            nodes[pairs] = last
        count -= pairs
    return nodes[0]


@compiled
def finish_sum(work: Any, leaves: Any, count: int, v: Any, first: int, rest: int) -> Any:
    """Return the sum of ``count`` blocks and ``rest`` values more, from ``first`` on of ``v``."""
    w = lanes(v)
    blocks, nodes = count % BLOCKS, work[0]
    pairs = blocks * w
    while pairs > blocks:
        pairs //= 2
        for i in range(0, pairs, w):
            store(nodes, i, _pair(load(nodes, 2 * i), load(nodes, 2 * i + w)))
    if rest:
        groups, zero = (rest + 7) // 8, v.dtype.type(0)
        for i in range(first + rest, first + groups * 8):
            v[i] = zero  # values beyond the last one add +0
        for i in range(0, groups, w):
            store(leaves[0], i, _leaf_sums(v, first + 8 * i))
        nodes[blocks] = _sum_nodes(leaves[0], groups)
        blocks += 1
    started, level, count = blocks > 0, 0, count // BLOCKS
    total = v.dtype.type(0)
    if started:
        total = _sum_nodes(nodes, blocks)
    while count:
        if count & 1:
            total = work[2, level] + total if started else work[2, level]
            started = True
        count >>= 1
        level += 1
    return total


@compiled
def row_sum(v: Any, columns: int, work: Any) -> Any:
    """Return the sum of a row of any length, in a buffer; ``work`` is one reduction's workspace."""
    size = block(v)
    full = columns // size
    for i in range(full):
        put_sum(work[0], i, v, i * size)
    return finish_sum(work[0], work[1], full, v, full * size, columns - full * size)


# --- Moments of values in a buffer ----------------------------------------------------------------


@inlined
def leaf_moments(v: Any, eighth: Any) -> Any:
    """Return mean and variance of eight vectors, lane by lane; ``eighth`` is a vector of 1/8."""
    d0, d1, d2, d3, d4, d5, d6, d7 = v
    m = (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))) * eighth  # exact: a power of two
    e0, e1, e2, e3 = d0 - m, d1 - m, d2 - m, d3 - m
    e4, e5, e6, e7 = d4 - m, d5 - m, d6 - m, d7 - m
    # Divided before they are summed: eight squares overflow where their mean does not.
    s0, s1, s2, s3 = e0 * eighth * e0, e1 * eighth * e1, e2 * eighth * e2, e3 * eighth * e3
    s4, s5, s6, s7 = e4 * eighth * e4, e5 * eighth * e5, e6 * eighth * e6, e7 * eighth * e7
    return m, ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@inlined
def merged_equal(left: Any, right: Any, half: Any) -> Any:
    """Return the moments of equal neighbours, pairs of vectors, with no division."""
    h = (left[0] - right[0]) * half
    return (left[0] + right[0]) * half, (left[1] * half + right[1] * half) + h * h


@inlined
def _merged_pairs(a: Any, b: Any, half: Any) -> Any:
    left = evens(a[0], b[0]), evens(a[1], b[1])
    return merged_equal(left, (odds(a[0], b[0]), odds(a[1], b[1])), half)


@inlined
def _merged_leaves(d: Any, i: int, eighth: Any, half: Any) -> Any:
    """Return the moments of W pairs of leaves of ``d``, from value ``i`` on."""
    a = leaf_moments(load_leaves(d, i), eighth)
    return _merged_pairs(a, leaf_moments(load_leaves(d, i + 8 * lanes(d)), eighth), half)


@compiled
def put_moments(work: Any, count: int, d: Any, first: int) -> None:
    """Add block ``count`` of a reduction, which ``d`` has from ``first`` on."""
    w, real = lanes(d), d.dtype.type
    eighth, half = fill(real(0.125)), fill(real(0.5))
    step, slot = 16 * w, count % BLOCKS
    a = _merged_leaves(d, first, eighth, half)
    a = _merged_pairs(a, _merged_leaves(d, first + step, eighth, half), half)
    b = _merged_leaves(d, first + 2 * step, eighth, half)
    b = _merged_pairs(b, _merged_leaves(d, first + 3 * step, eighth, half), half)
    mean, var = _merged_pairs(a, b, half)
    store(work[0], slot * w, mean)
    store(work[1], slot * w, var)
    if slot == BLOCKS - 1:
        m, v = _merge_nodes(work[0], work[1], BLOCKS * w, 1, 1)
        level, count = 0, count // BLOCKS
        while count & 1:
            m, v = merge(work[2, level], work[3, level], 1, m, v, 1)
            count >>= 1
            level += 1
        work[2, level], work[3, level] = m, v


@compiled
def _merge_level(mean: Any, var: Any, pairs: int) -> None:
    w, half = lanes(mean), fill(mean.dtype.type(0.5))
    for i in range(0, pairs, w):
        a, b = (load(mean, 2 * i), load(var, 2 * i)), (load(mean, 2 * i + w), load(var, 2 * i + w))
        m, v = _merged_pairs(a, b, half)
        store(mean, i, m)
        store(var, i, v)


@compiled
def _merge_nodes(mean: Any, var: Any, count: int, unit: int, last: int) -> Any:
    """Merge ``count`` neighbours of ``unit`` values, the last one of ``last``; overwrites them."""
    while count > 1:
        pairs, m, v = count // 2, mean[count - 1], var[count - 1]
        if count % 2 == 0 and last < unit:
            m, v = merge(mean[count - 2], var[count - 2], unit, m, v, last)
        _merge_level(mean, var, pairs)
        if count % 2:
            mean[pairs], var[pairs] = m, v
        else:
            if last < unit:
                mean[pairs - 1], var[pairs - 1] = m, v
            last += unit
        count -= pairs
        unit *= 2
    return mean[0], var[0]


@compiled
def finish_moments(work: Any, leaves: Any, count: int, d: Any, first: int, rest: int) -> Any:
    """Return the moments of ``count`` blocks and ``rest`` values more, from ``first`` of ``d``."""
    w, size = lanes(d), block(d)
    eighth = fill(d.dtype.type(0.125))
    blocks, mean, var = count % BLOCKS, work[0], work[1]
    pairs = blocks * w
    while pairs > blocks:
        pairs //= 2
        _merge_level(mean, var, pairs)
    rows = blocks * size + rest
    if rest:
        full, short, means, variances = rest // 8, rest % 8, leaves[0], leaves[1]
        for i in range(0, full, w):
            m, v = leaf_moments(load_leaves(d, first + 8 * i), eighth)
            store(means, i, m)
            store(variances, i, v)
        if short:
            at = first + 8 * full
            means[full], variances[full] = _short_leaf(d[at : at + short])
        nodes = full + (short > 0)
        mean[blocks], var[blocks] = _merge_nodes(means, variances, nodes, 8, short or 8)
        blocks += 1
    m, v = d[0], d[0]
    if blocks:
        m, v = _merge_nodes(mean, var, blocks, size, rest or size)
    level, count = 0, count // BLOCKS
    while count:
        if count & 1:
            unit = (size * BLOCKS) << level
            if rows:
                m, v = merge(work[2, level], work[3, level], unit, m, v, rows)
            else:
                m, v = work[2, level], work[3, level]
            rows += unit
        count >>= 1
        level += 1
    return m, v


@compiled
def _short_leaf(d: Any) -> Any:
    """Return mean and variance of fewer than eight values."""
    count, eighth, zero = d.dtype.type(d.shape[0]), d.dtype.type(0.125), d.dtype.type(0)
    v = np.zeros(8, d.dtype)  # values beyond the last one add +0
    v[: d.shape[0]] = d
    m = (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + zero))) / count
    for i in range(d.shape[0]):
        e = v[i] - m
        v[i] = e * eighth * e
    squares = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + zero))
    return m, squares / (count * eighth)


@compiled
def merge(left_mean: Any, left_var: Any, left_rows: int, mean: Any, var: Any, rows: int) -> Any:
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
def row_moments(d: Any, columns: int, work: Any) -> Any:
    """Return mean and variance of a row of any length, as ``row_sum`` its sum."""
    size = block(d)
    full = columns // size
    for i in range(full):
        put_moments(work[0], i, d, i * size)
    return finish_moments(work[0], work[1], full, d, full * size, columns - full * size)
