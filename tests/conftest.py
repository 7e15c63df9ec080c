"""Where the tests run: the fixture ``device`` gives each test the devices to run on.

By default these are the CPU and, where there is a C++ compiler, the host-run CUDA kernels
(host_cuda/): the CUDA modules as they are, compiled for the host. ``--device cuda`` runs the same
tests on a GPU, and fails where there is none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
from host_cuda import cupy_stand_in

import gpubn
from gpubn import backend, kernels

DEVICES = ("cpu", "host-cuda", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        action="append",
        choices=DEVICES,
        help="where the tests of layers and training run; may be given several times "
        "(default: cpu and host-cuda; cuda needs a GPU, and fails without one)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("device") or ["cpu", "host-cuda"]
        if metafunc.definition.get_closest_marker("not_host_run"):
            chosen = [name for name in chosen if name != "host-cuda"] or ["cpu"]
        metafunc.parametrize("device", chosen, indirect=True, scope="function")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "not_host_run: too much work for CUDA kernels on the host; other devices do it"
    )
    for name in ("GPUBN_DEVICE", "GPUBN_REPRODUCIBLE"):
        os.environ.pop(name, None)


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = backend._current.get()
    if chosen is not None:  # by a layer in a parametrize, which no test's device would apply to
        raise pytest.UsageError(f"collecting the tests chose a device: {chosen}")


@pytest.fixture(autouse=True)
def no_device_chosen() -> Iterator[None]:
    """Let each test begin as a program does: nothing has chosen a device yet."""
    token = backend._current.set(None)
    yield
    backend._current.reset(token)


@contextlib.contextmanager
def host_cuda() -> Iterator[None]:
    """Let gpubn take the stand-in for CuPy, and the host for a GPU."""
    if cupy_stand_in.compiler() is None:
        # Of the host's machine, not of gpubn: NVRTC still compiles the kernels in other tests.
        pytest.skip("no C++ compiler was found: the CUDA kernels cannot be run on the host")
    probes = dict(backend._probes)
    with cupy_stand_in.install():
        backend._probes.clear()
        kernels._load.cache_clear()
        try:
            yield
        finally:
            backend._probes.clear()
            backend._probes.update(probes)
            kernels._load.cache_clear()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[backend.Device]:
    """The device under test, in force for the test's length."""
    with contextlib.ExitStack() as stack:
        if request.param == "host-cuda":
            stack.enter_context(host_cuda())
        yield stack.enter_context(gpubn.use("cpu" if request.param == "cpu" else "cuda"))


@pytest.fixture
def two_devices() -> Iterator[None]:
    """The CPU, and the host-run CUDA kernels as a GPU."""
    with host_cuda():
        yield


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    outcome = backend.Probe(False, "no NVIDIA driver was found")
    monkeypatch.setattr(backend, "_probes", {0: outcome})


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that a test can count on: seeded by the test's name."""
    return np.random.default_rng(list(request.node.name.encode()))
