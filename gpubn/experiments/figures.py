"""Figures of experiments, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpubn.experiments.definitions import Experiment, Figure
from gpubn.experiments.results import Results

# Okabe and Ito's colours, which those who see few colours can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<"
STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
}


class Measure(NamedTuple):
    """What a plot shows: its title, its vertical axis, and whether that is in per cent."""

    title: str
    label: str
    percent: bool


MEASURES = {
    "loss": Measure("Training loss", "loss", False),
    "train_accuracy": Measure("Training accuracy", "accuracy in %", True),
    "val_accuracy": Measure("Validation accuracy", "accuracy in %", True),
    "best_train_accuracy": Measure("Best training accuracy", "accuracy in %", True),
    "best_val_accuracy": Measure("Best validation accuracy", "accuracy in %", True),
    "final_loss": Measure("Mean loss of the last 100 iterations", "loss", False),
}
FIELDS = {"weight_scale": "standard deviation of the initial weights"}

_SMOOTH = 20  # points that a line of losses is smoothed to, about


def draw(experiment: Experiment, figure: Figure, results: Results, source: str) -> bytes:
    """Draw a figure: a line for each series, the mean of its seeds, in the band that they span."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(dict(STYLE)):
        # Neither pyplot nor a global backend: drawing must not touch the caller's figures.
        canvas = Canvas(figsize=(3.7 * len(figure.measures) + 0.6, 3.5), dpi=140)
        canvas.set_layout_engine("constrained")
        agg = FigureCanvasAgg(canvas)
        plots = np.atleast_1d(canvas.subplots(1, len(figure.measures)))
        for axes, name in zip(plots, figure.measures, strict=True):
            for i, series in enumerate(results.series):
                look = {"color": COLOURS[i % len(COLOURS)], "label": series}
                if figure.across == "time":
                    _history(axes, results, series, name, look)
                else:
                    look["marker"] = MARKERS[i % len(MARKERS)]
                    _across(axes, results, series, name, figure.across, look)
            measure = MEASURES[name]
            axes.set(title=measure.title, ylabel=measure.label)
        handles, labels = plots[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        canvas.suptitle(f"{experiment.title} · {source}", x=0.01, ha="left", fontsize=11, parse_math=False)
        file = io.BytesIO()
        agg.print_png(file)
    return file.getvalue()


def _history(axes: Any, results: Results, series: str, name: str, look: dict[str, Any]) -> None:
    values = results.history(series, name)
    if name == "loss":
        axes.set_xlabel("iteration")
        steps, means = _smoothed(values)
        if values.shape[1] > 2 * _SMOOTH:
            axes.plot(
                np.arange(1, values.shape[1] + 1), values[0], lw=0.5, alpha=0.3, color=look["color"]
            )
        _line(axes, steps, means, look)
        return
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    marker = {"marker": "."} if values.shape[1] <= 30 else {}
    _line(axes, np.arange(values.shape[1]), 100 * values, {**look, **marker})


def _smoothed(values: Any) -> tuple[Any, Any]:
    """Return the middles of stretches of iterations, and the mean losses of these."""
    count = max(1, values.shape[1] // _SMOOTH)
    ends = range(count, values.shape[1] + 1, count)
    means = [values[:, end - count : end].mean(axis=1) for end in ends]
    return np.array([end - (count - 1) / 2 for end in ends]), np.array(means).T


def _across(
    axes: Any, results: Results, series: str, name: str, field: str, look: dict[str, Any]
) -> None:
    found = results.across(series, field, name)
    values = np.array(list(found.values())).T
    if MEASURES[name].percent:
        values = 100 * values
    else:
        axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlabel(FIELDS[field])
    _line(axes, np.array(list(found)), values, look)


def _line(axes: Any, steps: Any, values: Any, look: dict[str, Any]) -> None:
    """Draw the mean of the seeds' values ``(seeds, steps)``, and what they span."""
    values = np.where(np.isfinite(values), values, np.nan)
    axes.plot(steps, values.mean(axis=0), **look)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)
