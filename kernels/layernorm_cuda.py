"""Layer norm of every row of ``x (N, D)``, on CUDA. The formulas are in layernorm.cuh."""

from typing import Any

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, source
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples", "rows", "layernorm")
# As in rows.cuh.
MAX_TEAM, MERGED = 512, 1024
_WARP = 32
_BLOCK = 256  # threads of a block where a row needs no more: a multiprocessor has several such
_ENOUGH_BLOCKS = 256  # to keep every multiprocessor of a GPU busy


def forward(
    x: Array, gamma: Array, beta: Array, eps: float, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return out ``(N, D)`` and the rows' shift, mean and invstd, each ``(N,)``."""
    x, gamma, beta = contiguous(x, gamma, beta)
    out = cupy.empty(x.shape, x.dtype) if out is None else out
    shift, mean, invstd = (cupy.empty(x.shape[0], accumulator(x)) for _ in range(3))
    launch, grid, block = forward_of(_SOURCE, "layernorm_forward", x, gamma, beta, out)
    counts = map(np.int64, x.shape)
    launch(
        grid,
        block,
        (x, gamma, beta, out, shift, mean, invstd, *counts, accumulator(x).type(eps)),
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
    dx, sums = gradients_of(_SOURCE, "layernorm", dout, x, gamma, (shift, mean, invstd), 2, out)
    return dx, sums[0], sums[1]


def forward_of(text: str, name: str, x: Array, *arrays: Array) -> tuple[Any, Any, Any]:
    """Return kernel ``name`` for the rows of ``x``, its grid and its block.

    ``arrays`` are what it reads and writes along rows beside ``x``.
    """
    rows, columns = x.shape
    lanes, per = _lanes(columns, x)
    team = _team(columns, lanes, per)
    teams = _BLOCK // team if team <= _WARP else 1
    arguments = _chunk(columns, x, *arrays), per, lanes
    return kernel(text, name, x.dtype, *arguments), (-(-rows // teams),), (team, teams)


def gradients_of(
    text: str,
    op: str,
    dout: Array,
    x: Array,
    gamma: Array,
    statistics: tuple[Array, ...],
    width: int,
    out: Array | None,
) -> tuple[Array, Array]:
    """Return dx, and the sums over the rows ``(width, D)``, with the kernels of ``op``.

    Where a block's threads can hold a row of x and of dout beside the sums, both are read once, for
    dx and for the sums. Longer rows are read for dx, and again for the sums.
    """
    dout, x, gamma, *stats = contiguous(dout, x, gamma, *statistics)
    rows, columns = x.shape
    dx = cupy.empty(x.shape, x.dtype) if out is None else out
    counts = (np.int64(rows), np.int64(columns))
    arrays = (dout, x, *stats, gamma, dx)
    chunk = _chunk(columns, x, dout, gamma, dx)
    few = _values(x, 8)
    lanes, per = (8, few) if columns <= 8 * few else (_WARP, few)
    together = columns <= MAX_TEAM * few
    if not together:
        long = _values(x, 16)
        launch = kernel(text, f"{op}_backward_dx", x.dtype, chunk, long, _WARP)
        launch((rows,), (_team(columns, _WARP, long),), (*arrays, *counts))
    team = _team(columns, lanes, per) if together else _WARP
    strips = -(-columns // (team * per))
    leaves = -(-rows // 8)
    teams = _teams(team, leaves * strips)
    tiles = -(-leaves // teams)
    parts = cupy.empty((width, tiles, columns), accumulator(x))
    launch = kernel(text, f"{op}_gradients", x.dtype, chunk, per, lanes, int(together))
    launch((tiles * strips,), (team, teams), (*arrays, parts, np.uint32(tiles), *counts))
    return dx, _merge(parts)


def _merge(parts: Array) -> Array:
    """Merge ``parts (K, P, D)`` to ``(K, D)``."""
    width, count, columns = parts.shape
    while count > 1:
        tiles = -(-count // MERGED)
        merged = cupy.empty((width, tiles, columns), parts.dtype)
        kernel(_SOURCE, "merge_rows", parts.dtype)(
            (-(-columns // 32) * tiles * width,),
            (32, 32),
            (parts, merged, np.int64(columns), np.uint32(tiles), np.uint32(count)),
        )
        parts, count = merged, tiles
    return parts[:, 0]


def _values(x: Array, count: int) -> int:
    """Return how many values take the registers of ``count`` in single precision."""
    return count // (accumulator(x).itemsize // 4)


def _lanes(columns: int, x: Array) -> tuple[int, int]:
    """Return the lanes of a warp that take a row together, and the values that each holds."""
    few, many = _values(x, 8), _values(x, 16)
    if columns <= _WARP * few:
        return (8 if columns <= 8 * few else _WARP), few
    return _WARP, many


def _team(columns: int, lanes: int, per: int) -> int:
    """Return how many threads take a row of which each holds ``per`` values."""
    return min(MAX_TEAM, -(-columns // (lanes * per)) * lanes)


def _teams(team: int, leaves: int) -> int:
    """Return how many teams of so many threads, each with a leaf of eight rows, are a block.

    The more, the fewer parts there are to be merged; but there should be enough blocks.
    """
    teams = 1
    while 2 * teams * team <= _BLOCK and (teams * team < _WARP or leaves > teams * _ENOUGH_BLOCKS):
        teams *= 2
    return teams


def _chunk(columns: int, x: Array, *arrays: Array) -> int:
    """Return how many neighbours can be read at once in all rows, up to 16 bytes of ``x``."""
    count: int = 16 // x.dtype.itemsize
    while columns % count or any(_misaligned(a, count) for a in (x, *arrays)):
        count //= 2
    return count


def _misaligned(array: Array, count: int) -> bool:
    return bool(array.data.ptr % min(16, count * array.dtype.itemsize))
