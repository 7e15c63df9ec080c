"""Dropout in training. Masks differ between the libraries: only gpubn's is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.checks import TOLERANCE, Float64, Results, WrongResult
from benchmarks.harness import OURS, Case, Setting
from benchmarks.layer import Layer, draw, passes
from benchmarks.peers import Torch
from benchmarks.shapes import ELEMENTS, Shape
from gpubn.testing import reference

KEEP = 0.8
SEED = 7
CHECKED = 1 << 20
"""So many elements of gpubn's mask are compared with the reference, which is slow."""
DEVIATIONS = 6
"""By how many standard deviations the share that is kept may be off."""


def cases(setting: Setting) -> Iterator[Case]:
    for shape in ELEMENTS[setting.size]:
        yield from layer(setting.dtype, shape).cases(setting)


def layer(dtype: str, shape: Shape) -> Layer:
    x, dout = draw(dtype, 0, shape, shape)

    def check(name: str, results: Results) -> None:
        inputs = {"out": x, "dx": dout}
        kept = [_kept(results[key], inputs[key], dtype, name == OURS) for key in results]
        if len(kept) == 2 and not np.array_equal(*kept):
            raise WrongResult("the backward pass has another mask than the forward pass")

    return Layer(
        op="dropout",
        layout="any",
        name="dropout",
        inputs=(x,),
        dout=dout,
        arguments=({"mode": "train", "p": KEEP, "seed": SEED},),
        gradients=("dx",),
        passes=passes(2, 2),
        peer=_peer,
        check=check,
    )


def _kept(result: Float64, source: Any, dtype: str, ours: bool) -> Any:
    """Return which values were kept; every one must be scaled, and not too many or too few."""
    source = source.astype(np.float64)
    kept = (result != 0) | (source == 0)
    error = np.abs(result - np.where(kept, source / KEEP, 0))
    if not (error <= TOLERANCE[dtype] * np.abs(source)).all():
        raise WrongResult("a value is neither dropped nor scaled")
    share, deviation = kept.mean(), math.sqrt(KEEP * (1 - KEEP) / kept.size)
    if not abs(share - KEEP) <= DEVIATIONS * deviation:
        raise WrongResult(f"{share:.4f} of the values were kept, expected {KEEP}")
    if ours:
        first = min(kept.size, CHECKED)
        mask = reference.dropout_mask((first,), KEEP, SEED, 0, 0)
        if not np.array_equal(kept.reshape(-1)[:first], mask | (source.reshape(-1)[:first] == 0)):
            raise WrongResult("the mask is not that of the seed")
    return kept


def _peer(torch: Torch) -> Callable[..., Any]:
    functional = torch.module.nn.functional

    def run(x: Any) -> Any:
        return functional.dropout(x, 1 - KEEP, training=True)

    return run
