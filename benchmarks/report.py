"""What is written down: a row for each case, as it comes, and a summary at the end."""

from __future__ import annotations

import contextlib
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from benchmarks import shapes
from benchmarks.bench_optimizer import UPDATE
from benchmarks.bench_step import STEP
from benchmarks.harness import COPY, OURS, Case, Times
from benchmarks.layer import BOTH
from benchmarks.peers import PEERS

Row = dict[str, Any]

WHOLE = (BOTH, UPDATE, STEP)
"""The directions that the summary is of: all that a training step does of an op."""

COLUMNS = (
    *("op", "direction", "shape", "layout", "dtype", "buffers"),
    *(f"{who}_{what}" for who in (OURS, *PEERS) for what in ("us", "p20_us", "p80_us")),
    *("ratio", "best_peer", "bytes", "gb_per_s", "copy_us", "copy_gb_per_s", "of_copy", "per_s"),
)


class Table:
    """A CSV file with the environment on top, to which every row goes at once; or no file."""

    def __init__(self, path: Path | None, facts: Mapping[str, str], columns: Sequence[str]) -> None:
        self._path, self._columns = path, columns
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8")
            self._file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
            csv.DictWriter(self._file, columns).writeheader()
            self._file.flush()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            print(f"written to {self._path}", flush=True)

    def write(self, row: Row) -> None:
        """Add a row; columns that it lacks stay empty."""
        if self._file is not None:
            csv.DictWriter(self._file, self._columns).writerow(row)
            self._file.flush()


def row_of(case: Case, times: Mapping[str, Times], reuse: bool) -> Row:
    """Return what a case's times say."""
    ours = times[OURS].median
    row: Row = {
        "op": case.op,
        "direction": case.direction,
        "shape": shapes.name(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "buffers": "reused" if reuse else "fresh",
        "per_s": round(1 / ours, 1),
    }
    for who in (OURS, *PEERS):
        if who in times:
            for what, seconds in zip(("us", "p20_us", "p80_us"), times[who], strict=True):
                row[f"{who}_{what}"] = round(seconds * 1e6, 2)
    peers = {who: times[who].median for who in PEERS if who in times}
    if peers:
        best = min(peers, key=lambda who: peers[who])
        row |= {"ratio": round(peers[best] / ours, 3), "best_peer": best}
    if case.passes:
        needed, copy = case.passes * case.nbytes, times[COPY].median
        copy_speed = 2 * case.nbytes / copy
        row |= {
            "bytes": needed,
            "gb_per_s": round(needed / ours / 1e9, 2),
            "copy_us": round(copy * 1e6, 2),
            "copy_gb_per_s": round(copy_speed / 1e9, 2),
            "of_copy": round(needed / ours / copy_speed, 3),
        }
    return row


def heading() -> str:
    return (
        f"{'op':<23} {'direction':<16} {'shape':<15} {'layout':<6} {'gpubn µs (p20 - p80)':>30} "
        f"{'peer µs':>10} {'ratio':>6} {'GB/s':>7} {'of copy':>7}"
    )


def line(row: Row) -> str:
    """Return a row as it is printed: the best peer's time stands for all."""
    spread = f"{row['gpubn_us']:.1f} ({row['gpubn_p20_us']:.1f} - {row['gpubn_p80_us']:.1f})"
    peer = f"{row[row['best_peer'] + '_us']:.1f}" if "ratio" in row else ""
    cells = (
        f"{row['op']:<23} {row['direction']:<16} {short(row):<15} {row['layout']:<6} {spread:>30} "
        f"{peer:>10} {_number(row, 'ratio', 2):>6} {_number(row, 'gb_per_s', 1):>7} "
        f"{_number(row, 'of_copy', 2):>7}"
    )
    if row["direction"] == STEP:
        theirs = f", {row['best_peer']} {row['per_s'] / row['ratio']:.0f}" if peer else ""
        cells += f"  {row['per_s']:.0f} steps/s{theirs}"
    return cells.rstrip()


def short(row: Row) -> str:
    """Return a row's shape; of a training step, which has a network's, the batch."""
    shape: str = row["shape"]
    return f"batch {shape.partition('x')[0]}" if row["direction"] == STEP else shape


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each op: the geometric mean of the ratios to the best peer, and the worst.

    Of whole training passes only; nothing where no peer was timed.
    """
    whole = [row for row in rows if row["direction"] in WHOLE and "ratio" in row]
    if whole:
        yield "the best peer's time by gpubn's, geometric mean of each op's shapes:"
    for op in dict.fromkeys(row["op"] for row in whole):
        ratios = {f"{short(row)} {row['layout']}": row["ratio"] for row in whole if row["op"] == op}
        worst = min(ratios, key=lambda name: ratios[name])
        with contextlib.suppress(statistics.StatisticsError):  # a ratio that was rounded to 0
            mean = statistics.geometric_mean(ratios.values())
            yield f"  {op:<23} {mean:6.2f}   worst {ratios[worst]:.2f} at {worst}"


def _number(row: Row, name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else ""
