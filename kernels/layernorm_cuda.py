"""Layer norm of every row of ``x (N, D)``, on CUDA. The formulas are in layernorm.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source
from gpubn.kernels.samples_cuda import THREADS, reduce_channels
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples", "layernorm")


def forward(
    x: Array, gamma: Array, beta: Array, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    x, gamma, beta = contiguous(x, gamma, beta)
    rows, columns = x.shape
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    shift, mean, invstd = (cupy.empty(rows, accumulator(x)) for _ in range(3))
    kernel(_SOURCE, "layernorm_forward", x.dtype)(
        (rows,),
        (THREADS,),
        (x, gamma, beta, out, shift, mean, invstd, np.int64(columns), accumulator(x).type(eps)),
    )
    return out, shift, mean, invstd


def backward(
    dout: Array,
    x: Array,
    gamma: Array,
    shift: Array,
    mean: Array,
    invstd: Array,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx ``(N, D)``, to ``out`` if given, dgamma and dbeta ``(D,)``.

    These are the sums over rows of ``dout * xhat`` and of ``dout``.
    """
    dout, x, gamma, shift, mean, invstd = contiguous(dout, x, gamma, shift, mean, invstd)
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    kernel(_SOURCE, "layernorm_backward_dx", x.dtype)(
        (x.shape[0],),
        (THREADS,),
        (dout, x, gamma, shift, mean, invstd, dx, np.int64(x.shape[1])),
    )
    return dx, *reduce_rows(dout, x, shift, mean, invstd)


def reduce_rows(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array
) -> tuple[Array, Array]:
    """Return the sums over rows of ``dout * xhat`` and ``dout``; for statistics of a row each."""
    columns = x[None, :, :, None]
    arrays = contiguous(dout, x, shift, mean, invstd)
    dgamma, dbeta = reduce_channels(_SOURCE, "layernorm_sums", columns, arrays, "merge_sums", 2)
    return dgamma, dbeta
