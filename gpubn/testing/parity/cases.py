"""The cases of an operation: shapes around every tile's edge, both dtypes, every kind of values.

Cases are numbered. The number is the case's *seed*: with the operation's name it gives shape,
dtype, kind and all random numbers, in any process. The first ones are the quick run's, then comes
the rest of the grid, then, without end, cases drawn at random from the same edges.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Shape: TypeAlias = tuple[int, ...]

DTYPES = ("float32", "float64")
KINDS = (
    *("ordinary", "mean 1e6", "constant", "near 1e18", "near 1e30"),
    *("outlier", "subnormal", "signed zeros", "infinities", "NaN"),
)
LARGE_KINDS = ("ordinary", "mean 1e6")
_OF_GRADIENTS = ("subnormal", "signed zeros", "infinities", "NaN")
MAX_ELEMENTS = 1 << 20
"""Of an array of a case beyond the grid; so that a run needs little memory."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of an operation's cases, and the sizes that further ones are drawn from.

    Attributes
    ----------
    quick, full : tuple of shape
        Each comes with every dtype and kind; those of ``full`` not in a quick run.
    large : tuple of shape
        Enough work to be split among threads; with every dtype and ``LARGE_KINDS``.
    axes : tuple of tuple of int
        For each dimension, the sizes at the edges of tiles.
    """

    quick: tuple[Shape, ...]
    full: tuple[Shape, ...]
    large: tuple[Shape, ...]
    axes: tuple[tuple[int, ...], ...]

    def grid(self, *, quick: bool = False) -> list[tuple[Shape, str, str]]:
        """Return shape, dtype and kind of every case of the grid; the quick ones come first."""
        cases = list(product(self.quick, DTYPES, KINDS))
        if not quick:
            cases += product(self.full, DTYPES, KINDS)
            cases += product(self.large, DTYPES, LARGE_KINDS)
        return cases

    def draw(self, rng: np.random.Generator) -> Shape:
        """Return a shape of sizes from ``axes``, of at most ``MAX_ELEMENTS``."""
        while True:
            shape = tuple(int(rng.choice(sizes)) for sizes in self.axes)
            if math.prod(shape) <= MAX_ELEMENTS:
                return shape


# Sizes beside the edges of a leaf (8), a warp and a block's columns (32), lanes and tiles (256 and
# 1024), a lane's leaf (2048), and primes.
EDGES = (
    *(1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511),
    *(512, 513, 997, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097),
    *(8191, 8192, 8193, 10_007),
    *(16_383, 16_384, 16_385, 32_769, 65_535, 65_536, 65_537, 100_003),
)

# Arrays whose shape does not matter: every element for itself.
ELEMENTS = Shapes(
    quick=((1,), (7,), (33,), (256,), (1025,), (3, 333)),
    full=tuple((n,) for n in EDGES if n < 10_000 and n not in (1, 7, 33, 256, 1025)),
    large=((65_537,), (100_003,), (131_072,), (393_217,), (524_289,)),
    axes=(EDGES,),
)

# (N, D), reduced over the rows of each column. Batch norm takes no single row.
COLUMNS = Shapes(
    quick=((2, 1), (7, 3), (9, 33), (65, 5), (257, 2), (1025, 3), (5, 257)),
    full=(
        *((2, 2), (3, 1), (8, 32), (15, 8), (16, 31), (17, 256), (31, 31), (32, 65), (33, 7)),
        *((63, 3), (64, 64), (127, 2), (128, 33), (129, 1), (255, 4), (256, 3), (511, 1)),
        *((512, 5), (513, 2), (997, 1), (1023, 2), (1024, 1), (2047, 1), (2048, 3), (2049, 1)),
        *((4097, 2), (8191, 1), (8192, 2), (8193, 1), (9001, 2), (2, 1023), (3, 2049), (8, 1025)),
    ),
    large=((100_003, 1), (65_537, 3), (70_001, 7), (1031, 300), (5, 100_003)),
    axes=(EDGES[1:], EDGES),
)

# (N, D), reduced over the values of each row.
ROWS = Shapes(
    quick=((1, 1), (3, 7), (2, 33), (5, 255), (2, 257), (1, 2049)),
    full=(
        *((1, 2), (2, 3), (7, 1), (9, 2), (17, 5), (3, 8), (4, 9), (8, 31), (1, 32), (65, 33)),
        *((3, 63), (2, 64), (1, 65), (2, 127), (3, 128), (1, 129), (2, 256), (257, 3), (1, 511)),
        *((3, 512), (1, 513), (1, 997), (2, 1023), (1, 1024), (3, 1025), (2, 2047), (2, 2048)),
        *((3, 2049), (1, 4095), (2, 4097), (1, 8193), (2, 9001), (1, 16_384), (1, 16_385)),
    ),
    large=((2, 100_003), (1031, 300), (5, 65_537), (2, 262_145), (30_011, 10)),
    axes=(EDGES, EDGES),
)

_SIDES = tuple(n for n in EDGES if n <= 1025)

# (M, K, N): a product (M, K) by (K, N).
PRODUCTS = Shapes(
    quick=((1, 1, 1), (2, 7, 3), (9, 33, 17), (33, 65, 31), (64, 64, 64)),
    full=(
        *((1, 2, 1), (3, 1, 5), (1, 257, 1), (7, 8, 9), (8, 8, 8), (15, 16, 17), (31, 32, 33)),
        *((32, 31, 1), (1, 33, 32), (65, 63, 64), (63, 65, 66), (2, 1025, 3), (128, 9, 127)),
        *((129, 17, 128), (127, 128, 7), (5, 511, 65), (64, 1000, 10), (3, 3, 257), (257, 3, 3)),
    ),
    # The last ones are for the large tiles of a GPU, which takes them where every multiprocessor
    # gets one; of the three forms of product each is once the one with the large result.
    large=(
        *((257, 129, 255), (100, 3072, 100), (1025, 64, 130)),
        *((1025, 19, 1027), (1700, 19, 1900), (19, 1700, 1900), (1700, 1900, 19)),
    ),
    axes=(_SIDES, _SIDES, _SIDES),
)


@dataclass(frozen=True)
class Case:
    """One case of an operation."""

    op: str
    seed: int
    shape: Shape
    dtype: str
    kind: str

    @classmethod
    def numbered(cls, op: str, shapes: Shapes, seed: int) -> Case:
        """Return the case of this number."""
        grid = shapes.grid()
        if seed < len(grid):
            return cls(op, seed, *grid[seed])
        rng = _rng(op, seed, 1)
        return cls(op, seed, shapes.draw(rng), str(rng.choice(DTYPES)), str(rng.choice(KINDS)))

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} {self.kind}"

    def command(self) -> str:
        """Return the command that runs this case alone."""
        return f"gpubn parity --op {self.op} --seed {self.seed}"


class Draw:
    """Draws the arguments of a case: the same ones whenever a new one is made for it.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
    kind : str
        As in the case.
    rng : numpy.random.Generator
    """

    def __init__(self, case: Case) -> None:
        self.shape, self.dtype, self.kind = case.shape, case.dtype, case.kind
        self.rng = _rng(case.op, case.seed, 0)

    def hard(self, *shape: int) -> NDArray[Any]:
        """Return values of the case's kind and dtype."""
        return values(self.kind, shape, self.dtype, self.rng)

    def ordinary(self, *shape: int) -> NDArray[Any]:
        """Return standard normal values of the case's dtype."""
        return values("ordinary", shape, self.dtype, self.rng)

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
        """Return ordinary values to be added to a result: zeros where they would hide it."""
        added = self.ordinary(*shape)
        return np.zeros_like(added) if self.kind == "subnormal" else added


