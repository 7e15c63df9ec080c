from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    HARD_VALUES,
    Arrays,
    Layer,
    as_channels,
    assert_all_within,
    assert_gradients,
    assert_same_bits,
    assert_within,
    batchnorm,
    batchnorm_images,
    batchnorm_test,
    both_dtypes,
    draw,
    draw_of_shape,
    hard_values,
    of_rows,
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
# x's shape and the axis of its channels. One position and one of each channel, one channel, one
# sample, 7 * 7 positions, primes, more channels than a warp has threads, more samples than a tile.
IMAGES = (
    *(((2, 5, 1), 1), ((9, 3, 1, 1), 1), ((5, 1, 3), 1), ((1, 3, 4), 1), ((2, 3, 7, 7), 1)),
    *(((3, 11, 13), -1), ((7, 67, 5), 1), ((2, 3, 3, 67), 3), ((2, 3, 2, 5, 3), 1)),
    *(((5, 19, 23, 2), -1), ((3, 2, 1031), 1), ((5, 3, 4), 0), ((2, 5, 3, 7), 2)),
)
BATCHES = (*((shape, 1) for shape in SHAPES), *IMAGES)


def hard_arrays(
    layer: Layer, kind: str, shape: tuple[int, ...], axis: int, dtype: Any, rng: Any
) -> dict[str, NDArray[Any]]:
    """Return random arguments, with x's values of this kind along the samples of a channel."""
    channels = shape[axis]
    arrays = draw_of_shape(layer, shape, dtype, rng, channels)
    samples = arrays["x"].size // channels
    arrays["x"] = as_channels(hard_values(kind, (samples, channels), dtype, rng), shape, axis)
    if kind == "subnormal":  # beside a beta of 1 nothing of them could be seen
        arrays["beta"][:] = 0
    return arrays


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
    for shape, axis in BATCHES:
        arrays = hard_arrays(batchnorm, kind, shape, axis, dtype, rng)
        results = of_rows(run(batchnorm, device, {"axis": axis}, **arrays), axis)
        check_training(results, of_rows(arrays, axis))
        if kind == "constant":
            assert (results["out"] == arrays["beta"]).all()
            np.testing.assert_array_equal(results["dgamma"], 0)


@both_dtypes
def test_subnormal_gradients(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm, 257, 3, dtype, rng)
    arrays["dout"] = hard_values("subnormal", (257, 3), dtype, rng)
    check_training(run(batchnorm, device, **arrays), arrays)


