"""What trainings left behind: histories, their means over seeds, and a table of all of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpubn.experiments.definitions import Training

COLUMNS = (
    "experiment",
    "series",
    "weight_scale",
    "batch_size",
    "seed",
    "measure",
    "step",
    "value",
)
"""Of the table. The step counts iterations from 1 for a loss, epochs from 0 for an accuracy, where
0 is the first iteration."""

FINAL_LOSSES = 100
"""Iterations, the last ones, whose mean is a training's final loss."""


@dataclass(frozen=True)
class Outcome:
    """What came of one training.

    Attributes
    ----------
    training : Training
    losses : list of float
        One an iteration, those that were finite; none where the first was not.
    train_accuracies, val_accuracies : list of float
        After the first iteration and every epoch.
    diverged : int or None
        The iteration, from 1, at which the loss was not finite, and training stopped.
    seconds : float
    device : str
    """

    training: Training
    losses: list[float]
    train_accuracies: list[float]
    val_accuracies: list[float]
    diverged: int | None
    seconds: float
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], training: Training) -> Outcome:
        """Return what ``as_dict`` came from; KeyError or TypeError for anything else."""
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name != "training"}
        losses, *accuracies = (
            fields[key] for key in ("losses", "train_accuracies", "val_accuracies")
        )
        for history in (losses, *accuracies):
            if not isinstance(history, list) or not all(type(v) in (int, float) for v in history):
                raise TypeError("a history is no list of numbers")
        if not all(accuracies) or not isinstance(fields["seconds"], int | float):
            raise TypeError("there is no accuracy, or no time")
        if values["training"] != json.loads(json.dumps(asdict(training))):
            raise TypeError("it is of another training")
        return cls(training=training, **fields)

    def measure(self, name: str) -> float:
        """Return one number of a training: a key of ``figures.MEASURES`` that is no history."""
        if name == "final_loss":
            return _mean(self.losses[-FINAL_LOSSES:]) if self.diverged is None else math.inf
        kind, _, which = name.partition("_")
        history = self.train_accuracies if which == "train_accuracy" else self.val_accuracies
        assert kind == "best"
        return max(history)


@dataclass(frozen=True)
class Summary:
    """What a series ended with: means over the seeds."""

    train_accuracy: float
    val_accuracy: float
    best_val_accuracy: float

    @property
    def gap(self) -> float:
        """Training accuracy less validation accuracy."""
        return self.train_accuracy - self.val_accuracy


@dataclass(frozen=True)
class Results:
    """All outcomes of an experiment.

    Attributes
    ----------
    outcomes : sequence of Outcome
    chance : float
        The accuracy of guessing.
    """

    outcomes: Sequence[Outcome]
    chance: float

    @property
    def series(self) -> list[str]:
        """The series, in the order of the trainings."""
        return list(dict.fromkeys(outcome.training.series for outcome in self.outcomes))

    @property
    def epochs(self) -> int:
        """Epochs of the longest training."""
        return max(outcome.training.num_epochs for outcome in self.outcomes)

    def members(self, series: str) -> list[Outcome]:
        """Return the outcomes of a series."""
        return [outcome for outcome in self.outcomes if outcome.training.series == series]

    def of(self, series: str) -> Summary:
        """Return what a series ended with."""
        members = self.members(series)
        return Summary(
            _mean([outcome.train_accuracies[-1] for outcome in members]),
            _mean([outcome.val_accuracies[-1] for outcome in members]),
            _mean([max(outcome.val_accuracies) for outcome in members]),
        )

    def first_epoch(self, series: str, accuracy: float) -> int | None:
        """Return the first epoch after which a series' mean training accuracy was this or above."""
        means = self.history(series, "train_accuracy").mean(axis=0)
        above = np.flatnonzero(means >= accuracy)
        return int(above[0]) if len(above) else None

    def history(self, series: str, measure: str) -> NDArray[np.float64]:
        """Return the histories of a series, ``(seeds, steps)``.

        Behind the end of one that diverged a loss is NaN, and an accuracy stays what it was.
        """
        names = {"train_accuracy": "train_accuracies", "val_accuracy": "val_accuracies"}
        histories = [getattr(o, names.get(measure, "losses")) for o in self.members(series)]
        values = np.full((len(histories), max(map(len, histories))), np.nan)
        for row, history in zip(values, histories, strict=True):
            row[: len(history)] = history
            if measure != "loss":
                row[len(history) :] = history[-1]
        return values

    def across(self, series: str, field: str, measure: str) -> dict[float, NDArray[np.float64]]:
        """Return the seeds' values of a measure for each value of a field of ``Training``."""
        values: dict[float, list[float]] = {}
        for outcome in self.members(series):
            at = getattr(outcome.training, field)
            values.setdefault(at, []).append(outcome.measure(measure))
        return {at: np.array(found) for at, found in sorted(values.items())}

    def best_train_accuracies(self, field: str) -> dict[str, dict[float, float]]:
        """Return for each series the mean best training accuracy at each value of a field."""
        return {
            series: {
                at: float(found.mean())
                for at, found in self.across(series, field, "best_train_accuracy").items()
            }
            for series in self.series
        }

    def table(self, experiment: str) -> bytes:
        """Return a CSV file of ``COLUMNS``: every loss and accuracy in a row of its own."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for outcome in self.outcomes:
            training = outcome.training
            setting = (training.series, training.weight_scale, training.batch_size, training.seed)
            for measure, history, first in (
                ("loss", outcome.losses, 1),
                ("train_accuracy", outcome.train_accuracies, 0),
                ("val_accuracy", outcome.val_accuracies, 0),
            ):
                for step, value in enumerate(history, first):
                    writer.writerow((experiment, *setting, measure, step, value))
        return text.getvalue().encode()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
