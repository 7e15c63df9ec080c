"""Group normalization, and instance normalization, which is that of one channel a group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    HARD_VALUES,
    Arrays,
    Layer,
    assert_all_within,
    assert_gradients,
    assert_same_bits,
    assert_within,
    both_dtypes,
    draw_of_shape,
    groupnorm,
    hard_values,
    instancenorm,
    layernorm,
    on_device,
    run,
)
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import groupnorm_scales

# x's shape, the axis of its channels, and the number of groups: no positions and one, one value a
# group, one channel, one group, one sample, 7 * 7 positions, primes, groups of an odd number of
# channels, and sizes beside a leaf's (8), a warp's (32) and a tile's (1024).
BATCHES = (
    *(((3, 6), 1, 2), ((2, 6, 1, 1), 1, 3), ((2, 4), 1, 4), ((5, 1, 9), 1, 1), ((1, 5, 3), 1, 1)),
    *(((2, 6, 7, 7), 1, 3), ((2, 7, 7, 6), -1, 3), ((3, 11, 13), 1, 11), ((3, 11, 13), -1, 13)),
    *(((2, 9, 2, 3, 5), 1, 3), ((2, 2, 33), 1, 1), ((2, 3, 64, 2), 2, 4), ((1, 2, 1031), 1, 2)),
    *(((2, 40, 31), -1, 31), ((1, 521, 6), -1, 2)),
)


def hard_arrays(
    kind: str, shape: tuple[int, ...], axis: int, groups: int, dtype: Any, rng: Any
) -> dict[str, NDArray[Any]]:
    """Return random arguments, with x's values of this kind in every group."""
    arrays = draw_of_shape(groupnorm, shape, dtype, rng, shape[axis])
    of_group = arrays["x"].size // (shape[0] * groups)
    x = hard_values(kind, (of_group, shape[0] * groups), dtype, rng).T
    channels_second = np.moveaxis(arrays["x"], axis, 1).shape
    arrays["x"] = np.ascontiguousarray(np.moveaxis(x.reshape(channels_second), 1, axis))
    if kind == "subnormal":  # beside a beta of 1 nothing of them could be seen
        arrays["beta"][:] = 0
    return arrays


def check(results: Arrays, arrays: Arrays, groups: int, axis: int = 1) -> None:
    """Hold the results to the reference, by their bounds."""
    x, gamma, beta, dout = (arrays[name] for name in ("x", "gamma", "beta", "dout"))
    # The reference shifts by a group's first value: backwards, a far one costs it no digits.
    back = (slice(None), *(slice(None, None, -1) for _ in x.shape[1:]))
    backwards = x[back], gamma[::-1]
    dx, dgamma, dbeta = reference.groupnorm_backward(dout[back], *backwards, groups, axis=axis)
    out = reference.groupnorm_forward(*backwards, beta[::-1], groups, axis=axis)
    expected = {"out": out[back], "dx": dx[back], "dgamma": dgamma[::-1], "dbeta": dbeta[::-1]}
    scales = groupnorm_scales(x, gamma, beta, dout, groups, axis=axis)
    assert_all_within("groupnorm", results, expected, scales, f"{x.shape} {groups} {axis}")


