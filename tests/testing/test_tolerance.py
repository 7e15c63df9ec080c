"""The unit that errors are measured in, and scales that let no careless result pass."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpubn.testing import reference
from gpubn.testing.tolerance import (
    BOUNDS,
    affine_scales,
    batchnorm_scales,
    batchnorm_test_scales,
    groupnorm_scales,
    layernorm_scales,
    matmul_scale,
    rmsnorm_scales,
    sum_of_squares_scale,
    ulp_error,
    update_scales,
)

TINY = float(np.finfo(np.float32).tiny)


def chain(a: Any, b: Any) -> Any:
    """Return ``a @ b`` in float32, the products rounded and added one after another."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(len(b)):
        total = total + a[:, k : k + 1] * b[k]
    return total


def test_every_bound_has_a_reason() -> None:
    for name, bound in BOUNDS.items():
        assert 0 <= bound.seen <= bound.units, name
        assert bound.reason, name


def test_an_error_is_in_units_of_the_scales_last_place() -> None:
    one = np.float32(1)
    assert ulp_error(np.nextafter(one, 2 * one), 1, 1) == 1
    assert ulp_error(np.nextafter(one, 2 * one), 1, 4) == 0.25
    assert ulp_error(np.float32(1e-45), 0, 0) == 1
    assert ulp_error(np.float32([1, np.nan, np.inf]), [1, np.nan, 1e300], 1) == 0
    assert ulp_error(np.float32([np.inf]), [1], 1) == np.inf
    with pytest.raises(TypeError, match="result has dtype int64, expected floating point"):
        ulp_error(np.arange(3), np.arange(3), 1)


# --- Half precision ------------------------------------------------------------------------------

both_halves = pytest.mark.parametrize(
    "half", [np.float16, ml_dtypes.bfloat16], ids=lambda half: half.__name__
)


def any_float32(half: Any, rng: np.random.Generator) -> Any:
    """Return float32 values: all kinds of bits, and many that half precision has in its range."""
    bits = rng.integers(2**32, size=100_000, dtype=np.uint32).view(np.float32)
    bits[np.isnan(bits)] = np.nan  # no signalling ones, of which NumPy warns
    spread = rng.standard_normal(100_000) * 10.0 ** rng.uniform(-9, 5.2, 100_000)
    # Halfway between two neighbours, and the next numbers to both sides of it.
    with np.errstate(over="ignore"):
        halves = np.abs(spread[:10_000]).astype(half)
        halves = halves[np.isfinite(halves.astype(np.float32))]
        above = (halves.view(np.uint16) + np.uint16(1)).view(half).astype(np.float32)
        middle = (halves.astype(np.float32) + above) / np.float32(2)
        sides = [np.nextafter(middle, np.float32(to)) for to in (0, np.inf)]
    edges = np.float32([65_504, 65_519, 65_519.996, 65_520, 65_521, 3.39e38, 3.4e38, 0, -0.0])
    return np.concatenate([bits, spread.astype(np.float32), middle, *sides, edges, -edges])


@both_halves
def test_one_final_rounding_is_no_error(half: Any, rng: np.random.Generator) -> None:
    """Nor is it in any binade, among subnormal numbers, at a tie, or beyond the largest number."""
    values = any_float32(half, rng)
    with np.errstate(over="ignore", invalid="ignore"):
        results = values.astype(half)
    assert np.isinf(results.astype(np.float32)).any()
    assert np.isnan(results.astype(np.float32)).any()
    assert ulp_error(results, values.astype(np.float64), 0) == 0


@both_halves
def test_what_came_before_the_rounding_is_measured_in_float32(
    half: Any, rng: np.random.Generator
) -> None:
    """A float32 result off by so many units is never more than that, and sometimes all of it."""
    values = any_float32(half, rng)
    values = values[np.isfinite(values) & (np.abs(values) > 1e-30) & (np.abs(values) < 1e38)]
    with np.errstate(over="ignore"):
        results = values.astype(half)
    for units in (1, 5):
        expected = values + units * np.spacing(values).astype(np.float64)
        assert ulp_error(results, expected, values) == units
    # A larger scale's units are larger.
    assert ulp_error(results, expected, 8 * np.abs(values.astype(np.float64))) < 1


@both_halves
def test_another_half_is_an_error(half: Any, rng: np.random.Generator) -> None:
    """The next number is half a unit of half precision away: thousands of float32's."""
    values = np.abs(rng.standard_normal(1000)).astype(half)
    for step in (-1, 1):
        result = (values.view(np.uint16) + np.uint16(step % 2**16)).view(half)
        errors = [ulp_error(r, v, v) for r, v in zip(result, values.astype(float), strict=True)]
        assert min(errors) >= (2048 if half is np.float16 else 16384)
    expected = 1 + float(np.float32(2.0**-13))
    twice = np.float16(np.float32(expected)) + np.float16(0.001)  # rounded on the way
    assert ulp_error(twice, expected, 1) > 1000


