"""The peak of memory: what is read, what a run writes of it, and what does not depend on it."""

from __future__ import annotations

import csv
import dataclasses
import resource
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_cuda import cupy_stand_in

from gpubn import backend
from gpubn.nn import files
from gpubn.train import memory
from gpubn.train import run as runs
from gpubn.train.config import RunConfig
from gpubn.train.memory import Meter, human

CPU = backend.Device("cpu", 0, "for a test")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0.0 kB"),
        (999_900, "999.9 kB"),
        (999_950, "1.0 MB"),
        (812_340_000, "812.3 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (78_200_000_000, "78.2 GB"),
        (1_500_000_000_000, "1500.0 GB"),
    ],
)
def test_sizes_as_people_read_them(size: int, expected: str) -> None:
    assert human(size) == expected


# --- On the CPU -----------------------------------------------------------------------------------


def in_a_process(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


READ = """
from gpubn.backend import Device
from gpubn.train.memory import Meter
meter = Meter(Device("cpu", 0, ""))
def read():
    print(meter.read().bytes, flush=True)
"""


def test_the_peak_of_a_process() -> None:
    code = f"{READ}\nread()\nx = bytearray(b'1') * 10**8\nread()\ndel x\nread()"
    before, there, after = in_a_process(code)
    assert 1e7 < before < 1e9
    assert there - before > 0.9e8
    assert after >= there  # what is freed has been held


@linux
def test_the_parents_memory_does_not_count() -> None:
    parent = (
        "import subprocess, sys; x = bytearray(b'1') * 10**9;"
        f"subprocess.run([sys.executable, '-c', {READ + 'read()'!r}], check=True)"
    )
    (peak,) = in_a_process(parent)
    assert peak < 0.9e9


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5120), ("darwin", 5)])
@pytest.mark.parametrize("text", [None, "", "Name:\tpython\n", "VmHWM:\n", "VmHWM:\tmany kB\n"])
def test_where_there_is_no_such_file(
    platform: str, expected: int, text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "status"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(memory, "_PROCESS_STATUS", str(path))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=5))
    assert Meter(CPU).read() == memory.Peak(expected, "resident, this process")


