"""Kill training runs at random times, resume them, and compare their final weights.

Run by hand for the long form; ``test_run.py`` does three::

    python tests/train/kill_and_resume.py --kills 200 --in-checkpoints 50

A run is killed and resumed until a resumed one ends by itself; its ``model.safetensors`` must be,
to the byte, that of a run that nobody killed, and after every kill the checkpoint that is there
must be whole. Times are drawn between the moment at which a process has started and a little beyond
the one at which the whole run has its model, so that every stage is hit: before config.toml, within
an epoch, after the end. SIGKILL, SIGTERM and SIGINT (Ctrl-C) take turns at random. So many kills
are SIGKILLs that wait, after the time drawn, until a checkpoint is being written.
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

from gpubn.nn.files import read

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
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Outcome:
    """What became of one run: when it was killed, in which state, and whether weights are equal."""

    kills: list[Kill]
    states: list[str]
    equal: bool


@dataclass
class Kill:
    """When to end a process, with which signal, and whether to wait until a checkpoint is written.

    Such a wait is over when the process is.
    """

    delay: float
    signal: signal.Signals = signal.SIGKILL
    in_checkpoint: bool = False


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
    """Say how far a run had got when it was killed; its checkpoint must be whole."""
    if not (folder / CONFIG).exists():
        return "nothing"
    state = "config"
    if (folder / CHECKPOINT).exists():
        read(folder / CHECKPOINT, "checkpoint")
        state = "checkpoint"
    if (folder / METRICS).exists():
        state = f"epoch {len((folder / METRICS).read_text().splitlines()) - 2}"
    if (folder / MODEL).exists():
        state = "model"
    return f"{state}+tmp" if list(folder.glob(".*.tmp")) else state


def kill_and_resume(folder: Path, epochs: int, expected: bytes, kills: list[Kill]) -> Outcome:
    """Begin a run, kill it after each delay, resume it each time and at last let it end."""
    states = []
    for kill in kills:
        process = _go_on(folder, epochs)
        try:
            time.sleep(kill.delay)
            while kill.in_checkpoint and process.poll() is None and not _writes_checkpoint(folder):
                pass
            process.send_signal(kill.signal)
            process.wait(TIMEOUT)
        finally:
            process.kill()
            process.communicate()
        states.append(state_of(folder))
    finish(_go_on(folder, epochs))
    equal = (folder / MODEL).read_bytes() == expected and not list(folder.glob(".*.tmp"))
    return Outcome(kills, states, equal)


def _writes_checkpoint(folder: Path) -> bool:
    return folder.exists() and any(
        name.startswith(f".{CHECKPOINT}.") for name in os.listdir(folder)
    )


def _go_on(folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    if (folder / CONFIG).exists():
        return train("--resume", str(folder))
    return train("--out", str(folder), *FLAGS, str(epochs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="in all (default: 40)")
    parser.add_argument(
        "--in-checkpoints", type=int, default=10, help="of them, at least (default: 10)"
    )
    parser.add_argument("--per-run", type=int, default=4, help="kills of a run (default: 4)")
    parser.add_argument("--epochs", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default: 0)")
    arguments = parser.parse_args()
    times, epochs = random.Random(arguments.seed), arguments.epochs
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        uninterrupted(root / "warm", epochs)  # compiles the kernels
        expected, started, ended = uninterrupted(root / "whole", epochs)
        print(f"uninterrupted: config.toml after {started:.2f} s, model after {ended:.2f} s\n")
        print("run  weights    kills: seconds, signal, and the state then")
        runs = killed = inside = bad = 0
        while killed < arguments.kills or inside < arguments.in_checkpoints:
            runs += 1
            kills = []
            for number in range(1, arguments.per_run + 1):
                # The later a kill, the less is left to do until the next.
                aimed = times.random() < 1.4 * arguments.in_checkpoints / arguments.kills
                kills.append(
                    Kill(
                        times.uniform(0.8 * started, (0.9 if aimed else 1.1) * ended / number),
                        signal.SIGKILL if aimed else times.choice(SIGNALS),
                        aimed,
                    )
                )
            outcome = kill_and_resume(root / f"run-{runs}", epochs, expected, kills)
            killed += len(kills)
            inside += sum(
                kill.in_checkpoint and state.endswith("+tmp")
                for kill, state in zip(kills, outcome.states, strict=True)
            )
            bad += not outcome.equal
            text = ", ".join(
                f"{kill.delay:.2f} {kill.signal.name} {state}"
                for kill, state in zip(outcome.kills, outcome.states, strict=True)
            )
            print(f"{runs:3}  {'equal' if outcome.equal else 'DIFFERENT':9}  {text}", flush=True)
        print(
            f"\n{killed} kills, {inside} of them within the writing of a checkpoint; every "
            f"checkpoint was whole; {runs - bad} of {runs} runs ended with the same bytes"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
