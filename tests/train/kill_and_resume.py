"""Kill training runs with SIGKILL at random times, resume them, and compare their final weights.

Run by hand for the long form; ``test_run.py`` does three::

    python tests/train/kill_and_resume.py --runs 20

A run is killed and resumed until a resumed one ends by itself; its ``model.safetensors`` must be,
to the byte, that of a run that nobody killed. Times are drawn between the moment at which a process
has started and a little beyond the one at which the whole run has its model, so that every stage is
hit: before config.toml, within an epoch, in the middle of writing a file, after the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FLAGS = (
    "--hidden",
    "32",
    "16",
    "--batch-size",
    "100",
    "--device",
    "cpu",
    "--seed",
    "3",
    "--epochs",
)
MODEL, CHECKPOINT = "model.safetensors", "checkpoint.safetensors"
CONFIG, METRICS = "config.toml", "metrics.csv"
TIMEOUT = 300


@dataclass
class Outcome:
    """What became of one run: when it was killed, in which state, and whether weights are equal."""

    kills: list[float]
    states: list[str]
    equal: bool


def train(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpubn", "train", *arguments]
    # One thread of BLAS: two that wait for each other are slow on a machine that is busy.
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **threads},
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    """Wait for a run's end; it must be a good one."""
    try:
        output = process.communicate(timeout=TIMEOUT)[0].decode()
    finally:
        process.kill()  # no process may stay behind, whatever happened
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"gpubn train ended with {process.returncode}:\n{output}")
    return output


def uninterrupted(folder: Path, epochs: int) -> tuple[bytes, float, float]:
    """Return the model of a run that is let be, and the seconds to config.toml and to the model."""
    begun = time.monotonic()
    process = train("--out", str(folder), *FLAGS, str(epochs))
    seconds = []
    for name in (CONFIG, MODEL):
        while not (folder / name).exists() and process.poll() is None:
            time.sleep(0.005)
        seconds.append(time.monotonic() - begun)
    finish(process)
    return (folder / MODEL).read_bytes(), seconds[0], seconds[1]


def state_of(folder: Path) -> str:
    """Say how far a run had got when it was killed."""
    if not (folder / CONFIG).exists():
        return "nothing"
    state = "config"
    if (folder / CHECKPOINT).exists():
        state = "checkpoint"
    if (folder / METRICS).exists():
        state = f"epoch {len((folder / METRICS).read_text().splitlines()) - 2}"
    if (folder / MODEL).exists():
        state = "model"
    return f"{state}+tmp" if list(folder.glob(".*.tmp")) else state


def kill_and_resume(folder: Path, epochs: int, expected: bytes, delays: list[float]) -> Outcome:
    """Begin a run, kill it after each delay, resume it each time and at last let it end."""
    states = []
    for delay in delays:
        process = _go_on(folder, epochs)
        try:
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        states.append(state_of(folder))
    finish(_go_on(folder, epochs))
    equal = (folder / MODEL).read_bytes() == expected and not list(folder.glob(".*.tmp"))
    return Outcome(delays, states, equal)


def _go_on(folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    if (folder / CONFIG).exists():
        return train("--resume", str(folder))
    return train("--out", str(folder), *FLAGS, str(epochs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--epochs", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default: 0)")
    arguments = parser.parse_args()
    times, epochs = random.Random(arguments.seed), arguments.epochs
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        uninterrupted(root / "warm", epochs)  # compiles the kernels
        expected, started, ended = uninterrupted(root / "whole", epochs)
        print(f"uninterrupted: config.toml after {started:.2f} s, model after {ended:.2f} s\n")
        print("run  seconds until each kill, and the state then      weights")
        bad = 0
        for number in range(1, arguments.runs + 1):
            # The later a kill, the less is left to do until the next.
            delays = [
                times.uniform(0.8 * started, 1.1 * ended / kill)
                for kill in range(1, arguments.kills + 1)
            ]
            outcome = kill_and_resume(root / f"run-{number}", epochs, expected, delays)
            kills = ", ".join(
                f"{delay:.2f} {state}"
                for delay, state in zip(outcome.kills, outcome.states, strict=True)
            )
            bad += not outcome.equal
            print(
                f"{number:3}  {kills:45}  {'equal' if outcome.equal else 'DIFFERENT'}", flush=True
            )
        print(f"\n{arguments.runs - bad} of {arguments.runs} runs ended with the same bytes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
