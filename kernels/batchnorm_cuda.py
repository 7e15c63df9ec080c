"""Batch norm of ``x (N, D)`` over its rows, on CUDA. The formulas are in batchnorm.cuh."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.columns_cuda import gradient_sums, merge_parts, reduce_columns
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "columns", "batchnorm")

_middle = cupy.ElementwiseKernel(
    "T first, T central, T last",
    "T shift",
    "shift = gpubn::middle<T>(first, central, last)",
    "gpubn_batchnorm_shift",
    preamble=_SOURCE,
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
    "T running_mean, T running_var, T shift, T mean, T var, T momentum, T complement",
    "T next_mean, T next_var",
    """
    T sample_mean = (gpubn::real<T>(shift) + gpubn::real<T>(mean)).v;
    next_mean = gpubn::running_update<T>(running_mean, sample_mean, momentum, complement);
    next_var = gpubn::running_update<T>(running_var, var, momentum, complement);
    """,
    "gpubn_batchnorm_running",
    preamble=_SOURCE,
)

_normalize = cupy.ElementwiseKernel(
    "T x, T shift, T mean, T scale, T beta",
    "T out",
    "out = gpubn::batchnorm_normalize<T>(x, shift, mean, scale, beta)",
    "gpubn_batchnorm_normalize",
    preamble=_SOURCE,
)

_over_n = cupy.ElementwiseKernel(
    "T dgamma, T dbeta, int64 rows",
    "T dgamma_over_n, T dbeta_over_n",
    """
    gpubn::real<T> count((long long)rows);
    dgamma_over_n = (gpubn::real<T>(dgamma) / count).v;
    dbeta_over_n = (gpubn::real<T>(dbeta) / count).v;
    """,
    "gpubn_batchnorm_over_n",
    preamble=_SOURCE,
)

_dx = cupy.ElementwiseKernel(
    "T dout, T x, T shift, T mean, T invstd, T scale, T dgamma_over_n, T dbeta_over_n",
    "T dx",
    """
    dx = gpubn::batchnorm_dx<T>(dout, x, shift, mean, invstd, scale, dgamma_over_n, dbeta_over_n)
    """,
    "gpubn_batchnorm_dx",
    preamble=_SOURCE,
)

_dx_fixed = cupy.ElementwiseKernel(
    "T dout, T scale",
    "T dx",
    "dx = (gpubn::real<T>(dout) * gpubn::real<T>(scale)).v",
    "gpubn_batchnorm_dx_fixed",
    preamble=_SOURCE,
)


def shift(x: Array) -> Array:
    """Return K ``(D,)``: of every column, the middle value of its first, central and last row."""
    rows = x.shape[0]
    return _middle(x[0], x[rows // 2], x[rows - 1])


def moments(x: Array, shift: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance ``(D,)`` of ``x - shift`` over the rows."""
    x, shift = contiguous(x, shift)
    tiles_kernel = kernel(_SOURCE, "batchnorm_moments", x.dtype)
    merge = kernel(_SOURCE, "merge_moments", x.dtype)
    mean, var = reduce_columns(tiles_kernel, (x, shift), x, merge, 2)
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
    merge = kernel(_SOURCE, "merge_moments", mean.dtype)
    merged = merge_parts(merge, cupy.stack([mean, var]), part_rows, rows)
    return merged[0], merged[1]


def statistics(var: Array, gamma: Array, eps: float) -> tuple[Array, Array]:
    """Return ``invstd = 1 / sqrt(var + eps)`` and ``scale = gamma * invstd``, each ``(D,)``."""
    invstd, scale = _statistics(var, gamma, eps)
    return invstd, scale


def running_update(
    running_mean: Array, running_var: Array, shift: Array, mean: Array, var: Array, momentum: float
) -> tuple[Array, Array]:
    """Return ``momentum * running + (1 - momentum) * sample`` for the mean and the variance."""
    next_mean, next_var = _running(
        running_mean, running_var, shift, mean, var, momentum, 1.0 - momentum
    )
    return next_mean, next_var


def normalize(x: Array, shift: Array, mean: Array, scale: Array, beta: Array) -> Array:
    """Return ``((x - shift) - mean) * scale + beta``, ``(N, D)``."""
    return _normalize(x, shift, mean, scale, beta, cupy.empty(x.shape, x.dtype))


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
    over_n = _over_n(dgamma, dbeta, rows)
    return _dx(dout, x, shift, mean, invstd, scale, *over_n, cupy.empty(x.shape, x.dtype))


def backward_dx_fixed(dout: Array, scale: Array) -> Array:
    """Return dx ``(N, D)`` where the statistics were given, as in test mode: ``dout * scale``."""
    return _dx_fixed(dout, scale, cupy.empty(dout.shape, dout.dtype))
