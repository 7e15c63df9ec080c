"""The softmax loss of scores ``x (N, C)``, on the CPU."""

import math
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import column_sum
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.rows_numba import buffer_for, row_sum, scratch_for
from gpubn.kernels.threads import split


def loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    x, y = plain(x, y)
    losses, dx = np.empty((x.shape[0], 1), x.dtype), np.empty_like(x)
    split(lambda a, b: _loss(x, y, losses, dx, a, b), x.shape[0], x.size)
    return np.asarray(column_sum(losses)[0] / x.dtype.type(x.shape[0])), dx


@compiled
def _loss(x: Any, y: Any, losses: Any, dx: Any, first: int, last: int) -> None:
    real = x.dtype.type
    columns, count = x.shape[1], real(x.shape[0])
    scratch, e = scratch_for(x), buffer_for(x)
    for r in range(first, last):
        xr, dxr = x[r], dx[r]
        top = xr[0]
        for j in range(1, columns):
            if xr[j] > top:
                top = xr[j]
        for j in range(columns):
            e[j] = math.exp(xr[j] - top)
        total = row_sum(e, scratch)
        losses[r, 0] = real(math.log(total)) - (xr[y[r]] - top)
        for j in range(columns):
            dxr[j] = (e[j] / total - real(j == y[r])) / count
