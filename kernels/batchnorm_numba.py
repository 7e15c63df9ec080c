"""Batch norm of ``x (I, B, C, S)`` over its samples, on the CPU, as in batchnorm_cuda."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels import columns_numba, planes_numba
from gpubn.kernels.buffers_numba import buffers_of, workspace
from gpubn.kernels.columns_numba import TILES
from gpubn.kernels.columns_numba import gradients as column_gradients
from gpubn.kernels.columns_numba import moments as column_moments
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.memory import empty
from gpubn.kernels.planes_numba import group_gradients, group_moments, group_of, plane
from gpubn.kernels.real_numba import stored, widen
from gpubn.kernels.samples_numba import merge_parts, reduce_channels
from gpubn.kernels.statistics import Gradients, Statistics, accumulator
from gpubn.kernels.threads import get_num_threads, pieces_of
from gpubn.kernels.threads_numba import split
from gpubn.kernels.vectors_numba import (
    fill,
    lanes,
    load,
    load_part,
    read,
    relu_of,
    rounded,
    store,
    store_part,
    where_positive,
)

FEW = 64
"""Samples of a plane, up to which a group's planes are normalized as one row.

In so short a plane too large a part is left behind its last whole vector.
"""


def train(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    eps: float,
    momentum: float,
    correction: float = 1.0,
    residual: Array | None = None,
    relu: bool = False,
    out: Array | None = None,
) -> tuple[Array, Statistics, Array, Array]:
    """Return out, the statistics of ``x (1, B, C, S)``, and the next running mean and variance.

    What ``shift``, ``moments``, ``statistics``, ``running_update`` and ``normalize`` give one after
    the other. A group of channels is read from memory once, where it fits in a cache.
    """
    kernel, units = _at_once(x, _train_columns, _train_planes)
    if kernel is None:
        k = shift(x)
        mean, var = moments(x, k)
        invstd, scale = statistics(var, gamma, eps)
        running = running_update(running_mean, running_var, k, mean, var, momentum, correction)
        found = Statistics(k, mean, invstd, scale, beta)
        return normalize(x, found, residual, relu, out), found, *running
    out = empty(x.shape, x.dtype) if out is None else out
    channels = np.empty((7, x.shape[2]), accumulator(x))
    real = channels.dtype.type
    arguments = (
        *(*stored(x), *plain(gamma, beta, running_mean, running_var)),
        *(real(eps), real(momentum), real(1.0 - momentum), real(correction)),
        *(None if residual is None else stored(residual)[0], relu or residual is not None),
        *(*stored(out), channels),
    )
    split(kernel, arguments, units, x.size)
    k, mean, _, invstd, scale, next_mean, next_var = channels
    return out, Statistics(k, mean, invstd, scale, beta), next_mean, next_var


def backward(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return dx, to ``out`` if given, dgamma and dbeta, through the statistics of ``x``.

    What ``backward_sums``, ``gradients`` and ``backward_dx`` give one after the other; ``relu`` as
    there. A group of channels is read from memory once, where it fits in a cache.
    """
    kernel, units = _at_once(x, _backward_columns, _backward_planes)
    if kernel is None:
        dgamma, dbeta = backward_sums(dout, x, statistics, relu)
        sums = gradients(statistics.scale, dgamma, dbeta, x.shape[1] * x.shape[3])
        return backward_dx(dout, x, statistics, sums, relu, out), dgamma, dbeta
    dx = empty(x.shape, x.dtype) if out is None else out
    channels = np.empty((4, x.shape[2]), accumulator(x))
    found = plain(*statistics)
    arguments = (*stored(dout, x), *found[:4], found[4] if relu else None, *stored(dx), channels)
    split(kernel, arguments, units, x.size)
    return dx, channels[0], channels[1]


