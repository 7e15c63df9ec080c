"""Sums of columns on CUDA, in the column order, and what other ops need to reduce columns."""

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source

_SOURCE = source("real", "columns")
# As in columns.cuh.
_COLUMNS, _GROUPS, _LEAVES = 32, 8, 4
LANES = 256  # of a row: as in rows.cuh
_NODES = _GROUPS * _LEAVES  # leaves, or parts, that one block merges


def column_sum(x: Array) -> Array:
    """Return the sum of every column of ``x (N, D)``, shape ``(D,)``."""
    (x,) = contiguous(x)
    tiles_kernel = kernel(_SOURCE, "column_sum", x.dtype)
    return reduce_columns(tiles_kernel, (x,), x, kernel(_SOURCE, "merge_sums", x.dtype, 1), 1)[0]


def gradient_sums(
    dout: Array, x: Array, shift: Array, mean: Array, invstd: Array, per_row: bool
) -> tuple[Array, Array]:
    """Return the sums over rows of ``dout * xhat`` and of ``dout``, each ``(D,)``.

    ``xhat = ((x - shift) - mean) * invstd``, with statistics ``(N,)`` if ``per_row`` else ``(D,)``.
    """
    dout, x, shift, mean, invstd = contiguous(dout, x, shift, mean, invstd)
    tiles_kernel = kernel(_SOURCE, "gradient_sums", x.dtype, int(per_row))
    merge = kernel(_SOURCE, "merge_sums", x.dtype, 2)
    sums = reduce_columns(tiles_kernel, (dout, x, shift, mean, invstd), x, merge, 2)
    return sums[0], sums[1]


def reduce_columns(
    tiles_kernel: cupy.RawKernel,
    inputs: tuple[Array, ...],
    x: Array,
    merge: cupy.RawKernel,
    width: int,
) -> Array:
    """Run ``tiles_kernel`` over the tiles of ``x (N, D)``, then ``merge`` them: ``(width, D)``."""
    rows, columns = x.shape
    tiles = -(-rows // (8 * _NODES))
    parts = cupy.empty((width, tiles, columns), x.dtype)
    _launch(tiles_kernel, columns, tiles, (*inputs, parts), (rows,))
    return merge_parts(merge, parts, 8 * _NODES, rows)


def merge_parts(merge: cupy.RawKernel, parts: Array, part_rows: int, rows: int) -> Array:
    """Merge ``parts (K, P, D)``, of ``part_rows`` rows each but the last: ``(K, D)``."""
    width, count, columns = parts.shape
    while count > 1:
        tiles = -(-count // _NODES)
        merged = cupy.empty((width, tiles, columns), parts.dtype)
        _launch(merge, columns, tiles, (parts, merged), (count, part_rows, rows))
        parts, count, part_rows = merged, tiles, part_rows * _NODES
    return parts[:, 0]


def _launch(
    tiles_kernel: cupy.RawKernel,
    columns: int,
    tiles: int,
    arrays: tuple[Array, ...],
    counts: tuple[int, ...],
) -> None:
    grid = (tiles * -(-columns // _COLUMNS),)
    sizes = tuple(np.int64(count) for count in (columns, tiles, *counts))
    tiles_kernel(grid, (_COLUMNS, _GROUPS), (*arrays, *sizes))
