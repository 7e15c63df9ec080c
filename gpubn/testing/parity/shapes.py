"""The shapes of an operation's cases, around the edges of every tile, and the grid made of them.

The grid's order is part of a case's number, and so is a dtype that is not installed here: the
number of a case is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]

FLOATS = ("float32", "float64")
HALVES = ("float16", "bfloat16")
DTYPES = (*FLOATS, *HALVES)

KINDS = (
    *("ordinary", "mean 1e6", "constant", "near 1e18", "near 1e30"),
    *("outlier", "subnormal", "signed zeros", "infinities", "NaN"),
)
LARGE_KINDS = ("ordinary", "mean 1e6")
# Half precision is computed with in float32, which has all kinds; so fewer show how it is rounded.
HALF_KINDS = ("ordinary", "mean 1e6", "near 1e18", "subnormal", "infinities", "NaN")
_FULL_HALF_KINDS = ("ordinary", "subnormal")
_LARGE_HALF_KINDS = ("ordinary",)

MAX_ELEMENTS = 1 << 18
"""Of an array of a case beyond the grid; so that a run needs little memory and time."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of an operation's cases, and the sizes that further ones are drawn from.

    Attributes
    ----------
    quick, full : tuple of shape
        Each comes with every dtype and kind, half precision with fewer kinds; those of ``full`` are
        not in a quick run.
    large : tuple of shape
        Enough work to be split among threads; with every dtype and ``LARGE_KINDS``.
    axes : tuple of tuple of int
        For each dimension, the sizes at the edges of tiles.
    """

    quick: tuple[Shape, ...]
    full: tuple[Shape, ...]
    large: tuple[Shape, ...]
    axes: tuple[tuple[int, ...], ...]

    def grid(
        self, dtypes: tuple[str, ...], *, quick: bool = False
    ) -> tuple[tuple[Shape, str, str], ...]:
        """Return shape, dtype and kind of every case of the grid; the quick ones come first."""
        return _grid(self, dtypes, quick)

    def draw(self, dtypes: tuple[str, ...], rng: np.random.Generator) -> tuple[Shape, str, str]:
        """Return a shape of sizes from ``axes``, not too large, a dtype and a kind."""
        while True:
            shape = tuple(int(rng.choice(sizes)) for sizes in self.axes)
            if math.prod(shape) <= MAX_ELEMENTS:
                dtype = str(rng.choice(dtypes))
                return shape, dtype, str(rng.choice(HALF_KINDS if dtype in HALVES else KINDS))


@cache
def _grid(
    shapes: Shapes, dtypes: tuple[str, ...], quick: bool
) -> tuple[tuple[Shape, str, str], ...]:
    floats, halves = ([dtype for dtype in dtypes if dtype in some] for some in (FLOATS, HALVES))
    parts = [(shapes.quick, floats, KINDS), (shapes.quick, halves, HALF_KINDS)]
    if not quick:
        parts += [(shapes.full, floats, KINDS), (shapes.full, halves, _FULL_HALF_KINDS)]
        parts += [(shapes.large, floats, LARGE_KINDS), (shapes.large, halves, _LARGE_HALF_KINDS)]
    return tuple(case for part in parts for case in product(*part))


# Sizes beside the edges of a leaf (8), a warp and a block's columns (32), tiles of 256, 1024 and
# 2048 samples, and primes.
EDGES = (
    *(1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511),
    *(512, 513, 997, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097),
    *(8191, 8192, 8193, 10_007),
    *(16_383, 16_384, 16_385, 32_769, 65_535, 65_536, 65_537, 100_003),
)

# Arrays whose shape does not matter: every element for itself, or one sum over all.
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

# (N, C, S): batch, channels, positions; reduced over the N * S samples of each channel, of which
# there are two at least. A leaf, a buffer or a tile ends within a plane of S where S is no divisor.
_POSITIONS = (1, 2, 3, 4, 7, 8, 9, 16, 25, 49, 64, 121, 196, 255, 256, 257, 784, 1023, 1024, 1025)
PLANES = Shapes(
    quick=((1, 1, 2), (2, 3, 7), (9, 5, 1), (5, 33, 4), (3, 2, 49), (2, 5, 257), (3, 1, 1031)),
    full=(
        *((2, 1, 1), (1, 3, 8), (3, 1, 8), (1, 2, 9), (8, 32, 1), (17, 31, 1), (1, 65, 3)),
        *((7, 2, 2), (5, 3, 13), (2, 7, 16), (31, 1, 31), (4, 2, 64), (3, 4, 63), (2, 2, 65)),
        *((1, 1, 1024), (1, 2, 1023), (2, 1, 1025), (1, 3, 2047), (1, 1, 2048), (2, 1, 2049)),
        *((16, 2, 128), (41, 1, 49), (42, 2, 49), (5, 2, 997), (257, 3, 1), (1025, 2, 1)),
        *((2049, 1, 1), (10, 1, 1021), (9, 3, 225), (83, 5, 25)),
    ),
    large=((32, 16, 784), (8, 64, 196), (3, 2, 50_021), (64, 3, 1024), (16, 300, 49)),
    axes=((2, 3, 5, 8, 16, 31, 32, 64, 129), EDGES[:22], _POSITIONS),
)

# The same for what differs little: fewer.
FEW_PLANES = Shapes(
    quick=PLANES.quick[1:5],
    full=PLANES.full[::4],
    large=PLANES.large[:2],
    axes=PLANES.axes,
)

# (N, C, S), reduced over neighbouring channels of a sample: as many as a divisor of C.
GROUPS = Shapes(
    quick=((2, 6, 7), (3, 8, 1), (1, 12, 49), (9, 3, 5), (2, 33, 4), (1, 2, 1031)),
    full=(
        *((1, 1, 1), (1, 2, 1), (3, 1, 8), (2, 4, 2), (1, 16, 3), (5, 32, 1), (2, 31, 2)),
        *((33, 2, 9), (4, 9, 16), (7, 10, 13), (1, 64, 8), (2, 5, 63), (3, 4, 64), (1, 6, 65)),
        *((2, 128, 1), (1, 257, 1), (1, 8, 255), (2, 2, 256), (1, 3, 1023), (2, 1, 1024)),
        *((1, 2, 2048), (2, 1, 2049), (1, 12, 341), (3, 4, 997), (129, 4, 4), (1, 1030, 2)),
    ),
    large=((32, 16, 784), (8, 64, 196), (2, 6, 20_011), (64, 32, 49), (4, 1024, 25)),
    axes=((1, 2, 3, 5, 8, 31, 64), (1, 2, 3, 4, 6, 8, 12, 16, 31, 32, 64, 96, 256), _POSITIONS),
)

# The same over the positions of one channel, two at the least.
INSTANCES = Shapes(
    quick=((2, 3, 7), (1, 2, 49), (9, 3, 5), (2, 33, 4), (1, 2, 1031)),
    full=tuple(shape for shape in GROUPS.full[::2] if shape[2] > 1),
    large=GROUPS.large[:3],
    axes=(*GROUPS.axes[:2], _POSITIONS[1:]),
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
