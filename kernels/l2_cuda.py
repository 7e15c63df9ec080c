"""Sums of squares, and the L2 penalty ``0.5 * reg * sum(w**2)``, on CUDA."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.columns_cuda import LANES, column_sum
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "columns", "rows", "l2")

_square = cupy.ElementwiseKernel(
    "T x",
    "T out",
    "out = (gpubn::real<T>(x) * gpubn::real<T>(x)).v",
    "gpubn_square",
    preamble=source("real"),
)

_add_scaled = cupy.ElementwiseKernel(
    "T y, T x, T factor",
    "T out",
    "out = (gpubn::real<T>(y) + gpubn::real<T>(factor) * gpubn::real<T>(x)).v",
    "gpubn_add_scaled",
    preamble=source("real"),
)


def sum_of_squares(x: Array) -> Array:
    """Return the sum of the squares of all elements, of no dimensions, in the row order."""
    (x,) = contiguous(x)
    squares = cupy.zeros(-(-x.size // LANES) * LANES, x.dtype)
    _square(x.reshape(-1), squares[: x.size])
    lanes = column_sum(squares.reshape(-1, LANES))
    total = cupy.empty((), x.dtype)
    kernel(_SOURCE, "halve_lanes", x.dtype)((1,), (LANES,), (lanes, total))
    return total


def add_scaled(y: Array, x: Array, factor: float) -> None:
    """Add ``factor * x`` to ``y``, in place; ``y`` is in C order."""
    _add_scaled(y, x, factor, y)
