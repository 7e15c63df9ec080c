"""Sums of squares, and the L2 penalty ``0.5 * reg * sum(w**2)``, on the CPU."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_numba import column_sum
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.rows_numba import LANES, row_sum, scratch_for
from gpubn.kernels.threads import split


def sum_of_squares(x: Array) -> Array:
    """Return the sum of the squares of all elements, of no dimensions, in the row order."""
    (x,) = plain(x)
    squares = np.zeros(-(-x.size // LANES) * LANES, x.dtype)
    flat = (x.reshape(-1), squares)
    split(lambda a, b: _square(*flat, a, b), x.size, x.size)
    lanes = column_sum(squares.reshape(-1, LANES))
    return np.asarray(_halve_lanes(lanes.reshape(1, LANES)), x.dtype)


def add_scaled(y: Array, x: Array, factor: float) -> None:
    """Add ``factor * x`` to ``y``, in place; ``y`` is in C order."""
    flat = (y.reshape(-1), plain(x)[0].reshape(-1), y.dtype.type(factor))
    split(lambda a, b: _add_scaled(*flat, a, b), y.size, y.size)


@compiled
def _square(x: Any, out: Any, first: int, last: int) -> None:
    x, out = x[first:last], out[first:last]
    for i in range(out.shape[0]):
        out[i] = x[i] * x[i]


@compiled
def _halve_lanes(lanes: Any) -> Any:
    return row_sum(lanes[0], scratch_for(lanes))


@compiled
def _add_scaled(y: Any, x: Any, factor: Any, first: int, last: int) -> None:
    y, x = y[first:last], x[first:last]
    for i in range(y.shape[0]):
        y[i] = y[i] + factor * x[i]
