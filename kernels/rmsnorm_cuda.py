"""RMS norm of every row of ``x (N, D)``, on CUDA. The formulas are in rmsnorm.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, source
from gpubn.kernels.layernorm_cuda import forward_of, gradients_of
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples", "rows", "rmsnorm")


def forward(x: Array, gamma: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
    """Return out ``(N, D)`` and the rows' ``1 / sqrt(mean(x**2) + eps)``, ``(N,)``."""
    x, gamma = contiguous(x, gamma)
    rows, columns = x.shape
    real = accumulator(x)
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    invrms = cupy.empty(rows, real)
    square_scale = 0.5 ** (columns - 1).bit_length()
    scalars = (*map(np.int64, x.shape), real.type(eps), real.type(square_scale))
    launch, grid, block = forward_of(_SOURCE, "rmsnorm_forward", x, gamma, out)
    launch(grid, block, (x, gamma, out, invrms, *scalars))
    return out, invrms


def backward(
    dout: Array, x: Array, gamma: Array, invrms: Array, out: Array | None = None
) -> tuple[Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, and dgamma ``(D,)``.

    That is the sum over rows of ``dout * xhat``.
    """
    dx, sums = gradients_of(_SOURCE, "rmsnorm", dout, x, gamma, (invrms,), 1, out)
    return dx, sums[0]
