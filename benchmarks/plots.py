"""Charts of rows: speed by PyTorch's and by a copy's, shape by shape; and times against sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import COPY
from benchmarks.report import Row, short

# Okabe and Ito's colours, which those who see few colours can tell apart.
COLOURS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "forward+backward": "#222222",
    "test": "#009E73",
    "update": "#222222",
    "step": "#222222",
}
LINES = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7"),
    *("#56B4E9", "#D55E00", "#222222", "#999999"),
)
MARKERS = "os^Dv<>P"
GREY = "#666666"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}


def compare(path: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> list[Path]:
    """Draw every group of ops by itself, and return the files.

    One group is drawn to ``path``; of several each has its name put before the ending.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["op"].partition(" ")[0], []).append(row)
    drawn = []
    for group, members in groups.items():
        target = path.with_stem(f"{path.stem}-{group}") if len(groups) > 1 else path
        if _compare(target, group, members, facts):
            drawn.append(target)
    return drawn


def sizes(path: Path, series: Mapping[str, Mapping[int, float]], facts: Mapping[str, str]) -> None:
    """Draw times in µs against numbers of elements, a line for each op, both axes logarithmic."""
    plt = _pyplot()
    ops = {name: times for name, times in series.items() if name != COPY}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 6))
        for i, (name, times) in enumerate(ops.items()):
            axes.plot(
                [*times],
                [*times.values()],
                color=LINES[i % len(LINES)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3.5,
                linewidth=1.2,
                linestyle="--" if "backward" in name else "-",
                label=name,
            )
        if COPY in series:
            copy = series[COPY]
            axes.plot([*copy], [*copy.values()], ":", color=GREY, label="copy of as many bytes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(True)
        axes.set_xlabel("elements")
        axes.set_ylabel("µs, median")
        axes.legend()
        axes.set_title(f"Time against size: {_where(facts)}")
        _save(plt, figure, path)


def _compare(path: Path, group: str, rows: Sequence[Row], facts: Mapping[str, str]) -> bool:
    panels = [name for name in ("ratio", "of_copy") if any(name in row for row in rows)]
    if not panels:
        return False
    plt = _pyplot()
    labels = list(dict.fromkeys(map(_label, rows)))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            *(1, len(panels)),
            figsize=(2.5 + 4 * len(panels), 1.6 + 0.24 * len(labels)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, panel in zip(grid[0], panels, strict=True):
            for direction in directions:
                chosen = [row for row in rows if row["direction"] == direction and panel in row]
                axes.plot(
                    [row[panel] for row in chosen],
                    [labels.index(_label(row)) for row in chosen],
                    "o",
                    color=COLOURS.get(direction, GREY),
                    markersize=5,
                    alpha=0.9,
                    label=direction,
                )
            axes.axvline(1, color=GREY, linewidth=1)
            axes.grid(True)
            if panel == "ratio":
                axes.set_title("PyTorch's time / gpubn's (right of 1: gpubn is faster)")
                _ratio_axis(plt, axes, [row[panel] for row in rows if panel in row])
            else:
                axes.set_title("fraction of a copy's bandwidth")
                axes.set_xlim(left=0)
        first = grid[0][0]
        first.set_yticks(range(len(labels)), labels)
        first.set_ylim(len(labels) - 0.4, -0.6)
        figure.suptitle(
            f"{group}, {rows[0]['dtype']}: {_where(facts)}", x=0.01, ha="left", fontsize=11
        )
        if len(directions) > 1:
            handles, names = first.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower left", ncols=len(directions))
        _save(plt, figure, path)
    return True


def _ratio_axis(plt: Any, axes: Any, ratios: Sequence[float]) -> None:
    """Scale an axis by logarithms, so that twice as fast and half as fast are as far from 1."""
    low, high = min(0.8, *ratios) / 1.15, max(1.25, *ratios) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(plt.NullLocator())


def _label(row: Row) -> str:
    rule = row["op"].partition(" ")[2]
    layout = row["layout"] if row["layout"] in ("NCHW", "NHWC") else ""
    return " ".join(part for part in (rule, short(row), layout) if part)


def _where(facts: Mapping[str, str]) -> str:
    name = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    return f"{name}, commit {facts['commit']}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"drawn to {path}", flush=True)
