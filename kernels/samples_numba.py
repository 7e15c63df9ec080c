"""Reductions along the samples of each channel on the CPU, in the sample order (samples.cuh).

Where channels are neighbours in memory (channels last), rows of channels are added side by side:
columns_numba. Where samples are, channels go through buffers or become lanes: planes_numba.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels import columns_numba, planes_numba
from gpubn.kernels.columns_numba import BLOCK_COLUMNS, COLUMNS, INSTANCES, TILES
from gpubn.kernels.real_numba import stored
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads import pieces_of
from gpubn.kernels.threads_numba import split
from gpubn.kernels.vectors_numba import BYTES

# What a thread takes at a time, where there is enough for all of them.
TILE_SAMPLES = 1024  # samples of a channel, at least: 8 times a power of two
TILE_ROWS = 64  # rows of channels


def channel_sum(x: Array) -> Array:
    """Return the sum ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    kernels = (columns_numba.sums, planes_numba.sums)
    return reduce_channels(kernels, x, (*stored(x), False), columns_numba.merge_sums, 1)[0]


def square_sum(x: Array) -> Array:
    """Return the sum of squares ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    kernels = (columns_numba.sums, planes_numba.sums)
    return reduce_channels(kernels, x, (*stored(x), True), columns_numba.merge_sums, 1)[0]


def reduce_channels(
    kernels: tuple[Callable[..., None], Callable[..., None]],
    x: Array,
    arguments: tuple[Any, ...],
    merge: Callable[..., None],
    width: int,
) -> Any:
    """Reduce the tiles of ``x (I, B, C, S)`` by one of two kernels, then merge: ``(width, I*C)``.

    The first is for channels that are neighbours, the second for samples that are. Both take the
    arguments, parts ``(width, P, I * C)`` to write to, the samples of a tile, and a range of units:
    the second of channels' tiles, the first of what it is told.
    """
    instances, batch, channels, inner = x.shape
    rows, all_channels = batch * inner, instances * channels
    by_column, by_plane = kernels
    pieces = pieces_of(x.size)
    tile_rows, tiles = _whole(rows), 1
    if inner > 1 or channels == 1:
        if all_channels < pieces:
            tile_rows, tiles = _tiles(rows, pieces, TILE_SAMPLES)
        parts = np.empty((width, tiles, all_channels), accumulator(x))
        split(by_plane, (*arguments, parts, tile_rows), all_channels * tiles, x.size)
    else:
        if instances > 1:
            units, count = INSTANCES, instances
        elif rows >= pieces * TILE_ROWS or channels < pieces * BLOCK_COLUMNS:
            tile_rows, tiles = _tiles(rows, pieces, 8)
            units, count = TILES, tiles
        else:
            units, count = COLUMNS, -(-channels // BLOCK_COLUMNS)
        parts = np.empty((width, tiles, all_channels), accumulator(x))
        split(by_column, (*arguments, parts, tile_rows, units), count, x.size)
    return merge_parts(merge, parts, tile_rows, rows)


def reduce_rows(kernel: Callable[..., None], x: Array, arguments: tuple[Any, ...]) -> Any:
    """Sum over the rows of ``x (N, D)`` by a kernel that takes tiles of rows: ``(2, D)``.

    It takes the arguments, parts ``(2, P, D)`` to write to, a tile's rows, and a range of tiles.
    """
    rows, columns = x.shape
    tile_rows, tiles = _tiles(rows, pieces_of(x.size), _lanes(x))
    parts = np.empty((2, tiles, columns), accumulator(x))
    split(kernel, (*arguments, parts, tile_rows), tiles, x.size)
    return merge_parts(columns_numba.merge_sums, parts, tile_rows, rows)


def groups_of_rows(x: Array) -> int:
    """Return how many groups of rows, each a lane of a vector, ``x (N, D)`` has."""
    return -(-len(x) // _lanes(x))


def _lanes(x: Array) -> int:
    return BYTES // int(accumulator(x).itemsize)


def _tiles(rows: int, pieces: int, least: int) -> tuple[int, int]:
    """Choose a tile of at least so many rows; return its rows and how many tiles there are.

    All rows where there is to be one piece, else 8 times a power of two.
    """
    if pieces == 1:
        return _whole(rows), 1
    tile_rows = max(least, 1 << (-(-rows // pieces) - 1).bit_length())
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