@both_halves
def test_halves_that_are_not_finite(half: Any) -> None:
    inf, nan, one = half(np.inf), half(np.nan), half(1)
    agree = [(inf, np.inf), (-inf, -np.inf), (inf, 1e300), (-inf, -1e300), (nan, np.nan)]
    assert [ulp_error(result, expected, 1) for result, expected in agree] == [0] * 5
    apart = [(one, np.inf), (inf, -np.inf), (nan, 1), (one, np.nan), (inf, np.nan), (nan, np.inf)]
    assert [ulp_error(result, expected, 1) for result, expected in apart] == [np.inf] * 6
    assert ulp_error(inf, 1, 1) > 1e9
    assert ulp_error(-inf, 1e300, 1) > 1e9


def test_the_largest_float16() -> None:
    """What is rounded to infinity begins at 65,520."""
    for result, expected, error in (
        (65_504, 65_519, 0),
        (65_504, 65_520, 0),
        (65_504, 65_521, 1 / 2**-8),
        (np.inf, 65_520, 0),
        (np.inf, 65_519, 1 / 2**-8),
        (-np.inf, -65_519, 1 / 2**-8),
    ):
        assert ulp_error(np.float16(result), expected, 65_504) == error


def test_halves_of_any_shape() -> None:
    result = np.ones((3, 4), np.float16)[::2, ::-1]
    assert ulp_error(result, np.ones((2, 4)), np.ones(4)) == 0
    with pytest.raises(ValueError, match=r"^result has shape \(2, 4\), expected \(4,\)$"):
        ulp_error(result, np.ones(4), 1)


@both_halves
def test_scales_of_halves_are_those_of_the_same_numbers(
    half: Any, rng: np.random.Generator
) -> None:
    """The smallest normal number, too, is that of float32, which is computed with."""
    x, dout = (rng.standard_normal((6, 4)).astype(half) for _ in range(2))
    x[:, 0] = half(1)  # no distances from the mean
    wide = x.astype(np.float32), dout.astype(np.float32)
    gamma, beta, mean = rng.standard_normal((3, 4)).astype(np.float32)
    var = np.abs(gamma)
    for of_halves, of_wide in (
        *(
            (f(x, gamma, beta, dout), f(wide[0], gamma, beta, wide[1]))
            for f in (batchnorm_scales, layernorm_scales)
        ),
        (
            groupnorm_scales(x, gamma, beta, dout, 2),
            groupnorm_scales(wide[0], gamma, beta, wide[1], 2),
        ),
        (rmsnorm_scales(x, gamma, dout), rmsnorm_scales(wide[0], gamma, wide[1])),
        (
            batchnorm_test_scales(x, gamma, beta, mean, var, dout),
            batchnorm_test_scales(wide[0], gamma, beta, mean, var, wide[1]),
        ),
    ):
        for name, scale in of_halves.items():
            np.testing.assert_array_equal(scale, of_wide[name], err_msg=name)


# --- Scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
def test_the_scales_of_one_group_are_layer_norm_s(axis: int, rng: np.random.Generator) -> None:
    x, dout = rng.standard_normal((2, 5, 3, 4)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, x.shape[axis])).astype(np.float32)
    scales = groupnorm_scales(x, gamma, beta, dout, 1, axis=axis)
    places = (3, 1) if axis == 1 else (4,)
    spread = (np.broadcast_to(a.reshape(places), (3, 4)).reshape(12) for a in (gamma, beta))
    expected = layernorm_scales(x.reshape(5, 12), *spread, dout.reshape(5, 12))
    for name in ("out", "dx"):
        np.testing.assert_allclose(
            scales[name].reshape(5, 12), np.broadcast_to(expected[name], (5, 12)), rtol=1e-14
        )
    for name in ("dgamma", "dbeta"):
        total = expected[name].reshape(3, 4).sum(axis=1 if axis == 1 else 0)
        np.testing.assert_allclose(scales[name], total, rtol=1e-14)


