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
    dropout,
    dropout_test,
    run,
)
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference

# Four elements share a block of random words: shapes with every remainder.
SHAPES = ((1,), (6,), (7,), (2, 4), (3, 1, 4, 5), (33, 257))
SEED = 0xFEDCBA9876543210


def kept(device: Device, count: int = 1000, **dropout_param: Any) -> NDArray[np.bool_]:
    """Return the mask that a training call draws, seen through ones."""
    ones = device.xp.ones(count, np.float32)
    out, _ = layers.dropout_forward(ones, {"mode": "train", "p": 0.5} | dropout_param)
    return np.asarray(to_host(out) != 0)


@both_dtypes
@pytest.mark.parametrize("p", [1e-3, 0.25, 0.7, 1, np.float32(0.1)], ids=str)
def test_values(device: Device, dtype: Any, p: float, rng: np.random.Generator) -> None:
    key = {"seed": SEED, "stream": 2**32 - 1, "step": 7}
    for shape in SHAPES:
        x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        dropout_param = {"mode": "train", "p": p, **key}
        before = dict(dropout_param)
        out, cache = layers.dropout_forward(device.asarray(x), dropout_param)
        dx = layers.dropout_backward(device.asarray(dout), cache)
        assert dropout_param == before
        mask = reference.dropout_mask(shape, float(p), **key)
        expected = reference.dropout_forward(x, mask, float(p))
        assert_within("dropout", to_host(out), expected, expected, f"out {shape}")
        expected = reference.dropout_backward(dout, mask, float(p))
        assert_within("dropout", to_host(dx), expected, expected, f"dx {shape}")


def test_an_array_of_no_dimensions(device: Device) -> None:
    results = run(dropout, device, x=np.array(3.0), dout=np.array(5.0))
    assert results["out"].shape == results["dx"].shape == ()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(device: Device, p: float) -> None:
    count = 100_000
    deviations = (kept(device, count, p=p, seed=SEED).sum() - count * p) / np.sqrt(
        count * p * (1 - p)
    )
    assert abs(deviations) < 4


def test_masks_differ(device: Device) -> None:
    name = {"seed": 1, "stream": 2, "step": 3}
    first = kept(device, **name)
    np.testing.assert_array_equal(first, kept(device, **name))
    for key in name:
        assert 400 < (first != kept(device, **(name | {key: 4}))).sum() < 600
    assert 400 < (kept(device) != kept(device)).sum() < 600, "without a seed"
    assert 400 < (kept(device, seed=2**32) != kept(device, seed=0)).sum() < 600, "the upper half"


def test_backward_without_a_seed_has_the_mask_of_forward(device: Device) -> None:
    ones = device.xp.ones((30, 30), np.float32)
    out, cache = layers.dropout_forward(ones, {"mode": "train", "p": 0.4})
    dx = layers.dropout_backward(ones, cache)
    np.testing.assert_array_equal(to_host(dx), to_host(out))


@both_dtypes
def test_a_dropped_infinity_is_0(device: Device, dtype: Any) -> None:
    x = np.full(1000, np.inf, dtype)
    x[::2] = np.nan
    mask = reference.dropout_mask(x.shape, 0.5, SEED, 0, 0)
    dropout_param = {"mode": "train", "p": 0.5, "seed": SEED}
    out, _ = layers.dropout_forward(device.asarray(x), dropout_param)
    np.testing.assert_array_equal(to_host(out), np.where(mask, x, 0))


@both_dtypes
def test_test_mode_changes_nothing(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(dropout_test, 9, 7, dtype, rng)
    expected = {"out": arrays["x"], "dx": arrays["dout"]}
    assert_same_bits(run(dropout_test, device, **arrays), expected)


@pytest.mark.parametrize("layer", [dropout, dropout_test])
def test_gradients(device: Device, layer: Any, rng: np.random.Generator) -> None:
    assert_gradients(layer, device, **draw(layer, 4, 5, np.float64, rng))


@both_dtypes
def test_bits_are_those_of_the_cpu(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    for rows, columns in ((1, 1), (2, 7), (257, 33)):
        arrays = draw(dropout, rows, columns, dtype, rng)
        assert_same_bits(run(dropout, device, **arrays), run(dropout, CPU, **arrays))
