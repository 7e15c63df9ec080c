"""Sums of rows on the CPU, in the row order: 256 lanes, each in the column order, then halved."""

from typing import Any

import numpy as np

from gpubn.kernels.columns_numba import fold_sums, levels_for, push_sums, sum8
from gpubn.kernels.compile_numba import compiled

LANES = 256
LEAF = 8 * LANES  # values of a row that make one leaf of every lane


@compiled
def buffer_for(x: Any) -> Any:
    """Return zeros for a row of ``x (N, D)``, with room behind it for the +0 of absent values.

    Those fill the last leaf, or the lanes up to a power of two where a row has no more than 256.
    """
    columns = x.shape[1]
    size = 1
    if columns > LANES:
        size = (columns + LEAF - 1) // LEAF * LEAF
    while size < columns:
        size *= 2
    return np.zeros(size, x.dtype)


@compiled
def scratch_for(x: Any) -> Any:
    """Return the memory in which ``row_sum`` adds up a row of ``x (N, D)``."""
    return np.empty((levels_for(x.shape[1] // LEAF + 1) + 1, 1, LANES), x.dtype)


@compiled
def row_sum(row: Any, scratch: Any) -> Any:
    """Return the sum of a row, in a buffer that ``buffer_for`` made, in the row order."""
    levels, node = scratch[1:], scratch[0]
    lanes = node[0]
    width = min(row.shape[0], LANES)
    if row.shape[0] <= LANES:
        zero = row.dtype.type(0)
        for j in range(width):
            lanes[j] = row[j] + zero  # one value a lane; +0 stands for the seven absent ones
    else:
        leaves = row.shape[0] // LEAF
        for leaf in range(leaves):
            sum8(row[leaf * LEAF : (leaf + 1) * LEAF].reshape(8, LANES), lanes)
            push_sums(levels, leaf, node)
        fold_sums(levels, leaves, node, False)
    while width > 1:
        width //= 2
        for j in range(width):
            lanes[j] = lanes[j] + lanes[j + width]
    return lanes[0]
