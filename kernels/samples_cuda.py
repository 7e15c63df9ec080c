"""Reductions along the samples of each channel on CUDA, in the sample order (samples.cuh)."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples")
# As in samples.cuh.
THREADS, WIDE, LEAVES = 256, 32, 4
_NODES = THREADS // WIDE * LEAVES  # parts that a block merges


def channel_sum(x: Array) -> Array:
    """Return the sum ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    sums = reduce_channels(_SOURCE, "channel_sum", x, contiguous(x), "merge_sums", 1)
    return sums[0]


def square_sum(x: Array) -> Array:
    """Return the sum of squares ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    sums = reduce_channels(_SOURCE, "square_sum", x, contiguous(x), "merge_sums", 1)
    return sums[0]


def reduce_channels(
    text: str, name: str, x: Array, arrays: tuple[Array, ...], merge: str, width: int
) -> Array:
    """Run kernel ``name`` over the tiles of ``x (I, B, C, S)``, then merge them: ``(width, I*C)``.

    ``arrays`` are its arguments before the parts, all contiguous.
    """
    instances, batch, per_instance, inner = x.shape
    if per_instance == 1:  # then all of an instance's samples are neighbours
        batch, inner = 1, batch * inner
    columns = 1 if inner > 1 else WIDE
    leaves = THREADS // columns * (LEAVES if columns == WIDE else 1)
    rows, channels = batch * inner, instances * per_instance
    tiles = -(-rows // (8 * leaves))
    parts = cupy.empty((width, tiles, channels), accumulator(x))
    counts = (channels, tiles, rows, batch, per_instance, inner)
    kernel(text, name, x.dtype, columns)(
        (tiles * -(-channels // columns),),
        (columns, THREADS // columns),
        (*arrays, parts, *map(np.int64, counts)),
    )
    return merge_parts(merge, parts, 8 * leaves, rows)


def merge_parts(merge: str, parts: Array, part_rows: int, rows: int) -> Array:
    """Merge ``parts (K, P, C)``, of ``part_rows`` samples each but the last: ``(K, C)``."""
    width, count, channels = parts.shape
    while count > 1:
        tiles = -(-count // _NODES)
        merged = cupy.empty((width, tiles, channels), parts.dtype)
        counts = (channels, tiles, count, part_rows, rows)
        kernel(_SOURCE, merge, parts.dtype, width)(
            (tiles * -(-channels // WIDE),),
            (WIDE, THREADS // WIDE),
            (parts, merged, *map(np.int64, counts)),
        )
        parts, count, part_rows = merged, tiles, part_rows * _NODES
    return parts[:, 0]
