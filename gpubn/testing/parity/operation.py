"""What an operation is to parity: its cases, its arguments, its call, what it is held to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubn.testing.parity.cases import Case, Draw
from gpubn.testing.parity.shapes import FLOATS, Shape, Shapes

Arrays: TypeAlias = dict[str, Any]


class Held(NamedTuple):
    """What a result is held to: the float64 value, its scale, and its row in ``BOUNDS``."""

    value: Any
    scale: Any
    row: str


Reference: TypeAlias = dict[str, Held]

SQUARES_FIT = ("ordinary", "mean 1e6", "constant", "near 1e18", "subnormal")
"""The kinds that have a float64 reference, finite in float32, where the formula squares them."""


@dataclass(frozen=True)
class Operation:
    """An operation of the library.

    Attributes
    ----------
    name : str
    shapes : Shapes
    arguments : callable
        Draws host arrays and plain numbers.
    run : callable
        Takes the arguments by name, arrays on any one device, and returns named arrays there. One
        named ``"out, fused"`` is the result ``out`` computed in another way, and has to have its
        bits; ``also`` names them so.
    reference : callable, optional
        Takes the arguments on the host, half precision as float32.
    held : collection of str
        The kinds of values for which the reference holds.
    given : tuple of str
        Results that the reference takes beside the arguments, by name: what a formula depends on
        that is no number but a choice.
    dtypes : tuple of str
        What it takes.
    """

    name: str
    shapes: Shapes
    arguments: Callable[[Draw], Arrays]
    run: Callable[..., Arrays]
    reference: Callable[..., Reference] | None = None
    held: Collection[str] = SQUARES_FIT
    given: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS

    def grid(self, *, quick: bool = False) -> tuple[tuple[Shape, str, str], ...]:
        """Return shape, dtype and kind of its first cases."""
        return self.shapes.grid(self.dtypes, quick=quick)

    def holds(self, case: Case) -> bool:
        """Tell whether the case has a reference."""
        # Among its own subnormal numbers the reference rounds as well.
        rounds = (case.kind, case.dtype) == ("subnormal", "float64")
        return self.reference is not None and case.kind in self.held and not rounds

    def expected(self, arguments: Arrays, results: Arrays) -> Reference:
        """Return what the results of a case that ``holds`` are held to."""
        assert self.reference is not None
        given = {name: results[name] for name in self.given}
        wide = {name: _widened(value) for name, value in {**arguments, **given}.items()}
        with np.errstate(all="ignore"):
            return self.reference(**wide)

    def case(self, seed: int) -> Case:
        """Return the case of this number."""
        return Case.numbered(self.name, self.shapes, self.dtypes, seed)

    def draw(self, case: Case) -> Arrays:
        """Return the arguments of a case, the same ones at every call."""
        with np.errstate(all="ignore"):  # values may be too large or small for the dtype
            return self.arguments(Draw(case))


def _widened(value: Any) -> Any:
    half = isinstance(value, np.ndarray) and value.dtype.itemsize == 2
    return value.astype(np.float32) if half else value


def held(layer: str, expected: Arrays, scales: Arrays) -> Reference:
    """Return what the results of a layer are held to: ``BOUNDS`` has a row for each of them."""
    return {name: Held(value, scales[name], f"{layer} {name}") for name, value in expected.items()}


def also(way: str, results: Arrays) -> Arrays:
    """Name results that were computed in another way, and have to have the same bits."""
    return {f"{name}, {way}": value for name, value in results.items()}


def same_as(name: str) -> str:
    """Return the name of the result whose bits this one has to have: its own, or as in ``also``."""
    return name.partition(", ")[0]
