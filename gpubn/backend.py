"""The switch between NumPy on the CPU and CuPy on CUDA, and the only module that decides which.

``use`` chooses where networks, parameters and batches are created. Layer functions never ask the
switch: they look at the arrays that they are given (``namespace``, ``is_cuda``).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

Array = Any
"""A NumPy or a CuPy array. CuPy publishes no types, so neither can this name."""

ENVIRONMENT_VARIABLE = "GPUBN_DEVICE"
REPRODUCIBLE_VARIABLE = "GPUBN_REPRODUCIBLE"

_log = logging.getLogger("gpubn")


class DeviceError(RuntimeError):
    """CUDA was asked for and cannot be used. The message says why."""


@dataclass(frozen=True)
class Device:
    """A place where arrays live, and why it was chosen.

    Attributes
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.
    index : int
        The CUDA device's number; 0 on the CPU.
    reason : str
        One line: who asked for this device, or why CUDA was passed over.
    """

    kind: str
    index: int
    reason: str

    @property
    def name(self) -> str:
        """``"cpu"`` or ``"cuda:0"``, as ``use`` takes it."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @property
    def xp(self) -> ModuleType:
        """The array module: numpy or cupy."""
        return np if self.kind == "cpu" else importlib.import_module("cupy")

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which new arrays and launches go to this device."""
        if self.kind == "cpu":
            return contextlib.nullcontext()
        device: contextlib.AbstractContextManager[Any] = self.xp.cuda.Device(self.index)
        return device

    def asarray(self, array: Array, dtype: Any = None) -> Array:
        """Bring an array here; it is copied only if it is elsewhere or of another dtype."""
        if self.kind == "cpu":
            return np.asarray(to_host(array), dtype=dtype)
        with self.scope():
            return self.xp.asarray(array, dtype=dtype)


# --- What CUDA can do here -----------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The outcome of trying CUDA once: whether a kernel ran, and the reason if it did not."""

    usable: bool
    reason: str
    device_count: int = 0


_probes: dict[int, Probe] = {}
_probe_lock = threading.Lock()


def probe(index: int = 0) -> Probe:
    """Try CUDA device ``index``: import, driver, device, then a compile and a launch.

    The outcome is kept for the life of the process. Whatever goes wrong inside CuPy or the driver
    becomes a reason, never an exception: a machine whose GPU is broken must still train.
    """
    with _probe_lock:
        if index not in _probes:
            _probes[index] = _try_cuda(index)
        return _probes[index]


def _try_cuda(index: int) -> Probe:
    # Every `except Exception` below turns a fault of CuPy or the driver into a reason that is
    # shown, for a machine whose GPU is broken must still train. They raise types of their own,
    # which cannot be named where CuPy is not there.
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return Probe(False, "CuPy is not installed (gpubn's extras cuda12 and cuda13 bring it)")
        return Probe(False, f"CuPy cannot be imported: {_one_line(error)}")
    except Exception as error:  # a broken installation raises anything from ImportError to OSError
        return Probe(False, f"CuPy cannot be imported: {_one_line(error)}")

    runtime = cupy.cuda.runtime
    try:
        driver = int(runtime.driverGetVersion())
    except Exception as error:  # CuPy's and the driver's own types, not to be named: see above
        if "InsufficientDriver" not in str(error):
            return Probe(False, f"the NVIDIA driver does not answer: {_one_line(error)}")
        driver = 0  # with no driver at all the runtime says "insufficient" as well
    if driver == 0:
        return Probe(False, "no NVIDIA driver was found")
    try:
        needed = int(runtime.runtimeGetVersion())
        # Within one major version CUDA promises that an older driver runs newer code.
        if driver // 1000 < needed // 1000:
            return Probe(
                False,
                f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, CuPy needs "
                f"{needed // 1000}.0 or newer (update the driver, or install CuPy for CUDA "
                f"{driver // 1000})",
            )
        count = int(runtime.getDeviceCount())
    except Exception as error:  # CuPy's and the driver's own types, not to be named: see above
        if "InsufficientDriver" in str(error):
            return Probe(
                False,
                f"the NVIDIA driver is too old: it supports CUDA {_version(driver)} "
                f"({_one_line(error)})",
            )
        if "NoDevice" in str(error):
            return Probe(False, "the NVIDIA driver found no CUDA device")
        return Probe(False, f"the NVIDIA driver does not answer: {_one_line(error)}")
    if count == 0:
        return Probe(False, "the NVIDIA driver found no CUDA device")
    if index >= count:
        return Probe(False, f"there is no device {index}: this machine has {count}", count)
    try:
        with cupy.cuda.Device(index):
            double = cupy.ElementwiseKernel("float32 x", "float32 y", "y = x + x", "gpubn_probe")
            result = cupy.asnumpy(double(cupy.full(3, 21, dtype=np.float32)))
        if result.tolist() != [42.0, 42.0, 42.0]:
            return Probe(False, f"a first kernel computed 21 + 21 = {result[0]}", count)
    except Exception as error:  # CuPy's and the driver's own types, not to be named: see above
        return Probe(False, f"a first kernel failed: {_one_line(error)}", count)
    return Probe(True, "a first kernel ran", count)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


