"""Memory for results on the CPU that is used again, once nobody holds the array in it any more.

The system gives a large array new pages, and clears each when it is first written to: that takes
longer than to normalize what is put there. So the memory of a large result goes back to a pool when
the last array in it is gone, and the next result of its size takes it. A training step, which makes
arrays of the same sizes each time, has new memory in its first step only.

The pool never makes a process larger than it has been: where what is in use and what lies idle
would be more than was ever in use at once, what has lain idle longest is given back to the system
first. CuPy has such a pool of its own on CUDA.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from typing import Any

import numpy as np

LEAST = 1 << 16
"""Bytes from which memory is pooled; the C library keeps smaller pieces itself."""

_ALIGN = 64  # a vector, and a cache line


class Pool:
    """Pieces of memory, those that lie idle by their size.

    Attributes
    ----------
    used, idle, most : int
        Bytes that arrays are in, that lie idle, and the most that arrays were in at once.
    """

    def __init__(self) -> None:
        self.used = self.idle = self.most = 0
        self._pieces: dict[int, list[Any]] = {}  # the size that was used last is the last one
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who holds the lock: after a fork nobody does."""
        # Reentrant: a piece may come back, by the garbage collector, in the middle of `take`.
        self._lock = threading.RLock()

    def take(self, size: int) -> Any:
        """Return a piece of ``size`` bytes."""
        with self._lock:
            pieces = self._pieces.pop(size, None)
            piece = pieces.pop() if pieces else None
            if pieces:
                self._pieces[size] = pieces
            if piece is None:
                self.release(max(self.most - self.used - size, 0))
                piece = np.empty(size, np.uint8)
            else:
                self.idle -= size
            self.used += size
            self.most = max(self.most, self.used)
        return piece

    def give_back(self, piece: Any) -> None:
        """Let a piece lie idle."""
        with self._lock:
            size = piece.nbytes
            pieces = self._pieces.pop(size, None) or []
            self._pieces[size] = [*pieces, piece]
            self.used -= size
            self.idle += size

    def release(self, keep: int = 0) -> None:
        """Give idle memory back to the system, save so many bytes, what was used last."""
        with self._lock:
            while self.idle > keep:
                size = next(iter(self._pieces))
                pieces = self._pieces[size]
                pieces.pop(0)
                self.idle -= size
                if not pieces:
                    del self._pieces[size]


pool = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.renew_lock)


class _Block:
    """What an array is made of whose memory goes back to the pool with the last view of it."""

    __slots__ = ("__array_interface__", "piece", "pool")

    def __init__(self, size: int) -> None:
        self.pool = pool
        self.piece = pool.take(size + _ALIGN)
        address = self.piece.__array_interface__["data"][0]
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address + -address % _ALIGN, False),
            "version": 3,
        }

    def __del__(self) -> None:
        piece = getattr(self, "piece", None)  # there is none where there was no memory left
        if piece is not None:
            self.pool.give_back(piece)


def release_memory() -> None:
    """Give memory that gpubn and CuPy keep for arrays to come back to the system and the GPU."""
    pool.release()
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a new array in C order, whose values are whatever its memory held."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST:
        return np.empty(shape, dtype)
    return np.asarray(_Block(size)).view(dtype).reshape(shape)
