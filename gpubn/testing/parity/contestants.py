"""Who computes the cases: the CPU with several numbers of threads, every CUDA device, and more.

More is the CPU again, in a process of its own that compiles for another instruction set.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpubn import backend
from gpubn.kernels import threads
from gpubn.testing.parity.cases import Case, dtype_of
from gpubn.testing.parity.operations import OPERATIONS

Results: TypeAlias = dict[str, NDArray[Any]]

THREADS = (2, 4)
"""Beside 1, which the others are compared with."""

CPU = backend.resolve("cpu")


class ContestantFailed(Exception):
    """A contestant could not compute a case.

    Attributes
    ----------
    contestant : str
    case : Case
    reason : str
        Perhaps of several lines.
    gone : bool
        Whether it can compute no other case either.
    """

    def __init__(self, contestant: str, case: Case, reason: str, *, gone: bool) -> None:
        super().__init__(f"{contestant} failed in {case.command()}: {reason}")
        self.contestant, self.case, self.reason, self.gone = contestant, case, reason, gone


class Contestant(Protocol):
    """Computes cases. ``name`` is how it is called in the table."""

    name: str

    def compute(self, case: Case, arguments: Mapping[str, Any]) -> Results:
        """Return the results of a case, in host memory; ContestantFailed where there are none."""

    def close(self) -> None:
        """Let go of what it holds."""


def compute(device: backend.Device, op: str, arguments: Mapping[str, Any]) -> Results:
    """Run an operation on a device, with host arrays for its arguments and results."""
    # Infinities and NaN are among the values: that NumPy meets them is no news.
    with device.scope(), np.errstate(all="ignore"):
        there = {
            name: device.asarray(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
        results = OPERATIONS[op].run(**there)
        return {name: np.asarray(backend.to_host(value)) for name, value in results.items()}


class OnCpu:
    """The CPU, in this process, with a number of threads.

    More than one share even the smallest arrays, which is not worth it but for the test: so every
    case shows whether bits depend on how the work was split.
    """

    def __init__(self, count: int) -> None:
        self.name = f"cpu, {count} thread{'s' * (count > 1)}"
        self._count = count

    def compute(self, case: Case, arguments: Mapping[str, Any]) -> Results:
        """Return the results of a case."""
        with _num_threads(self._count):
            return compute(CPU, case.op, arguments)

    def close(self) -> None:
        """Hold nothing."""


@contextlib.contextmanager
def _num_threads(count: int) -> Iterator[None]:
    before, sizes = threads.get_num_threads(), (threads.WORTH_SPLITTING, threads.PIECE)
    threads.set_num_threads(count)
    threads.WORTH_SPLITTING = threads.PIECE = 1
    try:
        yield
    finally:
        threads.WORTH_SPLITTING, threads.PIECE = sizes
        threads.set_num_threads(before)


class OnCuda:
    """A CUDA device, in this process."""

    def __init__(self, device: backend.Device) -> None:
        self.name = device.name
        self._device = device

    def compute(self, case: Case, arguments: Mapping[str, Any]) -> Results:
        """Return the results of a case."""
        try:
            return compute(self._device, case.op, arguments)
        # CuPy and the driver raise types that cannot be named where they are not installed. All is
        # raised anew, with the case that it happened in.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ContestantFailed(self.name, case, reason, gone=False) from error

    def close(self) -> None:
        """Hold nothing."""


def cuda_devices() -> tuple[list[backend.Device], dict[str, str]]:
    """Return the CUDA devices that can be used, and the reasons for those that cannot, by name."""
    first = backend.probe()
    if not first.device_count:
        return [], {"CUDA": first.reason}
    devices, reasons = [], {}
    for index in range(first.device_count):
        outcome = backend.probe(index)
        if outcome.usable:
            devices.append(backend.resolve(f"cuda:{index}"))
        else:
            reasons[f"cuda:{index}"] = outcome.reason
    return devices, reasons


def cuda_name(device: backend.Device) -> str:
    """Return the name that the driver gives a CUDA device."""
    properties = device.xp.cuda.runtime.getDeviceProperties(device.index)
    return str(properties["name"].decode())


# --- Another instruction set ----------------------------------------------------------------------

_PLAIN = {"x86_64": "plain x86-64", "amd64": "plain x86-64", "aarch64": "plain ARMv8"}
_PLAIN["arm64"] = _PLAIN["aarch64"]


def own_instruction_set() -> str:
    """Return LLVM's name of the processor that this process compiles for."""
    name = importlib.import_module("numba").config.CPU_NAME
    return str(name or importlib.import_module("llvmlite.binding").get_host_cpu_name())


