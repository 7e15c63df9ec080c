"""Memory of results that is used again: kernels/memory.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from host_cuda import cupy_stand_in

import gpubn
from gpubn.kernels import memory
from gpubn.kernels.memory import LEAST, Pool, empty

LARGE = (LEAST // 4, 3)  # float32


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    pool = Pool()
    monkeypatch.setattr(memory, "pool", pool)
    yield pool
    used, idle, most = pool.counts()
    assert used + idle <= most


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, "bfloat16"])
@pytest.mark.parametrize("shape", [LARGE, (3, 5), (0, 7), (), (64, 1, 1024)])
def test_a_new_array(shape: tuple[int, ...], dtype: object) -> None:
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    array = empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert type(array) is np.ndarray
    assert array.flags.carray
    if array.nbytes >= LEAST:
        assert address(array) % 64 == 0


def test_memory_is_used_again_when_nobody_holds_it(pool: Pool) -> None:
    array = empty(LARGE, np.float32)
    view, place = array[::2, 1].reshape(-1, 1).view(np.int32), address(array)
    del array
    gc.collect()
    other = empty(LARGE, np.float32)
    assert address(other) != place  # the view is still there
    view[:] = 7
    other[:] = 1
    assert (view == 7).all()
    del view
    assert address(empty(LARGE, np.float32)) == place
    assert address(empty(LARGE[::-1], np.uint32)) == place  # the size counts


def test_two_arrays_never_share_memory(pool: Pool) -> None:
    for _ in range(3):
        arrays = [empty(LARGE, np.float32) for _ in range(5)]
        for number, array in enumerate(arrays):
            array[:] = number
        assert all((array == number).all() for number, array in enumerate(arrays))
        del array, arrays
    size = 5 * (4 * LARGE[0] * LARGE[1] + 64)
    assert pool.counts() == (0, size, size)


def test_a_process_is_never_larger_than_it_was(pool: Pool) -> None:
    for size in (*range(100, 120), *range(130, 90, -1)):
        array = empty((size, 1024), np.float32)
        used, idle, most = pool.counts()
        assert used + idle <= most
        del array
    assert pool.counts()[2] == 130 * 4096 + 64


def test_what_has_lain_idle_longest_goes_first(pool: Pool) -> None:
    sizes = (100, 110, 120)
    arrays = [empty((size, 1024), np.float32) for size in sizes]
    place = address(arrays[0])
    while arrays:
        arrays.pop()  # the largest first
    assert address(empty((100, 1024), np.float32)) == place
    assert pool.counts()[1] == 330 * 4096 + 3 * 64
    empty((50, 1024), np.float32)
    pool.counts()
    assert sorted(pool._pieces) == [50 * 4096 + 64, 100 * 4096 + 64, 110 * 4096 + 64]


def test_release(pool: Pool) -> None:
    held = empty(LARGE, np.float32)
    del held
    assert pool.counts()[1]
    gpubn.release_memory()
    assert (pool.counts()[:2], pool._pieces) == ((0, 0), {})


def test_release_beside_a_cupy_without_a_gpu() -> None:
    code = "import gpubn, cupy; gpubn.release_memory()"
    pytest.importorskip("cupy", exc_type=ImportError)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("two_devices")
def test_release_on_both_devices(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = cupy_stand_in.memory_pool, cupy_stand_in.pinned_memory_pool
    for each in pools:
        monkeypatch.setattr(each, "released", False)
    gpubn.release_memory()
    assert all(each.released for each in pools)


def test_threads(pool: Pool) -> None:
    wrong = []

    def use(number: int) -> None:
        for i in range(300):
            array = empty((LEAST // 8 + i % 3, 2), np.float32)
            array[:] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.counts()[0] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_is_at_it() -> None:
    code = """
import os, sys, threading
from gpubn.kernels.memory import empty, pool
held, go = threading.Event(), threading.Event()
def hold():
    with pool._lock:
        held.set()
        go.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    empty((1 << 20,), "float32")[:] = 1
    os._exit(7)
go.set()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_no_memory_left(pool: Pool) -> None:
    with pytest.raises(MemoryError):
        empty((1 << 60,), np.uint8)
    assert pool.counts() == (0, 0, 0)


def test_room_is_made_where_there_is_no_memory(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    empty(LARGE, np.float32)
    pool.counts()
    real = np.empty

    def full(size: int, dtype: object) -> object:
        if pool._idle():
            raise MemoryError
        return real(size, dtype)

    pool._most = 1 << 40  # nothing would be given back for another reason
    monkeypatch.setattr(np, "empty", full)
    assert empty((LEAST,), np.uint16).nbytes == 2 * LEAST


def test_the_garbage_collector_in_the_middle(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may give pieces back at any moment."""
    lists = [empty(LARGE, np.float32) for _ in range(20)]

    class Pieces(dict[int, list[object]]):
        def pop(self, *arguments: object) -> object:
            if lists:
                lists.pop()
            return super().pop(*arguments)

    pool._pieces = Pieces()
    for _ in range(30):
        size = empty(LARGE, np.float32).nbytes + 64
    used, idle, _ = pool.counts()
    assert used == 0
    assert sum(map(len, pool._pieces.values())) * size == idle


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
@pytest.mark.parametrize("handler", ["interrupt", "release_memory", "empty"])
def test_signals_in_the_middle(handler: str) -> None:
    """Interrupts, and handlers that use the pool themselves, at any moment."""
    code = f"""
import signal
import gpubn
from gpubn.kernels.memory import empty, pool
def handle(*_):
    if {handler!r} == "interrupt":
        raise KeyboardInterrupt
    if {handler!r} == "empty":
        empty((1 << 18,), "float32")
    else:
        gpubn.release_memory()
signal.signal(signal.SIGALRM, handle)
sizes, caught = [1 << 18, 1 << 19, 3 << 18], 0
for i in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + i % 97))
        for _ in range(30):
            held = [empty((size,), "uint8") for size in sizes]
            del held
    except KeyboardInterrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
held = None
gpubn.release_memory()
assert pool.counts()[1] == 0
empty((1 << 20,), "float32")[:] = 1
print("caught", caught)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout.split()[1]) > 100) == (handler == "interrupt")
