"""Losses of scores ``x (N, C)``, and the count of right answers, on CUDA.

The formulas are in losses.cuh.
"""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source
from gpubn.kernels.samples_cuda import THREADS, channel_sum

_SOURCE = source("real", "elementary", "samples", "rows", "losses")

_over_n = cupy.ElementwiseKernel(
    "T total, int64 rows",
    "T mean",
    "mean = (gpubn::real<T>(total) / gpubn::real<T>((long long)rows)).v",
    "gpubn_mean",
    preamble=source("real"),
)

_is_correct = cupy.ElementwiseKernel(
    "raw T x, int64 columns, int64 y",
    "int64 correct",
    "correct = gpubn::is_correct<T>(&x[i * columns], columns, y)",
    "gpubn_is_correct",
    preamble=_SOURCE,
)


def softmax_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    return _mean_loss("softmax_loss", x, y)


def svm_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    return _mean_loss("svm_loss", x, y)


def count_correct(x: Array, y: Array) -> Array:
    """Return how many rows' first largest score is their label's; int64, of no dimensions."""
    x, y = contiguous(x, y)
    return _is_correct(x, x.shape[1], y).sum()


def _mean_loss(name: str, x: Array, y: Array) -> tuple[Array, Array]:
    x, y = contiguous(x, y)
    rows, columns = x.shape
    losses, dx = cupy.empty((1, rows, 1, 1), x.dtype), cupy.empty(x.shape, x.dtype)
    kernel(_SOURCE, name, x.dtype)(
        (rows,), (THREADS,), (x, y, losses, dx, np.int64(columns), np.int64(rows))
    )
    return _over_n(channel_sum(losses), rows).reshape(()), dx
