"""The unit that errors are measured in, and scales that let no careless result pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpubn.testing import reference
from gpubn.testing.tolerance import (
    BOUNDS,
    affine_scales,
    matmul_scale,
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
