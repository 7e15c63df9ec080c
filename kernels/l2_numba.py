"""Sums of squares, and the L2 penalty ``0.5 * reg * sum(w**2)``, on the CPU."""

from typing import Any

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.samples_numba import square_sum
from gpubn.kernels.threads_numba import split


def sum_of_squares(x: Array) -> Array:
    """Return the sum of the squares of all elements, of no dimensions, in the sample order."""
    return square_sum(plain(x)[0].reshape(1, 1, 1, -1)).reshape(())


def add_scaled(y: Array, x: Array, factor: float) -> None:
    """Add ``factor * x`` to ``y``, in place; ``y`` is in C order."""
    flat = (y.reshape(-1), plain(x)[0].reshape(-1), y.dtype.type(factor))
    split(_add_scaled, flat, y.size, y.size)


@compiled
def _add_scaled(y: Any, x: Any, factor: Any, first: int, last: int) -> None:
    y, x = y[first:last], x[first:last]
    for i in range(y.shape[0]):
        y[i] = y[i] + factor * x[i]
