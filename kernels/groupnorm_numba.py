"""What group and instance norm add to batch norm, on the CPU. The same bits as groupnorm_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.batchnorm_numba import merge_moments, middle
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.real_numba import stored, widen
from gpubn.kernels.samples_numba import channel_sum
from gpubn.kernels.statistics import Gradients, accumulator


def shift(x: Array, size: int) -> Array:
    """Return K ``(I * C,)``, the same for the ``size`` neighbouring channels of a group.

    It is the middle one of the group's first, central and last value.
    """
    out = np.empty(x.shape[0] * x.shape[2], accumulator(x))
    _shift(*stored(x), size, out)
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
    count = gamma.dtype.type(size * samples)
    shares = []
    with np.errstate(all="ignore"):  # infinities and NaN take their course, as on CUDA
        for channel_sums in (dbeta, dgamma):
            weighted = gamma * channel_sums
            sums = channel_sum(weighted.reshape(1, 1, -1, size)).repeat(size)
            shares.append(invstd * (sums / count))
    return Gradients(*shares)


@compiled
def _shift(x: Any, size: int, out: Any) -> None:
    batch, channels, inner = x.shape[1:]
    samples = batch * inner
    central = size * samples // 2
    channel, sample = central // samples, central % samples
    for first in range(0, out.shape[0], size):
        instance, c = first // channels, first % channels
        k = middle(
            widen(x[instance, 0, c, 0]),
            widen(x[instance, sample // inner, c + channel, sample % inner]),
            widen(x[instance, batch - 1, c + size - 1, inner - 1]),
        )
        for j in range(size):
            out[first + j] = k
