"""ReLU of arrays of any shape, on CUDA. The formulas are in relu.cuh."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import Elementwise, source

_SOURCE = source("real", "relu")

_forward = Elementwise(
    "S x", "S out", "out = gpubn::relu_forward<STORED>(x)", "gpubn_relu_forward", _SOURCE
)

_backward = Elementwise(
    "S dout, S x",
    "S dx",
    "dx = gpubn::relu_backward<STORED>(dout, x)",
    "gpubn_relu_backward",
    _SOURCE,
)


def forward(x: Array, out: Array | None = None) -> Array:
    """Return ``max(0, x)``, to ``out`` if given."""
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    _forward(x.dtype, x, out)
    return out


def backward(dout: Array, x: Array, out: Array | None = None) -> Array:
    """Return ``dout`` where ``x > 0``, else 0, to ``out`` if given."""
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    _backward(x.dtype, dout, x, dx)
    return dx
