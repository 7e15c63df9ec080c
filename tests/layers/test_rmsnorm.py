from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    HARD_VALUES,
    Arrays,
    assert_all_within,
    assert_gradients,
    assert_same_bits,
    both_dtypes,
    draw,
    draw_of_shape,
    hard_values,
    rmsnorm,
    run,
)

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import rmsnorm_scales

# One sample, one and two features, and sizes beside a leaf's (8), a block's leaves (2048) and more.
SHAPES = ((1, 5), (2, 257), (37, 1), (9, 2), (70, 33), (3, 2049), (2, 5003))


def check(results: Arrays, arrays: Arrays) -> None:
    """Hold the results to the reference, by their bounds."""
    x, gamma, dout = (arrays[name] for name in ("x", "gamma", "dout"))
    dx, dgamma = reference.rmsnorm_backward(dout, x, gamma)
    expected = {"out": reference.rmsnorm_forward(x, gamma), "dx": dx, "dgamma": dgamma}
    assert_all_within("rmsnorm", results, expected, rmsnorm_scales(x, gamma, dout))


@both_dtypes
@pytest.mark.parametrize("kind", HARD_VALUES)
def test_values(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for rows, columns in SHAPES:
        arrays = draw(rmsnorm, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (columns, rows), dtype, rng).T
        check(run(rmsnorm, device, **arrays), arrays)


@both_dtypes
def test_subnormal_gradients(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(rmsnorm, 9, 257, dtype, rng)
    arrays["dout"] = hard_values("subnormal", (9, 257), dtype, rng)
    check(run(rmsnorm, device, **arrays), arrays)


@pytest.mark.not_host_run
@both_dtypes
@pytest.mark.parametrize("shape", [(1_000_003, 2), (2, 1_000_003)], ids=str)
def test_a_million(
    device: Device, dtype: Any, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    arrays = draw(rmsnorm, *shape, dtype, rng)
    arrays["x"] += dtype(1000)
    check(run(rmsnorm, device, **arrays), arrays)


def test_a_sample_of_zeros(device: Device, rng: np.random.Generator) -> None:
    arrays = draw(rmsnorm, 3, 40, np.float32, rng)
    arrays["x"][1] = 0
    results = run(rmsnorm, device, **arrays)
    check(results, arrays)
    np.testing.assert_array_equal(results["out"][1], 0)


def test_the_largest_mean_square_that_fits(device: Device, rng: np.random.Generator) -> None:
    # The sum of the squares does not fit float32, their mean does.
    signs = np.where(np.arange(300) % 2, 1, -1)[np.newaxis]
    arrays = draw(rmsnorm, 1, 300, np.float32, rng) | {"x": (1.8e19 * signs).astype(np.float32)}
    check(run(rmsnorm, device, **arrays), arrays)


@both_dtypes
def test_a_mean_square_that_overflows(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(rmsnorm, 3, 257, dtype, rng)
    arrays["x"][1] = hard_values("near 1e30", (1, 257), dtype, rng)
    results = run(rmsnorm, device, **arrays)
    np.testing.assert_array_equal(results["out"][1], 0)
    np.testing.assert_array_equal(results["dx"][1], 0)
    # Its neighbours know nothing of it, and dgamma nothing of it either.
    rest = {n: a[::2] if a.ndim == 2 else a for n, a in arrays.items()}
    check({n: a[::2] if a.ndim == 2 else a for n, a in results.items()}, rest)


def test_a_nan_stays_in_its_sample(device: Device, rng: np.random.Generator) -> None:
    arrays = draw(rmsnorm, 3, 40, np.float32, rng)
    arrays["x"][1, 7] = np.nan
    results = run(rmsnorm, device, **arrays)
    for name in ("out", "dx"):
        assert np.isnan(results[name][1]).all()
        assert np.isfinite(results[name][::2]).all()


def test_eps_is_the_only_key(device: Device, rng: np.random.Generator) -> None:
    x, ones = rng.standard_normal((4, 9)), np.ones(9)
    rms_param = {"eps": 0.5, "mode": "neither"}
    before = dict(rms_param)
    out, _ = layers.rmsnorm_forward(device.asarray(x), device.asarray(ones), rms_param)
    expected = reference.rmsnorm_forward(x, ones, 0.5)
    np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=1e-14)
    assert rms_param == before


def test_gradients(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(rmsnorm, device, **draw(rmsnorm, 3, 5, np.float64, rng))
    # Over the last of three axes.
    assert_gradients(rmsnorm, device, **draw_of_shape(rmsnorm, (2, 3, 4), np.float64, rng, 4))


@both_dtypes
def test_the_last_axes(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """As many as gamma has: what lies before them are samples, and the bits are a matrix's."""
    shape = (3, 5, 7)
    for count in (1, 2, 3):
        normalized = shape[3 - count :]
        arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("x", "dout")}
        arrays["gamma"] = rng.standard_normal(normalized).astype(dtype)
        columns = int(np.prod(normalized))
        flat = {
            name: a.reshape(-1) if name == "gamma" else a.reshape(-1, columns)
            for name, a in arrays.items()
        }
        expected, results = run(rmsnorm, device, **flat), run(rmsnorm, device, **arrays)
        shapes = {"out": shape, "dx": shape, "dgamma": normalized}
        assert {name: a.shape for name, a in results.items()} == shapes
        assert_same_bits({n: a.reshape(expected[n].shape) for n, a in results.items()}, expected)


@both_dtypes
@pytest.mark.parametrize("kind", [*HARD_VALUES, "near 1e30"])
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, kind: str, rng: np.random.Generator
) -> None:
    for rows, columns in SHAPES:
        arrays = draw(rmsnorm, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (columns, rows), dtype, rng).T
        assert_same_bits(run(rmsnorm, device, **arrays), run(rmsnorm, CPU, **arrays))
