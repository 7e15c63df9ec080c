"""The run: every case by every contestant, compared bit for bit and with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubn.testing.devices import ulp_distance
from gpubn.testing.parity.cases import Case, missing_dtypes
from gpubn.testing.parity.contestants import ContestantFailed, Contestants, Results
from gpubn.testing.parity.operation import Held, same_as
from gpubn.testing.parity.operations import OPERATIONS, cases
from gpubn.testing.tolerance import BOUNDS, ulp_error

REFERENCE = "float64 reference"

RANDOM = 100
"""How many random cases of each operation a full run adds to the grid."""


@dataclass(frozen=True)
class Plan:
    """Which cases run.

    Attributes
    ----------
    seeds : mapping of str to range
        The cases of every operation.
    """

    seeds: Mapping[str, range]

    @classmethod
    def of(
        cls, ops: Sequence[str] | None = None, seed: int | None = None, *, quick: bool = False
    ) -> Plan:
        """Return the cases of these operations, by default of all, or one case of each.

        Without ``quick`` these are the grid's, and ``RANDOM`` ones beyond it.

        Raises
        ------
        ValueError
            There is no such operation, or the seed is negative, or stands without an operation or
            beside ``quick``.
        """
        for op in ops or ():
            if op not in OPERATIONS:
                raise ValueError(f"op is {op!r}, expected one of {', '.join(OPERATIONS)}")
        if seed is None:
            chosen = dict.fromkeys(ops) if ops else OPERATIONS
            sizes = {op: len(OPERATIONS[op].grid(quick=quick)) for op in chosen}
            return cls({op: range(size + RANDOM * (not quick)) for op, size in sizes.items()})
        if not ops:
            raise ValueError(f"seed is {seed} without an operation, expected --op OP beside it")
        if quick:
            raise ValueError("quick is set beside a seed, expected one of the two")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected the number of a case, at least 0")
        for case in (OPERATIONS[op].case(seed) for op in ops):
            if case.dtype in missing_dtypes():
                why = missing_dtypes()[case.dtype]
                raise ValueError(f"seed {seed} of {case.op} is of {case.dtype}: {why}")
        return cls(dict.fromkeys(ops, range(seed, seed + 1)))

    @property
    def count(self) -> int:
        """How many cases there are."""
        return sum(1 for op, seeds in self.seeds.items() for _ in cases(op, seeds))


@dataclass(frozen=True)
class Finding:
    """How far one result of a case lay from another computation of it.

    Attributes
    ----------
    case : Case
    contestant : str
        Who differed from the CPU with one thread, perhaps itself in a result that was computed in
        another way; or REFERENCE.
    result : str
    distance : float
        From a contestant, units in the last place between the two; 0 is the same bits. From the
        reference, units of the last place at the result's scale.
    bound : float
        The largest distance that is accepted: 0 from a contestant.
    """

    case: Case
    contestant: str
    result: str
    distance: float
    bound: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the distance is more than is accepted."""
        return not self.distance <= self.bound

    @property
    def excess(self) -> float:
        """The distance as a fraction of the bound."""
        if self.distance == 0:
            return 0.0
        return self.distance / self.bound if self.bound else math.inf


@dataclass
class Row:
    """What became of an operation.

    Attributes
    ----------
    op : str
    cases, results, values : int
        How many cases ran, and how many results and single values of them were compared.
    referred : int
        How many cases were compared with the float64 reference.
    apart : Finding, optional
        Where two contestants differed most.
    off : Finding, optional
        Where the distance to the reference was the largest part of its bound.
    failures : list of Finding
        All that differed, or left their bounds.
    errors : list of ContestantFailed
        Who could not compute what.
    """

    op: str
    cases: int = 0
    results: int = 0
    values: int = 0
    referred: int = 0
    apart: Finding | None = None
    off: Finding | None = None
    failures: list[Finding] = field(default_factory=list)
    errors: list[ContestantFailed] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether all was compared, with the same bits and within its bounds."""
        return not self.failures and not self.errors

    def compared(self, finding: Finding) -> None:
        """Count a comparison between contestants."""
        if self.apart is None or finding.distance > self.apart.distance:
            self.apart = finding
        self._keep(finding)

    def held(self, finding: Finding) -> None:
        """Count a comparison with the reference."""
        if self.off is None or (finding.excess, finding.distance) > (
            self.off.excess,
            self.off.distance,
        ):
            self.off = finding
        self._keep(finding)

    def _keep(self, finding: Finding) -> None:
        if finding.failed:
            self.failures.append(finding)

    @property
    def worst(self) -> Finding | None:
        """The case to look at: bits that differ, else the one that is furthest from float64."""
        return self.apart if self.apart is not None and self.apart.failed else self.off


def run(
    plan: Plan,
    contestants: Contestants,
    on_case: Callable[[str], None],
    on_row: Callable[[Row], None],
) -> list[Row]:
    """Run the plan's cases, one after another; only one case's results are in memory.

    ``on_case`` is called with the operation after every case, ``on_row`` after every operation.
    """
    rows = []
    for op, seeds in plan.seeds.items():
        row = Row(op)
        for case in cases(op, seeds):
            _run_case(case, contestants, row)
            on_case(op)
        on_row(row)
        rows.append(row)
    return rows


def _run_case(case: Case, contestants: Contestants, row: Row) -> None:
    operation = OPERATIONS[case.op]
    arguments = operation.draw(case)
    baseline = contestants.baseline(case, arguments)
    row.cases += 1
    _compare(case, contestants.names[0], baseline, baseline, row)
    for name, results in contestants.others(case, arguments):
        if isinstance(results, ContestantFailed):
            row.errors.append(results)
        else:
            _compare(case, name, baseline, results, row)
    if operation.holds(case):
        row.referred += 1
        with np.errstate(all="ignore"):
            for result, held in operation.expected(arguments, baseline).items():
                error = _error(baseline[result], held)
                bound = BOUNDS[held.row].units
                row.held(Finding(case, REFERENCE, result, error, bound))


def _compare(case: Case, name: str, baseline: Results, results: Results, row: Row) -> None:
    for result in dict.fromkeys((*baseline, *results)):  # what only one of the two has differs too
        expected = same_as(result)
        if results is baseline and expected == result:
            continue
        array = baseline.get(expected)
        row.results += 1
        row.values += 0 if array is None else array.size
        row.compared(Finding(case, name, result, distance(array, results.get(result))))


def _error(result: NDArray[Any], held: Held) -> float:
    if result.dtype.kind in "iu":  # an integer's last place is 1
        return float(np.max(np.abs(result - held.value), initial=0))
    return ulp_error(result, held.value, held.scale)


def distance(a: NDArray[Any] | None, b: NDArray[Any] | None) -> float:
    """Return how far two results lie apart: 0 for the same bits, else units in the last place.

    Infinity for results of another shape or dtype, for integers that differ, and where only one has
    a NaN.
    """
    if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf
    if a.tobytes() == b.tobytes():
        return 0.0
    if a.dtype.kind in "iu":
        return math.inf
    if a.dtype.name == "bfloat16":  # the upper half of a float32, which has 2**16 units to one
        units = ulp_distance(a.astype(np.float32), b.astype(np.float32))
        return float(np.max(np.ceil(units / 2**16), initial=0))
    return float(np.max(ulp_distance(a, b), initial=0))
