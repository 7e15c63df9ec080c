"""The flags that every benchmark has, and what it was measured on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import gpubn
from gpubn.backend import Device
from gpubn.kernels.threads import get_num_threads

BUSY = 0.5  # processes that were running in the last minute
DTYPES = ("float32", "float64", "float16", "bfloat16")


def command_line(
    prog: str, description: str | None, dtypes: Sequence[str] = DTYPES
) -> argparse.ArgumentParser:
    """Return the flags that every benchmark has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument("--quick", action="store_true", help="shorter, and with fewer shapes")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser


def environment(device: Device) -> dict[str, str]:
    """Describe what is measured on, and print it."""
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpubn": gpubn.__version__,
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "tree": "with changes that are not committed" if changed else "as committed",
        "device": device.name,
        "cpu": _cpu_name(),
        "threads": str(get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in ("numpy", "numba", "torch"):
        facts[name] = _version(name)
    if device.kind == "cuda":
        runtime = device.xp.cuda.runtime
        facts["cupy"] = device.xp.__version__
        facts["gpu"] = runtime.getDeviceProperties(device.index)["name"].decode()
        facts["cuda of the driver"] = str(runtime.driverGetVersion())
        query = ("--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}")
        facts["driver"] = _output("nvidia-smi", *query) or "unknown"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    facts["load average at the start"] = f"{load:.2f}"
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)
    if load > BUSY:
        print(
            "this machine is doing something else: times on the CPU, and the ratios too, "
            "may be far off",
            flush=True,
        )
    return facts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
