"""The switch: what it chooses, the reason that it keeps, and how it fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import host_cuda

import gpubn
from gpubn import backend


class FakeRuntimeError(RuntimeError):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


def fails(message: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise FakeRuntimeError(message)

    return call


def fake_cupy(**changes: Any) -> types.ModuleType:
    """A CuPy on a machine with one GPU, but for ``changes``."""
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDeviceCount=lambda: 1,
    )
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {})
    device: Any = type("Device", (), {"__init__": lambda self, i: None})
    device.__enter__ = lambda self: self
    device.__exit__ = lambda self, *error: None
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=device)
    cupy.full = np.full
    cupy.asnumpy = np.asarray
    cupy.ElementwiseKernel = lambda *text: lambda x: x + x
    for name, value in changes.items():
        setattr(runtime if hasattr(runtime, name) else cupy, name, value)
    return cupy


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what was probed and chosen, before and after."""
    monkeypatch.setattr(backend, "_probes", {})
    monkeypatch.setattr(backend, "_told", set())
    monkeypatch.delenv("GPUBN_DEVICE", raising=False)
    token = backend._current.set(None)
    yield
    backend._current.reset(token)


def put(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)


class BrokenImport:
    """A finder under which importing cupy raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "cupy":
            raise self.error


OBSTACLES = {
    "CuPy is not installed": ModuleNotFoundError("No module named 'cupy'", name="cupy"),
    "CuPy cannot be imported: ImportError: libcuda": ImportError("libcuda.so.1: cannot open"),
    "CuPy cannot be imported: OSError: bad wheel": OSError("bad wheel\nsecond line"),
    "CuPy cannot be imported: ModuleNotFoundError: No module named 'cupy_backends'": (
        ModuleNotFoundError("No module named 'cupy_backends'", name="cupy_backends")
    ),
    "no NVIDIA driver was found": {"driverGetVersion": lambda: 0},
    "no NVIDIA driver was found ": {
        "driverGetVersion": fails(
            "cudaErrorInsufficientDriver: CUDA driver version is insufficient"
        )
    },
    "the NVIDIA driver is too old: it supports CUDA 11.8, CuPy needs 13.0": {
        "driverGetVersion": lambda: 11080,
        "getDeviceCount": fails("cudaErrorInsufficientDriver: insufficient"),
    },
    "the NVIDIA driver is too old: it supports CUDA 13.0 (FakeRuntimeError": {
        "getDeviceCount": fails("cudaErrorInsufficientDriver: insufficient"),
    },
    "the NVIDIA driver found no CUDA device": {"getDeviceCount": lambda: 0},
    "the NVIDIA driver found no CUDA device ": {
        "getDeviceCount": fails("cudaErrorNoDevice: no CUDA-capable device is detected")
    },
    "the NVIDIA driver does not answer: FakeRuntimeError: cudaErrorUnknown": {
        "driverGetVersion": fails("cudaErrorUnknown")
    },
    "the NVIDIA driver does not answer: FakeRuntimeError: cudaErrorSystemDriverMismatch": {
        "getDeviceCount": fails("cudaErrorSystemDriverMismatch")
    },
    "a first kernel failed: FakeRuntimeError: no kernel image": {
        "ElementwiseKernel": lambda *text: fails("no kernel image is available")
    },
    "a first kernel computed 21 + 21 = 21.0": {"ElementwiseKernel": lambda *text: lambda x: x},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_falls_back_with_the_reason(
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstacle: Any = OBSTACLES[reason]
    if isinstance(obstacle, Exception):
        for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [BrokenImport(obstacle), *sys.meta_path])
    else:
        put(monkeypatch, fake_cupy(**obstacle))

    with caplog.at_level(logging.WARNING, "gpubn"):
        device = gpubn.current()
        gpubn.current()
    assert (device.kind, device.name, device.xp) == ("cpu", "cpu", np)
    assert reason.strip() in device.reason
    assert "\n" not in device.reason
    assert [record.getMessage() for record in caplog.records] == [
        f"gpubn runs on the CPU: {device.reason.removeprefix('auto: ')}"
    ], "one line says why, once"

    with pytest.raises(gpubn.DeviceError) as error:
        gpubn.use("cuda")
    assert reason.strip() in str(error.value)
    with gpubn.use("cpu") as cpu:
        assert cpu.name == "cpu"


def test_takes_cuda_where_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake_cupy())
    assert gpubn.current().name == "cuda:0"
    assert "a first kernel ran" in gpubn.current().reason
    with pytest.raises(gpubn.DeviceError, match="there is no device 3: this machine has 1"):
        gpubn.use("cuda:3")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "CUDA:1.0", 0, None])
def test_unknown_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="expected 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        gpubn.use(name)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUBN_DEVICE", "cpu")
    assert gpubn.current().reason == "GPUBN_DEVICE=cpu"
    backend._current.set(None)
    monkeypatch.setenv("GPUBN_DEVICE", "tpu")
    with pytest.raises(ValueError, match="GPUBN_DEVICE is 'tpu'"):
        gpubn.current()


def test_use_is_scoped_and_nests(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake_cupy())
    gpubn.use("cuda")
    with gpubn.use("cpu"):
        assert gpubn.current().name == "cpu"
        with gpubn.use("cuda:0"):
            assert gpubn.current().name == "cuda:0"
        assert gpubn.current().name == "cpu"
        with pytest.raises(ZeroDivisionError), gpubn.use("cuda"):
            raise ZeroDivisionError
        assert gpubn.current().name == "cpu"
    assert gpubn.current().name == "cuda:0"


def test_use_stays_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake_cupy())
    gpubn.use("cpu")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(gpubn.current().name))
    thread.start()
    thread.join()
    assert seen == ["cuda:0"]
    assert gpubn.current().name == "cpu"


def test_arrays_move_between_devices() -> None:
    with host_cuda(), gpubn.use("cuda") as cuda:
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        there = cuda.asarray(x)
        assert backend.is_cuda(there)
        assert not backend.is_cuda(x)
        assert backend.place(there) == "cuda:0"
        assert backend.namespace(there).__name__ == "cupy"
        back = backend.resolve("cpu").asarray(there)
        assert isinstance(back, np.ndarray)
        np.testing.assert_array_equal(back, x)


def test_import_is_quick_and_light() -> None:
    code = (
        "import sys, time, numpy; start = time.perf_counter(); import gpubn;"
        "took = time.perf_counter() - start;"
        "heavy = {'cupy', 'numba', 'matplotlib', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy; print(took)"
    )
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    took = min(
        float(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, env=env
            ).stdout
        )
        for _ in range(3)
    )
    assert took < 0.3
