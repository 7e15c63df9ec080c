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
    batchnorm,
    batchnorm_test,
    both_dtypes,
    draw,
    hard_values,
    on_device,
    run,
)
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import batchnorm_scales, batchnorm_test_scales

# Two rows, one feature, and sizes beside a leaf's (8), a warp's (32) and a tile's (256, 1024).
SHAPES = ((2, 5), (37, 1), (9, 33), (257, 3), (1025, 7))


def check_training(results: Arrays, arrays: Arrays, momentum: float = 0.9) -> None:
    """Hold the results of a training step to the reference, by their bounds."""
    x, gamma, beta, dout = (arrays[name] for name in ("x", "gamma", "beta", "dout"))
    # The reference shifts by its first row: upside down, a far first row costs it no digits.
    graph = reference.batchnorm_forward(x[::-1], gamma, beta)
    dx, dgamma, dbeta = reference.batchnorm_backward_graph(dout[::-1], graph)
    expected = {"out": graph.out[::-1], "dx": dx[::-1], "dgamma": dgamma, "dbeta": dbeta}
    assert_all_within("batchnorm", results, expected, batchnorm_scales(**inputs(arrays)))
    check_running(results, arrays["running_mean"], arrays["running_var"], x, momentum)


def check_running(
    results: Arrays, mean: NDArray[Any], var: NDArray[Any], x: NDArray[Any], momentum: float
) -> None:
    expected = reference.batchnorm_running(mean, var, x[::-1], momentum)
    magnitude = momentum * np.abs(mean) + (1 - momentum) * np.abs(x.astype(np.float64)).mean(axis=0)
    scales = magnitude, expected[1]
    for name, value, scale in zip(("running_mean", "running_var"), expected, scales, strict=True):
        assert_within(f"batchnorm {name}", results[name], value, scale)


def inputs(arrays: Arrays) -> Arrays:
    return {name: arrays[name] for name in ("x", "gamma", "beta", "dout")}


@both_dtypes
@pytest.mark.parametrize("kind", HARD_VALUES)
def test_training(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for rows, columns in SHAPES:
        arrays = draw(batchnorm, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (rows, columns), dtype, rng)
        if kind == "subnormal":  # beside a beta of 1 nothing of them could be seen
            arrays["beta"][:] = 0
        results = run(batchnorm, device, **arrays)
        check_training(results, arrays)
        if kind == "constant":
            np.testing.assert_array_equal(results["out"], [arrays["beta"]] * rows)
            np.testing.assert_array_equal(results["dgamma"], 0)


@both_dtypes
def test_subnormal_gradients(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm, 257, 3, dtype, rng)
    arrays["dout"] = hard_values("subnormal", (257, 3), dtype, rng)
    check_training(run(batchnorm, device, **arrays), arrays)


@pytest.mark.not_host_run
@both_dtypes
def test_a_million_rows(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm, 1_000_003, 2, dtype, rng)
    arrays["x"] += dtype(1000)
    check_training(run(batchnorm, device, **arrays), arrays)


def test_the_largest_variance_that_fits(device: Device, rng: np.random.Generator) -> None:
    # Distances from the mean of up to 1.8e19, whose squares fit float32, are documented to work.
    signs = np.where(np.arange(40) % 2, 1, -1)[:, np.newaxis]
    arrays = draw(batchnorm, 40, 1, np.float32, rng) | {"x": (1e19 * signs).astype(np.float32)}
    check_training(run(batchnorm, device, **arrays), arrays)


@both_dtypes
def test_a_variance_that_overflows(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm, 257, 3, dtype, rng)
    arrays["x"] = hard_values("near 1e30", (257, 3), dtype, rng)
    results = run(batchnorm, device, **arrays)
    np.testing.assert_array_equal(results["out"], [arrays["beta"]] * 257)
    np.testing.assert_array_equal(results["dx"], 0)
    np.testing.assert_array_equal(results["dgamma"], 0)
    np.testing.assert_array_equal(results["running_var"], np.inf)
    magnitude = np.abs(arrays["x"].astype(np.longdouble)).mean(axis=0)
    mean = arrays["x"].astype(np.longdouble).mean(axis=0)
    scale = 0.1 * magnitude + 0.9 * np.abs(arrays["running_mean"])
    expected = 0.1 * mean + 0.9 * arrays["running_mean"]
    assert_within("batchnorm running_mean", results["running_mean"], expected, scale)
    assert_within(
        "batchnorm dbeta",
        results["dbeta"],
        arrays["dout"].astype(np.float64).sum(axis=0),
        np.abs(arrays["dout"]).sum(axis=0),
    )

    statistics = {name: results[name] for name in ("running_mean", "running_var")}
    results = run(batchnorm_test, device, **(arrays | statistics))
    np.testing.assert_array_equal(results["out"], [arrays["beta"]] * 257)
    np.testing.assert_array_equal(results["dx"], 0)


@both_dtypes
@pytest.mark.parametrize("kind", ["ordinary", "mean 1e6", "subnormal"])
def test_test_mode(device: Device, dtype: Any, kind: str, rng: np.random.Generator) -> None:
    for rows, columns in ((1, 5), *SHAPES):
        arrays = draw(batchnorm_test, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (rows, columns), dtype, rng)
        arrays["running_mean"] = hard_values(kind, (1, columns), dtype, rng)[0]
        if kind == "subnormal":
            arrays["beta"][:] = 0
        results = run(batchnorm_test, device, **arrays)
        forward = {name: a for name, a in arrays.items() if name != "dout"}
        scale = 1 / np.sqrt(arrays["running_var"].astype(np.float64) + 1e-5)
        dout = arrays["dout"].astype(np.float64)
        xhat = (arrays["x"].astype(np.float64) - arrays["running_mean"]) * scale
        expected = {
            "out": reference.batchnorm_test(**forward),
            "dx": dout * arrays["gamma"] * scale,
            "dgamma": (dout * xhat).sum(axis=0),
            "dbeta": dout.sum(axis=0),
        }
        assert_all_within("batchnorm test", results, expected, batchnorm_test_scales(**arrays))


@both_dtypes
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1])
def test_running_statistics(
    device: Device, dtype: Any, momentum: float | None, rng: np.random.Generator
) -> None:
    bn_param: Arrays = {"mode": "train"} | ({} if momentum is None else {"momentum": momentum})
    mean, var = np.zeros(3), np.zeros(3)
    gamma = device.xp.ones(3, dtype)
    for _ in range(3):
        x = (5 + 2 * rng.standard_normal((20, 3))).astype(dtype)
        layers.batchnorm_forward(device.asarray(x), gamma, gamma, bn_param)
        results = {name: to_host(bn_param[name]) for name in ("running_mean", "running_var")}
        check_running(results, mean, var, x, 0.9 if momentum is None else momentum)
        mean, var = results["running_mean"], results["running_var"]


