"""Timing: results are checked first, and the machine's own copy, timed in turns, sets the scale."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpubn
from gpubn.backend import Device
from gpubn.kernels.threads import get_num_threads

SHAPES = (
    *((32, 100), (128, 512), (1024, 512), (4096, 1024), (8192, 4096), (65536, 256), (262144, 64)),
    *((131072, 3), (1000, 1023), (64, 65536)),
)
QUICK_SHAPES = ((128, 512), (1024, 512), (4096, 1024), (65536, 256))


@dataclass(frozen=True)
class Case:
    """One function to time; ``passes`` are its reads and writes of an x-sized array."""

    op: str
    shape: tuple[int, int]
    dtype: str
    passes: int
    run: Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One result: times in microseconds, bandwidth over the bytes that must move."""

    op: str
    rows: int
    columns: int
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    of_copy: float


def command_line(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the flags that every benchmark has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--quick", action="store_true", help="shorter, and with fewer shapes")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser


def time_once(device: Device, run: Callable[[], Any]) -> float:
    """Return the seconds of one run; on CUDA by events, from the first launch to the last end."""
    if device.kind == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    cuda = device.xp.cuda
    start, end = cuda.Event(), cuda.Event()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3


def measure(device: Device, cases: Iterable[Case], seconds: float) -> Iterator[Row]:
    """Time each case for about ``seconds``, in turns with a copy of an array of its size."""
    for case in cases:
        x = device.xp.ones(case.shape, case.dtype)
        target = device.xp.empty_like(x)

        def copy(target: Any = target, x: Any = x) -> None:
            target[...] = x

        for warm_up in (case.run, copy) * 3:
            time_once(device, warm_up)
        times, copies, end = [], [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            times.append(time_once(device, case.run))
            copies.append(time_once(device, copy))
        median = statistics.median(times)
        p20, p80 = np.percentile(times, [20, 80])
        needed = case.passes * x.nbytes
        copy_speed = 2 * x.nbytes / statistics.median(copies)
        yield Row(
            case.op,
            *case.shape,
            case.dtype,
            round(median * 1e6, 2),
            round(float(p20) * 1e6, 2),
            round(float(p80) * 1e6, 2),
            round(needed / median / 1e9, 2),
            round(needed / median / copy_speed, 3),
        )


def environment(device: Device) -> dict[str, str]:
    """Describe what is measured on, and print it."""
    import numba

    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpubn": gpubn.__version__,
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "device": device.name,
        "cpu": _cpu_name(),
        "threads": str(get_num_threads()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }
    if device.kind == "cuda":
        runtime = device.xp.cuda.runtime
        facts["gpu"] = runtime.getDeviceProperties(device.index)["name"].decode()
        facts["cupy"] = device.xp.__version__
        facts["driver"] = str(runtime.driverGetVersion())
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)
    return facts


def write_csv(path: Path, rows: Sequence[Any], facts: dict[str, str]) -> None:
    """Write rows under comment lines that say what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, [*asdict(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(f"written to {path}")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
