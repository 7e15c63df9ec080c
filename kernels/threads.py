"""How many threads the CPU kernels use, and in how many pieces they take their work."""

import os

WORTH_SPLITTING = 1 << 17
"""Elements below which another thread costs more than it saves.

The half of such an array that another core takes has to move from the first one's cache to its own,
and a helper that sleeps wakes up when most of the work is done.
"""

PIECE = 1 << 13
"""Elements of a piece of work, at least: a thread more is not woken for less."""
_PIECES = 8  # of a thread, at most: they even out the threads' speeds

_threads: int | None = None


def _default() -> int:
    counts = []
    for name in ("GPUBN_NUM_THREADS", "NUMBA_NUM_THREADS"):  # Numba itself fails on a bad second
        value = os.environ.get(name)
        if value:
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
            counts.append(int(value))
    if counts:
        return counts[0]
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def get_num_threads() -> int:
    """Return how many threads a CPU kernel may use."""
    global _threads
    if _threads is None:
        _threads = _default()
    return _threads


def set_num_threads(count: int) -> None:
    """Let CPU kernels use ``count`` threads. Speed may change; bits do not.

    The default is ``GPUBN_NUM_THREADS``, else ``NUMBA_NUM_THREADS``, else the process's CPUs.
    """
    global _threads
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}, expected a whole number of at least 1")
    _threads = count


def pieces_of(elements: int) -> int:
    """Return in how many pieces work on so many elements is best done: one, or many a thread."""
    threads = get_num_threads()
    if threads == 1 or elements < WORTH_SPLITTING:
        return 1
    return max(1, min(_PIECES * threads, elements // PIECE))
