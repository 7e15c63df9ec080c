"""Batch norm of ``x (I, B, C, S)`` over its samples, on CUDA. The formulas are in batchnorm.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import Elementwise, contiguous, source
from gpubn.kernels.samples_cuda import merge_parts, reduce_channels
from gpubn.kernels.statistics import Gradients, Statistics, accumulator

_SOURCE = source("real", "samples", "batchnorm")

# A channel's number among those of all instances, for element i of x.
_CHANNEL = "long long c = i / instance * channels + i / inner % channels;"
_PLACE = "int64 instance, int64 channels, int64 inner"
_STATISTICS = "raw T shift, raw T mean"

_middle = Elementwise(
    "raw S x, int64 batch, int64 channels, int64 inner",
    "T shift",
    """
    gpubn::Shape shape = {batch, channels, inner};
    long long samples = batch * inner;
    gpubn::Walk first(shape, i, 0), central(shape, i, samples / 2), last(shape, i, samples - 1);
    shift = gpubn::middle<REAL>(gpubn::load<STORED>(x[first.at]).v,
                                gpubn::load<STORED>(x[central.at]).v,
                                gpubn::load<STORED>(x[last.at]).v);
    """,
    "gpubn_batchnorm_shift",
    _SOURCE,
)

_statistics = cupy.ElementwiseKernel(
    "T var, T gamma, T eps",
    "T invstd, T scale",
    """
    invstd = gpubn::batchnorm_invstd<T>(var, eps);
    scale = (gpubn::real<T>(gamma) * gpubn::real<T>(invstd)).v;
    """,
    "gpubn_batchnorm_statistics",
    preamble=_SOURCE,
)

_running = cupy.ElementwiseKernel(
    "T running_mean, T running_var, T shift, T mean, T var, T momentum, T complement, T correction",
    "T next_mean, T next_var",
    """
    gpubn::real<T> sample_mean = gpubn::real<T>(shift) + gpubn::real<T>(mean);
    gpubn::real<T> sample_var = gpubn::real<T>(var) * gpubn::real<T>(correction);
    next_mean = gpubn::running_update<T>(running_mean, sample_mean, momentum, complement);
    next_var = gpubn::running_update<T>(running_var, sample_var, momentum, complement);
    """,
    "gpubn_batchnorm_running",
    preamble=_SOURCE,
)

_normalize = Elementwise(
    f"S x, {_STATISTICS}, raw T scale, raw T beta, {_PLACE}",
    "S out",
    f"{_CHANNEL} out = gpubn::batchnorm_normalize<STORED>(x, shift[c], mean[c], scale[c], beta[c])",
    "gpubn_batchnorm_normalize",
    _SOURCE,
)

_relu = Elementwise(
    f"S x, {_STATISTICS}, raw T scale, raw T beta, {_PLACE}",
    "S out",
    f"{_CHANNEL} out = gpubn::batchnorm_relu<STORED>(x, shift[c], mean[c], scale[c], beta[c])",
    "gpubn_batchnorm_relu",
    _SOURCE,
)

_add_relu = Elementwise(
    f"S x, S residual, {_STATISTICS}, raw T scale, raw T beta, {_PLACE}",
    "S out",
    f"{_CHANNEL} out = gpubn::batchnorm_add_relu<STORED>"
    "(x, residual, shift[c], mean[c], scale[c], beta[c])",
    "gpubn_batchnorm_add_relu",
    _SOURCE,
)

_gradients = cupy.ElementwiseKernel(
    "T scale, T dgamma, T dbeta, int64 samples",
    "T constant, T slope",
    """
    gpubn::real<T> count((long long)samples), s(scale);
    constant = (s * (gpubn::real<T>(dbeta) / count)).v;
    slope = (s * (gpubn::real<T>(dgamma) / count)).v;
    """,
    "gpubn_batchnorm_gradients",
    preamble=_SOURCE,
)

_dx = Elementwise(
    f"S dout, S x, {_STATISTICS}, raw T invstd, raw T scale, raw T constant, raw T slope, {_PLACE}",
    "S dx",
    f"{_CHANNEL} dx = gpubn::batchnorm_dx<STORED>(gpubn::load<STORED>(dout), x, "
    "shift[c], mean[c], invstd[c], scale[c], constant[c], slope[c])",
    "gpubn_batchnorm_dx",
    _SOURCE,
)

_relu_dx = Elementwise(
    f"S dout, S x, {_STATISTICS}, raw T invstd, raw T scale, raw T beta, raw T constant, "
    f"raw T slope, {_PLACE}",
    "S dx",
    f"""
    {_CHANNEL}
    auto g = gpubn::batchnorm_relu_gradient<STORED>(dout, x, shift[c], mean[c], scale[c], beta[c]);
    dx = gpubn::batchnorm_dx<STORED>(g, x, shift[c], mean[c], invstd[c], scale[c], constant[c],
                                     slope[c]);
    """,
    "gpubn_batchnorm_relu_dx",
    _SOURCE,
)

_dx_fixed = Elementwise(
    f"S dout, raw T scale, {_PLACE}",
    "S dx",
    f"{_CHANNEL} dx = gpubn::store<STORED>"
    "(gpubn::load<STORED>(dout) * gpubn::real<REAL>(scale[c]))",
    "gpubn_batchnorm_dx_fixed",
    _SOURCE,
)

_relu_dx_fixed = Elementwise(
    f"S dout, S x, {_STATISTICS}, raw T scale, raw T beta, {_PLACE}",
    "S dx",
    f"""
    {_CHANNEL}
    auto g = gpubn::batchnorm_relu_gradient<STORED>(dout, x, shift[c], mean[c], scale[c], beta[c]);
    dx = gpubn::store<STORED>(g * gpubn::real<REAL>(scale[c]));
    """,
    "gpubn_batchnorm_relu_dx_fixed",
    _SOURCE,
)


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
    the other.
    """
    k = shift(x)
    mean, var = moments(x, k)
    invstd, scale = statistics(var, gamma, eps)
    running = running_update(running_mean, running_var, k, mean, var, momentum, correction)
    found = Statistics(k, mean, invstd, scale, beta)
    return normalize(x, found, residual, relu, out), found, *running


