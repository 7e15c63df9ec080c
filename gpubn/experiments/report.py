"""What a person reads: tables, figures, and one page with all of it."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gpubn.experiments.definitions import Experiment, Training
from gpubn.experiments.figures import draw
from gpubn.experiments.results import Results
from gpubn.experiments.running import Plan
from gpubn.train.checkpoint import atomic_write

PAGE = "report.html"

_SETTINGS: tuple[tuple[str, Callable[[Training], str]], ...] = (
    ("hidden layers", lambda t: " ".join(map(str, t.hidden_dims))),
    ("weight scale", lambda t: f"{t.weight_scale:.3g}"),
    ("update rule", lambda t: f"{t.update_rule}, {t.learning_rate:.3g}"),
    ("epochs", lambda t: str(t.num_epochs)),
    ("batch size", lambda t: str(t.batch_size)),
    ("images", lambda t: f"{t.images:,}"),
)


def write(
    folder: Path, plan: Plan, results: Mapping[str, Results], facts: Mapping[str, str]
) -> list[Path]:
    """Write every experiment's table and figures, and the page; return the files, the page last."""
    files, sections = [], []
    for experiment in plan.experiments:
        found = results[experiment.name]
        table = folder / f"{experiment.name}.csv"
        atomic_write(table, found.table(experiment.name))
        files.append(table)
        images = []
        for figure in experiment.figures:
            image = draw(experiment, figure, found, plan.data)
            ending = "" if figure.name == experiment.name else f"-{figure.name}"
            path = folder / f"{experiment.name}{ending}.png"
            atomic_write(path, image)
            files.append(path)
            images.append(image)
        sections.append(_section(experiment, found, images))
    page = folder / PAGE
    atomic_write(page, _page(plan, sections, facts).encode())
    return [*files, page]


def _section(experiment: Experiment, results: Results, images: list[bytes]) -> str:
    text = html.escape
    figures = "".join(
        f'<img alt="{text(experiment.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for image in images
    )
    diverged = sum(outcome.diverged is not None for outcome in results.outcomes)
    count = len(results.outcomes)
    seconds = sum(outcome.seconds for outcome in results.outcomes)
    devices = sorted({outcome.device for outcome in results.outcomes})
    note = f"{count} training{'s' if count > 1 else ''} on {', '.join(devices)}, {seconds:.1f} s"
    if diverged:
        note += f"; of {diverged} the loss became infinite or NaN, and training stopped there"
    return f"""<section id="{experiment.name}">
<h2>{text(experiment.title)}</h2>
<p class="question">{text(experiment.question)}</p>
<p class="finding">{text(experiment.finding(results))}</p>
{figures}
<details><summary>{text(note)}</summary>{_settings(results)}</details>
</section>
"""


def _settings(results: Results) -> str:
    """Return a table of the settings of each series; what its trainings do not share is a range."""
    rows = []
    for series in results.series:
        trainings = [outcome.training for outcome in results.members(series)]
        cells = [series, *(_range(trainings, setting) for _, setting in _SETTINGS)]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("series", *(name for name, _ in _SETTINGS)))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _range(trainings: list[Training], setting: Callable[[Training], str]) -> str:
    values = list(dict.fromkeys(setting(training) for training in trainings))
    return values[0] if len(values) == 1 else f"{len(values)} from {values[0]} to {values[-1]}"


def _page(plan: Plan, sections: list[str], facts: Mapping[str, str]) -> str:
    facts = {**facts, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    links = " · ".join(
        f'<a href="#{experiment.name}">{html.escape(experiment.title)}</a>'
        for experiment in plan.experiments
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gpubn: experiments on {html.escape(plan.data)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.25rem; margin: 3rem 0 0; }}
.question {{ color: #666; margin: 0; }} .finding {{ font-weight: 600; max-width: 48rem; }}
img {{ max-width: 100%; display: block; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 0.9rem; }}
dt {{ color: #666; }} dd {{ margin: 0; }}
details {{ font-size: 0.85rem; color: #444; overflow-x: auto; }}
table {{ border-collapse: collapse; margin-top: 0.5rem; }}
th, td {{ text-align: left; padding: 0.15rem 0.8rem 0.15rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; }}
</style>
</head>
<body>
<h1>Experiments on {html.escape(plan.data)}</h1>
<nav>{links}</nav>
<dl>{items}</dl>
{"".join(sections)}</body>
</html>
"""
