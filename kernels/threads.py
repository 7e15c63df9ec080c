"""The CPU kernels' threads: Python threads that run compiled code without the GIL.

Numba's own parallel loops are not used: their default layer on Linux does not survive a fork, the
one without dependencies ends the process when two threads enter it at once, and both compile for
seconds. Work is split where the numerics contract allows it, so the number of threads never shows
in a result.

The calling thread begins at once, and takes piece after piece of what is to be done; others take
pieces too as they wake up. So a thread that wakes late, or not at all, costs nothing.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue

WORTH_SPLITTING = (1 << 19) + 1
"""Elements below which waking another thread costs more than it saves.

The half of such an array that another core takes has to move from the first one's cache to its own.
"""

PIECE = 1 << 15
"""Elements of a piece of work, at least."""
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


class _Job:
    """Work that several threads take pieces of.

    Its locks are its own, so that an interrupt in the middle of it cannot stop a later one.
    """

    def __init__(self, run: Callable[[int, int], None], bounds: list[tuple[int, int]]) -> None:
        self.run, self.todo = run, deque(bounds)
        self.running, self.lock = 0, threading.Lock()
        self.idle = threading.Event()
        self.error: BaseException | None = None

    def help(self) -> None:
        """Take pieces until there is none left; in a thread that no interrupt reaches."""
        with self.lock:
            if not self.todo:
                return
            self.running += 1
            self.idle.clear()
        try:
            self.take_pieces(self.todo.pop)
        except BaseException as error:  # goes on in the calling thread
            self.error = error
            self.todo.clear()
        with self.lock:
            self.running -= 1
            if not self.running:
                self.idle.set()

    def take_pieces(self, take: Callable[[], tuple[int, int]]) -> None:
        while self.todo:
            try:
                piece = take()
            except IndexError:  # another thread was faster
                return
            self.run(*piece)

    def finish(self) -> None:
        """Wait until no thread is at work, for the arrays must not change hands before.

        Interrupts wait too, and are raised then.
        """
        interrupt: BaseException | None = None
        while True:
            try:
                self.todo.clear()
                while self.running:
                    self.idle.wait()
                break
            except BaseException as error:
                interrupt = error
        self.run = _nothing  # who comes late finds nothing to do, and keeps no arrays alive
        if interrupt is not None:
            raise interrupt


def _nothing(start: int, stop: int) -> None:
    """Do no work."""


_jobs: SimpleQueue[_Job] = SimpleQueue()
_workers = 0
_starting = threading.Lock()


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


def _start_workers(count: int) -> int:
    """Let there be ``count`` threads that wait for work, and end with the process.

    Returns how many there are: fewer where the system gives no more.
    """
    global _workers
    if _workers < count and _starting.acquire(blocking=False):  # else another caller is at it
        try:
            while _workers < count:
                worker = threading.Thread(target=_work, args=(_jobs,), name="gpubn", daemon=True)
                worker.start()
                _workers += 1
        except (
            RuntimeError
        ):  # "can't start new thread": a limit, or the interpreter is about to end
            pass
        finally:
            _starting.release()
    return min(_workers, count)


def _forget_workers() -> None:
    global _jobs, _workers, _starting
    _jobs, _workers, _starting = SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)  # a child has no threads but its own


def pieces_of(elements: int) -> int:
    """Return in how many pieces work on so many elements is best done: one, or many a thread."""
    threads = get_num_threads()
    if threads == 1 or elements < WORTH_SPLITTING:
        return 1
    return min(_PIECES * threads, max(threads, elements // PIECE))


def split(run: Callable[[int, int], None], count: int, elements: int) -> None:
    """Call ``run(start, stop)`` over ``range(count)``, in several threads where that pays.

    Parameters
    ----------
    run : callable
        Does a piece of the work; pieces must be independent.
    count : int
        How many units of work there are.
    elements : int
        How many array elements they touch in all.
    """
    threads, pieces = get_num_threads(), min(count, pieces_of(elements))
    if pieces < 2:
        run(0, count)
        return
    bounds = [count * piece // pieces for piece in range(pieces + 1)]
    job = _Job(run, list(pairwise(bounds)))
    try:
        for _ in range(_start_workers(min(threads, pieces) - 1)):
            _jobs.put(job)
        # From the other end than the helpers: what a thread took before is in its caches still.
        job.take_pieces(job.todo.popleft)
    finally:
        job.finish()
    if job.error is not None:
        raise job.error
