"""Sums of rows on the CPU, in the row order: 256 lanes, each in the column order, then halved."""

from typing import Any

import numpy as np

from gpubn.kernels.columns_numba import fold_sums, levels_for, push_sums, sum8
from gpubn.kernels.compile_numba import compiled

LANES = 256


@compiled
def row_sum(v: Any, lanes: Any) -> Any:
    """Return the sum of ``v (D,)`` in the row order; ``lanes (256,)`` is scratch."""
    columns = v.shape[0]
    width = LANES
    if columns <= LANES:
        # One value a lane. Adding +0 stands for all the absent ones; so does leaving out lanes.
        zero = v.dtype.type(0)
        while width // 2 >= columns and width > 1:
            width //= 2
        for j in range(columns):
            lanes[j] = v[j] + zero
        for j in range(columns, width):
            lanes[j] = zero
    else:
        _sum_lanes(v, lanes)
    while width > 1:
        width //= 2
        for j in range(width):
            lanes[j] = lanes[j] + lanes[j + width]
    return lanes[0]


@compiled
def _sum_lanes(v: Any, lanes: Any) -> None:
    columns = v.shape[0]
    span = 8 * LANES  # values of a leaf
    leaves = columns // span
    levels = np.empty((levels_for(leaves + 1), 1, LANES), v.dtype)
    node = np.empty((1, LANES), v.dtype)
    for leaf in range(leaves):
        sum8(v[leaf * span : (leaf + 1) * span].reshape(8, LANES), node[0])
        push_sums(levels, leaf, node)
    if columns % span:
        last = np.zeros(span, v.dtype)  # values beyond the last one add +0
        last[: columns % span] = v[leaves * span :]
        sum8(last.reshape(8, LANES), node[0])
        fold_sums(levels, leaves, node, True)
    else:
        fold_sums(levels, leaves, node, False)
    lanes[:] = node[0]
