"""What kernels share on both devices: a channel's statistics, dtypes, and how x is viewed.

Kernels see an array as ``x (I, B, C, S)`` in C order: instances, batch, channels, inner. A channel
of an instance is normalized over its ``B * S`` samples. Batch norm has one instance; instance and
group norm have channels of their own in every sample. Channels last has S = 1.
"""

from typing import Any, NamedTuple

import numpy as np

from gpubn.backend import Array


def accumulator(x: Array) -> np.dtype[Any]:
    """Return the dtype in which ``x`` is computed with: float32 for half precision."""
    return np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype


class Statistics(NamedTuple):
    """Arrays ``(I * C,)``: what the channels of all instances are normalized with.

    ``out = ((x - shift) - mean) * scale + beta``, where ``mean`` is that of ``x - shift``,
    ``invstd = 1 / sqrt(var + eps)`` and ``scale = gamma * invstd``.
    """

    shift: Array
    mean: Array
    invstd: Array
    scale: Array
    beta: Array


class Gradients(NamedTuple):
    """Arrays ``(I * C,)``: what dx takes away, ``dx = (scale * g - constant) - xhat * slope``."""

    constant: Array
    slope: Array
