"""Work in pieces, for several threads: kernels/threads.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from gpubn.kernels import threads
from gpubn.kernels.threads import get_num_threads, set_num_threads, split


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "WORTH_SPLITTING", 1)
    before = get_num_threads()
    set_num_threads(4)
    yield
    set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 31, 32, 33, 1000])
@pytest.mark.parametrize("elements", [1, 10**5, 10**9])
def test_every_unit_is_done_once(count: int, elements: int) -> None:
    done: list[int] = []
    split(lambda a, b: done.extend(range(a, b)), count, elements)
    assert sorted(done) == list(range(count))


def test_several_threads_work_at_once() -> None:
    barrier = threading.Barrier(4, timeout=60)
    split(lambda a, b: barrier.wait() and None, 4, 10**9)


def test_small_work_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_SPLITTING", 1000)
    pieces: list[tuple[int, int]] = []
    split(lambda a, b: pieces.append((a, b)), 10, 999)
    assert pieces == [(0, 10)]


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_comes_out_when_all_are_done(where: str) -> None:
    caller, running, begun = threading.get_ident(), set(), threading.Barrier(4, timeout=60)

    def run(a: int, b: int) -> None:
        running.add(a)
        begun.wait()
        mine = (threading.get_ident() == caller) == (where == "caller")
        time.sleep(0 if mine else 0.2)
        running.remove(a)
        if mine:
            raise ZeroDivisionError(a)

    with pytest.raises(ZeroDivisionError):
        split(run, 4, 10**9)
    assert not running
    done: list[int] = []
    split(lambda a, b: done.append(a), 4, 10**9)  # and the next one works
    assert len(done) == 4


def test_several_callers() -> None:
    wrong = []

    def call() -> None:
        for _ in range(50):
            done: list[int] = []
            split(lambda a, b, done=done: done.extend(range(a, b)), 100, 10**9)
            if sorted(done) != list(range(100)):
                wrong.append(done)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_piece_may_be_split_again() -> None:
    done: list[int] = []
    split(lambda a, b: split(lambda c, d: done.extend(range(c, d)), 10, 10**9), 8, 10**9)
    assert len(done) == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_threads_of_its_own() -> None:
    split(lambda a, b: None, 4, 10**9)
    child = os.fork()
    if child == 0:
        barrier = threading.Barrier(4, timeout=60)
        try:
            split(lambda a, b: barrier.wait() and None, 4, 10**9)
        finally:
            os._exit(0 if barrier.n_waiting == 0 and not barrier.broken else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
def test_interrupts_leave_nothing_behind() -> None:
    """After many of them, at any moment, work goes on; none returns before its pieces are done."""
    code = """
import signal, sys, threading, time
import numpy as np
from gpubn.kernels import threads
from gpubn.layers import batchnorm_forward, batchnorm_backward
threads.WORTH_SPLITTING = 1
threads.set_num_threads(4)
x = np.ones((300, 40), np.float32)
g = np.ones(40, np.float32)
def step():
    out, cache = batchnorm_forward(x, g, g, {"mode": "train"})
    batchnorm_backward(x, cache)
step()
signal.signal(signal.SIGALRM, signal.default_int_handler)
running = set()
def run(a, b):
    if threading.current_thread() is not threading.main_thread():
        running.add(a)
        time.sleep(0.0002)
        running.remove(a)
interrupted = 0
for i in range(400):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 60))
        while True:
            step()
            threads.split(run, 8, 10**9)
    except KeyboardInterrupt:
        interrupted += 1
        assert not running
signal.setitimer(signal.ITIMER_REAL, 0)
step()
print("interrupted", interrupted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 300
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2", None])
def test_bad_counts(count: object) -> None:
    with pytest.raises(ValueError, match="count is"):
        set_num_threads(count)  # type: ignore[arg-type]
