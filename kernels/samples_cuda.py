"""Reductions along the samples of each channel on CUDA, in the sample order (samples.cuh)."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import contiguous, kernel, pointers, source
from gpubn.kernels.statistics import accumulator

_SOURCE = source("real", "samples")
# As in samples.cuh.
THREADS, WIDE, LEAVES = 256, 32, 4
_NODES = THREADS // WIDE * LEAVES  # parts that a block merges

_LINE, _SECTOR = 128, 32  # bytes: what a warp should read side by side, and what a transfer has
_BLOCKS = 4  # for each multiprocessor, where there are samples enough
_FEW = 38 << 10  # bytes that a block has without asking, and is soon done with even if few work
_BESIDE = 10 << 10  # shared memory of a block beside what it keeps, at the most


class Plan(NamedTuple):
    """How the channels of an array are cut up into blocks and threads; no bits depend on it."""

    layout: str  # samples.cuh's Planes or Columns, with the width of a vector
    columns: int  # threads of a block that read side by side
    groups: int  # blocks that read side by side
    tiles: int  # blocks that share a channel
    shared: int  # bytes of shared memory, where a block keeps what it has read; else 0
    sizes: tuple[int, ...]  # what kernels take as their last arguments: samples.cuh's Sizes

    def run(self, text: str, name: str, arrays: tuple[Any, ...], width: int, *words: str) -> None:
        """Run kernel ``name`` on ``arrays``, the first of x's dtype; nodes have ``width`` values.

        What ``words`` name are its template arguments after the layout.
        """
        parts = tickets = None
        if self.tiles > 1:
            parts = cupy.empty((width, self.tiles, self.sizes[0]), accumulator(arrays[0]))
            tickets = cupy.zeros(self.groups, np.uint32)
        compiled = kernel(text, name, arrays[0].dtype, self.layout, *words)
        if self.shared > _FEW:
            compiled.max_dynamic_shared_size_bytes = self.shared
        if self.groups:
            compiled(
                (self.tiles * self.groups,),
                (self.columns, THREADS // self.columns),
                pointers(*arrays, parts, tickets, *map(np.int64, self.sizes)),
                shared_mem=self.shared,
            )


def plan_of(x: Array, *others: Array | None, widest: int = 16, kept: int = 0) -> Plan:
    """Plan the reduction of the channels of ``x (I, B, C, S)``, and of others that lie as it does.

    Of what a thread computes with, neighbouring channels have ``widest`` bytes at the most: there
    are only so many registers. Where ``kept`` arrays of a channel fit on chip, a block is to keep
    them there, and there is one tile.
    """
    addresses = [array.data.ptr for array in (x, *others) if array is not None]
    sizes = (x.shape, x.dtype.itemsize, alignment_of(addresses), widest, kept)
    return _plan(*sizes, *_device(x.device.id))


@lru_cache(maxsize=1024)  # every call asks
def _plan(
    shape: tuple[int, ...],
    itemsize: int,
    aligned: int,
    widest: int,
    kept: int,
    processors: int,
    shared: int,
) -> Plan:
    instances, batch, per_instance, inner = shape
    if per_instance == 1:  # then all of an instance's samples are neighbours
        batch, inner = 1, batch * inner
    rows, channels = batch * inner, instances * per_instance
    if inner > 1:
        width = _vector_width(inner, itemsize, aligned)
        name, columns, of_block = f"Planes<{width}>", 1, 1
    else:
        width = min(_vector_width(per_instance, itemsize, aligned), widest // max(itemsize, 4))
        name, of_block = f"Columns<{width}>", width
        columns = min(_LINE // (width * itemsize), WIDE, _power(-(-channels // width)))
    most = 32 // of_block  # a thread's leaves: samples.cuh's 2^levels

    def cut(columns: int, share: int, shared: int = 0) -> Plan:
        tiles = max(1, -(-rows // (8 * THREADS // columns * share)))
        sizes = (channels, tiles, share, rows, batch, per_instance, inner)
        groups = -(-channels // (columns * of_block))
        return Plan(f"gpubn::{name}", columns, groups, tiles, shared, sizes)

    # On chip: as wide as gives every multiprocessor a block, of which two are to fit, so that one
    # reads while the other writes; or else as narrow as a transfer, if a block is soon done.
    narrow = columns
    while kept:
        share, line = _power(-(-rows // (8 * THREADS // narrow))), width * itemsize
        vectors = rows * narrow * of_block // width
        found = cut(narrow, share, kept * line * (vectors + vectors * line // _LINE + 1))
        narrower = narrow > 1 and narrow * line > _SECTOR
        busy = found.groups >= processors
        room = min(shared // 2 - _BESIDE, shared if busy else _FEW)
        if share <= most and found.shared <= room and (busy or not narrower):
            return found
        if not narrower:
            break
        narrow //= 2
    share = most
    while share > 1 and (found := cut(columns, share)).tiles * found.groups < _BLOCKS * processors:
        share //= 2
    return cut(columns, share)


def alignment_of(addresses: list[int]) -> int:
    """Return to how many bytes, 16 at the most, all of the addresses are aligned."""
    together = 16
    for address in addresses:
        together |= address
    return together & -together


def _vector_width(neighbours: int, itemsize: int, aligned: int) -> int:
    """Return how many values a vector has: as many as divide so many neighbours evenly."""
    width = aligned // itemsize
    while neighbours % width:
        width //= 2
    return width


def _power(count: int) -> int:
    """Return the power of two that is not below ``count``."""
    return 1 << max(count - 1, 0).bit_length()


@cache  # CuPy asks the driver for all attributes, which takes longer than a small kernel
def _device(number: int) -> tuple[int, int]:
    """Return a device's multiprocessors, and the bytes of shared memory that a block may have."""
    attributes = cupy.cuda.Device(number).attributes
    return int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"])


def channel_sum(x: Array) -> Array:
    """Return the sum ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    return _sum("channel_sum", x)


def square_sum(x: Array) -> Array:
    """Return the sum of squares ``(I * C,)`` of every channel of ``x (I, B, C, S)``."""
    return _sum("square_sum", x)


def _sum(name: str, x: Array) -> Array:
    (x,) = contiguous(x)
    out = cupy.empty(x.shape[0] * x.shape[2], accumulator(x))
    plan_of(x).run(_SOURCE, name, (x, out), 1)
    return out


def merge_parts(parts: Array, part_rows: int, rows: int) -> Array:
    """Merge moments ``(2, P, C)`` of parts, of ``part_rows`` samples each but the last."""
    _, count, channels = parts.shape
    while count > 1:
        tiles = -(-count // _NODES)
        merged = cupy.empty((2, tiles, channels), parts.dtype)
        counts = (channels, tiles, count, part_rows, rows)
        kernel(_SOURCE, "merge_moments", parts.dtype)(
            (tiles * -(-channels // WIDE),),
            (WIDE, THREADS // WIDE),
            (parts, merged, *map(np.int64, counts)),
        )
        parts, count, part_rows = merged, tiles, part_rows * _NODES
    return parts[:, 0]
