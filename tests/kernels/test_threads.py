"""Work in pieces, for several threads: kernels/threads.py and threads_numba.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpubn.kernels import threads, threads_numba
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.threads import get_num_threads, set_num_threads
from gpubn.kernels.threads_numba import _add, _give_way, _read, split

MANY = 10**9
"""Elements that are worth any number of pieces."""


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "WORTH_SPLITTING", 1)
    monkeypatch.setattr(threads, "PIECE", 1)
    before = get_num_threads()
    set_num_threads(4)
    yield
    set_num_threads(before)


@compiled
def count(done: Any, first: int, last: int) -> None:
    for i in range(first, last):
        done[i] += 1


@compiled
def note_piece(pieces: Any, first: int, last: int) -> None:
    pieces[first] = last


@compiled
def meet(arrived: int, patience: int, met: Any, first: int, last: int) -> None:
    """Wait until as many threads as there are units are here at once."""
    _add(arrived, 0, 1)
    while patience and _read(arrived, 0) < met.shape[0]:
        _give_way()
        patience -= 1
    met[first] = patience > 0


@compiled
def see(present: int, crowds: Any, first: int, last: int) -> None:
    """Write how many threads were here at once, at the most."""
    for i in range(first, last):
        most = _add(present, 0, 1) + 1
        for _ in range(300):
            most = max(most, _read(present, 0))
            _give_way()
        _add(present, 0, -1)
        crowds[i] = most


@compiled
def need_memory(done: Any, greedy: int, size: int, first: int, last: int) -> None:
    for i in range(first, last):
        room = np.empty(size if i == greedy else 1, np.float64)
        room[0] = i
        done[i] = room[0]


def everyone_comes() -> bool:
    arrived, met = np.zeros(1, np.int64), np.zeros(4, np.bool_)
    split(meet, (arrived.ctypes.data, 20_000_000, met), 4, MANY)
    return bool(met.all())


@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 31, 32, 33, 1000])
@pytest.mark.parametrize("elements", [1, 10**5, MANY])
def test_every_unit_is_done_once(units: int, elements: int) -> None:
    done = np.zeros(units, np.int64)
    for _ in range(100):
        split(count, (done,), units, elements)
    assert (done == 100).all()


def test_several_threads_work_at_once() -> None:
    assert everyone_comes()


def test_helpers_that_sleep_wake_up() -> None:
    for pause in (0.0, 0.0001, 0.001, 0.05):
        assert everyone_comes()
        time.sleep(pause)
        assert everyone_comes()


def test_helpers_without_work_sleep() -> None:
    assert everyone_comes()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # three that look all the time take 0.3 on one core


def test_small_work_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_SPLITTING", 1000)
    monkeypatch.setattr(threads, "PIECE", 250)
    pieces = np.zeros(10, np.int64)
    split(note_piece, (pieces,), 10, 999)
    assert pieces.tolist() == [10] + [0] * 9
    split(note_piece, (pieces,), 10, 1000)
    assert pieces.tolist() == [2, 0, 5, 0, 0, 7, 0, 10, 0, 0]


@pytest.mark.parametrize(
    "greedy", [0, 3]
)  # the piece that the caller takes first, a helper's first
def test_no_memory_is_an_error_and_the_next_work_is_done(greedy: int) -> None:
    done = np.zeros(4)
    with pytest.raises(MemoryError, match="no memory for its buffers"):
        split(need_memory, (done, greedy, 1 << 58), 4, MANY)
    split(need_memory, (done, -1, 1), 4, MANY)
    assert done.tolist() == [0, 1, 2, 3]


def test_no_memory_in_one_thread() -> None:
    set_num_threads(1)
    with pytest.raises(MemoryError, match="no memory for its buffers"):
        split(need_memory, (np.zeros(4), 2, 1 << 58), 4, MANY)


def test_several_callers() -> None:
    wrong = []

    def call() -> None:
        done = np.zeros(100, np.int64)
        for turn in range(2000):
            split(count, (done,), 100, MANY)
            if (done != turn + 1).any():
                wrong.append(turn)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_fewer_threads_than_before() -> None:
    assert everyone_comes()
    set_num_threads(2)
    present, crowds = np.zeros(1, np.int64), np.zeros(16, np.int64)
    split(see, (present.ctypes.data, crowds), 16, MANY)
    assert crowds.max() == 2


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads_numba, "_crew", threads_numba._Crew())
    monkeypatch.setattr(threading.Thread, "start", start)
    done = np.zeros(100, np.int64)
    split(count, (done,), 100, MANY)
    assert (done == 1).all()


def test_more_threads_than_a_crew_has() -> None:
    set_num_threads(10_000)
    done = np.zeros(100, np.int64)
    split(count, (done,), 100, MANY)
    assert (done == 1).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_threads_of_its_own() -> None:
    assert everyone_comes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if everyone_comes() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_others_work() -> None:
    """The child finds a crew of its own, whatever the parent's was doing."""
    stop = threading.Event()

    def work() -> None:
        done = np.zeros(1000, np.int64)
        while not stop.is_set():
            split(count, (done,), 1000, MANY)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = 0 if everyone_comes() else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        worker.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_right_after_the_first_threads(tmp_path: Path) -> None:
    """A helper that compiled itself held the compiler's lock, which the child had no owner of."""
    code = """
import os
import numpy as np
from gpubn.kernels import threads
from gpubn.kernels.relu_numba import forward
threads.set_num_threads(2)
forward(np.ones(1 << 20, np.float32))
child = os.fork()
if child == 0:
    forward(np.ones(1 << 20, np.float64))
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},  # where nothing is compiled yet
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
def test_interrupts_leave_nothing_behind() -> None:
    """After many of them, at any moment, work goes on, and gives what it gave before."""
    code = """
import signal
import numpy as np
from gpubn.kernels import threads
from gpubn.layers import batchnorm_forward, batchnorm_backward
threads.WORTH_SPLITTING = threads.PIECE = 1
threads.set_num_threads(4)
x = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
g = np.ones(40, np.float32)
def step():
    out, cache = batchnorm_forward(x, g, g, {"mode": "train"})
    return out, batchnorm_backward(x, cache)[0]
expected = step()
signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupted = 0
for i in range(400):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 60))
        while True:
            step()
    except KeyboardInterrupt:
        interrupted += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert all((a == b).all() for a, b in zip(step(), expected))
print("interrupted", interrupted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 300
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_process_ends_while_helpers_sleep_or_look() -> None:
    code = """
import numpy as np, sys, time
from gpubn.kernels import threads
from gpubn.layers import relu_forward
threads.WORTH_SPLITTING = threads.PIECE = 1
threads.set_num_threads(4)
relu_forward(np.ones(100_000, np.float32))
time.sleep(float(sys.argv[1]))
"""
    for pause in ("0", "0.1"):
        command = [sys.executable, "-c", code, pause]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2", None])
def test_bad_counts(count: object) -> None:
    with pytest.raises(ValueError, match="count is"):
        set_num_threads(count)  # type: ignore[arg-type]