# --- The switch ----------------------------------------------------------------------------------

_current: ContextVar[Device | None] = ContextVar("gpubn_device", default=None)
_told: set[str] = set()


class use:  # noqa: N801 - called as a function: `use("cuda")`, `with use("cpu"):`
    """Choose the device for what this thread or task creates from now on.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:1", ...}
        ``auto`` takes CUDA where a kernel really runs, else the CPU; ``current().reason`` keeps
        why. ``cuda`` never falls back.

    Raises
    ------
    DeviceError
        CUDA was named and cannot be used; the message has the reason.
    ValueError
        The device's name is not one of the above.

    Notes
    -----
    Takes effect at once; as a context manager it ends with the block::

        gpubn.use("cuda")
        with gpubn.use("cpu"):
            ...
    """

    def __init__(self, device: str = "auto") -> None:
        self._token: Token[Device | None] | None = _current.set(resolve(device))

    def __enter__(self) -> Device:
        return current()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None


def current() -> Device:
    """Return the device in force here: the last ``use``, else ``GPUBN_DEVICE``, else ``auto``."""
    device = _current.get()
    if device is None:
        device = resolve(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", from_environment=True)
        _current.set(device)
    if device.reason.startswith("auto: CUDA") and device.reason not in _told:
        _told.add(device.reason)
        _log.warning("gpubn runs on the CPU: %s", device.reason.removeprefix("auto: "))
    return device


def silence_fallback() -> None:
    """Leave telling about a fallback to the caller, who prints ``current().reason`` itself."""
    device = _current.get()
    if device is not None:
        _told.add(device.reason)


def resolve(device: str, *, from_environment: bool = False) -> Device:
    """Turn a device's name into a ``Device``; raises as ``use`` does, changes nothing."""
    source = f"{ENVIRONMENT_VARIABLE}={device}" if from_environment else f"{device} was asked for"
    name = device.strip().lower() if isinstance(device, str) else device
    if name == "cpu":
        return Device("cpu", 0, source)
    if name == "auto":
        outcome = probe()
        if outcome.usable:
            return Device("cuda", 0, f"auto: {outcome.reason}")
        return Device("cpu", 0, f"auto: CUDA cannot be used: {outcome.reason}")
    if isinstance(name, str) and (name == "cuda" or name.startswith("cuda:")):
        number = name[5:] or "0"
        if name != "cuda:" and number.isascii() and number.isdigit():
            outcome = probe(int(number))
            if not outcome.usable:
                raise DeviceError(
                    f"CUDA cannot be used: {outcome.reason}; device 'cpu' or 'auto' would run here"
                )
            return Device("cuda", int(number), source)
    where = ENVIRONMENT_VARIABLE if from_environment else "device"
    raise ValueError(f"{where} is {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")


# --- Reproducible matrix products -----------------------------------------------------------------


def reproducible(choice: bool | None = None) -> bool:
    """Return whether matrix products are to have the same bits on every device.

    Parameters
    ----------
    choice : bool, optional
        The caller's; without one ``GPUBN_REPRODUCIBLE`` decides, and without that it is False.

    Raises
    ------
    TypeError, ValueError
        The choice is no bool, or the variable none of 1, true, yes, on, 0, false, no, off.
    """
    if choice is None:
        value = os.environ.get(REPRODUCIBLE_VARIABLE, "")
        if value.lower() in ("", "0", "false", "no", "off"):
            return False
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        raise ValueError(f"{REPRODUCIBLE_VARIABLE} is {value!r}, expected 1 or 0")
    if not isinstance(choice, bool | np.bool_):
        raise TypeError(f"reproducible is {choice!r}, expected True or False")
    return bool(choice)


# --- Where an array lives ------------------------------------------------------------------------


def is_cuda(array: Array) -> bool:
    """Tell whether ``array`` is a CuPy array, without importing CuPy."""
    cupy = sys.modules.get("cupy")
    # A CuPy that failed half-way through its import leaves a module without ndarray.
    return cupy is not None and isinstance(array, getattr(cupy, "ndarray", ()))


def is_array(array: Array) -> bool:
    """Tell whether ``array`` is a NumPy or CuPy array."""
    return is_cuda(array) or isinstance(array, np.ndarray)


def namespace(array: Array) -> ModuleType:
    """Return the module of an array's functions: cupy for a CuPy array, else numpy."""
    return sys.modules["cupy"] if is_cuda(array) else np


def place(array: Array) -> str:
    """Name the device that holds an array: ``"cpu"`` or ``"cuda:0"``."""
    return f"cuda:{array.device.id}" if is_cuda(array) else "cpu"


def scope_of(array: Array) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels launch on the device that holds ``array``."""
    return array.device if is_cuda(array) else contextlib.nullcontext()


def to_host(array: Array) -> Any:
    """Return a NumPy array with the same values; a CuPy array is copied, others are passed on."""
    return sys.modules["cupy"].asnumpy(array) if is_cuda(array) else array


def is_cuda_error(error: BaseException) -> bool:
    """Tell whether an exception is CuPy's or the driver's: a launch, a compile, memory, a BLAS."""
    return type(error).__module__.partition(".")[0] in ("cupy", "cupy_backends")