def no_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system as Windows is."""
    monkeypatch.setattr(memory, "_PROCESS_STATUS", "nowhere")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)


def test_windows_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    no_getrusage(monkeypatch)
    peak = Meter(CPU).read()
    assert peak.bytes is None
    assert str(peak) == (
        "unknown (this system does not tell a process's peak: it has no getrusage)"
    )


# --- On CUDA --------------------------------------------------------------------------------------


@pytest.fixture
def pool(two_devices: None) -> Iterator[cupy_stand_in.MemoryPool]:
    pool = cupy_stand_in.memory_pool
    yield pool
    vars(pool).clear()


def test_what_the_pool_holds(pool: cupy_stand_in.MemoryPool) -> None:
    meter = Meter(backend.resolve("cuda"))
    read = []
    for pool.total in (3 * 10**9, 5 * 10**9, 4 * 10**9, 0):  # the last: emptied
        read.append(meter.read().bytes)
    assert read == [3 * 10**9, 5 * 10**9, 5 * 10**9, 5 * 10**9]
    pool.total = 10**9
    assert str(meter.read()) == "5.0 GB (CuPy's memory pool on cuda:0)"


def test_another_allocator_is_not_guessed_at(pool: cupy_stand_in.MemoryPool) -> None:
    pool.total = 0
    peak = Meter(backend.resolve("cuda")).read()
    assert peak.bytes is None
    assert "told to allocate on cuda:0 without its default pool" in peak.what


# --- In a run -------------------------------------------------------------------------------------

SMALL = RunConfig(hidden=(8,), batch_size=300, epochs=2, device="cpu")


def cells(folder: Path) -> list[str]:
    with open(folder / runs.METRICS, newline="") as file:
        return [row["peak_memory_bytes"] for row in csv.DictReader(file)]


def test_a_column_of_metrics(tmp_path: Path) -> None:
    run = runs.start(SMALL, tmp_path / "run")
    peaks = [int(cell) for cell in cells(tmp_path / "run")]
    assert len(peaks) == 3
    assert peaks == sorted(peaks)
    assert run.peak_memory.bytes is not None
    assert 1e7 < peaks[0] <= peaks[-1] <= run.peak_memory.bytes


def test_on_a_gpu_it_is_the_pools(pool: cupy_stand_in.MemoryPool, tmp_path: Path) -> None:
    class Grow(runs.Watcher):
        def iteration(self, run: runs.Run) -> None:
            pool.total = 10**6 * run.solver.iteration

    pool.total = 7
    run = runs.start(dataclasses.replace(SMALL, device="cuda"), tmp_path / "run", watcher=Grow())
    per_epoch = run.solver.iterations_per_epoch
    # A row is written before the watcher hears of its last iteration.
    expected = ["7", f"{10**6 * (per_epoch - 1)}", f"{10**6 * (2 * per_epoch - 1)}"]
    assert cells(tmp_path / "run") == expected
    assert run.peak_memory.bytes == 10**6 * 2 * per_epoch


def test_unknown_peaks_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        no_getrusage(patch)
        patch.setattr(runs, "_locked", lambda folder: runs.contextlib.nullcontext())
        assert runs.start(SMALL, tmp_path / "run").finished
    assert cells(tmp_path / "run") == ["", "", ""]
    assert runs.resume(tmp_path / "run", epochs=3).finished
    *old, new = cells(tmp_path / "run")
    assert old == ["", "", ""]
    assert int(new) > 1e7


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / runs.METRICS, newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in runs.NOT_REPEATED} for row in table]


class Killed(BaseException):
    """Ends a run where no code of its own could catch it."""


class KillIn(runs.Watcher):
    """Kills a run after its first epoch."""

    def epoch(self, run: runs.Run) -> None:
        if run.solver.epoch == 1:
            raise Killed


def test_a_resumed_run_keeps_the_peaks_of_its_epochs(
    pool: cupy_stand_in.MemoryPool, tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, device="cuda", reproducible=True)
    pool.total = 10**9
    whole = runs.start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        runs.start(config, tmp_path / "killed", watcher=KillIn())
    pool.total = 10**8
    run = runs.resume(tmp_path / "killed")
    assert cells(tmp_path / "killed") == ["1000000000", "1000000000", "100000000"]
    assert run.peak_memory.bytes == 10**8  # this process's
    # Nothing that is compared knows of it.
    assert cells(tmp_path / "whole") != cells(tmp_path / "killed")
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    assert run.net.sha256() == whole.net.sha256()
    models = [(tmp_path / name / runs.MODEL).read_bytes() for name in ("whole", "killed")]
    assert models[0] == models[1]


def test_runs_of_earlier_versions_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    runs.start(SMALL, whole)
    with pytest.raises(Killed):
        runs.start(SMALL, out, watcher=KillIn())
    # As they wrote it: no column, and nothing in the checkpoint.
    table = [line.rpartition(",")[0] for line in (out / runs.METRICS).read_text().splitlines()]
    (out / runs.METRICS).write_text("\n".join(table))
    read = files.read

    def read_old(*arguments: Any) -> Any:
        arrays, header = read(*arguments)
        header["config"].pop("row_peaks", None)
        return arrays, header

    with monkeypatch.context() as patch:
        patch.setattr(files, "read", read_old)
        assert runs.resume(out).finished
    first, second, third = cells(out)
    assert (first, second) == ("", "")
    assert int(third) > 1e7
    assert rows(out) == rows(whole)
    assert (out / runs.MODEL).read_bytes() == (whole / runs.MODEL).read_bytes()
    # And once it has gone on, it is as any other.
    assert runs.resume(out).finished
    assert cells(out) == [first, second, third]


def test_columns_that_are_not_repeated_are_columns() -> None:
    assert set(runs.NOT_REPEATED) < set(runs.METRICS_COLUMNS)
    assert np.unique(runs.METRICS_COLUMNS).size == len(runs.METRICS_COLUMNS)
