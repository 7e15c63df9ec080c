"""What group and instance norm add to batch norm, on CUDA. The formulas are in groupnorm.cuh."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.batchnorm_cuda import merge_moments
from gpubn.kernels.compile_cuda import Elementwise, contiguous, source
from gpubn.kernels.samples_cuda import channel_sum
from gpubn.kernels.statistics import Gradients, accumulator

_SOURCE = source("real", "samples", "groupnorm")

_shift = Elementwise(
    "raw S x, int64 size, int64 batch, int64 channels, int64 inner",
    "T shift",
    """
    gpubn::Shape shape = {batch, channels, inner};
    shift = gpubn::groupnorm_shift<STORED>(&x[0], i / size * size, size, shape);
    """,
    "gpubn_groupnorm_shift",
    _SOURCE,
)

_weighted = cupy.ElementwiseKernel(
    "T gamma, T sum",
    "T weighted",
    "weighted = (gpubn::real<T>(gamma) * gpubn::real<T>(sum)).v",
    "gpubn_groupnorm_weighted",
    preamble=_SOURCE,
)

_share = cupy.ElementwiseKernel(
    "T invstd, T sum, int64 values",
    "T share",
    "share = gpubn::groupnorm_share<T>(invstd, sum, values)",
    "gpubn_groupnorm_share",
    preamble=_SOURCE,
)


def shift(x: Array, size: int) -> Array:
    """Return K ``(I * C,)``, the same for the ``size`` neighbouring channels of a group.

    It is the middle one of the group's first, central and last value.
    """
    (x,) = contiguous(x)
    instances, batch, channels, inner = x.shape
    out = cupy.empty(instances * channels, accumulator(x))
    _shift(x.dtype, x.reshape(-1), size, batch, channels, inner, out)
    return out


def merge_channels(mean: Array, var: Array, size: int, samples: int) -> tuple[Array, Array]:
    """Merge the moments ``(I * C,)`` of each group's channels, of ``samples`` each; for each."""
    if size == 1:
        return mean, var
    means, variances = (array.reshape(-1, size).T for array in (mean, var))
    merged = merge_moments(means, variances, samples, samples * size)
    return merged[0].repeat(size), merged[1].repeat(size)


def gradients(
    gamma: Array, invstd: Array, dgamma: Array, dbeta: Array, size: int, samples: int
) -> Gradients:
    """Return what dx takes away, from the sums ``(I * C,)`` over each channel's samples."""
    shares = []
    for channel_sums in (dbeta, dgamma):
        weighted = _weighted(gamma, channel_sums)
        sums = channel_sum(weighted.reshape(1, 1, -1, size)).repeat(size)
        shares.append(_share(invstd, sums, size * samples))
    return Gradients(*shares)
