from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    assert_gradients,
    assert_same_bits,
    assert_within,
    both_dtypes,
    draw,
    relu,
    run,
)

from gpubn.backend import Device
from gpubn.testing import reference

SHAPES = ((), (1,), (7,), (2, 5), (3, 1, 4, 5), (129, 257))
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 5e-324, -5e-324)


def special(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> Any:
    """Return ordinary values, with every second one special."""
    ordinary = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), ordinary).astype(dtype)


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(
    device: Device, dtype: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, dout = special(shape, dtype, rng), special(shape, dtype, rng)
    results = run(relu, device, x=x, dout=dout)
    assert_within("relu", results["out"], reference.relu_forward(x), 0)
    assert_within("relu", results["dx"], reference.relu_backward(dout, x), 0)


def test_nothing_passes_at_zero(device: Device) -> None:
    x = np.array([0.0, -0.0, np.nan, -1.0, 1.0])
    results = run(relu, device, x=x, dout=np.full(5, np.inf))
    np.testing.assert_array_equal(results["dx"], [0, 0, 0, 0, np.inf])


def test_gradients(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(relu, device, **draw(relu, 4, 5, np.float64, rng))


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    arrays = {"x": special(shape, dtype, rng), "dout": special(shape, dtype, rng)}
    assert_same_bits(run(relu, device, **arrays), run(relu, CPU, **arrays))
