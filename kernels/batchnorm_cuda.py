"""Batch norm of ``x (I, B, C, S)`` over its samples, on CUDA. The formulas are in batchnorm.cuh."""

from typing import Any

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import Elementwise, contiguous, kernel, pointers, source
from gpubn.kernels.samples_cuda import THREADS, alignment_of, merge_parts, plan_of
from gpubn.kernels.statistics import Gradients, Statistics, accumulator

_SOURCE = source("real", "samples", "batchnorm")

# Where an array has no vectors: it is misaligned or has gaps, or 2^31 values or more.
# A channel's number among those of all instances, for element i of x.
_CHANNEL = "long long c = i / instance * channels + i / inner % channels;"
_PLACE = "int64 instance, int64 channels, int64 inner"
_STATISTICS = "raw T shift, raw T mean"

_shift = Elementwise(
    "raw S x, int64 batch, int64 channels, int64 inner",
    "T shift",
    """
    gpubn::Shape shape = {batch, channels, inner};
    shift = gpubn::batchnorm_shift<STORED>(&x[0], shape, i);
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
    constant = gpubn::batchnorm_share<T>(scale, dbeta, samples);
    slope = gpubn::batchnorm_share<T>(scale, dgamma, samples);
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
    the other, in one launch where a channel fits on chip, else in two.
    """
    x, gamma, beta, running_mean, running_var = contiguous(
        x, gamma, beta, running_mean, running_var
    )
    added = None if residual is None else contiguous(residual)[0]
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    cut = plan_of(x, added, out, kept=int(out.flags.c_contiguous))
    found = cupy.empty((6, x.shape[2]), accumulator(x))
    scalars = map(found.dtype.type, (eps, momentum, 1.0 - momentum, correction))
    arrays = (
        *(x, added, relu, gamma, beta, running_mean, running_var, *scalars),
        *(out if cut.shared else None, found),
    )
    cut.run(_SOURCE, "batchnorm_train", arrays, 2, _word(cut.shared > 0))
    k, mean, invstd, scale, next_mean, next_var = found
    statistics = Statistics(k, mean, invstd, scale, beta)
    if not cut.shared:
        normalize(x, statistics, added, relu, out)
    return out, statistics, next_mean, next_var


def backward(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return dx, to ``out`` if given, dgamma and dbeta, through the statistics of ``x``.

    What ``backward_sums``, ``gradients`` and ``backward_dx`` give one after the other, in one
    launch where a channel of ``dout`` and ``x`` fits on chip, else in two.
    """
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    sums, complete = _backward(dout, x, statistics, relu, dx)
    dgamma, dbeta, constant, slope = sums
    if not complete:
        backward_dx(dout, x, statistics, Gradients(constant, slope), relu, dx)
    return dx, dgamma, dbeta


def _backward(
    dout: Array, x: Array, statistics: Statistics, relu: bool, dx: Array | None
) -> tuple[Array, bool]:
    """Return dgamma, dbeta, constant and slope ``(4, I * C)``, and whether dx was written too."""
    dout, x, *channels = contiguous(dout, x, *statistics)
    on_chip = dx is not None and dx.flags.c_contiguous
    cut = plan_of(x, dout, dx, widest=8, kept=2 * on_chip)
    sums = cupy.empty((4, len(channels[0])), accumulator(x))
    arrays = (dout, x, relu, *channels, dx if cut.shared else None, sums)
    cut.run(_SOURCE, "batchnorm_backward", arrays, 2, _word(cut.shared > 0))
    return sums, cut.shared > 0


def shift(x: Array) -> Array:
    """Return K ``(I * C,)``: of every channel, the middle one of three of its samples.

    They are the first, the central and the last one.
    """
    (x,) = contiguous(x)
    instances, batch, channels, inner = x.shape
    out = cupy.empty(instances * channels, accumulator(x))
    _shift(x.dtype, x.reshape(-1), batch, channels, inner, out)
    return out


def moments(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance ``(I * C,)`` of ``x - shift`` over the samples."""
    x, shift = contiguous(x, shift)
    found = cupy.empty((2, len(shift)), accumulator(x))
    plan_of(x).run(_SOURCE, "batchnorm_moments", (x, shift, found), 2)
    return found[0], found[1]


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
    merged = merge_parts(parts, part_rows, rows)
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
    shift, mean, _, scale, beta = channels = contiguous(*statistics)
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    (x,) = contiguous(x)
    added = None if residual is None else contiguous(residual)[0]
    words = _vectors(x, added, out, channels)
    if words:
        arrays = (x, added, relu, shift, mean, scale, beta, out)
        _run_vectors("batchnorm_normalize_vectors", arrays, words)
    elif added is not None:
        _add_relu(x.dtype, x, added, shift, mean, scale, beta, *_place(x), out)
    else:
        (_relu if relu else _normalize)(x.dtype, x, shift, mean, scale, beta, *_place(x), out)
    return out


def backward_sums(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False
) -> tuple[Array, Array]:
    """Return the sums ``(I * C,)`` over the samples of ``g * xhat`` and of ``g``.

    ``g`` is ``dout``; with ``relu`` it is 0 where the normalized output was not above 0.
    """
    (dgamma, dbeta, *_), _ = _backward(dout, x, statistics, relu, None)
    return dgamma, dbeta


def backward_sums_add_relu(
    dout: Array, out: Array, x: Array, statistics: Statistics
) -> tuple[Array, Array, Array]:
    """Return the sums of ``g * xhat`` and ``g``, and ``g``: ``dout`` where ``out > 0``, else 0."""
    dresidual = cupy.empty(x.shape, x.dtype)
    dout, out, x, *channels = contiguous(dout, out, x, *statistics[:3])
    sums = cupy.empty((2, len(channels[0])), accumulator(x))
    arrays = (dout, out, dresidual, x, *channels, sums)
    cut = plan_of(x, dout, out, dresidual, widest=8)
    cut.run(_SOURCE, "batchnorm_add_relu_sums", arrays, 2)
    return sums[0], sums[1], dresidual


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
    return _dx_of(dout, x, statistics, gradients, relu, out)


def backward_dx_fixed(
    dout: Array, x: Array, statistics: Statistics, relu: bool = False, out: Array | None = None
) -> Array:
    """Return dx where the statistics were given, as in test mode: ``g * scale``."""
    return _dx_of(dout, x, statistics, None, relu, out)


def _dx_of(
    dout: Array,
    x: Array,
    statistics: Statistics,
    gradients: Gradients | None,
    relu: bool,
    out: Array | None,
) -> Array:
    shift, mean, invstd, scale, beta = channels = contiguous(*statistics)
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    dout, x, *sums = contiguous(dout, x, *(gradients or ()))
    words = _vectors(x, dout, dx, (*channels, *sums))
    if words:
        arrays = (dout, x, relu, *channels, *(sums or (None, None)), dx)
        _run_vectors("batchnorm_dx_vectors", arrays, (*words, _word(gradients is None)))
    elif gradients is None and relu:
        _relu_dx_fixed(x.dtype, dout, x, shift, mean, scale, beta, *_place(x), dx)
    elif gradients is None:
        _dx_fixed(x.dtype, dout, scale, *_place(x), dx)
    elif relu:
        _relu_dx(x.dtype, dout, x, shift, mean, invstd, scale, beta, *sums, *_place(x), dx)
    else:
        _dx(x.dtype, dout, x, shift, mean, invstd, scale, *sums, *_place(x), dx)
    return dx


def _vectors(
    x: Array, other: Array | None, out: Array, channels: tuple[Array, ...]
) -> tuple[str, ...]:
    """Return the template arguments with which elements are taken as vectors, or nothing."""
    _, _, per_instance, inner = x.shape
    width = 16 // x.dtype.itemsize
    arrays = (x, out) if other is None else (x, other, out)
    if not (out.flags.c_contiguous and _aligned(arrays) and 0 < x.size < 2**31):
        return ()
    if inner % width == 0:
        return str(width), "gpubn::SAME"
    if inner == 1 and per_instance % width == 0 and _aligned(channels):
        return str(width), "gpubn::NEIGHBOURS"
    return str(width), "gpubn::ANY"


def _aligned(arrays: tuple[Array, ...]) -> bool:
    return alignment_of([array.data.ptr for array in arrays]) == 16


def _run_vectors(name: str, arrays: tuple[Any, ...], words: tuple[str, ...]) -> None:
    x, width = arrays[0], int(words[0])
    _, batch, channels, inner = x.shape
    blocks = -(-x.size // (width * THREADS))
    sizes = map(np.uint32, (x.size, batch * channels, channels, inner))
    kernel(_SOURCE, name, x.dtype, *words)((blocks,), (THREADS,), pointers(*arrays, *sizes))


def _word(value: bool) -> str:
    return "true" if value else "false"


def _place(x: Array) -> tuple[np.int64, ...]:
    _, batch, channels, inner = x.shape
    return np.int64(batch * channels * inner), np.int64(channels), np.int64(inner)