@pytest.mark.not_host_run
@both_dtypes
@pytest.mark.parametrize("shape", [(1_000_003, 2), (1, 2, 1_000_003)], ids=["rows", "positions"])
def test_a_million(
    device: Device, dtype: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    arrays = draw_of_shape(batchnorm, shape, dtype, rng)
    arrays["x"] += dtype(1000)
    check_training(of_rows(run(batchnorm, device, **arrays), 1), of_rows(arrays, 1))


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
    for shape, axis in (((1, 5), 1), ((1, 5, 1), 1), *BATCHES):
        arrays = hard_arrays(batchnorm_test, kind, shape, axis, dtype, rng)
        arrays["running_mean"] = hard_values(kind, (1, shape[axis]), dtype, rng)[0]
        results = of_rows(run(batchnorm_test, device, {"axis": axis}, **arrays), axis)
        arrays = of_rows(arrays, axis)
        forward = {name: a for name, a in arrays.items() if name != "dout"}
        scale = 1 / np.sqrt(arrays["running_var"].astype(np.float64) + 1e-5)
        dout = arrays["dout"].astype(np.float64)
        xhat = (arrays["x"].astype(np.float64) - arrays["running_mean"]) * scale
        expected = {
            "out": reference.batchnorm_test(**forward),
            "dx": dout * arrays["gamma"] * scale,
            # NumPy adds in pairs only along what is contiguous.
            "dgamma": np.ascontiguousarray((dout * xhat).T).sum(axis=1),
            "dbeta": np.ascontiguousarray(dout.T).sum(axis=1),
        }
        assert_all_within("batchnorm test", results, expected, batchnorm_test_scales(**arrays))


@both_dtypes
@pytest.mark.parametrize("momentum", ["absent", 0.0, 0.3, 1])
def test_running_statistics(
    device: Device, dtype: Any, momentum: Any, rng: np.random.Generator
) -> None:
    bn_param: Arrays = {"mode": "train"} | ({} if momentum == "absent" else {"momentum": momentum})
    mean, var = np.zeros(3), np.zeros(3)
    gamma = device.xp.ones(3, dtype)
    for _ in range(3):
        x = (5 + 2 * rng.standard_normal((20, 3))).astype(dtype)
        layers.batchnorm_forward(device.asarray(x), gamma, gamma, bn_param)
        results = {name: to_host(bn_param[name]) for name in ("running_mean", "running_var")}
        check_running(results, mean, var, x, 0.9 if momentum == "absent" else momentum)
        mean, var = results["running_mean"], results["running_var"]
    assert "num_batches" not in bn_param


@both_dtypes
def test_cumulative_statistics(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    """Without a momentum they are the mean over the batches, whatever they were to begin with."""
    bn_param: Arrays = {"mode": "train", "momentum": None}
    for name in ("running_mean", "running_var"):
        bn_param[name] = device.xp.full(3, 7, dtype)
    gamma = device.xp.ones(3, dtype)
    samples: dict[str, list[Any]] = {"running_mean": [], "running_var": []}
    for count in range(1, 6):
        x = (count + count * rng.standard_normal((20, 3))).astype(dtype)
        bn_param["mode"] = "train"
        layers.batchnorm_forward(device.asarray(x), gamma, gamma, bn_param)
        samples["running_mean"].append(x.mean(axis=0, dtype=np.float64))
        samples["running_var"].append(x.var(axis=0, dtype=np.float64))
        assert bn_param["num_batches"] == count
        bn_param["mode"] = "test"  # which is no batch to be counted
        layers.batchnorm_forward(device.asarray(x), gamma, gamma, bn_param)
        assert bn_param["num_batches"] == count
        for name, of_batches in samples.items():
            mean = np.mean(of_batches, axis=0)
            assert_within(f"batchnorm {name}", to_host(bn_param[name]), mean, np.abs(mean) + 1)


def test_cumulative_statistics_go_on_from_a_count(device: Device) -> None:
    """As from a checkpoint: the fourth batch has a quarter of the weight."""
    x = device.asarray(np.array([[1.0], [3.0]]))
    old = {"running_mean": np.array([10.0]), "running_var": np.array([5.0])}
    bn_param = {"mode": "train", "momentum": None, "num_batches": 3, **on_device(device, old)}
    layers.batchnorm_forward(x, x[0], x[0], bn_param)
    assert bn_param["num_batches"] == 4
    assert to_host(bn_param["running_mean"]).tolist() == [0.75 * 10 + 0.25 * 2]
    assert to_host(bn_param["running_var"]).tolist() == [0.75 * 5 + 0.25 * 1]


@both_dtypes
@pytest.mark.parametrize("momentum", [0.9, None])
def test_an_unbiased_running_variance(
    device: Device, dtype: Any, momentum: float | None, rng: np.random.Generator
) -> None:
    for shape, axis in (((2, 3), 1), ((5, 3, 7), 1), ((2, 4, 3), -1)):
        arrays = draw_of_shape(batchnorm, shape, dtype, rng, 3)
        x, gamma, mean, var = (
            device.asarray(arrays[name]) for name in ("x", "gamma", "running_mean", "running_var")
        )
        choice = {"mode": "train", "momentum": momentum, "running_mean": mean, "running_var": var}
        unbiased: Arrays = {**choice, "unbiased": True}
        biased: Arrays = {**choice, "unbiased": False}
        out, _ = layers.batchnorm_forward(x, gamma, gamma, unbiased, axis)
        expected, _ = layers.batchnorm_forward(x, gamma, gamma, biased, axis)
        # A batch is normalised with its biased variance either way, and means have no bias.
        assert_same_bits({"out": to_host(out)}, {"out": to_host(expected)})
        means = ({"mean": to_host(params["running_mean"])} for params in (unbiased, biased))
        assert_same_bits(*means)
        share = 0.0 if momentum is None else momentum
        rows = of_rows(arrays, axis)["x"]
        _, value = reference.batchnorm_running(
            arrays["running_mean"], arrays["running_var"], rows, share, unbiased=True
        )
        assert_within("batchnorm running_var", to_host(unbiased["running_var"]), value, value)


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
@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3), 1), ((2, 3, 2, 2), 1), ((2, 3, 2), -1), ((2, 3, 2, 1, 2), 0)]
)
def test_gradients(
    device: Device, layer: Any, shape: tuple[int, ...], axis: int, rng: np.random.Generator
) -> None:
    """In test mode statistics are constants: those of a frozen batch norm."""
    arrays = draw_of_shape(layer, shape, np.float64, rng, shape[axis])
    assert_gradients(layer, device, choices={"axis": axis}, **arrays)


