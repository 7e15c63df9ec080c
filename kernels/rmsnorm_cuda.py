"""RMS norm of every row of ``x (N, D)``, on CUDA. The formulas are in rmsnorm.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source
from gpubn.kernels.layernorm_cuda import reduce_rows
from gpubn.kernels.samples_cuda import THREADS
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples", "rmsnorm")


def forward(x: Array, gamma: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
    """Return out ``(N, D)`` and the rows' ``1 / sqrt(mean(x**2) + eps)``, ``(N,)``."""
    x, gamma = contiguous(x, gamma)
    rows, columns = x.shape
    real = accumulator(x)
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    invrms = cupy.empty(rows, real)
    square_scale = 0.5 ** (columns - 1).bit_length()
    scalars = (np.int64(columns), real.type(eps), real.type(square_scale))
    kernel(_SOURCE, "rmsnorm_forward", x.dtype)(
        (rows,), (THREADS,), (x, gamma, out, invrms, *scalars)
    )
    return out, invrms


def backward(
    dout: Array, x: Array, gamma: Array, invrms: Array, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, and dgamma ``(D,)``.

    That is the sum over rows of ``dout * xhat``.
    """
    dout, x, gamma, invrms = contiguous(dout, x, gamma, invrms)
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    kernel(_SOURCE, "rmsnorm_backward_dx", x.dtype)(
        (x.shape[0],), (THREADS,), (dout, x, gamma, invrms, dx, np.int64(x.shape[1]))
    )
    zeros = cupy.zeros_like(invrms)  # layer norm's shift and mean, of a row that has none
    return dx, reduce_rows(dout, x, zeros, zeros, invrms)[0]
