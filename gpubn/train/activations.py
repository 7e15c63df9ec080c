"""What a network's layers put out over training: mean, deviation and histogram, and of gradients.

With them one sees what batch normalization is about: how the inputs of a layer wander while those
before it learn.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpubn.backend import Array, to_host
from gpubn.nn.affine import Affine
from gpubn.nn.layer import Layer
from gpubn.nn.norms import BatchNorm, LayerNorm
from gpubn.nn.sequential import Sequential

BINS = 64
RECORDS = 100
"""Iterations of a run that are recorded, about."""

KINDS = ("output", "gradient")
"""Of a layer: what it puts out, and the loss's gradient with respect to that."""

_SUMMARY = ("mean", "deviation", "low", "high")


class Record(NamedTuple):
    """The values of one array: mean and standard deviation, and a histogram between two ends.

    ``counts`` are of ``BINS`` equal bins from ``low`` to ``high``, the smallest and the largest
    value; where these are too near to each other, or too far apart, all are in the first bin.
    Infinities and NaN are left out.
    """

    mean: float
    deviation: float
    low: float
    high: float
    counts: NDArray[np.int64]

    @staticmethod
    def of(array: Array) -> Record:
        """Return the record of an array, on whichever device."""
        values = np.asarray(to_host(array), np.float64).ravel()
        values = values[np.isfinite(values)]
        if not len(values):
            return Record(np.nan, np.nan, np.nan, np.nan, np.zeros(BINS, np.int64))
        low, high = float(values.min()), float(values.max())
        counts = np.zeros(BINS, np.int64)
        with np.errstate(over="ignore", invalid="ignore"):  # of a run that is about to diverge
            mean, deviation = float(values.mean()), float(values.std())
            try:
                if low == high:
                    raise ValueError("one value")
                counts, _ = np.histogram(values, BINS, (low, high))
            except ValueError:  # no bins between neighbours, or of an infinite width
                counts[0] = len(values)
        return Record(mean, deviation, low, high, counts)


