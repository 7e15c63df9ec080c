"""Plugin for pytest: the fixtures ``device`` and ``xp``, which run a test once on each device.

    def test_doubles(xp):                  # xp is numpy in test_doubles[cpu],
        x = xp.ones(3)                     # and cupy in test_doubles[cuda:0]
        assert (x + x == 2).all()

pytest loads it wherever gpubn is installed, so it has to stay out of the way where it is not used:
it asks for no device before a test asks for a fixture, or the command line for ``--gpubn-device``,
and a project's own fixtures and parameters of these names replace its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from gpubn import backend
from gpubn.backend import Device, DeviceError

# What `device` and `xp` stand on. Only where one of them is used is it among a test's fixtures.
_BASE = "_gpubn_device"
_OPTION = "--gpubn-device"
_chosen = pytest.StashKey[list[Device]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gpubn-device``."""
    parser.getgroup("gpubn").addoption(
        _OPTION,
        action="append",
        metavar="DEVICE",
        help="where tests with gpubn's fixtures 'device' and 'xp' run: auto (the default: cpu, and "
        "cuda where it works), cpu, cuda, cuda:N or all (cpu and every CUDA device); several with "
        "commas, or by giving it several times. Other than auto, CUDA that cannot be used is an "
        "error",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse at start-up a device that cannot be used; with ``auto`` nothing is tried yet."""
    if config.getoption(_OPTION):
        _devices(config)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the devices that the command line asked for."""
    if config.getoption(_OPTION):
        return f"gpubn: devices {', '.join(device.name for device in _devices(config))}"
    return None


@pytest.hookimpl(trylast=True)  # after a project's own hooks have given `device` values of theirs
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with ``device`` or ``xp`` once on each device."""
    if _BASE not in metafunc.fixturenames:
        return
    given = {name for call in metafunc._calls for name in call.params}
    if given and given >= {"device", "xp"}.intersection(metafunc.fixturenames):
        return  # plain values stand in for our fixtures, so nothing stands on the base
    devices = _devices(metafunc.config)
    metafunc.parametrize(_BASE, devices, ids=[d.name for d in devices], indirect=True)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Say why CUDA was left out, where tests were to run on it."""
    used = any(_BASE in getattr(item, "fixturenames", ()) for item in items)
    if used and not config.getoption(_OPTION) and not backend.probe().usable:
        return f"gpubn: 'device' and 'xp' are the CPU only, {backend.probe().reason}"
    return None


@pytest.fixture
def _gpubn_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if not hasattr(request, "param"):
        raise pytest.UsageError(
            "gpubn's fixtures 'device' and 'xp' were asked for while a test runs "
            "(getfixturevalue), expected among the arguments of a test or fixture"
        )
    device: Device = request.param
    with backend.use(device.name), device.scope():
        yield device


@pytest.fixture
def device(_gpubn_device: Device) -> Device:
    """Each device in turn, a ``gpubn.Device``; in force during the test, as after ``gpubn.use``."""
    return _gpubn_device


@pytest.fixture
def xp(_gpubn_device: Device) -> ModuleType:
    """Each device's array module in turn, numpy or cupy; goes with ``device``."""
    return _gpubn_device.xp


def _devices(config: pytest.Config) -> list[Device]:
    """Return the devices that the command line asks for, in its order and each once."""
    if _chosen not in config.stash:
        words = ",".join(config.getoption(_OPTION) or ["auto"]).split(",")
        try:
            found = {device.name: device for word in words for device in _meant_by(word.strip())}
        except (DeviceError, ValueError) as error:
            raise pytest.UsageError(f"{_OPTION} {','.join(words)}: {error}") from error
        config.stash[_chosen] = list(found.values())
    return config.stash[_chosen]


def _meant_by(word: str) -> list[Device]:
    if word == "auto":
        names = ["cpu", "cuda"] if backend.probe().usable else ["cpu"]
    elif word == "all":
        count = max(1, backend.probe().device_count)  # of no device, cuda:0 says what is missing
        names = ["cpu", *(f"cuda:{index}" for index in range(count))]
    else:
        names = [word]
    return [backend.resolve(name) for name in names]
