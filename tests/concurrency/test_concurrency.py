"""Threads and processes that use the library at once: the bits of one, and no crash."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gpubn.train import FullyConnectedNet, Solver

EVERY_OP = Path(__file__).parent / "every_op.py"


def layer(name: str, package: str | None = None) -> object:
    missing = package is not None and importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is missing"))


@pytest.mark.parametrize("callers", [2, 8])
@pytest.mark.parametrize("name", [layer("workqueue"), layer("omp"), layer("tbb", "tbb")])
def test_every_op_by_threads_at_once(name: str, callers: int) -> None:
    command = [sys.executable, str(EVERY_OP), "--layer", name, "--callers", str(callers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"beside Numba's {name} layer" in done.stdout
    assert f"{callers} threads finished, 0 results differ" in done.stdout


def train(seed: int) -> str:
    """Train a net and return its hash."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, 400)
    data = {"X_train": rng.standard_normal((400, 30)) + y[:, None], "y_train": y}
    data |= {"X_val": data["X_train"][:50], "y_val": y[:50]}
    net = FullyConnectedNet(
        [64, 48], 30, 4, 0.5, "batchnorm", seed=seed, device="cpu", reproducible=True
    )
    settings = {"num_epochs": 4, "batch_size": 50, "verbose": False, "seed": seed}
    Solver(net, data, update_rule="adam", **settings).train()
    return net.sha256()


def test_two_nets_trained_at_once() -> None:
    expected = [train(0), train(1)]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train(seed)}))
        for seed in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    "method",
    [m for m in ("fork", "forkserver", "spawn") if m in multiprocessing.get_all_start_methods()],
)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 and later
def test_processes_train_as_their_parent_does(method: str) -> None:
    expected = train(0)
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        assert list(pool.map(train, [0, 0])) == [expected] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as Unix has them")
def test_a_fork_while_another_thread_trains() -> None:
    expected = train(0)
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            train(1)

    thread = threading.Thread(target=go_on)
    thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            queue = context.SimpleQueue()
            child = context.Process(target=lambda queue=queue: queue.put(train(0)))
            child.start()
            child.join(120)
            assert child.exitcode == 0
            assert queue.get() == expected
    finally:
        over.set()
        thread.join()
