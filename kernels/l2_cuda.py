"""Sums of squares, and the L2 penalty ``0.5 * reg * sum(w**2)``, on CUDA."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, source
from gpubn.kernels.samples_cuda import square_sum

_add_scaled = cupy.ElementwiseKernel(
    "T y, T x, T factor",
    "T out",
    "out = (gpubn::real<T>(y) + gpubn::real<T>(factor) * gpubn::real<T>(x)).v",
    "gpubn_add_scaled",
    preamble=source("real"),
)


def sum_of_squares(x: Array) -> Array:
    """Return the sum of the squares of all elements, of no dimensions, in the sample order."""
    (x,) = contiguous(x)
    return square_sum(x.reshape(1, 1, 1, -1)).reshape(())


def add_scaled(y: Array, x: Array, factor: float) -> None:
    """Add ``factor * x`` to ``y``, in place; ``y`` is in C order."""
    _add_scaled(y, x, factor, y)
