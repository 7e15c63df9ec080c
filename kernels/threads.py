"""The CPU kernels' threads: a pool of Python threads that run compiled code without the GIL.

Numba's own parallel loops are not used: their default layer on Linux does not survive a fork, the
one without dependencies ends the process when two threads enter it at once, and both compile for
seconds. Work is split where the numerics contract allows it, so the number of threads never shows
in a result.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

WORTH_SPLITTING = 1 << 17
"""Elements below which handing work to another thread costs more than it saves."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
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
    global _threads, _pool
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}, expected a whole number of at least 1")
    with _lock:
        _threads, _pool = count, None  # threads of the old pool end when they have nothing to do


def _get_pool(threads: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="gpubn")
        return _pool


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has no threads but its own


def split(run: Callable[[int, int], None], count: int, elements: int) -> None:
    """Call ``run(start, stop)`` over ``range(count)``, in several threads where that pays.

    Parameters
    ----------
    run : callable
        Does its share of the work; shares must be independent.
    count : int
        How many units of work there are.
    elements : int
        How many array elements they touch in all.
    """
    threads = get_num_threads()
    shares = min(threads, count, 1 + elements // WORTH_SPLITTING)
    if shares < 2:
        run(0, count)
        return
    bounds = [count * share // shares for share in range(shares + 1)]
    pool = _get_pool(threads)
    others = []
    try:
        for i in range(1, shares):
            try:
                others.append(pool.submit(run, bounds[i], bounds[i + 1]))
            except RuntimeError:  # the interpreter is about to end, and starts no more threads
                run(bounds[i], bounds[i + 1])
        run(bounds[0], bounds[1])
    finally:
        # Wait in any case: the arrays must not change hands while a share is still written.
        for other in others:
            other.result()
