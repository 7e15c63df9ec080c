"""Reductions along the samples of each channel on the CPU, in the sample order (samples.cuh).

Where channels are neighbours in memory (channels last), rows of channels are added side by side:
columns_numba. Where samples are, a channel at a time goes through a buffer: planes_numba.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels import columns_numba, planes_numba
from gpubn.kernels.real_numba import stored
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import get_num_threads, split

TILE_ROWS = 1024  # the least samples of a tile: 8 times a power of two


def channel_sum(x: Array) -> Array:
    """Return the sum ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    kernels = (columns_numba.sums, planes_numba.sums)
    return reduce_channels(kernels, x, (*stored(x), False), columns_numba.merge_sums, 1)[0]


def square_sum(x: Array) -> Array:
    """Return the sum of squares ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    kernels = (columns_numba.sums, planes_numba.sums)
    return reduce_channels(kernels, x, (*stored(x), True), columns_numba.merge_sums, 1)[0]


def reduce_channels(
    kernels: tuple[Callable[..., None], Callable[..., None] | None],
    x: Array,
    arguments: tuple[Any, ...],
    merge: Callable[..., None],
    width: int,
) -> Any:
    """Reduce the tiles of ``x (I, B, C, S)`` by one of two kernels, then merge: ``(width, I*C)``.

    The first is for channels that are neighbours, the second, if any, for samples that are. Both
    take the arguments, parts ``(width, P, I * C)`` to write to, the samples of a tile, and ranges:
    of instances, tiles and columns, or of channels' tiles.
    """
    instances, batch, channels, inner = x.shape
    rows, all_channels = batch * inner, instances * channels
    by_column, by_plane = kernels
    block = columns_numba.BLOCK
    kernel: Callable[..., None]
    ranges: Callable[[int, int], tuple[int, ...]]
    if inner > 1 or (channels == 1 and by_plane is not None):
        assert by_plane is not None
        kernel = by_plane
        tile_rows, tiles = _tiles(rows, all_channels)
        units, ranges = all_channels * tiles, lambda a, b: (a, b)
    else:
        kernel = by_column
        blocks = -(-channels // block)
        tile_rows, tiles = _tiles(rows, instances * blocks)
        if tiles > 1 and instances == 1:
            units, ranges = tiles, lambda a, b: (0, 1, a, b, 0, channels)
        elif instances > 1:
            tile_rows, tiles = _whole(rows), 1
            units, ranges = instances, lambda a, b: (a, b, 0, 1, 0, channels)
        else:
            units, ranges = blocks, lambda a, b: (0, 1, 0, 1, a * block, min(b * block, channels))
    parts = np.empty((width, tiles, all_channels), accumulator(x))
    split(lambda a, b: kernel(*arguments, parts, tile_rows, *ranges(a, b)), units, x.size)
    return merge_parts(merge, parts, tile_rows, rows)


def _tiles(rows: int, at_once: int) -> tuple[int, int]:
    """Choose a tile, and return its samples and how many tiles there are.

    All samples where ``at_once`` units of work occupy the threads, else a power of two.
    """
    threads = get_num_threads()
    if threads == 1 or at_once >= 4 * threads:
        return _whole(rows), 1
    share = -(-rows // (4 * threads))  # a few tiles a thread even out their speed
    tile_rows = max(TILE_ROWS, 1 << (share - 1).bit_length())
    return tile_rows, -(-rows // tile_rows)


def _whole(rows: int) -> int:
    """Return a tile that all samples fit in: 8 times a power of two."""
    return 8 << rows.bit_length()


def merge_parts(merge: Callable[..., None], parts: Any, part_rows: int, rows: int) -> Any:
    """Merge ``parts (K, P, C)``, of ``part_rows`` samples each but the last: ``(K, C)``."""
    if parts.shape[1] == 1:
        return parts[:, 0]
    out = np.empty((parts.shape[0], parts.shape[2]), parts.dtype)
    merge(parts, part_rows, rows, out)
    return out