@both_dtypes
@pytest.mark.parametrize("kind", HARD_VALUES)
def test_values(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for shape, axis, groups in BATCHES:
        arrays = hard_arrays(kind, shape, axis, groups, dtype, rng)
        results = run(groupnorm, device, {"groups": groups, "axis": axis}, **arrays)
        check(results, arrays, groups, axis)
        if kind == "constant":
            assert (np.moveaxis(results["out"], axis, -1) == arrays["beta"]).all()
            np.testing.assert_array_equal(results["dgamma"], 0)


@both_dtypes
@pytest.mark.parametrize("kind", ["ordinary", "mean 1e6"])
def test_instances(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for shape, axis in (((3, 5, 2), 1), ((2, 3, 7, 7), 1), ((2, 7, 7, 3), -1), ((1, 1, 1031), 1)):
        arrays = hard_arrays(kind, shape, axis, shape[axis], dtype, rng)
        results = run(instancenorm, device, {"axis": axis}, **arrays)
        check(results, arrays, shape[axis], axis)
        groups = {"groups": shape[axis], "axis": axis}
        assert_same_bits(results, run(groupnorm, device, groups, **arrays))


@both_dtypes
def test_subnormal_gradients(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw_of_shape(groupnorm, (3, 4, 33), dtype, rng)
    arrays["dout"] *= dtype(1e-40 if dtype is np.float32 else 1e-310)
    check(run(groupnorm, device, {"groups": 2}, **arrays), arrays, 2)
    # One value a group has no gradient: what is left are roundings of gamma * dout.
    arrays = draw_of_shape(groupnorm, (3, 64), dtype, rng)
    arrays["dout"] *= dtype(1e-40 if dtype is np.float32 else 1e-310)
    arrays["gamma"] *= dtype(1e-3)
    check(run(groupnorm, device, {"groups": 64}, **arrays), arrays, 64)


@pytest.mark.not_host_run
@both_dtypes
@pytest.mark.parametrize("shape", [(100_003, 6, 2), (2, 6, 100_003)], ids=str)
def test_a_million(
    device: Device, dtype: Any, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    arrays = draw_of_shape(groupnorm, shape, dtype, rng)
    arrays["x"] += dtype(1000)
    check(run(groupnorm, device, {"groups": 2}, **arrays), arrays, 2)


def test_the_largest_variance_that_fits(device: Device, rng: np.random.Generator) -> None:
    signs = np.where(np.arange(300) % 2, 1, -1).reshape(1, 6, 50)
    arrays = draw_of_shape(groupnorm, (1, 6, 50), np.float32, rng)
    arrays["x"] = (1e19 * signs).astype(np.float32)
    check(run(groupnorm, device, {"groups": 2}, **arrays), arrays, 2)


@both_dtypes
def test_a_variance_that_overflows(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """And only its group's sample gives beta, and has no gradient."""
    arrays = draw_of_shape(groupnorm, (3, 6, 40), dtype, rng)
    arrays["x"][1, 2:4] = hard_values("near 1e30", (2, 40), dtype, rng)
    results = run(groupnorm, device, {"groups": 3}, **arrays)
    assert (results["out"][1, 2:4] == arrays["beta"][2:4, np.newaxis]).all()
    np.testing.assert_array_equal(results["dx"][1, 2:4], 0)
    dout = arrays["dout"].astype(np.float64)
    sums, scale = dout.sum(axis=(0, 2)), np.abs(dout).sum(axis=(0, 2))
    assert_within("groupnorm dbeta", results["dbeta"], sums, scale)
    rest = {n: a[::2] if a.ndim > 1 else a for n, a in arrays.items()}
    expected = run(groupnorm, device, {"groups": 3}, **rest)
    for name in ("out", "dx"):
        np.testing.assert_array_equal(results[name][::2], expected[name])


def test_a_nan_stays_in_its_group(device: Device, rng: np.random.Generator) -> None:
    arrays = draw_of_shape(groupnorm, (2, 6, 5), np.float32, rng)
    arrays["x"][1, 2, 3] = np.nan
    results = run(groupnorm, device, {"groups": 3}, **arrays)
    for name in ("out", "dx"):
        lost = np.isnan(results[name])
        assert lost[1, 2:4].all()
        assert lost.sum() == 2 * 5
    assert np.isnan(results["dgamma"]).tolist() == [False, False, True, True, False, False]
    assert np.isfinite(results["dbeta"]).all()


def test_eps_is_the_only_key(device: Device, rng: np.random.Generator) -> None:
    x, ones, zeros = rng.standard_normal((4, 9, 2)), np.ones(9), np.zeros(9)
    arguments = [device.asarray(array) for array in (x, ones, zeros)]
    param = {"eps": 0.5, "mode": "neither"}
    before = dict(param)
    for groups, (out, _) in (
        (3, layers.groupnorm_forward(*arguments, 3, param)),
        (9, layers.instancenorm_forward(*arguments, param)),
    ):
        expected = reference.groupnorm_forward(x, ones, zeros, groups, eps=0.5)
        np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=1e-14)
    assert param == before


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((2, 6), 1, 2), ((2, 4, 3, 2), 1, 2), ((2, 3, 4), -1, 2), ((2, 3, 5), 1, 1)],
)
def test_gradients(
    device: Device, shape: tuple[int, ...], axis: int, groups: int, rng: np.random.Generator
) -> None:
    arrays = draw_of_shape(groupnorm, shape, np.float64, rng, shape[axis])
    assert_gradients(groupnorm, device, choices={"groups": groups, "axis": axis}, **arrays)


@pytest.mark.parametrize("axis", [1, -1])
def test_gradients_of_instances(device: Device, axis: int, rng: np.random.Generator) -> None:
    arrays = draw_of_shape(instancenorm, (2, 3, 4), np.float64, rng, (2, 3, 4)[axis])
    assert_gradients(instancenorm, device, choices={"axis": axis}, **arrays)


@both_dtypes
def test_one_group_is_layer_norm(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """But for its channels' gamma, and to rounding: the order of the sums is another."""
    arrays = draw_of_shape(groupnorm, (3, 5, 7), dtype, rng)
    results = run(groupnorm, device, {"groups": 1}, **arrays)
    spread = {
        name: np.repeat(arrays[name], 7).reshape(5, 7) if arrays[name].ndim == 1 else arrays[name]
        for name in arrays
    }
    expected = run(layernorm, device, **spread)
    tolerance = 1e-5 if dtype is np.float32 else 1e-13
    for name in ("out", "dx"):
        np.testing.assert_allclose(results[name], expected[name], rtol=0, atol=tolerance)
    for name in ("dgamma", "dbeta"):
        sums = expected[name].sum(axis=1)
        np.testing.assert_allclose(results[name], sums, rtol=0, atol=10 * tolerance)


# --- Images --------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("layer", [groupnorm, instancenorm])
def test_the_axis_of_the_channels_does_not_show(
    device: Device, dtype: Any, layer: Layer, rng: np.random.Generator
) -> None:
    for shape in ((2, 6, 7, 7), (3, 66, 11), (2, 3, 2, 3, 3), (1, 2, 300)):
        first = draw_of_shape(layer, shape, dtype, rng)
        expected = run(layer, device, **first)
        for axis in (2, -1):
            moved = {
                name: np.ascontiguousarray(np.moveaxis(a, 1, axis)) if a.ndim > 1 else a
                for name, a in first.items()
            }
            results = run(layer, device, {"axis": axis}, **moved)
            results = {n: np.moveaxis(a, axis, 1) if a.ndim > 1 else a for n, a in results.items()}
            assert_same_bits(results, expected, f"{shape} {axis}")


@both_dtypes
def test_spatial(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """The assignment's gamma and beta are (1, C, 1, 1)."""
    arrays = draw_of_shape(groupnorm, (2, 6, 4, 5), dtype, rng)
    expected = run(groupnorm, device, {"groups": 3}, **arrays)
    there = on_device(device, arrays)
    gamma, beta = (there[name].reshape(1, 6, 1, 1) for name in ("gamma", "beta"))
    out, cache = layers.spatial_groupnorm_forward(there["x"], gamma, beta, 3, {})
    dx, dgamma, dbeta = layers.spatial_groupnorm_backward(there["dout"], cache)
    assert dgamma.shape == dbeta.shape == (1, 6, 1, 1)
    results = {"out": out, "dx": dx, "dgamma": dgamma.reshape(6), "dbeta": dbeta.reshape(6)}
    assert_same_bits({name: to_host(array) for name, array in results.items()}, expected)


@both_dtypes
@pytest.mark.parametrize("kind", [*HARD_VALUES, "near 1e30"])
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, kind: str, rng: np.random.Generator
) -> None:
    for shape, axis, groups in BATCHES:
        arrays = hard_arrays(kind, shape, axis, groups, dtype, rng)
        choices = {"groups": groups, "axis": axis}
        results, expected = (run(groupnorm, d, choices, **arrays) for d in (device, CPU))
        assert_same_bits(results, expected, f"{shape} {groups} {axis}")