# --- Images --------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("layer", [batchnorm, batchnorm_test])
def test_the_axis_of_the_channels_does_not_show(
    device: Device, dtype: Any, layer: Layer, rng: np.random.Generator
) -> None:
    """Channels first and last, and the rows of a matrix, have the same samples in one order."""
    for shape in ((2, 3, 7, 7), (3, 67, 11), (2, 5, 2, 3, 3), (4, 1, 300)):
        first = draw_of_shape(layer, shape, dtype, rng)
        expected = of_rows(run(layer, device, **first), 1)
        assert_same_bits(run(layer, device, **of_rows(first, 1)), expected, f"{shape}")
        for axis in (0, 2, -1):
            moved = {
                name: np.ascontiguousarray(np.moveaxis(a, 1, axis)) if a.ndim > 1 else a
                for name, a in first.items()
            }
            results = run(layer, device, {"axis": axis}, **moved)
            assert results["out"].shape == moved["x"].shape
            assert_same_bits(of_rows(results, axis), expected, f"{shape} {axis}")


def test_an_axis_counts_from_either_end(device: Device, rng: np.random.Generator) -> None:
    arrays = draw_of_shape(batchnorm, (2, 3, 5, 4), np.float32, rng, 5)
    expected = run(batchnorm, device, {"axis": 2}, **arrays)
    assert_same_bits(run(batchnorm, device, {"axis": -2}, **arrays), expected)
    assert_same_bits(run(batchnorm, device, {"axis": np.int64(2)}, **arrays), expected)


def test_spatial(device: Device, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm_images, 3, 5, np.float32, rng)
    there = on_device(device, arrays)
    bn_param = {"mode": "train"} | {name: there[name] for name in ("running_mean", "running_var")}
    out, cache = layers.spatial_batchnorm_forward(
        there["x"], there["gamma"], there["beta"], bn_param
    )
    dx, dgamma, dbeta = layers.spatial_batchnorm_backward(there["dout"], cache)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta} | {
        name: bn_param[name] for name in ("running_mean", "running_var")
    }
    expected = run(batchnorm_images, device, **arrays)
    assert_same_bits({name: to_host(a) for name, a in results.items()}, expected)


@both_dtypes
@pytest.mark.parametrize("layer", [batchnorm, batchnorm_test])
@pytest.mark.parametrize("kind", [*HARD_VALUES, "near 1e30"])
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, layer: Any, kind: str, rng: np.random.Generator
) -> None:
    for shape, axis in BATCHES:
        arrays = hard_arrays(layer, kind, shape, axis, dtype, rng)
        results, expected = (run(layer, d, {"axis": axis}, **arrays) for d in (device, CPU))
        assert_same_bits(results, expected, f"{shape} {axis}")


@both_dtypes
def test_what_has_no_weight_has_no_part(device: Device, dtype: Any) -> None:
    """A momentum of 1 leaves the statistics, of 0 takes the batch's: beside infinities too."""
    x = device.asarray(hard_values("near 1e30", (9, 1), dtype, np.random.default_rng(0)))
    ordinary = device.asarray(np.arange(9, dtype=dtype)[:, np.newaxis])
    ones = device.xp.ones(1, dtype)
    bn_param: Arrays = {"mode": "train", "momentum": 1.0, "running_mean": ones, "running_var": ones}
    layers.batchnorm_forward(x, ones, ones, bn_param)  # an infinite variance
    assert [float(to_host(bn_param[n])[0]) for n in ("running_mean", "running_var")] == [1, 1]
    bn_param["momentum"] = 0.5
    layers.batchnorm_forward(x, ones, ones, bn_param)
    assert np.isinf(to_host(bn_param["running_var"])[0])
    bn_param["momentum"] = 0.0
    layers.batchnorm_forward(ordinary, ones, ones, bn_param)
    mean, var = (float(to_host(bn_param[n])[0]) for n in ("running_mean", "running_var"))
    assert (mean, var) == (4, pytest.approx(60 / 9))
