"""ReLU of arrays of any shape, on the CPU. The same bits as relu_cuda."""

from typing import Any

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.memory import empty
from gpubn.kernels.real_numba import stored, widen
from gpubn.kernels.threads_numba import split


def forward(x: Array, out: Array | None = None) -> Array:
    """Return ``max(0, x)``, to ``out`` if given."""
    out = empty(x.shape, x.dtype) if out is None else out
    flat = tuple(array.reshape(-1) for array in stored(x, out))
    split(_forward, flat, x.size, x.size)
    return out


def backward(dout: Array, x: Array, out: Array | None = None) -> Array:
    """Return ``dout`` where ``x > 0``, else 0, to ``out`` if given."""
    dx = empty(x.shape, x.dtype) if out is None else out
    flat = tuple(array.reshape(-1) for array in stored(dout, x, dx))
    split(_backward, flat, x.size, x.size)
    return dx


@compiled
def _forward(x: Any, out: Any, first: int, last: int) -> None:
    x, out = x[first:last], out[first:last]
    zero = x.dtype.type(0)  # of half precision too: its bits are 0
    for i in range(out.shape[0]):
        v = widen(x[i])
        out[i] = x[i] if v > 0 or v != v else zero  # a NaN stays one


@compiled
def _backward(dout: Any, x: Any, dx: Any, first: int, last: int) -> None:
    dout, x, dx = dout[first:last], x[first:last], dx[first:last]
    zero = x.dtype.type(0)
    for i in range(dx.shape[0]):
        dx[i] = dout[i] if widen(x[i]) > 0 else zero