@both_dtypes
def test_test_mode_without_running_statistics(device: Device, dtype: Any) -> None:
    x = device.xp.ones((4, 3), dtype)
    bn_param: Arrays = {"mode": "test"}
    out, _ = layers.batchnorm_forward(x, x[0], x[0], bn_param)
    expected = reference.batchnorm_test(*(np.ones(s) for s in ((4, 3), 3, 3)), *np.zeros((2, 3)))
    np.testing.assert_allclose(to_host(out), expected, rtol=1e-6)
    for name in ("running_mean", "running_var"):
        assert bn_param[name].dtype == dtype
        np.testing.assert_array_equal(to_host(bn_param[name]), np.zeros(3))


def test_test_mode_leaves_the_running_statistics(device: Device) -> None:
    arrays = on_device(device, {"x": np.ones((4, 3)), "mean": np.ones(3), "var": np.ones(3)})
    bn_param = {"mode": "test", "running_mean": arrays["mean"], "running_var": arrays["var"]}
    before = dict(bn_param)
    layers.batchnorm_forward(arrays["x"], arrays["var"], arrays["mean"], bn_param)
    assert bn_param.keys() == before.keys()
    assert all(bn_param[name] is before[name] for name in before)
    assert to_host(arrays["mean"]).tolist() == to_host(arrays["var"]).tolist() == [1, 1, 1]


def test_eps(device: Device, rng: np.random.Generator) -> None:
    x, ones, zeros = rng.standard_normal((9, 4)), np.ones(4), np.zeros(4)
    expected = {
        "train": reference.batchnorm_forward(x, ones, zeros, eps=0.5).out,
        "test": reference.batchnorm_test(x, ones, zeros, zeros, zeros, eps=0.5),
    }
    for mode, value in expected.items():
        arguments = (device.asarray(a) for a in (x, ones, zeros))
        out, _ = layers.batchnorm_forward(*arguments, {"mode": mode, "eps": 0.5})
        np.testing.assert_allclose(to_host(out), value, rtol=0, atol=1e-14)


def test_alt_is_the_same_function() -> None:
    assert layers.batchnorm_backward_alt is layers.batchnorm_backward


@pytest.mark.parametrize("layer", [batchnorm, batchnorm_test])
def test_gradients(device: Device, layer: Any, rng: np.random.Generator) -> None:
    assert_gradients(layer, device, **draw(layer, 5, 3, np.float64, rng))


@both_dtypes
@pytest.mark.parametrize("layer", [batchnorm, batchnorm_test])
@pytest.mark.parametrize("kind", [*HARD_VALUES, "near 1e30"])
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, layer: Any, kind: str, rng: np.random.Generator
) -> None:
    for rows, columns in SHAPES:
        arrays = draw(layer, rows, columns, dtype, rng)
        arrays["x"] = hard_values(kind, (rows, columns), dtype, rng)
        assert_same_bits(run(layer, device, **arrays), run(layer, CPU, **arrays))