class Activations:
    """Records the outputs and gradients of a network's layers in some iterations of training.

    Parameters
    ----------
    layers : Sequential
    iterations : int
        Of the whole training; of them the first and then each ``iterations // RECORDS``-th is
        recorded.

    Attributes
    ----------
    names : list of str
        The layers, such as "affine 1".
    iterations : list of int
        Those that were recorded, counted from 1.
    records : list of list of Record
        For each iteration the records of each layer's output, and then of each layer's gradient.
    """

    def __init__(self, layers: Sequential, iterations: int) -> None:
        self._layers = list(layers)
        self._every = max(1, iterations // RECORDS)
        self._seen: dict[tuple[int, str], Record] = {}
        self.names = _names(self._layers)
        self.iterations: list[int] = []
        self.records: list[list[Record]] = []

    def before(self, iteration: int) -> None:
        """Look on at an iteration, if it is one that is recorded; ``after`` it looks away."""
        wanted = iteration == 1 or iteration % self._every == 0
        self._seen.clear()
        for i, layer in enumerate(self._layers):
            layer.observer = self._observer(i) if wanted else None

    def after(self, iteration: int) -> bool:
        """Keep what was seen in an iteration; return whether anything was."""
        for layer in self._layers:
            layer.observer = None
        if not self._seen:
            return False
        places = [(i, kind) for kind in KINDS for i in range(len(self._layers))]
        self.iterations.append(iteration)
        self.records.append([self._seen[place] for place in places])
        self._seen.clear()
        return True

    def _observer(self, i: int) -> Any:
        def observe(layer: Layer, kind: str, array: Array) -> None:
            self._seen[i, kind] = Record.of(array)

        return observe

    # --- As arrays --------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Any]:
        """Return all records, axes (iteration, kind, layer), as ``activations.npz`` has them."""
        shape = (len(self.records), len(KINDS), len(self.names))
        arrays: dict[str, Any] = {"iterations": np.array(self.iterations, np.int64)}
        for name in _SUMMARY:
            values = [[getattr(record, name) for record in row] for row in self.records]
            arrays[name] = np.array(values, np.float64).reshape(shape)
        counts = [[record.counts for record in row] for row in self.records]
        arrays["counts"] = np.array(counts, np.int64).reshape(*shape, BINS)
        return arrays

    def load(self, arrays: Mapping[str, Any]) -> None:
        """Go on from what ``arrays`` returned."""
        self.iterations = np.asarray(arrays["iterations"]).tolist()
        count = len(self.iterations)
        places = len(KINDS) * len(self.names)
        summary = [np.asarray(arrays[name]).reshape(count, places) for name in _SUMMARY]
        counts = np.asarray(arrays["counts"]).reshape(count, places, BINS)
        mean, deviation, low, high = (values.tolist() for values in summary)
        self.records = [
            [
                Record(mean[t][j], deviation[t][j], low[t][j], high[t][j], counts[t, j])
                for j in range(counts.shape[1])
            ]
            for t in range(count)
        ]

    def as_npz(self) -> bytes:
        """Return an .npz file of the arrays, and of the layers' names and the kinds."""
        file = io.BytesIO()
        named: dict[str, Any] = {"layers": np.array(self.names), "kinds": np.array(KINDS)}
        np.savez_compressed(file, **named, **self.arrays())
        return file.getvalue()

    # --- As a picture -----------------------------------------------------------------------------

    def draw(self, title: str) -> bytes:
        """Draw what hidden layers are given, put out, and get back, over training; return a PNG.

        A column for each hidden layer. Dark is where many values are (by the root of their share);
        the lines are the mean and one deviation to either side.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        arrays = self.arrays()
        affines = [i for i, layer in enumerate(self._layers) if isinstance(layer, Affine)]
        hidden = list(itertools.pairwise(affines))
        rows = (
            ("the affine layer's output", 0, [first for first, _ in hidden]),
            ("the hidden layer's output", 0, [end - 1 for _, end in hidden]),
            ("gradient of the affine layer's output", 1, [first for first, _ in hidden]),
        )
        columns = max(1, len(hidden))
        figure = Figure(figsize=(2.3 * columns + 1.2, 6.6), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
        plots = figure.subplots(len(rows), columns, sharex=True, squeeze=False)
        for line, (label, kind, layers) in zip(plots, rows, strict=True):
            line[0].set_ylabel(label, fontsize=8)
            for axes, layer in zip(line, layers, strict=False):
                _draw(axes, arrays, kind, layer)
        for column in range(len(hidden)):
            plots[0][column].set_title(f"hidden layer {column + 1}", fontsize=9)
            plots[-1][column].set_xlabel("iteration", fontsize=8)
        file = io.BytesIO()
        canvas.print_png(file)
        return file.getvalue()


def _draw(axes: Any, arrays: Mapping[str, NDArray[Any]], kind: int, layer: int) -> None:
    at = arrays["iterations"]
    mean, deviation, low, high = (arrays[name][:, kind, layer] for name in _SUMMARY)
    axes.tick_params(labelsize=7)
    if not np.isfinite(mean).all():
        axes.text(0.5, 0.5, "not finite", transform=axes.transAxes, ha="center")
        return
    bottom = max(float(low.min()), float((mean - 4 * deviation).min()))
    top = min(float(high.max()), float((mean + 4 * deviation).max()))
    if not top > bottom:
        bottom, top = bottom - 1, top + 1
    edges = np.linspace(bottom, top, 81)
    counts = arrays["counts"][:, kind, layer]
    shares = np.array(
        [rebinned(c, lo, hi, edges) for c, lo, hi in zip(counts, low, high, strict=True)]
    )
    # Many values are 0 exactly, behind a ReLU: all others would be pale beside them.
    shares = np.sqrt(np.minimum(shares / np.quantile(shares[shares > 0], 0.9), 1))
    middles = np.concatenate([[at[0] - 0.5], (at[1:] + at[:-1]) / 2, [at[-1] + 0.5]])
    axes.pcolormesh(middles, edges, shares.T, cmap="Blues", rasterized=True)
    axes.plot(at, mean, color="#D55E00", lw=1.2)
    for sign in (-1, 1):
        axes.plot(at, mean + sign * deviation, color="#D55E00", lw=0.7, ls="--")
    axes.set_ylim(bottom, top)


def rebinned(
    counts: NDArray[np.int64], low: float, high: float, edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the shares of a histogram's values that lie between other edges."""
    below = np.concatenate([[0], np.cumsum(counts)]) / max(1, counts.sum())
    return np.diff(np.interp(edges, np.linspace(low, high, len(below)), below))


def _names(layers: list[Layer]) -> list[str]:
    """Return names by what a layer is and the affine layer that it follows."""
    names, number = [], 0
    for layer in layers:
        number += isinstance(layer, Affine)
        what = type(layer).__name__.lower()
        if isinstance(layer, BatchNorm | LayerNorm):
            what += " relu" if getattr(layer, "relu", False) else ""
        names.append(f"{what} {number}")
    return names