def test_every_scale_has_the_shape_of_its_result(rng: np.random.Generator) -> None:
    x, dout = rng.standard_normal((2, 3, 6, 2, 2))
    gamma, beta = rng.standard_normal((2, 6))
    shapes = {name: s.shape for name, s in groupnorm_scales(x, gamma, beta, dout, 3).items()}
    assert shapes == {"out": x.shape, "dx": x.shape, "dgamma": (6,), "dbeta": (6,)}
    x, dout = x.reshape(12, 6), dout.reshape(12, 6)
    shapes = {name: s.shape for name, s in rmsnorm_scales(x, gamma, dout).items()}
    assert shapes == {"out": x.shape, "dx": x.shape, "dgamma": (6,)}


def test_the_scale_of_a_product_is_that_of_its_partial_sums() -> None:
    a, b = np.array([[1.0, 2.0, -3.0]]), np.array([[1.0, 5.0], [1.0, -1.0], [1.0, 1.0]])
    expected = [[np.sqrt(1 + 9 + 0), np.sqrt(25 + 9 + 0)]]
    np.testing.assert_allclose(matmul_scale(a, b), expected, rtol=1e-15)


def test_the_scale_of_a_long_product_needs_no_memory_for_all_of_it(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    a, b = rng.standard_normal((5, 70)), rng.standard_normal((70, 3))
    whole = matmul_scale(a, b)
    for block in (1, 15 * 7, 15 * 64):
        monkeypatch.setattr("gpubn.testing.tolerance._BLOCK", block)
        np.testing.assert_allclose(matmul_scale(a, b), whole, rtol=1e-14)


@pytest.mark.parametrize("depth", [1, 10, 1000, 100_003])
@pytest.mark.parametrize("signs", ["both", "one"])
def test_a_product_of_any_depth_is_held_to_one_bound(
    depth: int, signs: str, rng: np.random.Generator
) -> None:
    drawn = rng.standard_normal((3, depth)), rng.standard_normal((depth, 4))
    a, b = (np.float32(np.abs(x) if signs == "one" else x) for x in drawn)
    expected, scale = a.astype(float) @ b.astype(float), matmul_scale(a, b)
    assert ulp_error(chain(a, b), expected, scale) <= BOUNDS["affine out"].units
    # One value in a thousand, lost.
    if depth == 1000:
        lost = chain(a[:, :-1], b[:-1])
        assert ulp_error(lost, expected, scale) > 10 * BOUNDS["affine out"].units


def test_subnormal_products_count_as_the_smallest_normal_number(rng: np.random.Generator) -> None:
    x = np.float32(1e-40 * rng.standard_normal((6, 50)))
    w, dout = rng.standard_normal((50, 4)), 1e-40 * rng.standard_normal((6, 4))
    scales = affine_scales(x, np.float32(w), np.zeros(4, np.float32), np.float32(dout))
    # TINY itself is the smallest normal number: each rounding of a sum is half of a last place.
    for name, depth in (("out", 50), ("dx", 4), ("dw", 6)):
        assert (scales[name] >= np.sqrt(depth) * TINY).all()
        assert (scales[name] <= 2 * np.sqrt(depth) * TINY).all()
    assert (scales["db"] >= 6 * TINY).all()
    expected = x.astype(float) @ np.float32(w).astype(float)
    bound = BOUNDS["affine out"].units
    assert ulp_error(chain(x, np.float32(w)), expected, scales["out"]) <= bound
    assert ulp_error(np.zeros((6, 4), np.float32), expected, scales["out"]) > bound
    assert sum_of_squares_scale(x) == pytest.approx(300 * TINY)


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        ("sgd", ()),
        ("sgd_momentum", ("velocity",)),
        ("rmsprop", ("cache",)),
        ("adam", ("m", "v")),
        ("adamw", ("m", "v")),
    ],
)
def test_an_update_that_cancels_keeps_the_scale_of_its_terms(
    rule: str, state: tuple[str, ...]
) -> None:
    values = {"velocity": 2.0, "cache": 0.0, "m": 100.0, "v": 0.0}
    states = {name: np.float32([values[name]]) for name in state}
    w, dw = np.float32([1.0]), np.float32([100.0])
    for sign in (1, -1):
        steps = {"t": 3} if "m" in state else {}
        scales = update_scales(rule, w, sign * dw, **steps, **states)
        assert scales.keys() == {"w", *state}
        results = getattr(reference, rule)(w, sign * dw, **states, **steps)
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(("w", *state), results, strict=False):
            assert scales[name] >= np.abs(result)
            assert scales[name] > 0
        assert scales["w"] > 1
        if rule == "sgd":  # w - 0.01 * 100 is 0
            assert scales["w"] == pytest.approx(2)
        if rule == "sgd_momentum":
            assert scales["velocity"] == pytest.approx(0.9 * 2 + 1)
        if "m" in state:
            assert scales["m"] == pytest.approx(0.9 * 100 + 0.1 * 100)
