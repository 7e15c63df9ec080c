"""Subnormal numbers count, also where another library has set the processor to flush them."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpubn.kernels import threads
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.subnormals_numba import change_flushing, restore
from gpubn.kernels.threads_numba import _Crew, split
from gpubn.layers import batchnorm_backward, batchnorm_forward, relu_forward
from gpubn.train import FullyConnectedNet

TINY = np.arange(1, 4001, dtype=np.int32).view(np.float32).reshape(400, 10)  # all subnormal


def bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.int32)  # in floats a thread that flushes sees none of them


@compiled
def flush() -> None:
    change_flushing(True)


@compiled
def twice(x, out, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        out[i] = x[i] + x[i]


@pytest.fixture
def flushing() -> Iterator[None]:
    twice(TINY[0], np.empty(10, np.float32), 0, 10)  # compiled before
    flush()
    yield
    restore()


def test_a_thread_that_flushes_is_set_back_with_a_warning(flushing: None) -> None:
    out = np.empty(10, np.float32)
    twice(TINY[0], out, 0, 10)
    assert not bits(out).any()  # without gpubn they are lost
    with pytest.warns(RuntimeWarning, match="subnormal numbers") as seen:
        out, _ = relu_forward(TINY)
    assert (bits(out) == bits(TINY)).all()
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once: the thread no longer flushes
        relu_forward(TINY)


def test_the_bits_are_those_of_a_thread_that_does_not_flush() -> None:
    gamma = TINY[0] + 1
    with np.errstate(all="ignore"):
        results = []
        for set_mode in (restore, flush):
            set_mode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out, cache = batchnorm_forward(
                    TINY, gamma, TINY[0], {"mode": "train", "eps": 1e-37}
                )
                results.append((out, *batchnorm_backward(TINY, cache)))
    for expected, got in zip(*results, strict=True):
        assert (bits(got) == bits(expected)).all()


def test_helpers_that_such_a_thread_begins_do_not_flush(
    flushing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpubn.kernels.threads_numba._crew", _Crew())  # new helpers
    monkeypatch.setattr(threads, "WORTH_SPLITTING", 1)
    monkeypatch.setattr(threads, "PIECE", 1)
    before = threads.get_num_threads()
    threads.set_num_threads(4)
    x = np.tile(TINY.reshape(-1), 500)
    out = np.empty_like(x)
    try:
        for _ in range(100):
            split(twice, (x, out), x.size, x.size)
            if bits(out).any():  # the calling thread's pieces are zero: the others' are not
                return
    finally:
        threads.set_num_threads(before)
    pytest.fail("every piece was flushed, a helper's too, or no helper came")


def test_training_says_so_too(flushing: None) -> None:
    net = FullyConnectedNet([5], 4, 3, seed=0, device="cpu")
    X, y = np.ones((2, 4), np.float32), np.zeros(2, np.int64)
    flush()
    with pytest.warns(RuntimeWarning, match="subnormal numbers"):
        net.loss(X, y)
