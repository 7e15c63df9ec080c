"""Events of a run for TensorBoard, by tensorboardX."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpubn.train.activations import KINDS, Activations

_SCALARS = {
    "loss": "loss/training",
    "train_accuracy": "accuracy/training",
    "val_accuracy": "accuracy/validation",
    "learning_rate": "learning rate",
}


class Events:
    """Writes a run's events to a folder.

    Parameters
    ----------
    folder : path
    iteration : int
        How many are done. Events of later ones, which a run wrote before it was killed, are hidden.
    """

    def __init__(self, folder: str | os.PathLike[str], iteration: int) -> None:
        library: Any = importlib.import_module("tensorboardX")
        self._writer = library.SummaryWriter(os.fspath(folder), purge_step=iteration + 1)

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.csv, and all that was written before, to disk."""
        for column, tag in _SCALARS.items():
            self._writer.add_scalar(tag, row[column], row["iteration"])
        self._writer.flush()

    def histograms(self, activations: Activations) -> None:
        """Write the last record of every layer."""
        iteration, row = activations.iterations[-1], activations.records[-1]
        names = [f"{kind}/{name}" for kind in KINDS for name in activations.names]
        for name, record in zip(names, row, strict=True):
            count = int(record.counts.sum())
            square = np.square(record.deviation) + np.square(record.mean)
            if count == 0 or not np.isfinite(square):  # nothing was finite, or it is too large
                continue
            edges = np.linspace(record.low, record.high, len(record.counts) + 1)
            self._writer.add_histogram_raw(
                name,
                min=record.low,
                max=record.high,
                num=count,
                sum=record.mean * count,
                sum_squares=float(square) * count,
                bucket_limits=edges[1:].tolist(),
                bucket_counts=record.counts.tolist(),
                global_step=iteration,
            )

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
