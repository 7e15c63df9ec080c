"""Batch norm with what follows it in one pass: the bits of the separate calls."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layer_cases import (
    CPU,
    Arrays,
    Layer,
    accumulator,
    as_channels,
    assert_gradients,
    assert_same_bits,
    batchnorm_add_relu,
    batchnorm_relu,
    draw_of_shape,
    hard_values,
    on_device,
    on_host,
    run,
    running,
)
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Array, Device, namespace, to_host

FUSED: tuple[Layer, ...] = (batchnorm_relu, batchnorm_add_relu)
# Sizes beside a leaf's (8), a warp's (32) and a tile's (1024); one position; one channel; 7 * 7.
BATCHES = (
    *(((2, 5), 1), ((257, 3), 1), ((9, 33), 1), ((9, 3, 1, 1), 1), ((5, 1, 3), 1)),
    *(((2, 3, 7, 7), 1), ((2, 7, 7, 3), -1), ((3, 13, 11), 1), ((3, 2, 1031), 1)),
    ((2, 21, 5, 3), 1),  # short channels, more than the lanes of a vector
)
every_dtype = pytest.mark.parametrize(
    "dtype",
    [np.float16, ml_dtypes.bfloat16, np.float32, np.float64],
    ids=lambda dtype: dtype.__name__,
)
both_modes = pytest.mark.parametrize("mode", ["train", "test"])


def add(a: Array, b: Array) -> Array:
    """Add on the host, where nothing flushes subnormals, and round once."""
    xp = namespace(a)
    with np.errstate(all="ignore"):
        return xp.asarray(to_host(a) + to_host(b))


def by_steps(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    dout: Array,
    residual: Array | None = None,
    mode: str = "train",
    axis: int = 1,
) -> Arrays:
    bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
    out, norm = layers.batchnorm_forward(x, gamma, beta, bn_param, axis)
    if residual is not None:
        out = add(out, residual)
    out, relu = layers.relu_forward(out)
    dout = layers.relu_backward(dout, relu)
    dx, dgamma, dbeta = layers.batchnorm_backward(dout, norm)
    results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta, **running(bn_param)}
    return results if residual is None else results | {"dresidual": dout}


def hard_arrays(
    layer: Layer, kind: str, shape: tuple[int, ...], axis: int, dtype: Any, rng: Any
) -> dict[str, NDArray[Any]]:
    channels = shape[axis]
    arrays = draw_of_shape(layer, shape, dtype, rng, channels)
    samples = arrays["x"].size // channels
    if kind == "special":
        # Zeros and NaN where ReLU decides, and infinities that it may let through.
        for name in {"x", "residual", "dout"} & arrays.keys():
            special = rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], shape)
            chosen = rng.random(shape) < 0.5 / samples
            arrays[name] = np.where(chosen, special, arrays[name].astype(float)).astype(dtype)
        arrays["beta"][0], arrays["gamma"][0] = 0, -0.0
    elif kind != "ordinary":
        x = hard_values(kind, (samples, channels), accumulator(dtype).type, rng)
        arrays["x"] = as_channels(x, shape, axis).astype(dtype)
    if kind == "constant":  # ReLU sees a sum of exactly 0
        arrays["beta"][:] = 0
    return arrays


@every_dtype
@both_modes
@pytest.mark.parametrize("layer", FUSED)
def test_the_bits_of_the_separate_calls(
    device: Device, dtype: Any, mode: str, layer: Layer, rng: np.random.Generator
) -> None:
    # In half precision values of 1e6 and 1e30 may be infinities.
    small = ("ordinary", "special", "constant", "subnormal")
    full = (*small, "mean 1e6", "near 1e30", "far first row")
    for kind in small if np.dtype(dtype).itemsize == 2 else full:
        for shape, axis in BATCHES:
            arrays = on_device(device, hard_arrays(layer, kind, shape, axis, dtype, rng))
            results = on_host(layer(**arrays, mode=mode, axis=axis))
            expected = on_host(by_steps(**arrays, mode=mode, axis=axis))
            assert_same_bits(results, expected, f"{kind} {shape} {axis}")


@every_dtype
@both_modes
@pytest.mark.parametrize("layer", FUSED)
def test_bits_are_those_of_the_cpu(
    device: Device, dtype: Any, mode: str, layer: Layer, rng: np.random.Generator
) -> None:
    for kind in ("ordinary", "special", "subnormal"):
        for shape, axis in BATCHES:
            arrays = hard_arrays(layer, kind, shape, axis, dtype, rng)
            choices = {"mode": mode, "axis": axis}
            results, expected = (run(layer, d, choices, **arrays) for d in (device, CPU))
            assert_same_bits(results, expected, f"{kind} {shape} {axis}")


@both_modes
@pytest.mark.parametrize("layer", FUSED)
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 3, 2, 2), 1), ((4, 3, 2), -1)])
def test_gradients(
    device: Device,
    mode: str,
    layer: Layer,
    shape: tuple[int, ...],
    axis: int,
    rng: np.random.Generator,
) -> None:
    arrays = draw_of_shape(layer, shape, np.float64, rng, shape[axis])
    choices = {"mode": mode, "axis": axis}
    for name in {"beta", "running_mean", "residual"} & arrays.keys():
        arrays[name] *= 0.1
    # ReLU lets some pass and some not, and no step of a central difference crosses its kink.
    passes = run(layer, CPU, choices, **arrays)["out"] > 0
    assert 0 < passes.mean() < 1
    for nudge in (-1e-4, 1e-4):
        nudged = run(layer, CPU, choices, **{**arrays, "beta": arrays["beta"] + nudge})
        np.testing.assert_array_equal(nudged["out"] > 0, passes)
    assert_gradients(layer, device, choices=choices, **arrays)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((40, 5), 1), ((2, 20, 3, 3), 1), ((1, 2, 100, 100), 1), ((2, 3, 3, 20), -1)],
)
def test_relu_sees_what_is_stored(device: Device, shape: tuple[int, ...], axis: int) -> None:
    # Before they are rounded to float16 half of the outputs are above 0; afterwards none is.
    rng = np.random.default_rng(5)
    x, dout = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    gamma, beta = np.full(shape[axis], 1e-9, np.float32), np.zeros(shape[axis], np.float32)
    with device.scope():
        x, dout, gamma, beta = map(device.asarray, (x, dout, gamma, beta))
        out, cache = layers.batchnorm_relu_forward(x, gamma, beta, {"mode": "train"}, axis)
        gradients = layers.batchnorm_relu_backward(dout, cache)
    for array in (out, *gradients):
        assert not to_host(array).any()


def test_the_caller_may_go_on_with_dout_and_the_residual(
    device: Device, rng: np.random.Generator
) -> None:
    arrays = on_device(device, draw_of_shape(batchnorm_add_relu, (4, 3, 5), np.float32, rng))
    before = {name: to_host(array).tobytes() for name, array in arrays.items()}
    results = batchnorm_add_relu(**arrays)
    results["dresidual"][...] = 0
    assert {name: to_host(array).tobytes() for name, array in arrays.items()} == before


def test_the_cache_of_another_layer(device: Device) -> None:
    x, v = device.xp.ones((4, 3), np.float32), device.xp.ones(3, np.float32)
    caches = {
        "batchnorm": layers.batchnorm_forward(x, v, v, {"mode": "train"})[1],
        "batchnorm_relu": layers.batchnorm_relu_forward(x, v, v, {"mode": "train"})[1],
        "batchnorm_add_relu": layers.batchnorm_add_relu_forward(x, x, v, v, {"mode": "train"})[1],
    }
    for layer in caches:
        for other, cache in caches.items():
            if other != layer:
                with pytest.raises(TypeError, match=rf"expected the one that {layer}_forward"):
                    getattr(layers, f"{layer}_backward")(x, cache)
