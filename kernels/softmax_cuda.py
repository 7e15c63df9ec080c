"""The softmax loss of scores ``x (N, C)``, on CUDA. The formulas are in softmax.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_cuda import column_sum
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "columns", "rows", "softmax")
_LANES = 256  # as in rows.cuh

_over_n = cupy.ElementwiseKernel(
    "T total, int64 rows",
    "T mean",
    "mean = (gpubn::real<T>(total) / gpubn::real<T>((long long)rows)).v",
    "gpubn_softmax_mean",
    preamble=source("real"),
)


def loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    x, y = contiguous(x, y)
    rows, columns = x.shape
    losses, dx = cupy.empty((rows, 1), x.dtype), cupy.empty(x.shape, x.dtype)
    kernel(_SOURCE, "softmax_loss", x.dtype)(
        (rows,), (_LANES,), (x, y, losses, dx, np.int64(columns), np.int64(rows))
    )
    return _over_n(column_sum(losses), rows).reshape(()), dx
