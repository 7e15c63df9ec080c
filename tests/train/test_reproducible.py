"""A whole training run gives the same weights, to the bit, wherever and however it is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import host_cuda

import gpubn
from gpubn import backend, cli
from gpubn.kernels import gemm_numba
from gpubn.kernels.threads import get_num_threads, set_num_threads
from gpubn.nn import files
from gpubn.train import checkpoint
from gpubn.train import run as runs
from gpubn.train.config import RunConfig

README = Path(__file__).parents[2] / "README.md"
SMALL = RunConfig(hidden=(24, 16), batch_size=120, epochs=2, device="cpu", reproducible=True)
# Between them: every layer, every update rule, the L2 penalty, both dtypes.
CONFIGS: dict[str, dict[str, Any]] = {
    "batchnorm-dropout-adam": {},
    "layernorm-momentum": {"normalization": "layernorm", "update_rule": "sgd_momentum"},
    "batchnorm-float64-adamw": {"dtype": "float64", "update_rule": "adamw", "reg": 1e-3},
    "none-rmsprop": {"normalization": "none", "update_rule": "rmsprop", "reg": 1e-3},
    "layernorm-float64-sgd": {
        "normalization": "layernorm",
        "update_rule": "sgd",
        "dtype": "float64",
    },
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> RunConfig:
    return dataclasses.replace(SMALL, learning_rate=0.02, **CONFIGS[request.param])


first_two = pytest.mark.parametrize("config", list(CONFIGS)[:2], indirect=True)


def other_device(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[Any]:
    """What makes ``cuda`` a device: the stand-in, or with ``--device cuda`` nothing."""
    real = "cuda" in (request.config.getoption("device") or [])
    return contextlib.nullcontext() if real else host_cuda()


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager[Any]:
    return other_device(request)


def test_cpu_and_cuda_end_with_the_same_weights(
    config: RunConfig, cuda: Any, tmp_path: Path
) -> None:
    there = runs.start(config, tmp_path / "cpu").net.sha256()
    with cuda:
        run = runs.start(dataclasses.replace(config, device="cuda"), tmp_path / "cuda")
        assert run.net.device.kind == "cuda"
        assert run.net.sha256() == there
        assert run.test is not None
        assert run.test.sha256 == there


def test_threads_do_not_show(config: RunConfig, tmp_path: Path) -> None:
    # Large enough that the products are split between threads.
    config = dataclasses.replace(config, hidden=(256, 128), batch_size=200, epochs=1)
    before, hashes = get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            set_num_threads(threads)
            hashes.add(runs.start(config, tmp_path / str(threads)).net.sha256())
    finally:
        set_num_threads(before)
    assert len(hashes) == 1


class Killed(BaseException):
    """Ends a run where no code of its own could catch it."""


class KillIn(runs.Watcher):
    """Kills a run in an epoch after its first checkpoint."""

    def iteration(self, run: runs.Run) -> None:
        if run.solver.epoch == 1 and run.solver.iteration % run.solver.iterations_per_epoch == 5:
            raise Killed


@first_two
@pytest.mark.parametrize("begun_on", ["cpu", "cuda"])
def test_killed_on_one_device_and_finished_on_the_other(
    begun_on: str, config: RunConfig, cuda: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, device=begun_on)
    finished_on = {"cpu": "cuda", "cuda": "cpu"}[begun_on]
    with cuda:
        whole = runs.start(config, tmp_path / "whole").net.sha256()
        with pytest.raises(Killed):
            runs.start(config, tmp_path / "killed", watcher=KillIn())
        run = runs.resume(tmp_path / "killed", device=finished_on)
        assert run.net.device.kind == finished_on
        assert run.net.sha256() == whole


def train(folder: Path, *flags: str, **environment: str) -> str:
    """Run the command in a process of its own; return the hash that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "gpubn", "train", "--out", str(folder), *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"^weights SHA-256 ([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    return str(found)


