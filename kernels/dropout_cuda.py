"""Inverted dropout of arrays of any shape, on CUDA. The generator is in dropout.cuh."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import Elementwise, contiguous, source
from gpubn.kernels.statistics import accumulator

_apply = Elementwise(
    "S x, T scale, uint64 threshold, uint64 seed, uint32 stream, uint32 step_",
    "S out",
    "out = gpubn::dropout<STORED>(x, i, scale, threshold, seed, stream, step_)",
    "gpubn_dropout",
    source("real", "dropout"),
)


def apply(x: Array, p: float, seed: int, stream: int, step: int, out: Array | None = None) -> Array:
    """Return ``x / p`` where the mask of ``(seed, stream, step)`` keeps an element, else 0.

    To ``out`` if given. The same call on ``dout`` is the backward pass.
    """
    shape = x.shape  # contiguous() gives an array of no dimensions one
    (x,) = contiguous(x)  # the mask follows the C order of the elements
    threshold = np.uint64(round(p * 2**32))
    key = (np.uint64(seed), np.uint32(stream), np.uint32(step))
    out = cupy.empty(x.shape, x.dtype) if out is None else out.reshape(x.shape)
    _apply(x.dtype, x, accumulator(x).type(1 / p), threshold, *key, out)
    return out.reshape(shape)
