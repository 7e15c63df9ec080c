"""What a run of parity says: a header, a table with a row for each operation, a verdict, JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from gpubn.testing.parity import contestants as who
from gpubn.testing.parity.cases import Case, missing_dtypes
from gpubn.testing.parity.comparison import REFERENCE, Finding, Plan, Row
from gpubn.testing.parity.contestants import Contestants
from gpubn.testing.parity.operations import OPERATIONS

_OP = max(map(len, OPERATIONS))


def environment(contestants: Contestants, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what was compared with what, and where."""
    return {
        "versions": dict(versions),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": {"cpu": platform.processor() or platform.machine()}
        | {device.name: who.cuda_name(device) for device in contestants.devices},
        "not used": contestants.unusable | missing_dtypes(),
        "threads": [1, *who.THREADS],
        "instruction sets": {
            who.own_instruction_set(): "this process",
            **who.other_instruction_sets(),
        },
        "contestants": list(contestants.names),
    }


def header(environment: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the lines that stand before the table."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    devices = ", ".join(f"{name} ({what})" for name, what in environment["devices"].items())
    compiled = [f"{name} ({what})" for name, what in environment["instruction sets"].items()]
    if len(compiled) == 1:
        compiled.append("no other to compare with here")
    return [
        f"versions {versions}, on {environment['platform']}",
        f"devices  {devices}",
        *(f"{name:8} cannot be used: {reason}" for name, reason in environment["not used"].items()),
        f"threads  {', '.join(map(str, environment['threads']))}",
        f"compiled for {', '.join(compiled)}",
        f"cases    {plan.count:,}; the first run compiles kernels, for a minute or so",
    ]


def table_head() -> list[str]:
    """Return the table's first lines."""
    return [
        "",
        "apart: the largest distance from the CPU with one thread, in units in the last place;",
        "    0: the same bits, also with channels last, and step by step instead of in one pass",
        "from float64: the largest error, in those units, and what is accepted; -: no reference",
        "",
        f"{'op':{_OP}}  {'cases':>5}  {'apart':>5}  {'from float64':14}  worst case",
    ]


def table_row(row: Row) -> str:
    """Return an operation's line of the table."""
    apart = "-" if row.apart is None else _units(row.apart.distance)
    off = "-" if row.off is None else f"{row.off.distance:.3g} of {row.off.bound:g}"
    last = [_worst(row.worst)] if row.worst else []
    last += [f"ERROR {error.contestant}, seed {error.case.seed}" for error in row.errors]
    return f"{row.op:{_OP}}  {row.cases:5}  {apart:>5}  {off:14}  {'; '.join(last)}".rstrip()


def _worst(finding: Finding) -> str:
    whose = "" if finding.contestant == REFERENCE else f" of {finding.contestant}"
    broken = "BROKEN " if finding.failed else ""
    return f"{broken}{finding.case}, seed {finding.case.seed}: {finding.result}{whose}"


def _units(distance: float) -> str:
    return "inf" if math.isinf(distance) else f"{distance:.0f}"


def verdict(environment: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Return the lines after the table: what was shown, or how to see again what broke."""
    results, values = (sum(getattr(row, name) for row in rows) for name in ("results", "values"))
    broken = [row.op for row in rows if row.failures]
    if broken:
        outcome = f"the contract is BROKEN by {', '.join(broken)}. To see the worst cases again:"
    elif all(row.same for row in rows):
        outcome = "the same bits everywhere"
    else:
        outcome = "the same bits where there were any, but there were ERRORS:"
    lines = ["", f"{results:,} results of {values:,} values compared: {outcome}"]
    lines += [f"  {row.worst.case.command()}" for row in rows if row.failures and row.worst]
    for error in (error for row in rows for error in row.errors):
        lines += [f"ERROR: {line}" for line in str(error).splitlines()[:1]]
        lines += [f"  {line}" for line in str(error).splitlines()[1:]]
    lines.append(_against_float64(rows))
    if list(environment["devices"]) == ["cpu"]:
        lines.append("no CUDA device took part")
    return lines


def _against_float64(rows: Sequence[Row]) -> str:
    referred, cases = (sum(getattr(row, name) for row in rows) for name in ("referred", "cases"))
    if not referred:
        return "no case was compared with float64: of these values there is no reference"
    beyond = any(failure.contestant == REFERENCE for row in rows for failure in row.failures)
    within = "some BEYOND their bounds" if beyond else "all within their bounds"
    return f"{referred:,} of {cases:,} cases compared with float64: {within}"


def as_json(environment: Mapping[str, Any], rows: Sequence[Row]) -> bytes:
    """Return all of a run as JSON; an infinite distance is the text "inf"."""
    content = {
        "environment": environment,
        "same": all(row.same for row in rows),
        "operations": [_row(row) for row in rows],
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _row(row: Row) -> dict[str, Any]:
    return {
        "op": row.op,
        "cases": row.cases,
        "results": row.results,
        "values": row.values,
        "apart": _finding(row.apart),
        "from float64": _finding(row.off),
        "worst": _finding(row.worst),
        "failures": [_finding(failure) for failure in row.failures],
        "errors": [
            {
                **_case(error.case),
                "contestant": error.contestant,
                "reason": error.reason,
            }
            for error in row.errors
        ],
    }


def _finding(finding: Finding | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {
        **_case(finding.case),
        "contestant": finding.contestant,
        "result": finding.result,
        "distance": finding.distance if math.isfinite(finding.distance) else "inf",
        "bound": finding.bound,
    }


def _case(case: Case) -> dict[str, Any]:
    return {
        "seed": case.seed,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "kind": case.kind,
        "command": case.command(),
    }