def test_the_hash_in_the_readme(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    (flags,) = re.findall(r"^gpubn train (--reproducible .*)$", text, re.MULTILINE)
    (expected,) = re.findall(r"^weights SHA-256 ([0-9a-f]{64})$", text, re.MULTILINE)
    assert train(tmp_path / "run", *flags.split(), "--device", "cpu") == expected


def test_instruction_sets_do_not_show(tmp_path: Path) -> None:
    """Code for any x86-64 processor has no fused multiply-add, and narrow vectors."""
    flags = ("--reproducible", "--device", "cpu", "--hidden", "40", "--epochs", "1")
    # A cache of their own: Numba's index is one for all processors.
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    generic = train(tmp_path / "generic", *flags, NUMBA_CPU_NAME="generic", **cache)
    assert generic == train(tmp_path / "host", *flags)


# --- How it is asked for --------------------------------------------------------------------------


def test_products_are_the_devices_blas_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where K is small a BLAS may happen to give the same bits: so what is called is looked at.
    matmul, calls = gemm_numba.matmul, []
    monkeypatch.setattr(gemm_numba, "matmul", lambda a, b: calls.append(1) or matmul(a, b))

    def products(**arguments: Any) -> int:
        """Return how many of our products a training step of two layers computes.

        Of five: two forward, three backward, for the network asks for no gradient of its input.
        """
        net = gpubn.FullyConnectedNet([2], 4, 3, seed=0, device="cpu", **arguments)
        calls.clear()
        net.loss(np.ones((5, 4), np.float32), np.zeros(5, np.int64))
        return len(calls)

    monkeypatch.delenv("GPUBN_REPRODUCIBLE", raising=False)
    assert (products(), products(reproducible=True)) == (0, 5)
    for value, expected in (("1", 5), ("true", 5), ("0", 0), ("", 0)):
        monkeypatch.setenv("GPUBN_REPRODUCIBLE", value)
        assert products() == expected
        assert products(reproducible=False) == 0
    monkeypatch.setenv("GPUBN_REPRODUCIBLE", "maybe")
    with pytest.raises(ValueError, match="GPUBN_REPRODUCIBLE is 'maybe', expected 1 or 0"):
        products()


def test_a_seed_is_asked_for() -> None:
    with pytest.raises(ValueError, match="seed is None, expected a number where the network"):
        gpubn.FullyConnectedNet([3], reproducible=True)
    with pytest.raises(TypeError, match="reproducible is 'yes', expected True or False"):
        gpubn.FullyConnectedNet([3], seed=0, reproducible="yes")


class Foreign:
    def __init__(self) -> None:
        self.params = {"W": np.zeros((4, 3))}

    def loss(self, X: Any, y: Any = None) -> Any:
        return X @ self.params["W"]


def test_a_solver_sets_its_network(rng: np.random.Generator, capsys: Any) -> None:
    X, y = rng.standard_normal((40, 4)).astype(np.float32), rng.integers(0, 3, 40)
    data = {"X_train": X, "y_train": y, "X_val": X, "y_val": y}
    net = gpubn.FullyConnectedNet([5], 4, 3, seed=0, device="cpu", reproducible=False)
    solver = gpubn.Solver(net, data, num_epochs=1, batch_size=10, seed=0, reproducible=True)
    assert net.reproducible
    solver.train()
    assert f"weights SHA-256 {net.sha256()}\n" in capsys.readouterr().out
    gpubn.Solver(net, data, seed=0)
    assert net.reproducible
    gpubn.Solver(net, data, reproducible=False)
    assert not net.reproducible

    with pytest.raises(ValueError, match=r"^seed is None"):
        gpubn.Solver(net, data, reproducible=True)
    unseeded = gpubn.FullyConnectedNet([5], 4, 3, device="cpu")
    with pytest.raises(ValueError, match=r"^the network's seed is None"):
        gpubn.Solver(unseeded, data, seed=0, reproducible=True)
    assert (net.reproducible, unseeded.reproducible) == (False, False)
    with pytest.raises(ValueError, match="expected None for a Foreign"):
        gpubn.Solver(Foreign(), data, seed=0, reproducible=True)


def test_seeds_are_asked_for_however_it_came_about(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = rng.standard_normal((40, 4)).astype(np.float32), rng.integers(0, 3, 40)
    data = {"X_train": X, "y_train": y, "X_val": X, "y_val": y}
    monkeypatch.setenv("GPUBN_REPRODUCIBLE", "1")
    with pytest.raises(ValueError, match="seed is None"):
        gpubn.FullyConnectedNet([5], 4, 3, device="cpu")
    net = gpubn.FullyConnectedNet([5], 4, 3, device="cpu", seed=0)
    with pytest.raises(ValueError, match="seed is None"):
        gpubn.Solver(net, data)


def test_what_was_saved_before_there_were_reproducible_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(SMALL, reproducible=False, epochs=1)
    runs.start(config, tmp_path)
    # As an earlier version wrote it: nothing says reproducible.
    without = (tmp_path / "config.toml").read_text().replace("reproducible = false\n", "")
    (tmp_path / "config.toml").write_text(without)
    read = files.read

    def read_old(*arguments: Any) -> Any:
        arrays, header = read(*arguments)
        for part in (header["net"], header["config"].get("run", header["config"])):
            del part["reproducible"]
        return arrays, header

    monkeypatch.setattr(files, "read", read_old)
    assert runs.resume(tmp_path, epochs=2).finished
    assert not checkpoint.load_model(tmp_path / "model.safetensors", "cpu")[0].reproducible


def test_flags_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["train", "--hidden", "8", "--epochs", "1", "--device", "cpu"]

    def said(*flags: str) -> bool:
        assert cli.main([*small, *flags]) == 0
        return "SHA-256" in capsys.readouterr().out

    monkeypatch.setenv("GPUBN_REPRODUCIBLE", "1")
    assert said("--out", "a")
    assert not said("--out", "b", "--no-reproducible")
    assert said("--out", "c", "--config", "a/config.toml")
    assert not said("--out", "d", "--config", "b/config.toml")
    monkeypatch.delenv("GPUBN_REPRODUCIBLE")
    assert [RunConfig.read(f"{name}/config.toml").reproducible for name in "abcd"] == [
        True, False, True, False,
    ]  # fmt: skip
    assert said("--out", "e", "--config", "a/config.toml")
    assert not said("--out", "f")
    assert cli.main(["train", "--resume", "a"]) == 0
    again = capsys.readouterr().out
    assert cli.main(["evaluate", "a"]) == 0
    assert len(set(re.findall(r"[0-9a-f]{64}", again + capsys.readouterr().out))) == 1

    assert cli.main(["train", "--resume", "a", "--no-reproducible"]) == 2
    assert "--reproducible cannot be given beside --resume" in capsys.readouterr().err
    monkeypatch.setenv("GPUBN_REPRODUCIBLE", "maybe")
    assert cli.main([*small, "--out", "g"]) == 2
    assert "GPUBN_REPRODUCIBLE is 'maybe', expected 1 or 0" in capsys.readouterr().err
    assert cli.main(["info"]) == 0


def test_the_hash_is_of_all_that_the_network_computes_with(rng: np.random.Generator) -> None:
    def net() -> gpubn.FullyConnectedNet:
        return gpubn.FullyConnectedNet(
            [5], 4, 3, normalization="batchnorm", seed=0, device="cpu", reproducible=True
        )

    first = net()
    assert first.sha256() == net().sha256()
    X, y = rng.standard_normal((10, 4)).astype(np.float32), rng.integers(0, 3, 10)
    first.loss(X, y)  # moves the running statistics and no parameter
    assert first.sha256() != net().sha256()
    second = net()
    b = backend.to_host(second.params["b2"]).copy()
    b[1] = -0.0
    second.params["b2"] = b
    assert second.sha256() != net().sha256()
