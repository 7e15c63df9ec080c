"""Train what experiments ask for, one after the other or side by side, and keep every outcome.

The folder of an experiment holds

- ``trainings/*.json``: the outcome of each training, written when it ends: what is there is not
  trained again, so that an interrupted command goes on where it stopped;
- ``NAME.csv`` and ``NAME-FIGURE.png`` for each experiment, and ``report.html``: made anew from the
  outcomes.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpubn import backend
from gpubn.experiments.definitions import EXPERIMENTS, Experiment, Training
from gpubn.experiments.results import Outcome, Results
from gpubn.train import FullyConnectedNet, NonFiniteLoss, Solver
from gpubn.train.checkpoint import atomic_write
from gpubn.train.data import Dataset, load
from gpubn.train.run import RunError

OUTCOMES = "trainings"
"""The folder of the outcomes."""

_THREADS = ("GPUBN_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ExperimentError(RunError):
    """An experiment that cannot be run as asked. The message says why, in one line."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes
    ----------
    experiments : sequence of Experiment
    data : str
        As for ``gpubn.train.load_data``.
    device : str or None
        As for ``gpubn.use``; None is the device in force.
    seeds, jobs : int
        Trainings of each network, with seeds 0, 1, ...; and how many run side by side.
    quick : bool
        Fewer epochs, and fewer weight scales.
    """

    experiments: Sequence[Experiment]
    data: str = "digits"
    device: str | None = None
    seeds: int = 1
    jobs: int = 1
    quick: bool = False

    @classmethod
    def of(cls, names: Sequence[str], **options: Any) -> Plan:
        """Return a plan for experiments by name; ``all`` stands for every one.

        Raises
        ------
        ExperimentError
            There is no such experiment, or a number is too small.
        """
        for name in names:
            if name != "all" and name not in EXPERIMENTS:
                raise ExperimentError(
                    f"there is no experiment {name!r}, expected all or some of "
                    f"{', '.join(EXPERIMENTS)}"
                )
        chosen = [e for e in EXPERIMENTS.values() if e.name in names or "all" in names]
        for option in ("seeds", "jobs"):
            if options.get(option, 1) < 1:
                raise ExperimentError(f"{option} is {options[option]}, expected at least 1")
        return cls(chosen, **options)

    @property
    def trainings(self) -> list[tuple[Experiment, Training]]:
        """Every training, with the experiment that it belongs to."""
        return [
            (experiment, training)
            for experiment in self.experiments
            for training in experiment.of_seeds(self.seeds, self.quick)
        ]

    @property
    def folder(self) -> Path:
        """Where it is written by default."""
        names = [experiment.name for experiment in self.experiments]
        name = "all" if len(names) == len(EXPERIMENTS) else "+".join(names)
        source = Path(self.data.rpartition(":")[2]).stem or "data"
        return Path("experiments") / "-".join([name, source, *(["quick"] if self.quick else [])])


class Watcher(Protocol):
    """What ``run`` calls on its way."""

    def begin(self, done: int, total: int, device: backend.Device, data: Dataset) -> None:
        """Hear that all is ready, and how many trainings there are already."""

    def trained(self, experiment: Experiment, outcome: Outcome) -> None:
        """Hear that a training has ended, and is saved."""


def run(plan: Plan, folder: Path, watcher: Watcher | None = None) -> dict[str, Results]:
    """Train what is not there yet, and return the results of each experiment by its name.

    Parameters
    ----------
    plan : Plan
    folder : Path
        Where outcomes are, and go; made if need be.
    watcher : Watcher, optional

    Raises
    ------
    ExperimentError, DataError, DeviceError
        The device is none, or it or the data cannot be used; nothing has been written.
    OSError
        A file cannot be read or written.
    """
    dataset = load(plan.data)
    try:
        device = backend.current() if plan.device is None else backend.resolve(plan.device)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    data = prepare(dataset, max(training.images for _, training in plan.trainings))
    digest = dataset.digest()
    found: dict[Training, Outcome] = {}
    keys = {training: _key(training, digest) for _, training in plan.trainings}
    for training, key in keys.items():
        outcome = _read(folder / OUTCOMES / f"{key}.json", training)
        if outcome is not None:
            found[training] = outcome
    missing = [training for training in keys if training not in found]
    (folder / OUTCOMES).mkdir(parents=True, exist_ok=True)
    if watcher is not None:
        watcher.begin(len(found), len(keys), device, dataset)
    owners = {training: experiment for experiment, training in reversed(plan.trainings)}
    for outcome in _outcomes(missing, data, device.name, plan.jobs):
        text = json.dumps(outcome.as_dict(), indent=1, allow_nan=False)
        path = folder / OUTCOMES / f"{keys[outcome.training]}.json"
        atomic_write(path, f"{text}\n".encode())
        found[outcome.training] = outcome
        if watcher is not None:
            watcher.trained(owners[outcome.training], outcome)
    chance = 1 / dataset.num_classes
    return {
        experiment.name: Results(
            [found[training] for training in experiment.of_seeds(plan.seeds, plan.quick)], chance
        )
        for experiment in plan.experiments
    }


def prepare(dataset: Dataset, images: int) -> dict[str, Any]:
    """Return what a Solver takes: images less the mean training image, not scaled, in float32.

    Of the training images there are the first ``images``; the mean is of all.
    """
    mean = dataset.X_train.mean(axis=0, dtype=np.float64)
    return {
        "X_train": (dataset.X_train[:images] - mean).astype(np.float32),
        "y_train": dataset.y_train[:images],
        "X_val": (dataset.X_val - mean).astype(np.float32),
        "y_val": dataset.y_val,
        "num_classes": dataset.num_classes,
    }


def train(training: Training, data: Mapping[str, Any], device: str) -> Outcome:
    """Train one network."""
    images = slice(training.images)
    X = data["X_train"][images]
    started = time.perf_counter()
    net = FullyConnectedNet(
        training.hidden_dims,
        X[0].size,
        data["num_classes"],
        training.dropout_keep_ratio,
        training.normalization,
        weight_scale=training.weight_scale,
        seed=training.seed,
        device=device,
    )
    solver = Solver(
        net,
        {
            "X_train": X,
            "y_train": data["y_train"][images],
            "X_val": data["X_val"],
            "y_val": data["y_val"],
        },
        update_rule=training.update_rule,
        optim_config={"learning_rate": training.learning_rate},
        num_epochs=training.num_epochs,
        batch_size=min(training.batch_size, len(X)),
        verbose=False,
        print_every=10**9,  # losses stay on the device until an epoch ends
        seed=training.seed,
    )
    diverged = None
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # some are made to diverge
            solver.train()
    except NonFiniteLoss as error:
        diverged = error.iteration
    return Outcome(
        training,
        [loss for loss in solver.loss_history[:diverged] if math.isfinite(loss)],
        # One that diverged in its first iteration has guessed, and no more.
        solver.train_acc_history or [1 / data["num_classes"]],
        solver.val_acc_history or [1 / data["num_classes"]],
        diverged,
        round(time.perf_counter() - started, 3),
        net.device.name,
    )


# --- One after the other, or side by side ---------------------------------------------------------


def _outcomes(
    trainings: Sequence[Training], data: dict[str, Any], device: str, jobs: int
) -> Iterator[Outcome]:
    """Yield outcomes as they come."""
    jobs = min(jobs, len(trainings))
    if jobs < 2:
        yield from (train(training, data, device) for training in trainings)
        return
    with _sharing_threads(jobs):
        pool = concurrent.futures.ProcessPoolExecutor(
            jobs,
            multiprocessing.get_context("spawn"),  # a fork would not survive CUDA
            initializer=_begin_job,
            initargs=(data, device),
        )
        waiting, running = list(reversed(trainings)), set[concurrent.futures.Future[Outcome]]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # no more: what is handed over begins
                    running.add(pool.submit(_job, waiting.pop()))
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ExperimentError(
                "a process that trained was killed, for want of memory perhaps: fewer --jobs need "
                "less; what is trained is kept"
            ) from error
        finally:  # after an error or Ctrl-C as well: what is under way is of no use to anyone
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)


@functools.cache
def _shared() -> dict[str, Any]:
    return {}


def _begin_job(data: dict[str, Any], device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    backend.silence_fallback()
    _shared().update(data=data, device=device)


def _end_with_parent() -> None:
    """End this process with the one that began it, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _job(training: Training) -> Outcome:
    return train(training, _shared()["data"], _shared()["device"])


class _sharing_threads:  # noqa: N801 - a context manager, used as a function
    """While it lasts, processes that begin have their share of this one's threads."""

    def __init__(self, jobs: int) -> None:
        from gpubn.kernels.threads import get_num_threads

        self.threads = str(max(1, get_num_threads() // jobs))
        self.before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        for name in _THREADS:
            self.before[name] = os.environ.get(name)
            os.environ[name] = self.threads

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- Outcomes on disk -----------------------------------------------------------------------------


def _key(training: Training, digest: str) -> str:
    """Return the name of a training's file: of its settings and of the data."""
    text = json.dumps([dataclasses.asdict(training), digest], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _read(path: Path, training: Training) -> Outcome | None:
    """Return a saved outcome; None where there is none, or what is there is none."""
    try:
        return Outcome.from_dict(json.loads(path.read_text("utf-8")), training)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
