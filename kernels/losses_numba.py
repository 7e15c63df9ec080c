"""Losses of scores ``x (N, C)``, and the count of right answers, on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.buffers_numba import buffer_of, row_sum, workspace
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.elementary_numba import exp_of, log_of
from gpubn.kernels.threads_numba import split


def softmax_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    return _mean_loss(_softmax_loss, x, y)


def svm_loss(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the mean loss, an array of no dimensions, and dx ``(N, C)``; ``y`` is int64."""
    return _mean_loss(_svm_loss, x, y)


def count_correct(x: Array, y: Array) -> Array:
    """Return how many rows' first largest score is their label's; int64, of no dimensions."""
    return np.asarray((x.argmax(axis=1) == y).sum())  # NumPy takes a NaN for the largest


def _mean_loss(kernel: Callable[..., None], x: Array, y: Array) -> tuple[Array, Array]:
    x, y = plain(x, y)
    rows = x.shape[0]
    losses, dx = buffer_of(x, rows), np.empty_like(x)
    split(kernel, (x, y, losses, dx), rows, x.size)
    # A sum like those that the kernels take within a row: nothing more is to be compiled.
    total = row_sum(losses, rows, workspace(x, 1, rows))
    return np.asarray(x.dtype.type(total) / x.dtype.type(rows)), dx


@compiled
def _softmax_loss(x: Any, y: Any, losses: Any, dx: Any, first: int, last: int) -> None:
    real = x.dtype.type
    columns, count = x.shape[1], real(x.shape[0])
    work, e = workspace(x, 1, columns), buffer_of(x, columns)
    for r in range(first, last):
        xr, dxr = x[r], dx[r]
        top = xr[0]
        for j in range(1, columns):
            if xr[j] > top:
                top = xr[j]
        for j in range(columns):
            e[j] = exp_of(xr[j] - top)
        total = row_sum(e, columns, work)
        losses[r] = log_of(total) - (xr[y[r]] - top)
        for j in range(columns):
            dxr[j] = (e[j] / total - real(j == y[r])) / count


@compiled
def _svm_loss(x: Any, y: Any, losses: Any, dx: Any, first: int, last: int) -> None:
    real = x.dtype.type
    zero, one = real(0), real(1)
    columns, count = x.shape[1], real(x.shape[0])
    work, margins = workspace(x, 1, columns), buffer_of(x, columns)
    for r in range(first, last):
        xr, dxr, label = x[r], dx[r], y[r]
        right, above = xr[label], 0
        for j in range(columns):
            margin = (xr[j] - right) + one
            margins[j] = zero if zero > margin else margin  # a NaN stays one
        margins[label] = zero
        losses[r] = row_sum(margins, columns, work)
        for j in range(columns):
            above += margins[j] > zero
            dxr[j] = (one if margins[j] > zero else zero) / count
        dxr[label] = (zero - real(above)) / count
