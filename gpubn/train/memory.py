"""How much memory a training takes: its peak, and sizes as people read them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from gpubn.backend import Device

_PROCESS_STATUS = "/proc/self/status"


@dataclass(frozen=True)
class Peak:
    """The most memory that was held at a time.

    Attributes
    ----------
    bytes : int or None
        None where it cannot be known.
    what : str
        What held it; where ``bytes`` is None, why it is not known.
    """

    bytes: int | None
    what: str

    def __str__(self) -> str:
        size = "unknown" if self.bytes is None else human(self.bytes)
        return f"{size} ({self.what})"


class Meter:
    """Keeps the peak of what this process holds for computing on a device.

    On the CPU that is the process's peak resident memory, as the system counts it. On CUDA it is
    what CuPy's memory pool holds of the GPU's memory (``total_bytes``), not what arrays in it use:
    the pool gives nothing back by itself, so that its size between two steps is the peak within
    them, and no other program can have what it holds. What CUDA itself and its libraries take is
    not counted. Both begin with the process: earlier runs in it count.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._peak: int | None = None

    def read(self) -> Peak:
        """Return the peak so far. On CUDA the pool is looked at now; nothing is waited for."""
        now = _process_peak() if self._device.kind == "cpu" else _pool_size(self._device)
        if now.bytes is not None:
            # The pool may have been emptied: by its owner, or where memory had run out.
            self._peak = max(now.bytes, self._peak or 0)
        return now if self._peak is None else Peak(self._peak, now.what)


def human(size: int) -> str:
    """Return a number of bytes in kB (10**3 bytes), MB (10**6) or GB (10**9), with one decimal."""
    for power, unit in ((3, "kB"), (6, "MB")):
        if size < 999.95 * 10**power:  # more would be 1000.0
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 10**9:.1f} GB"


def _pool_size(device: Device) -> Peak:
    with device.scope():
        size = int(device.xp.get_default_memory_pool().total_bytes())
    if size == 0:  # the network's parameters alone would be more
        return Peak(None, f"CuPy was told to allocate on {device.name} without its default pool")
    return Peak(size, f"CuPy's memory pool on {device.name}")


def _process_peak() -> Peak:
    size = _high_water_mark()
    if size is None:
        size = _max_resident()
    if size is None:
        return Peak(None, "this system does not tell a process's peak: it has no getrusage")
    return Peak(size, "resident, this process")


def _high_water_mark() -> int | None:
    """Return VmHWM in bytes, on Linux.

    There ``ru_maxrss`` is no less than what the parent held when it started this process: a run
    that a large program starts would be said to be as large.
    """
    try:
        with open(_PROCESS_STATUS, "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):  # another system, or a /proc of another kind
        pass
    return None


def _max_resident() -> int | None:
    """Return getrusage's ``ru_maxrss`` in bytes; None on Windows, which has no getrusage."""
    if sys.platform == "win32":
        return None
    import resource

    size = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return size if sys.platform == "darwin" else size << 10
