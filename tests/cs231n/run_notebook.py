"""Run a solved notebook of CS231n on gpubn, and compare what it prints with what it printed.

    python tests/cs231n/run_notebook.py BatchNormalization.ipynb [--data DIR_OR_NPZ] [--device D]
        [--arrays cupy]

Imports of ``cs231n`` become ``gpubn.cs231n``, magics and cells for Colab are left out. With
``--arrays cupy`` the notebook's ``np`` is CuPy. Each cell's numbers are shown beside the recorded
ones; relative errors, which are rounding, are expected below 1e-4 and not equal. Exits with 1 where
a cell fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def source_of(cell: dict[str, Any], arrays: str) -> str:
    text = "".join(cell["source"])
    if "google.colab" in text:
        return ""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    text = re.sub(r"\b(from|import) cs231n\b", r"\1 gpubn.cs231n", "\n".join(lines))
    return text.replace("import numpy as np", f"import {arrays} as np")


def numbers(text: str) -> list[float]:
    """The numbers with a point, of lines that show no error or time."""
    lines = [s for s in text.splitlines() if not re.search("error|difference|speedup|Warning", s)]
    return [float(found) for found in NUMBER.findall("\n".join(lines))]


def agree(ours: list[float], theirs: list[float]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours)} numbers, recorded were {len(theirs)}" if theirs else ""
    close = sum(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=2e-6) for a, b in zip(ours, theirs, strict=True)
    )
    return f"{close} of {len(ours)} numbers as recorded" if ours else ""


def errors(text: str) -> list[float]:
    return [float(v) for v in re.findall(r"(?:error|difference): +(\S+)", text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--data", help="CIFAR-10's batches, or an .npz file")
    parser.add_argument("--device", help="where networks are: auto, cpu, cuda")
    parser.add_argument("--arrays", default="numpy", choices=("numpy", "cupy"))
    parser.add_argument("--cells", type=int, help="run only the first so many code cells")
    options = parser.parse_args()
    if options.data:
        os.environ["GPUBN_CIFAR10"] = options.data
    import matplotlib

    matplotlib.use("Agg")
    if options.device:
        import gpubn

        gpubn.use(options.device)
    room: dict[str, Any] = {"__name__": "__main__"}
    failed = 0
    cells = json.loads(options.notebook.read_text("utf-8"))["cells"]
    for i, cell in enumerate([c for c in cells if c["cell_type"] == "code"][: options.cells]):
        text = source_of(cell, options.arrays)
        if not text.strip():
            continue
        told = io.StringIO()
        started = time.perf_counter()
        try:
            with contextlib.redirect_stdout(told):
                exec(compile(text, f"cell {i}", "exec"), room)
        except Exception:
            failed += 1
            print(told.getvalue(), traceback.format_exc(), sep="\n")
        recorded = "".join("".join(o.get("text", [])) for o in cell.get("outputs", []))
        worst = max(errors(told.getvalue()), default=None)
        note = [agree(numbers(told.getvalue()), numbers(recorded))]
        note += [] if worst is None else [f"largest error {worst:.2g}"]
        first = next((s for s in text.splitlines() if s.strip()), "")
        seconds = time.perf_counter() - started
        print(f"cell {i:2} {seconds:6.1f} s  {'; '.join(filter(None, note)):40} {first[:60]}")
    print(f"{failed} cells failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
