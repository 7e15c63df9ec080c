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
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn.backend import probe

LEAST = 1 << 16
"""Bytes from which memory is pooled; the C library keeps smaller pieces itself."""

_ALIGN = 64  # a vector, and a cache line


class Pool:
    """Pieces of memory, those that lie idle by their size.

    What is done here may be left at any point by an interrupt, and entered again at any point: by a
    signal's handler, or by what the garbage collector calls. So nothing relies on two things being
    changed together: at worst a piece goes back to the system early, or ``used`` is a little off.
    """

    def __init__(self) -> None:
        self._used = self._most = 0  # bytes in use, and the most at once
        self._pieces: dict[int, list[Any]] = {}  # the size that was used last is the last one
        self._returned: deque[Any] = deque()  # what came back and is not yet among them
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who holds the lock: after a fork nobody does."""
        self._lock = threading.RLock()

    def counts(self) -> tuple[int, int, int]:
        """Return the bytes in use, those that lie idle, and the most that were in use at once."""
        with self._lock:
            self._collect()
            return self._used, self._idle(), self._most

    def take(self, size: int) -> Any:
        """Return a piece of ``size`` bytes."""
        with self._lock:
            self._collect()
            pieces = self._pieces.pop(size, [])
            if len(pieces) > 1:
                self._pieces[size] = pieces
            piece = _popped(pieces.pop)
            if piece is None:
                piece = self._allocate(size)
            self._used += size
            self._most = max(self._most, self._used)
        return piece

    def give_back(self, piece: Any) -> None:
        """Let a piece lie idle."""
        self._returned.append(piece)

    def release(self) -> None:
        """Give all idle memory back to the system."""
        with self._lock:
            self._collect()
            self._keep(0)

    def _allocate(self, size: int) -> Any:
        self._keep(self._most - self._used - size)
        try:
            return np.empty(size, np.uint8)
        except MemoryError:  # what lies idle may make room
            self._keep(0)
            return np.empty(size, np.uint8)

    def _collect(self) -> None:
        while (piece := _popped(self._returned.popleft)) is not None:
            self._used -= piece.nbytes
            pieces = self._pieces.pop(piece.nbytes, [])
            pieces.append(piece)
            self._pieces[piece.nbytes] = pieces

    def _idle(self) -> int:
        return sum(size * len(pieces) for size, pieces in list(self._pieces.items()))

    def _keep(self, most: int) -> None:
        """Give idle memory back to the system, save so many bytes, what was used last."""
        excess = self._idle() - max(most, 0)
        for size in list(self._pieces):
            pieces = self._pieces.get(size, [])
            while excess > 0 and _popped(pieces.pop) is not None:
                excess -= size
            if not pieces:
                self._pieces.pop(size, None)


def _popped(pop: Callable[[], Any]) -> Any:
    """Return what ``pop`` does, and None of what is empty."""
    try:
        return pop()
    except IndexError:
        return None


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
    if cupy is not None and probe().usable:  # it may be there without a driver
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a new array in C order, whose values are whatever its memory held."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST:
        return np.empty(shape, dtype)
    return np.asarray(_Block(size)).view(dtype).reshape(shape)