def _at_once(
    x: Array, by_column: Callable[..., None], by_plane: Callable[..., None]
) -> tuple[Callable[..., None] | None, int]:
    """Return the kernel that takes channels from beginning to end, and its units of work.

    No kernel where rows are to be split between threads, or channels are too few for them.
    """
    _, _, channels, inner = x.shape
    pieces = pieces_of(x.size)
    if inner > 1 and channels >= min(pieces, 2 * get_num_threads()):
        return by_plane, channels
    # In threads its moments, their merging and its statistics are kernels of their own: splitting
    # pays for twice as much work as elsewhere.
    if inner == 1 and pieces_of(x.size // 2) == 1:
        return by_column, 1
    return None, 0


def shift(x: Array) -> Array:
    """Return K ``(I * C,)``: of every channel, the middle one of three of its samples.

    They are the first, the central and the last one.
    """
    out = np.empty(x.shape[0] * x.shape[2], accumulator(x))
    _shift(*stored(x), out, 0, out.shape[0])
    return out


def moments(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance ``(I * C,)`` of ``x - shift`` over the samples."""
    kernels = (columns_numba.moments, planes_numba.moments)
    arguments = (*stored(x), *plain(shift))
    mean, var = reduce_channels(kernels, x, arguments, columns_numba.merge_moments, 2)
    return mean, var


def merge_moments(mean: Array, var: Array, part_rows: int, rows: int) -> tuple[Array, Array]:
    """Merge the moments ``(P, C)`` of parts after one common shift, as if taken over all samples.

    Every part has ``part_rows`` samples, the last one what is left of ``rows``. Where ``part_rows``
    is 8 times a power of two, the result has the bits of ``moments`` over the samples together.

    Raises
    ------
    ValueError
        There are not as many parts as the samples make.
    """
    if mean.shape != var.shape or len(mean) != -(-rows // part_rows):
        raise ValueError(
            f"mean has shape {mean.shape} and var {var.shape}, expected {-(-rows // part_rows)} "
            f"parts of both: {rows} rows in parts of {part_rows}"
        )
    (parts,) = plain(np.stack([mean, var]))
    merged = merge_parts(columns_numba.merge_moments, parts, part_rows, rows)
    return merged[0], merged[1]


def statistics(var: Array, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return ``invstd = 1 / sqrt(var + eps)`` and ``scale = gamma * invstd``, of var's shape."""
    var, gamma = plain(var, gamma)
    invstd, scale = np.empty_like(var), np.empty_like(var)
    _statistics(var, gamma, var.dtype.type(eps), invstd, scale)
    return invstd, scale


def running_update(
    running_mean: Array,
    running_var: Array,
    shift: Array,
    mean: Array,
    var: Array,
    momentum: float,
    correction: float = 1.0,
) -> tuple[Array, Array]:
    """Return ``momentum * running + (1 - momentum) * sample`` for the mean and the variance.

    The sample's variance is ``var * correction``: N / (N - 1) where it is to be unbiased.
    """
    arrays = plain(running_mean, running_var, shift, mean, var)
    scalars = map(var.dtype.type, (momentum, 1.0 - momentum, correction))
    next_mean, next_var = np.empty_like(arrays[0]), np.empty_like(arrays[0])
    _running_update(*arrays, *scalars, next_mean, next_var)
    return next_mean, next_var


def normalize(
    x: Array,
    statistics: Statistics,
    residual: Array | None = None,
    relu: bool = False,
    out: Array | None = None,
) -> Array:
    """Return ``((x - shift) - mean) * scale + beta``, of x's shape, to ``out`` if given.

    With ``relu`` that of ReLU after it; with a ``residual``, of ReLU after their sum.
    """
    shift, mean, _, scale, beta = plain(*statistics)
    out = empty(x.shape, x.dtype) if out is None else out
    added = None if residual is None else stored(residual)[0]
    relu = relu or residual is not None
    arguments = (*stored(x), shift, mean, scale, beta, added, relu, *stored(out))
    _elementwise(_normalize, _normalize_planes, x, arguments)
    return out


def backward_sums(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False
) -> tuple[Array, Array]:
    """Return the sums ``(I * C,)`` over the samples of ``g * xhat`` and of ``g``.

    ``g`` is ``dout``; with ``relu`` it is 0 where the normalized output was not above 0.
    """
    shift, mean, invstd, scale, beta = plain(*statistics)
    arguments = (
        *(*stored(dout, x), shift, mean, invstd),
        *((scale, beta) if relu else (None, None)),
        *(None, None),
    )
    return _backward_sums(x, arguments)


def backward_sums_add_relu(
    dout: Array, out: Array, x: Array, statistics: Statistics
) -> tuple[Array, Array, Array]:
    """Return the sums of ``g * xhat`` and ``g``, and ``g``: ``dout`` where ``out > 0``, else 0."""
    shift, mean, invstd, *_ = plain(*statistics)
    dresidual = empty(x.shape, x.dtype)
    arguments = (*stored(dout, x), shift, mean, invstd, None, None, *stored(out, dresidual))
    return (*_backward_sums(x, arguments), dresidual)


def _backward_sums(x: Array, arguments: tuple[Any, ...]) -> tuple[Array, Array]:
    kernels = (columns_numba.gradients, planes_numba.gradients)
    dgamma, dbeta = reduce_channels(kernels, x, arguments, columns_numba.merge_sums, 2)
    return dgamma, dbeta


def gradients(scale: Array, dgamma: Array, dbeta: Array, samples: int) -> Gradients:
    """Return ``scale * (dbeta / N)`` and ``scale * (dgamma / N)``, for sums over N samples."""
    arrays = plain(scale, dgamma, dbeta)
    sums = Gradients(np.empty_like(arrays[0]), np.empty_like(arrays[0]))
    _gradients(*arrays, scale.dtype.type(samples), *sums)
    return sums


def backward_dx(
    dout: Array,
    x: Array,
    statistics: Statistics,
    gradients: Gradients,
    relu: bool = False,
    out: Array | None = None,
) -> Array:
    """Return dx, of x's shape, from the sums' shares in it; ``relu`` as in ``backward_sums``."""
    return _backward_dx(dout, x, statistics, plain(*gradients), relu, out)


def backward_dx_fixed(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> Array:
    """Return dx where the statistics were given, as in test mode: ``g * scale``."""
    return _backward_dx(dout, x, statistics, (None, None), relu, out)


def _backward_dx(
    dout: Array,
    x: Array,
    statistics: Statistics,
    sums: tuple[Any, Any],
    relu: bool,
    out: Array | None,
) -> Array:
    channels = plain(*statistics)
    beta = channels[4] if relu else None
    dx = empty(x.shape, x.dtype) if out is None else out
    arguments = (*stored(dout, x), *channels[:4], beta, *sums, *stored(dx))
    _elementwise(_dx, _dx_planes, x, arguments)
    return dx


def _elementwise(
    by_row: Callable[..., None], by_plane: Callable[..., None], x: Array, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel over the rows of ``x``: of neighbouring channels, or of a channel's samples."""
    instances, batch, channels, inner = x.shape
    if inner == 1:
        split(by_row, arguments, instances * batch, x.size)
    else:
        split(by_plane, arguments, instances * batch * channels, x.size)


# --- A channel's few numbers ---------------------------------------------------------------------


@compiled
def _shift(x: Any, out: Any, first: int, last: int) -> None:
    batch, channels, inner = x.shape[1:]
    central = batch * inner // 2
    for j in range(first, last):
        instance, c = j // channels, j % channels
        a = widen(x[instance, 0, c, 0])
        b = widen(x[instance, central // inner, c, central % inner])
        out[j] = middle(a, b, widen(x[instance, batch - 1, c, inner - 1]))


@inlined
def middle(a: Any, b: Any, c: Any) -> Any:
    """Return the middle one of three values, as in real.cuh."""
    if a > b:
        a, b = b, a
    if b > c:
        b = a if a > c else c
    return b


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
    correction: Any,
    next_mean: Any,
    next_var: Any,
) -> None:
    for j in range(var.shape[0]):
        sample_mean, sample_var = shift[j] + mean[j], var[j] * correction
        next_mean[j] = _weighted(running_mean[j], sample_mean, momentum, complement)
        next_var[j] = _weighted(running_var[j], sample_var, momentum, complement)


@compiled
def _weighted(running: Any, sample: Any, momentum: Any, complement: Any) -> Any:
    if complement == 0:  # what has no weight has no part, an infinity either
        return running
    return sample if momentum == 0 else momentum * running + complement * sample


@compiled
def _gradients(scale: Any, dgamma: Any, dbeta: Any, count: Any, constant: Any, slope: Any) -> None:
    for j in range(scale.shape[0]):
        constant[j] = scale[j] * (dbeta[j] / count)
        slope[j] = scale[j] * (dgamma[j] / count)


# --- Channels from beginning to end ---------------------------------------------------------------


@compiled
def _train_planes(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    eps: Any,
    momentum: Any,
    complement: Any,
    correction: Any,
    residual: Any,
    relu: bool,
    out: Any,
    channels: Any,
    first: int,
    last: int,
) -> None:
    """Normalize channels, whose statistics become columns of ``channels (7, C)``."""
    batch, inner = x.shape[1], x.shape[3]
    samples = batch * inner
    shift, mean, _, _, scale = channels[0], channels[1], channels[2], channels[3], channels[4]
    group = min(group_of(x), last - first)
    work, buffers = workspace(channels, group, samples), buffers_of(channels, group)
    for a in range(first, last, group):
        b = min(a + group, last)
        _shift(x, shift, a, b)
        group_moments(x, shift, a, b - a, 0, samples, work, buffers, channels[1:3])
        _describe(
            *(gamma, running_mean, running_var, eps, momentum, complement, correction),
            *(channels, a, b),
        )
        if inner <= FEW:  # the group's samples as if each were a channel: vectors of several
            k, m = np.repeat(shift[a:b], inner), np.repeat(mean[a:b], inner)
            f, t = np.repeat(scale[a:b], inner), np.repeat(beta[a:b], inner)
            for n in range(batch - 1, -1, -1):  # what was read last is in the nearest cache
                at = plane(x, a, n)
                _normalize_row(x, (k, m, f, t), residual, relu, out, at, 0, k.shape[0])
            continue
        for n in range(batch - 1, -1, -1):
            for c in range(a, b):
                at = plane(x, c, n)
                _normalize_plane(x, (shift, mean, scale, beta), residual, relu, out, at, c)


@compiled
def _train_columns(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    eps: Any,
    momentum: Any,
    complement: Any,
    correction: Any,
    residual: Any,
    relu: bool,
    out: Any,
    channels: Any,
    first: int,
    last: int,
) -> None:
    """Normalize all channels at once, as ``_train_planes`` some; there is one unit of work."""
    batch, columns = x.shape[1:3]
    shift, mean, scale = channels[0], channels[1], channels[4]
    parts = channels[1:3].reshape(2, 1, columns)
    _shift(x, shift, 0, columns)
    column_moments(x, shift, parts, batch, TILES, 0, 1)  # one tile
    _describe(
        *(gamma, running_mean, running_var, eps, momentum, complement, correction),
        *(channels, 0, columns),
    )
    _normalize(x, shift, mean, scale, beta, residual, relu, out, 0, batch)


@compiled
def _describe(
    gamma: Any,
    running_mean: Any,
    running_var: Any,
    eps: Any,
    momentum: Any,
    complement: Any,
    correction: Any,
    channels: Any,
    a: int,
    b: int,
) -> None:
    """Complete columns a to b of ``channels``: after shift, mean and var all the rest."""
    part = channels[:, a:b]
    shift, mean, var, invstd, scale = part[0], part[1], part[2], part[3], part[4]
    _statistics(var, gamma[a:b], eps, invstd, scale)
    _running_update(
        *(running_mean[a:b], running_var[a:b], shift, mean, var),
        *(momentum, complement, correction, part[5], part[6]),
    )


@compiled
def _backward_planes(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    beta: Any,
    dx: Any,
    channels: Any,
    first: int,
    last: int,
) -> None:
    """Write dx of channels, and dgamma and dbeta to the first rows of ``channels (4, C)``."""
    batch, inner = x.shape[1], x.shape[3]
    samples = batch * inner
    group = max(1, min(group_of(x) // 2, last - first))
    work, buffers = workspace(channels, 2 * group, samples), buffers_of(channels, 2 * group)
    dgamma, dbeta, constant, slope = channels[0], channels[1], channels[2], channels[3]
    count = channels.dtype.type(samples)
    for a in range(first, last, group):
        b = min(a + group, last)
        group_gradients(
            *(dout, x, (shift, mean, invstd), scale, beta, None, None),
            *(a, b - a, 0, samples, work, buffers, channels[:2]),
        )
        _gradients(scale[a:b], dgamma[a:b], dbeta[a:b], count, constant[a:b], slope[a:b])
        if inner <= FEW:
            k, m = np.repeat(shift[a:b], inner), np.repeat(mean[a:b], inner)
            s, f = np.repeat(invstd[a:b], inner), np.repeat(scale[a:b], inner)
            away, along = np.repeat(constant[a:b], inner), np.repeat(slope[a:b], inner)
            statistics = k, m, s, f
            if beta is not None:
                t = np.repeat(beta[a:b], inner)
                _dx_runs(dout, x, statistics, t, away, along, dx, a)
            else:
                _dx_runs(dout, x, statistics, None, away, along, dx, a)
            continue
        for n in range(batch - 1, -1, -1):
            for c in range(a, b):
                at = plane(x, c, n)
                _dx_plane(dout, x, (shift, mean, invstd, scale), beta, constant, slope, dx, at, c)


@compiled
def _dx_runs(
    dout: Any,
    x: Any,
    statistics: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    dx: Any,
    channel: int,
) -> None:
    """Write dx of neighbouring channels from ``channel`` on, of whose samples each has its own."""
    for n in range(x.shape[1] - 1, -1, -1):
        at = plane(x, channel, n)
        _dx_row(dout, x, statistics, beta, constant, slope, dx, at, 0, constant.shape[0])


@compiled
def _backward_columns(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    beta: Any,
    dx: Any,
    channels: Any,
    first: int,
    last: int,
) -> None:
    """Write all of dx, and dgamma and dbeta as in ``_backward_planes``; one unit of work."""
    batch, columns = x.shape[1:3]
    parts = channels[:2].reshape(2, 1, columns)
    dgamma, dbeta, constant, slope = channels[0], channels[1], channels[2], channels[3]
    column_gradients(
        *(dout, x, shift, mean, invstd, scale, beta, None, None, parts, batch),
        *(TILES, 0, 1),
    )
    _gradients(scale, dgamma, dbeta, channels.dtype.type(batch), constant, slope)
    _dx(dout, x, shift, mean, invstd, scale, beta, constant, slope, dx, 0, batch)


# --- Elementwise: rows of channels, or of a channel's samples -------------------------------------


@compiled
def _normalize(
    x: Any,
    shift: Any,
    mean: Any,
    scale: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    out: Any,
    first: int,
    last: int,
) -> None:
    batch, channels = x.shape[1:3]
    statistics = shift, mean, scale, beta
    for r in range(first, last):
        _normalize_row(
            x, statistics, residual, relu, out, r * channels, r // batch * channels, channels
        )


@compiled
def _normalize_row(
    x: Any,
    statistics: Any,
    residual: Any,
    relu: bool,
    out: Any,
    first: int,
    channel: int,
    columns: int,
) -> None:
    """Normalize ``columns`` elements from ``first`` on, of a channel each from ``channel`` on."""
    w, part = lanes(out), columns % lanes(out)
    for j in range(0, columns - w + 1, w):
        v = _normalized(x, statistics, residual, relu, out, first + j, channel + j, None)
        store(out, first + j, v)
    if part:
        j = columns - part
        v = _normalized(x, statistics, residual, relu, out, first + j, channel + j, part)
        store_part(out, first + j, part, v)


@inlined
def _normalized(
    x: Any,
    statistics: Any,
    residual: Any,
    relu: bool,
    out: Any,
    i: int,
    channel: int,
    part: int | None,
) -> Any:
    """Return the outputs of elements from ``i`` on, of channels from ``channel`` on."""
    shift, mean, scale, beta = statistics
    d = (read(x, i, part) - read(shift, channel, part)) - read(mean, channel, part)
    v = d * read(scale, channel, part) + read(beta, channel, part)
    return _activated(v, residual, relu, out, i, part)


@inlined
def _activated(v: Any, residual: Any, relu: bool, out: Any, i: int, part: int | None) -> Any:
    """Return normalized values after the residual and ReLU, if there are any."""
    if residual is not None:
        return relu_of(rounded(rounded(v, out) + read(residual, i, part), out))
    return relu_of(v) if relu else v


@compiled
def _normalize_planes(
    x: Any,
    shift: Any,
    mean: Any,
    scale: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    out: Any,
    first: int,
    last: int,
) -> None:
    batch, channels, inner = x.shape[1:]
    statistics = shift, mean, scale, beta
    n, c = first // channels, first % channels
    for i in range(first, last):
        channel = n // batch * channels + c
        _normalize_plane(x, statistics, residual, relu, out, i * inner, channel)
        c += 1
        if c == channels:
            n, c = n + 1, 0


@inlined
def _normalize_plane(
    x: Any, statistics: Any, residual: Any, relu: bool, out: Any, first: int, channel: int
) -> None:
    """Normalize a channel's neighbouring samples, the elements from ``first`` on."""
    shift, mean, scale, beta = statistics
    k, m, s, t = (
        fill(shift[channel]),
        fill(mean[channel]),
        fill(scale[channel]),
        fill(beta[channel]),
    )
    w, part = lanes(out), x.shape[3] % lanes(out)
    last = first + x.shape[3]
    for i in range(first, last - w + 1, w):
        v = ((load(x, i) - k) - m) * s + t
        store(out, i, _activated(v, residual, relu, out, i, None))
    if part:
        i = last - part
        v = ((load_part(x, i, part) - k) - m) * s + t
        store_part(out, i, part, _activated(v, residual, relu, out, i, part))


@compiled
def _dx(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    dx: Any,
    first: int,
    last: int,
) -> None:
    batch, channels = x.shape[1:3]
    statistics = shift, mean, invstd, scale
    for r in range(first, last):
        _dx_row(
            *(dout, x, statistics, beta, constant, slope, dx),
            *(r * channels, r // batch * channels, channels),
        )


@compiled
def _dx_row(
    dout: Any,
    x: Any,
    statistics: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    dx: Any,
    first: int,
    channel: int,
    columns: int,
) -> None:
    """Write dx of ``columns`` elements from ``first`` on, of a channel each from ``channel`` on."""
    w, part = lanes(dx), columns % lanes(dx)
    for j in range(0, columns - w + 1, w):
        v = _dx_columns(
            dout, x, statistics, beta, constant, slope, dx, first + j, channel + j, None
        )
        store(dx, first + j, v)
    if part:
        j = columns - part
        v = _dx_columns(
            dout, x, statistics, beta, constant, slope, dx, first + j, channel + j, part
        )
        store_part(dx, first + j, part, v)


@inlined
def _dx_columns(
    dout: Any,
    x: Any,
    statistics: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    out: Any,
    i: int,
    c: int,
    part: int | None,
) -> Any:
    """Return dx of elements from ``i`` on, of channels from ``c`` on."""
    shift, mean, invstd, scale = statistics
    g, f = read(dout, i, part), read(scale, c, part)
    d = (read(x, i, part) - read(shift, c, part)) - read(mean, c, part)
    if beta is not None:
        g = where_positive(rounded(d * f + read(beta, c, part), out), g)
    if constant is not None:
        xhat = d * read(invstd, c, part)
        return (f * g - read(constant, c, part)) - xhat * read(slope, c, part)
    return g * f


@compiled
def _dx_planes(
    dout: Any,
    x: Any,
    shift: Any,
    mean: Any,
    invstd: Any,
    scale: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    dx: Any,
    first: int,
    last: int,
) -> None:
    batch, channels, inner = x.shape[1:]
    statistics = shift, mean, invstd, scale
    n, c = first // channels, first % channels
    for i in range(first, last):
        channel = n // batch * channels + c
        _dx_plane(dout, x, statistics, beta, constant, slope, dx, i * inner, channel)
        c += 1
        if c == channels:
            n, c = n + 1, 0


@inlined
def _dx_plane(
    dout: Any,
    x: Any,
    statistics: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    dx: Any,
    first: int,
    channel: int,
) -> None:
    """Write dx of a channel's neighbouring samples, the elements from ``first`` on."""
    w, part = lanes(dx), x.shape[3] % lanes(dx)
    last = first + x.shape[3]
    for i in range(first, last - w + 1, w):
        v = _dx_samples(dout, x, statistics, beta, constant, slope, dx, i, channel, None)
        store(dx, i, v)
    if part:
        i = last - part
        v = _dx_samples(dout, x, statistics, beta, constant, slope, dx, i, channel, part)
        store_part(dx, i, part, v)


@inlined
def _dx_samples(
    dout: Any,
    x: Any,
    statistics: Any,
    beta: Any,
    constant: Any,
    slope: Any,
    out: Any,
    i: int,
    channel: int,
    part: int | None,
) -> Any:
    """Return dx of a channel's elements from ``i`` on."""
    shift, mean, invstd, scale = statistics
    g, f = read(dout, i, part), fill(scale[channel])
    d = (read(x, i, part) - fill(shift[channel])) - fill(mean[channel])
    if beta is not None:
        g = where_positive(rounded(d * f + fill(beta[channel]), out), g)
    if constant is not None:
        xhat = d * fill(invstd[channel])
        return (f * g - fill(constant[channel])) - xhat * fill(slope[channel])
    return g * f
