"""The cases of an operation: a shape, a dtype and a kind of values, and the numbers themselves.

Cases are numbered. The number is the case's *seed*: with the operation's name it gives shape,
dtype, kind and all random numbers, in any process. The first ones are the quick run's, then comes
the rest of the grid, then, without end, cases drawn at random from the same edges.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubn.testing.parity.shapes import HALVES, Shape, Shapes

_OF_GRADIENTS = ("subnormal", "signed zeros", "infinities", "NaN")


@dataclass(frozen=True)
class Case:
    """One case of an operation."""

    op: str
    seed: int
    shape: Shape
    dtype: str
    kind: str

    @classmethod
    def numbered(cls, op: str, shapes: Shapes, dtypes: tuple[str, ...], seed: int) -> Case:
        """Return the case of this number, of an operation that takes these dtypes."""
        grid = shapes.grid(dtypes)
        if seed < len(grid):
            return cls(op, seed, *grid[seed])
        return cls(op, seed, *shapes.draw(dtypes, _rng(op, seed, 1)))

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.kind}"

    def command(self) -> str:
        """Return the command that runs this case alone."""
        return f"gpubn parity --op {self.op} --seed {self.seed}"


def missing_dtypes() -> dict[str, str]:
    """Return the dtypes that cannot be used here, and why."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return {"bfloat16": "NumPy has it from ml_dtypes, which is not installed"}
    return {}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype by its name; bfloat16 too."""
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")  # which gives NumPy the name
    return np.dtype(name)


class Draw:
    """Draws the arguments of a case: the same ones whenever a new one is made for it.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
    kind : str
        As in the case.
    real : str
        The dtype of parameters and statistics: the case's, but float32 beside half precision.
    rng : numpy.random.Generator
    """

    def __init__(self, case: Case) -> None:
        self.shape, self.dtype, self.kind = case.shape, case.dtype, case.kind
        self.real = "float32" if case.dtype in HALVES else case.dtype
        self.rng = _rng(case.op, case.seed, 0)

    def hard(self, *shape: int) -> NDArray[Any]:
        """Return values of the case's kind and dtype."""
        return values(self.kind, shape, self.dtype, self.rng)

    def ordinary(self, *shape: int) -> NDArray[Any]:
        """Return standard normal values of the case's dtype."""
        return values("ordinary", shape, self.dtype, self.rng)

    def weights(self, *shape: int) -> NDArray[Any]:
        """Return standard normal values of the parameters' dtype."""
        return values("ordinary", shape, self.real, self.rng)

    def upstream(self, *shape: int) -> NDArray[Any]:
        """Return an upstream gradient: ordinary, but of a kind that tests more than range."""
        return self.hard(*shape) if self.kind in _OF_GRADIENTS else self.ordinary(*shape)

    def uniform(self, low: float, high: float, *shape: int) -> NDArray[Any]:
        """Return values spread evenly from ``low`` to ``high``, of the case's dtype."""
        return self.rng.uniform(low, high, shape).astype(self.dtype)

    def any_bits(self, *shape: int) -> NDArray[Any]:
        """Return values of any exponent and sign, an infinity or NaN now and then."""
        dtype = np.dtype(self.dtype)
        drawn = np.frombuffer(self.rng.bytes(math.prod(shape) * dtype.itemsize), dtype)
        return drawn.reshape(shape)

    def visible(self, *shape: int) -> NDArray[Any]:
        """Return parameters to be added to a result: zeros where they would hide it."""
        return self._seen(self.weights(*shape))

    def visible_values(self, *shape: int) -> NDArray[Any]:
        """Return ordinary values to be added to a result: zeros where they would hide it."""
        return self._seen(self.ordinary(*shape))

    def _seen(self, added: NDArray[Any]) -> NDArray[Any]:
        return np.zeros_like(added) if self.kind == "subnormal" else added


def _rng(op: str, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(op.encode()), seed, stream])


# What kinds are in a dtype: the mean of "mean 1e6", whose deviation is 0.5; the magnitudes of
# "near 1e18", "near 1e30" and "subnormal"; and the outlier.
_MAGNITUDES = {
    "float32": (1e6, 1e18, 1e30, 1e-40, 3e19),
    "float64": (1e6, 1e18, 1e200, 1e-310, 1e155),
    "float16": (100.0, 1e4, 3e4, 1e-6, 6e4),
    "bfloat16": (10.0, 1e18, 1e30, 1e-39, 3e19),
}


def values(kind: str, shape: Shape, dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """Return an array of a kind of values, those that a careless kernel gets wrong.

    The names are float32's: there squares near 1e30 overflow, and an outlier is 3e19. In float64
    they are near 1e200, an outlier is 1e155, and what is subnormal is near 1e-310, not 1e-40. Half
    precision has the nearest that fits: float16 a mean of 100 with eight values to its deviation,
    values near 1e4 instead of 1e18, and subnormal ones near 1e-6.
    """
    mean, large, huge, tiny, outlier = _MAGNITUDES[dtype]
    x = rng.standard_normal(shape)
    if kind == "mean 1e6":
        x = mean + 0.5 * x
    elif kind == "constant":
        x = np.full(shape, x.flat[0])
    elif kind == "near 1e18":
        x *= large
    elif kind == "near 1e30":
        x *= huge
    elif kind == "outlier":
        x.flat[x.size // 3] = outlier
    elif kind == "subnormal":
        x *= tiny
    elif kind == "signed zeros":
        zeros = rng.choice([0.0, -0.0], shape)
        x = np.where(rng.random(shape) < 0.8, zeros, x)
    elif kind in ("infinities", "NaN"):
        few = x.reshape(-1)[:: max(1, x.size // 7)]
        few[:] = rng.choice(
            [np.inf, -np.inf] if kind == "infinities" else [np.nan, -np.nan], few.size
        )
    return x.astype(dtype_of(dtype))
