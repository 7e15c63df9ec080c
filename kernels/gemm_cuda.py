"""Matrix products on CUDA, each output one chain of fused multiply-adds, and the bias.

The kernel is in gemm.cuh.
"""

from functools import cache

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "gemm")
_TILES = ((128, 8), (64, 4), (32, 2), (16, 2))  # a block's outputs, and a thread's, along each axis

_add_bias = cupy.ElementwiseKernel(
    "T x, T b",
    "T out",
    "out = (gpubn::real<T>(x) + gpubn::real<T>(b)).v",
    "gpubn_add_bias",
    preamble=source("real"),
)


def matmul(a: Array, b: Array) -> Array:
    """Return ``a @ b (M, N)`` for ``a (M, K)`` and ``b (K, N)``, which may be transposed arrays."""
    (rows, depth), columns = a.shape, b.shape[1]
    out = cupy.empty((rows, columns), a.dtype)
    if depth == 0:
        out.fill(0)
        return out
    a, a_transposed = _stored(a)
    b, b_transposed = _stored(b)
    tile, per_thread = _tile(rows, columns, a.dtype, _processors(a.device.id))
    form = (tile, per_thread, int(not a_transposed), int(b_transposed))
    multiply = kernel(_SOURCE, "matmul", a.dtype, *form)
    blocks = -(-rows // tile) * -(-columns // tile)
    sizes = tuple(np.int64(size) for size in (rows, columns, depth))
    multiply((blocks,), ((tile // per_thread) ** 2,), (a, b, out, *sizes))
    return out


def add_bias(x: Array, b: Array) -> None:
    """Add ``b (D,)`` to every row of ``x (N, D)``, in place; ``x`` is in C order."""
    _add_bias(x, b, x)


def _tiles_for(dtype: np.dtype) -> tuple[tuple[int, int], ...]:
    """Return the tiles that there are for a dtype; of doubles the largest is too large to share."""
    return _TILES if dtype.itemsize == 4 else _TILES[1:]


def _stored(a: Array) -> tuple[Array, bool]:
    """Return a matrix as it lies in memory, in C order, and whether that is its transpose."""
    if a.flags.f_contiguous and not a.flags.c_contiguous:
        return a.T, True
    return contiguous(a)[0], False


@cache  # CuPy asks the driver for all attributes, which takes longer than a small product
def _processors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


def _tile(rows: int, columns: int, dtype: np.dtype, processors: int) -> tuple[int, int]:
    """Choose the largest tile that gives every multiprocessor a block."""
    for tile, per_thread in _tiles_for(dtype):
        if -(-rows // tile) * -(-columns // tile) >= processors:
            return tile, per_thread
    return _TILES[-1]
