"""Batch norm of ``x (I, B, C, S)`` over its samples, on the CPU, as in batchnorm_cuda."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels import columns_numba, planes_numba
from gpubn.kernels.columns_numba import relu_gradient
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.real_numba import narrow, stored, widen
from gpubn.kernels.samples_numba import merge_parts, reduce_channels
from gpubn.kernels.statistics import Gradients, Statistics, accumulator
from gpubn.kernels.threads import split


def shift(x: Array) -> Array:
    """Return K ``(I * C,)``: of every channel, the middle one of three of its samples.

    They are the first, the central and the last one.
    """
    out = np.empty(x.shape[0] * x.shape[2], accumulator(x))
    _shift(*stored(x), out)
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
    x: Array, statistics: Statistics, residual: Array | None = None, relu: bool = False
) -> Array:
    """Return ``((x - shift) - mean) * scale + beta``, of x's shape.

    With ``relu`` that of ReLU after it; with a ``residual``, of ReLU after their sum.
    """
    shift, mean, _, scale, beta = plain(*statistics)
    out = np.empty(x.shape, x.dtype)
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
    dresidual = np.empty(x.shape, x.dtype)
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
    dout: Array, x: Array, statistics: Statistics, gradients: Gradients, relu: bool = False
) -> Array:
    """Return dx, of x's shape, from the sums' shares in it; ``relu`` as in ``backward_sums``."""
    return _backward_dx(dout, x, statistics, plain(*gradients), relu)


def backward_dx_fixed(dout: Array, x: Array, statistics: Statistics, relu: bool = False) -> Array:
    """Return dx where the statistics were given, as in test mode: ``g * scale``."""
    return _backward_dx(dout, x, statistics, (None, None), relu)


def _backward_dx(
    dout: Array, x: Array, statistics: Statistics, sums: tuple[Any, Any], relu: bool
) -> Array:
    channels = plain(*statistics)
    beta = channels[4] if relu else None
    dx = np.empty(x.shape, x.dtype)
    arguments = (*stored(dout, x), *channels[:4], beta, *sums, *stored(dx))
    _elementwise(_dx, _dx_planes, x, arguments)
    return dx


def _elementwise(
    by_row: Callable[..., None], by_plane: Callable[..., None], x: Array, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel over the rows of ``x``: of neighbouring channels, or of a channel's samples."""
    instances, batch, channels, inner = x.shape
    if inner == 1:
        split(lambda a, b: by_row(*arguments, a, b), instances * batch, x.size)
    else:
        split(lambda a, b: by_plane(*arguments, a, b), instances * batch * channels, x.size)


# --- A channel's few numbers ---------------------------------------------------------------------


@compiled
def _shift(x: Any, out: Any) -> None:
    instances, batch, channels, inner = x.shape
    central = batch * inner // 2
    for instance in range(instances):
        for j in range(channels):
            a = widen(x[instance, 0, j, 0])
            b = widen(x[instance, central // inner, j, central % inner])
            c = widen(x[instance, batch - 1, j, inner - 1])
            out[instance * channels + j] = middle(a, b, c)


@compiled
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
    zero = shift.dtype.type(0)
    for row in range(first, last):
        instance, n = row // batch, row % batch
        a, b = instance * channels, (instance + 1) * channels
        xr, y = x[instance, n].reshape(channels), out[instance, n].reshape(channels)
        k, m, s, t = shift[a:b], mean[a:b], scale[a:b], beta[a:b]
        if residual is not None:
            z = residual[instance, n].reshape(channels)
            for j in range(channels):
                v = widen(narrow(((widen(xr[j]) - k[j]) - m[j]) * s[j] + t[j], y))
                v = widen(narrow(v + widen(z[j]), y))
                y[j] = narrow(v if v > zero or v != v else zero, y)  # a NaN stays one
        elif relu:
            for j in range(channels):
                v = ((widen(xr[j]) - k[j]) - m[j]) * s[j] + t[j]
                y[j] = narrow(v if v > zero or v != v else zero, y)
        else:
            for j in range(channels):
                y[j] = narrow(((widen(xr[j]) - k[j]) - m[j]) * s[j] + t[j], y)


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
    zero = shift.dtype.type(0)
    for plane in range(first, last):
        instance, n, c = plane // channels // batch, plane // channels % batch, plane % channels
        j = instance * channels + c
        xs, y = x[instance, n, c], out[instance, n, c]
        k, m, s, t = shift[j], mean[j], scale[j], beta[j]
        if residual is not None:
            z = residual[instance, n, c]
            for i in range(inner):
                v = widen(narrow(((widen(xs[i]) - k) - m) * s + t, y))
                v = widen(narrow(v + widen(z[i]), y))
                y[i] = narrow(v if v > zero or v != v else zero, y)  # a NaN stays one
        elif relu:
            for i in range(inner):
                v = ((widen(xs[i]) - k) - m) * s + t
                y[i] = narrow(v if v > zero or v != v else zero, y)
        else:
            for i in range(inner):
                y[i] = narrow(((widen(xs[i]) - k) - m) * s + t, y)


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
    g = np.empty(channels, shift.dtype)
    for row in range(first, last):
        instance, n = row // batch, row % batch
        a, b = instance * channels, (instance + 1) * channels
        gr, xr = dout[instance, n].reshape(channels), x[instance, n].reshape(channels)
        y = dx[instance, n].reshape(channels)
        k, m, s, f = shift[a:b], mean[a:b], invstd[a:b], scale[a:b]
        if beta is not None:
            relu_gradient(gr, xr, k, m, f, beta[a:b], g)
        else:
            for j in range(channels):
                g[j] = widen(gr[j])
        if constant is not None:
            p, q = constant[a:b], slope[a:b]
            for j in range(channels):
                xhat = ((widen(xr[j]) - k[j]) - m[j]) * s[j]
                y[j] = narrow((f[j] * g[j] - p[j]) - xhat * q[j], y)
        else:
            for j in range(channels):
                y[j] = narrow(g[j] * f[j], y)


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
    zero = shift.dtype.type(0)
    for plane in range(first, last):
        instance, n, c = plane // channels // batch, plane // channels % batch, plane % channels
        j = instance * channels + c
        gs, xs, y = dout[instance, n, c], x[instance, n, c], dx[instance, n, c]
        k, m, s, f = shift[j], mean[j], invstd[j], scale[j]
        for i in range(inner):
            g, d = widen(gs[i]), (widen(xs[i]) - k) - m
            if beta is not None:
                out = widen(narrow(d * f + beta[j], y))
                g = g if out > zero else zero
            if constant is not None:
                y[i] = narrow((f * g - constant[j]) - (d * s) * slope[j], y)
            else:
                y[i] = narrow(g * f, y)
