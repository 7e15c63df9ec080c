"""ReLU of arrays of any shape, on CUDA. The formulas are in relu.cuh."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import source

_SOURCE = source("real", "relu")

_forward = cupy.ElementwiseKernel(
    "T x", "T out", "out = gpubn::relu_forward<T>(x)", "gpubn_relu_forward", preamble=_SOURCE
)

_backward = cupy.ElementwiseKernel(
    "T dout, T x",
    "T dx",
    "dx = gpubn::relu_backward<T>(dout, x)",
    "gpubn_relu_backward",
    preamble=_SOURCE,
)


def forward(x: Array) -> Array:
    """Return ``max(0, x)``."""
    return _forward(x, cupy.empty(x.shape, x.dtype))


def backward(dout: Array, x: Array) -> Array:
    """Return ``dout`` where ``x > 0``, else 0."""
    return _backward(dout, x, cupy.empty(x.shape, x.dtype))
