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
    assert_within,
    both_dtypes,
    draw,
    draw_of_shape,
    hard_values,
    layernorm,
    layernorm_images,
    on_device,
    run,
)

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import layernorm_scales

# One sample, one and two features, and sizes beside a leaf's (8), a block's leaves (2048) and more.
SHAPES = ((1, 5), (2, 257), (37, 1), (9, 2), (70, 33), (3, 2049), (2, 5003))


def check(results: Arrays, arrays: Arrays) -> None:
    """Hold the results to the reference, by their bounds."""
    x, gamma, beta, dout = (arrays[name] for name in ("x", "gamma", "beta", "dout"))
    # The reference shifts by a row's first value: backwards, a far one costs it no digits.
    backwards = x[:, ::-1], gamma[::-1]
    dx, dgamma, dbeta = reference.layernorm_backward(dout[:, ::-1], *backwards)
    expected = {
        "out": reference.layernorm_forward(*backwards, beta[::-1])[:, ::-1],
        **{"dx": dx[:, ::-1], "dgamma": dgamma[::-1], "dbeta": dbeta[::-1]},
    }
    assert_all_within("layernorm", results, expected, layernorm_scales(**arrays))


@both_dtypes
@pytest.mark.parametrize("kind", HARD_VALUES)
def test_values(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for rows, columns in SHAPES:
        arrays = draw(layernorm, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (columns, rows), dtype, rng).T
        if kind == "subnormal":  # beside a beta of 1 nothing of them could be seen
            arrays["beta"][:] = 0
        results = run(layernorm, device, **arrays)
        check(results, arrays)
        if kind == "constant":
            np.testing.assert_array_equal(results["out"], [arrays["beta"]] * rows)
            np.testing.assert_array_equal(results["dgamma"], 0)


@both_dtypes
def test_subnormal_gradients(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(layernorm, 9, 257, dtype, rng)
    arrays["dout"] = hard_values("subnormal", (9, 257), dtype, rng)
    check(run(layernorm, device, **arrays), arrays)


@pytest.mark.not_host_run
@both_dtypes
@pytest.mark.parametrize("shape", [(1_000_003, 2), (2, 1_000_003)])
def test_a_million(
    device: Device, dtype: Any, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    arrays = draw(layernorm, *shape, dtype, rng)
    arrays["x"] += dtype(1000)
    check(run(layernorm, device, **arrays), arrays)


def test_the_largest_variance_that_fits(device: Device, rng: np.random.Generator) -> None:
    signs = np.where(np.arange(300) % 2, 1, -1)[np.newaxis]
    arrays = draw(layernorm, 1, 300, np.float32, rng) | {"x": (1e19 * signs).astype(np.float32)}
    check(run(layernorm, device, **arrays), arrays)


@both_dtypes
def test_a_variance_that_overflows(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(layernorm, 3, 257, dtype, rng)
    arrays["x"] = hard_values("near 1e30", (3, 257), dtype, rng)
    results = run(layernorm, device, **arrays)
    np.testing.assert_array_equal(results["out"], [arrays["beta"]] * 3)
    np.testing.assert_array_equal(results["dx"], 0)
    np.testing.assert_array_equal(results["dgamma"], 0)
    dout = arrays["dout"].astype(np.float64)
    assert_within("layernorm dbeta", results["dbeta"], dout.sum(axis=0), np.abs(dout).sum(axis=0))


def test_eps_is_the_only_key(device: Device, rng: np.random.Generator) -> None:
    x, ones, zeros = rng.standard_normal((4, 9)), np.ones(9), np.zeros(9)
    ln_param = {"eps": 0.5, "mode": "neither", "momentum": None}
    before = dict(ln_param)
    out, _ = layers.layernorm_forward(*(device.asarray(a) for a in (x, ones, zeros)), ln_param)
    expected = reference.layernorm_forward(x, ones, zeros, eps=0.5)
    np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=1e-14)
    assert ln_param == before


def test_gradients(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(layernorm, device, **draw(layernorm, 3, 5, np.float64, rng))
    images = draw_of_shape(layernorm_images, (2, 3, 2, 2), np.float64, rng)
    assert_gradients(layernorm_images, device, **images)
    # Over the last of three axes.
    assert_gradients(layernorm, device, **draw_of_shape(layernorm, (2, 3, 4), np.float64, rng, 4))


@both_dtypes
def test_the_last_axes(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """As many as gamma has: what lies before them are samples, and the bits are a matrix's."""
    shape = (3, 5, 7, 7)
    for count in (1, 2, 3, 4):
        normalized = shape[4 - count :]
        arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("x", "dout")}
        arrays |= {n: rng.standard_normal(normalized).astype(dtype) for n in ("gamma", "beta")}
        columns = int(np.prod(normalized))
        flat = {
            name: a.reshape(-1, columns) if name in ("x", "dout") else a.reshape(-1)
            for name, a in arrays.items()
        }
        expected = run(layernorm, device, **flat)
        check(expected, flat)
        results = run(layernorm, device, **arrays)
        shapes = {"out": shape, "dx": shape, "dgamma": normalized, "dbeta": normalized}
        assert {name: a.shape for name, a in results.items()} == shapes
        assert_same_bits({n: a.reshape(expected[n].shape) for n, a in results.items()}, expected)


def test_gamma_of_no_last_axes(device: Device) -> None:
    x = np.ones((3, 5, 7))
    for shape in ((5,), (3, 7), (1, 7), (2, 3, 5, 7), ()):
        arrays = on_device(device, {"x": x, "gamma": np.ones(shape), "beta": np.ones(7)})
        with pytest.raises(ValueError, match=r"^gamma has shape \(.*\), expected "):
            layers.layernorm_forward(**arrays, ln_param={})
    arrays = on_device(device, {"x": x, "gamma": np.ones((5, 7)), "beta": np.ones(7)})
    with pytest.raises(ValueError, match=r"^beta has shape \(7,\), expected \(5, 7\)$"):
        layers.layernorm_forward(**arrays, ln_param={})


@both_dtypes
@pytest.mark.parametrize("kind", [*HARD_VALUES, "near 1e30"])
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, kind: str, rng: np.random.Generator
) -> None:
    for rows, columns in SHAPES:
        arrays = draw(layernorm, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (columns, rows), dtype, rng).T
        assert_same_bits(run(layernorm, device, **arrays), run(layernorm, CPU, **arrays))
