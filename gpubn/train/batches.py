"""Where the samples of a training lie, and how a batch of them comes to its network.

On CUDA a data set that takes at most a quarter of the device's free memory is put there once, and
batches are cut out there. A larger training set stays on the host: two batches have room on the
device, and the next one is copied there, from pinned memory and on a stream of its own, while a
step computes with the other. On the CPU batches are cut out of the arrays as they are.

Whichever way it came, a batch has the same bits: floats are cast to the network's dtype on the
host, integers on the device.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubn import backend
from gpubn.backend import Array, Device
from gpubn.train.memory import human

Indices = NDArray[np.int64]

_QUARTER = 4  # A data set may take this part of the free memory: a step needs the rest.
_BLOCK = 16 << 20  # bytes that are cast on the host, and copied, at a time


def pick(array: Array, chosen: Indices) -> Array:
    """Return the chosen samples, where the array is; the indices go to its device."""
    if not backend.is_cuda(array):
        return array[chosen]
    with backend.scope_of(array):
        return array[backend.namespace(array).asarray(chosen)]


class Batches:
    """Batches cut out where the samples are.

    Attributes
    ----------
    X, y : array (N, d1, ...), integer array (N,)
        The samples.
    foresees : bool
        Whether it is of use to tell ``step_launched`` which batch comes next.
    """

    foresees = False

    def __init__(self, X: Array, y: Array) -> None:
        self.X, self.y = X, y

    def take(self, chosen: Indices) -> tuple[Array, Array]:
        """Return the batch of these samples, for one step; later steps may overwrite it."""
        if backend.is_cuda(self.X) and backend.place(self.X) == backend.place(self.y):
            with backend.scope_of(self.X):  # the indices are copied once for both
                chosen = backend.namespace(self.X).asarray(chosen)
        return pick(self.X, chosen), pick(self.y, chosen)

    def step_launched(self, upcoming: Indices | None) -> None:
        """Hear that all of the step on the last batch is launched, and what will come next.

        ``upcoming`` is a guess: ``take`` has the last word.
        """

    def settle(self) -> None:
        """Wait until no copy is under way any more."""


class _Slot:
    """Room for a batch of samples and labels, on the host in pinned memory and on the device.

    Attributes
    ----------
    chosen : int64 array or None
        The samples whose copies were sent here and are not used up.
    copied, used : cupy.cuda.Event
        The last copy to the device has ended; all that was to read the room on the device has.
    """

    def __init__(self, xp: ModuleType, specs: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self.host = [_pinned(xp, *spec) for spec in specs]
        self.device = [xp.empty(*spec) for spec in specs]
        self.copied, self.used = (xp.cuda.Event(disable_timing=True) for _ in range(2))
        # Its memory may come from an array that kernels still read, earlier on this stream.
        xp.cuda.get_current_stream().record(self.used)
        self.chosen: Indices | None = None


class Streamed(Batches):
    """Batches copied from the host, each while the step on the one before it runs.

    No call waits for the device, except that before a third batch is prepared the first one's copy
    must have ended: the host is never more than two steps ahead.

    Parameters
    ----------
    X, y : ndarray (N, d1, ...), integer ndarray (N,)
        Read-only, memory-mapped and not contiguous ones too: only batches are copied. What is
        changed in them after a step may be seen a step late.
    batch_size : int
        Of every batch.
    dtype : dtype
        Of the network.
    device : Device
        CUDA's.
    """

    foresees = True

    def __init__(
        self, X: Array, y: Array, batch_size: int, dtype: np.dtype[Any], device: Device
    ) -> None:
        super().__init__(X, y)
        self._device = device
        specs = [
            ((batch_size, *X.shape[1:]), _stored_dtype(X, dtype)),
            ((batch_size,), np.dtype(np.int64)),
        ]
        with device.scope():
            # Not CUDA's default kind, which waits for the kernels of the default stream.
            self._stream = device.xp.cuda.Stream(non_blocking=True)
            self._slots = [_Slot(device.xp, specs) for _ in range(2)]
        self._turn = 0  # the slot of the batch in use, or next to be used

    def take(self, chosen: Indices) -> tuple[Array, Array]:
        """Return the batch of these samples, whose copy the current stream waits for."""
        slot = self._slots[self._turn]
        with self._device.scope():
            current = self._device.xp.cuda.get_current_stream()
            if slot.chosen is None or not np.array_equal(slot.chosen, chosen):
                current.record(slot.used)  # a step that failed may still read it
                self._send(slot, chosen)
            current.wait_event(slot.copied)
        return slot.device[0], slot.device[1]

    def step_launched(self, upcoming: Indices | None) -> None:
        """Let go of the last batch once the current stream is done with it; send the next."""
        slot = self._slots[self._turn]
        with self._device.scope():
            self._device.xp.cuda.get_current_stream().record(slot.used)
            slot.chosen = None
            self._turn = 1 - self._turn
            if upcoming is not None:
                self._send(self._slots[self._turn], upcoming)

    def _send(self, slot: _Slot, chosen: Indices) -> None:
        slot.chosen = None
        slot.copied.synchronize()  # the last copy out of this pinned memory: two batches ago
        for pinned, samples in zip(slot.host, (self.X, self.y), strict=True):
            np.copyto(pinned, samples[chosen], casting="unsafe")
        self._stream.wait_event(slot.used)
        for there, pinned in zip(slot.device, slot.host, strict=True):
            there.set(pinned, self._stream)
        self._stream.record(slot.copied)
        slot.chosen = chosen

    def settle(self) -> None:
        """Wait until no copy is under way any more; steps may be."""
        with self._device.scope():
            self._stream.synchronize()

    def __del__(self) -> None:
        # Pinned and device memory go back to their pools: no copy may still be using them.
        with contextlib.suppress(Exception):  # never made whole, or the interpreter is ending
            self.settle()


@dataclass(frozen=True)
class Prepared:
    """What a training works with.

    Attributes
    ----------
    batches : Batches
        Of the training set.
    X_val, y_val : array
        The validation set.
    placement : str
        Where batches come from and why, in one line; empty where nothing was decided: on the CPU,
        and for samples that came on the device.
    """

    batches: Batches
    X_val: Array
    y_val: Array
    placement: str


def prepare(
    train: tuple[Array, Array],
    val: tuple[Array, Array],
    batch_size: int,
    dtype: np.dtype[Any],
    device: Device,
) -> Prepared:
    """Decide where samples lie, and put them there: first the training set, then the other.

    Parameters
    ----------
    train, val : (array (N, d1, ...), integer array (N,))
        Checked ones. NumPy arrays are not kept where they are copied to the device.
    batch_size : int
    dtype : dtype
        Of the network.
    device : Device
        The network's.
    """
    if device.kind == "cpu":
        return Prepared(Batches(*train), *val, "")
    X, y, why = _place(*train, dtype, device)
    X_val, y_val, _ = _place(*val, dtype, device)
    if backend.is_cuda(X):
        batches, source = Batches(X, y), f"from {device.name}"
    else:
        batches = Streamed(X, y, batch_size, dtype, device)
        source = "from the host, each copied while the step before it runs"
    placement = f"{source}: the training set {why}"
    if not backend.is_cuda(X_val):
        placement += "; the validation set stays on the host"
    return Prepared(batches, X_val, y_val, placement if why else "")


def free_memory(device: Device) -> int:
    """Return how many bytes arrays may still take on a CUDA device.

    They are free there, or held by CuPy's pool without being used. Where the pool was given a
    limit, CUPY_GPU_MEMORY_LIMIT say, there are no more than that leaves.
    """
    with device.scope():
        pool = device.xp.get_default_memory_pool()
        free = int(device.xp.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())
        limit = int(pool.get_limit())  # 0: none
        return min(free, limit - int(pool.used_bytes())) if limit else free


def _place(X: Array, y: Array, dtype: np.dtype[Any], device: Device) -> tuple[Array, Array, str]:
    """Return samples on the device, or on the host where they are too many; and why."""
    if backend.is_cuda(X):
        return X, device.asarray(y, np.int64), ""
    stored = _stored_dtype(X, dtype)
    size, free = X.size * stored.itemsize + 8 * len(y), free_memory(device)
    fits = size * _QUARTER <= free
    why = (
        f"takes {human(size)}, {'at most' if fits else 'more than'} a quarter of the "
        f"{human(free)} free on {device.name}"
    )
    if not fits:
        return X, backend.to_host(y), why
    return _upload(X, stored, device), device.asarray(y, np.int64), why


def _stored_dtype(X: Array, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which samples come to the device.

    Floats come in the network's: CuPy's cast to float32 makes subnormals zero, NumPy's does not.
    Integers come as they are, in the machine's order of bytes: bytes are a quarter of float32.
    """
    stored: np.dtype[Any] = dtype if X.dtype.kind == "f" else X.dtype.newbyteorder("=")
    return stored


def _upload(X: NDArray[Any], dtype: np.dtype[Any], device: Device) -> Array:
    """Copy samples to the device, block by block: a cast of all would need as much again."""
    rows = max(1, _BLOCK // max(1, math.prod(X.shape[1:]) * dtype.itemsize))
    with device.scope():
        there = device.xp.empty(X.shape, dtype)
        for start in range(0, len(X), rows):
            # Cast here, not on the device: see `_stored_dtype`.
            block = np.ascontiguousarray(X[start : start + rows], dtype)
            there[start : start + rows] = device.xp.asarray(block)
    return there


def _pinned(xp: ModuleType, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a NumPy array in memory that the device can read while the host does other things."""
    memory = xp.cuda.alloc_pinned_memory(math.prod(shape) * dtype.itemsize)
    return np.ndarray(shape, dtype, buffer=memory)