def backward(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return dx, to ``out`` if given, dgamma and dbeta, through the statistics of ``x``.

    What ``backward_sums``, ``gradients`` and ``backward_dx`` give one after the other.
    """
    dgamma, dbeta = backward_sums(dout, x, statistics, relu)
    sums = gradients(statistics.scale, dgamma, dbeta, x.shape[1] * x.shape[3])
    return backward_dx(dout, x, statistics, sums, relu, out), dgamma, dbeta


def shift(x: Array) -> Array:
    """Return K ``(I * C,)``: of every channel, the middle one of three of its samples.

    They are the first, the central and the last one.
    """
    (x,) = contiguous(x)
    instances, batch, channels, inner = x.shape
    out = cupy.empty(instances * channels, accumulator(x))
    _middle(x.dtype, x.reshape(-1), batch, channels, inner, out)
    return out


def moments(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance ``(I * C,)`` of ``x - shift`` over the samples."""
    arrays = contiguous(x, shift)
    mean, var = reduce_channels(_SOURCE, "batchnorm_moments", x, arrays, "merge_moments", 2)
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
    (parts,) = contiguous(cupy.stack([mean, var]))
    merged = merge_parts("merge_moments", parts, part_rows, rows)
    return merged[0], merged[1]


def statistics(var: Array, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return ``invstd = 1 / sqrt(var + eps)`` and ``scale = gamma * invstd``, of var's shape."""
    invstd, scale = _statistics(var, gamma, eps)
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
    next_mean, next_var = _running(
        running_mean, running_var, shift, mean, var, momentum, 1.0 - momentum, correction
    )
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
    shift, mean, _, scale, beta = contiguous(*statistics)
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    (x,) = contiguous(x)
    channels = (shift, mean, scale, beta, *_place(x))
    if residual is not None:
        _add_relu(x.dtype, x, *contiguous(residual), *channels, out)
    else:
        (_relu if relu else _normalize)(x.dtype, x, *channels, out)
    return out


def backward_sums(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False
) -> tuple[Array, Array]:
    """Return the sums ``(I * C,)`` over the samples of ``g * xhat`` and of ``g``.

    ``g`` is ``dout``; with ``relu`` it is 0 where the normalized output was not above 0.
    """
    shift, mean, invstd, scale, beta = statistics
    arrays = contiguous(dout, x, shift, mean, invstd, *((scale, beta) if relu else ()))
    name = "batchnorm_relu_sums" if relu else "batchnorm_sums"
    dgamma, dbeta = reduce_channels(_SOURCE, name, x, arrays, "merge_sums", 2)
    return dgamma, dbeta


def backward_sums_add_relu(
    dout: Array, out: Array, x: Array, statistics: Statistics
) -> tuple[Array, Array, Array]:
    """Return the sums of ``g * xhat`` and ``g``, and ``g``: ``dout`` where ``out > 0``, else 0."""
    dresidual = cupy.empty(x.shape, x.dtype)
    dout, out, *channels = contiguous(dout, out, x, *statistics[:3])
    arrays = (dout, out, dresidual, *channels)
    name = "batchnorm_add_relu_sums"
    dgamma, dbeta = reduce_channels(_SOURCE, name, x, arrays, "merge_sums", 2)
    return dgamma, dbeta, dresidual


def gradients(scale: Array, dgamma: Array, dbeta: Array, samples: int) -> Gradients:
    """Return ``scale * (dbeta / N)`` and ``scale * (dgamma / N)``, for sums over N samples."""
    constant, slope = _gradients(scale, dgamma, dbeta, samples)
    return Gradients(constant, slope)


def backward_dx(
    dout: Array,
    x: Array,
    statistics: Statistics,
    gradients: Gradients,
    relu: bool = False,
    out: Array | None = None,
) -> Array:
    """Return dx, of x's shape, from the sums' shares in it; ``relu`` as in ``backward_sums``."""
    shift, mean, invstd, scale, beta = contiguous(*statistics)
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    dout, x, *sums = contiguous(dout, x, *gradients)
    if relu:
        _relu_dx(x.dtype, dout, x, shift, mean, invstd, scale, beta, *sums, *_place(x), dx)
    else:
        _dx(x.dtype, dout, x, shift, mean, invstd, scale, *sums, *_place(x), dx)
    return dx


def backward_dx_fixed(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> Array:
    """Return dx where the statistics were given, as in test mode: ``g * scale``."""
    shift, mean, _, scale, beta = contiguous(*statistics)
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    dout, x = contiguous(dout, x)
    if relu:
        _relu_dx_fixed(x.dtype, dout, x, shift, mean, scale, beta, *_place(x), dx)
    else:
        _dx_fixed(x.dtype, dout, scale, *_place(x), dx)
    return dx


def _place(x: Array) -> tuple[np.int64, ...]:
    _, batch, channels, inner = x.shape
    return np.int64(batch * channels * inner), np.int64(channels), np.int64(inner)
