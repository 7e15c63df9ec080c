"""exp and log of arrays of any shape, on CUDA. The formulas are in elementary.cuh."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import source

_SOURCE = source("real", "elementary")

_exp = cupy.ElementwiseKernel(
    "T x", "T out", "out = gpubn::exp<T>(x)", "gpubn_exp", preamble=_SOURCE
)
_log = cupy.ElementwiseKernel(
    "T x", "T out", "out = gpubn::log<T>(x)", "gpubn_log", preamble=_SOURCE
)


def exp(x: Array) -> Array:
    """Return e to the power of ``x``."""
    return _exp(x, cupy.empty(x.shape, x.dtype))


def log(x: Array) -> Array:
    """Return the natural logarithm of ``x``: NaN below 0, minus infinity at 0."""
    return _log(x, cupy.empty(x.shape, x.dtype))