def _rng(op: str, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(op.encode()), seed, stream])


def values(kind: str, shape: Shape, dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """Return an array of a kind of values, those that a careless kernel gets wrong.

    The names are float32's: there squares near 1e30 overflow, and an outlier is 3e19. In float64
    they are near 1e200, an outlier is 1e155, and what is subnormal is near 1e-310, not 1e-40.
    """
    single = dtype == "float32"
    x = rng.standard_normal(shape)
    if kind == "mean 1e6":
        x = 1e6 + 0.5 * x
    elif kind == "constant":
        x = np.full(shape, x.flat[0])
    elif kind == "near 1e18":
        x *= 1e18
    elif kind == "near 1e30":
        x *= 1e30 if single else 1e200
    elif kind == "outlier":
        x.flat[x.size // 3] = 3e19 if single else 1e155
    elif kind == "subnormal":
        x *= 1e-40 if single else 1e-310
    elif kind == "signed zeros":
        zeros = rng.choice([0.0, -0.0], shape)
        x = np.where(rng.random(shape) < 0.8, zeros, x)
    elif kind in ("infinities", "NaN"):
        few = x.reshape(-1)[:: max(1, x.size // 7)]
        few[:] = rng.choice(
            [np.inf, -np.inf] if kind == "infinities" else [np.nan, -np.nan], few.size
        )
    return x.astype(dtype)