def other_instruction_sets() -> dict[str, str]:
    """Return the instruction sets to compare with: LLVM's names, and what they are."""
    machine = platform.machine().lower()
    if machine not in _PLAIN or own_instruction_set() == "generic":
        return {}
    return {"generic": _PLAIN[machine]}


class OnOtherInstructionSet:
    """The CPU with one thread, in a process that compiles for another instruction set.

    The process draws the cases' arguments itself, from the same seeds, and sends its results in the
    order in which they will be asked for. It is never ahead by more than a pipe holds.

    Parameters
    ----------
    processor : str
        LLVM's name of a processor.
    seeds : mapping of str to range
        All cases that will be asked for: of each operation in turn, in ascending order.
    """

    def __init__(self, processor: str, seeds: Mapping[str, range]) -> None:
        self.name = f"cpu, {processor}"
        with contextlib.ExitStack() as stack:
            self._errors: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            folder = _cache_folder(processor) or stack.enter_context(tempfile.TemporaryDirectory())
            self._child = subprocess.Popen(
                [*_command(), json.dumps({op: [r.start, r.stop] for op, r in seeds.items()})],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(processor, folder),
            )
            self._stack = stack.pop_all()
        assert self._child.stdout is not None
        self._pipe = self._child.stdout

    def compute(self, case: Case, arguments: Mapping[str, Any]) -> Results:
        """Return the results of a case, which must be the next one."""
        try:
            frame = json.loads(self._pipe.readline())
            if (frame["op"], frame["seed"]) == (case.op, case.seed):
                return {result["name"]: self._array(result) for result in frame["results"]}
            reason = f"its process sent another case: {frame['op']}, seed {frame['seed']}"
        except (ValueError, EOFError):  # no line of JSON, or fewer bytes than it says
            reason = self._last_words()
        raise ContestantFailed(self.name, case, reason, gone=True)

    def _array(self, result: Mapping[str, Any]) -> NDArray[Any]:
        array = np.empty(tuple(result["shape"]), dtype_of(result["dtype"]))
        data = self._pipe.read(array.nbytes)
        if len(data) < array.nbytes:
            raise EOFError
        array.reshape(-1)[:] = np.frombuffer(data, array.dtype)
        return array

    def _last_words(self) -> str:
        self._pipe.close()  # if it is still there, it ends at its next result
        code = self._child.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        said = "\n".join(lines[-12:]) or "nothing on its standard error"
        return f"its process ended with exit code {code}:\n{said}"

    def close(self) -> None:
        """End the process, if it has not ended by itself."""
        self._child.kill()
        self._pipe.close()
        self._child.wait()
        self._stack.close()


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "gpubn.testing.parity.child"]


def _cache_folder(processor: str) -> str | None:
    """Return the folder for what this processor's kernels are compiled to; None if there is none.

    Not Numba's own: there one index serves all processors, and of two processes that compile the
    same kernel for two processors at once, one may be left with the code of the other.
    """
    users = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    parent = os.environ.get("NUMBA_CACHE_DIR") or users or os.path.expanduser("~/.cache")
    folder = os.path.join(parent, f"gpubn-{processor}")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _environment(processor: str, folder: str) -> dict[str, str]:
    return {
        **os.environ,
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": "",  # no more than the processor's own, whatever this one's may be
        "NUMBA_CACHE_DIR": folder,
        "GPUBN_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # the same gpubn
    }


class Contestants:
    """All contestants of a run, the first of them the one that the others are compared with.

    One that fails is left out for the rest of the operation, or of the run if it is gone.
    """

    def __init__(self, seeds: Mapping[str, range]) -> None:
        self.devices, self.unusable = cuda_devices()
        self._failed_in: dict[str, str] = {}
        self._baseline = OnCpu(1)
        self._others: list[Contestant] = [OnCpu(count) for count in THREADS]
        self._others += [OnCuda(device) for device in self.devices]
        for processor in other_instruction_sets():
            self._others.append(OnOtherInstructionSet(processor, seeds))
        self.names = tuple(each.name for each in (self._baseline, *self._others))

    def baseline(self, case: Case, arguments: Mapping[str, Any]) -> Results:
        """Return the results that all others are compared with."""
        return self._baseline.compute(case, arguments)

    def others(
        self, case: Case, arguments: Mapping[str, Any]
    ) -> Iterator[tuple[str, Results | ContestantFailed]]:
        """Yield name and results of the others, one after another, or how one failed."""
        for each in tuple(self._others):
            if self._failed_in.get(each.name) == case.op:
                continue
            try:
                yield each.name, each.compute(case, arguments)
            except ContestantFailed as failure:
                self._failed_in[each.name] = case.op
                if failure.gone:
                    self._others.remove(each)
                    each.close()
                yield each.name, failure

    def __enter__(self) -> Contestants:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in self._others:
            each.close()
