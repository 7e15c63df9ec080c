"""Layer norm of every row of ``x (N, D)``, on CUDA. The formulas are in layernorm.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.columns_cuda import LANES, gradient_sums
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "columns", "rows", "layernorm")


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    x, gamma, beta = contiguous(x, gamma, beta)
    rows, columns = x.shape
    out = cupy.empty(x.shape, x.dtype)
    shift, mean, invstd = (cupy.empty(rows, x.dtype) for _ in range(3))
    square_scale = 0.5 ** (columns - 1).bit_length()
    scalars = (np.int64(columns), x.dtype.type(eps), x.dtype.type(square_scale))
    kernel(_SOURCE, "layernorm_forward", x.dtype)(
        (rows,), (LANES,), (x, gamma, beta, out, shift, mean, invstd, *scalars)
    )
    return out, shift, mean, invstd


def backward_dx(
    dout: Array, x: Array, gamma: Array, shift: Array, mean: Array, invstd: Array
) -> Array:
    """Return dx ``(N, D)``."""
    dout, x, gamma, shift, mean, invstd = contiguous(dout, x, gamma, shift, mean, invstd)
    dx = cupy.empty(x.shape, x.dtype)
    kernel(_SOURCE, "layernorm_backward_dx", x.dtype)(
        (x.shape[0],),
        (LANES,),
        (dout, x, gamma, shift, mean, invstd, dx, np.int64(x.shape[1])),
    )
    return dx


def backward_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return dgamma and dbeta ``(D,)``: the sums over rows of ``dout * xhat`` and of ``dout``."""
    return gradient_sums(dout, x, shift, mean, invstd, per_row=True)
