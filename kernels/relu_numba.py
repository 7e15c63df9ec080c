"""ReLU of arrays of any shape, on the CPU. The same bits as relu_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, plain
from gpubn.kernels.threads import split


def forward(x: Array) -> Array:
    """Return ``max(0, x)``."""
    (x,) = plain(x)
    out = np.empty_like(x)
    flat = (x.reshape(-1), out.reshape(-1))
    split(lambda a, b: _forward(*flat, a, b), x.size, x.size)
    return out


def backward(dout: Array, x: Array) -> Array:
    """Return ``dout`` where ``x > 0``, else 0."""
    dout, x = plain(dout, x)
    dx = np.empty_like(x)
    flat = (dout.reshape(-1), x.reshape(-1), dx.reshape(-1))
    split(lambda a, b: _backward(*flat, a, b), x.size, x.size)
    return dx


@compiled
def _forward(x: Any, out: Any, first: int, last: int) -> None:
    zero = x.dtype.type(0)
    x, out = x[first:last], out[first:last]
    for i in range(out.shape[0]):
        v = x[i]
        out[i] = v if v > zero or v != v else zero  # a NaN stays one


@compiled
def _backward(dout: Any, x: Any, dx: Any, first: int, last: int) -> None:
    zero = x.dtype.type(0)
    dout, x, dx = dout[first:last], x[first:last], dx[first:last]
    for i in range(dx.shape[0]):
        dx[i] = dout[i] if x[i] > zero else zero
