"""What the tests of the layers share: every layer as one call, hard values, and comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Array, Device, resolve, to_host
from gpubn.testing.gradients import eval_numerical_gradient_array, rel_error
from gpubn.testing.tolerance import BOUNDS, ulp_error

Arrays = dict[str, Any]
CPU = resolve("cpu")
both_dtypes = pytest.mark.parametrize(
    "dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__
)
HALVES = (np.float16, ml_dtypes.bfloat16)
both_halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)

# --- Every layer, forward and backward, as a function of arrays ----------------------------------


def affine(x: Array, w: Array, b: Array, dout: Array, reproducible: bool | None = None) -> Arrays:
    out, cache = layers.affine_forward(x, w, b, reproducible)
    dx, dw, db = layers.affine_backward(dout, cache)
    return {"out": out, "dx": dx, "dw": dw, "db": db}


def affine_reproducible(x: Array, w: Array, b: Array, dout: Array) -> Arrays:
    return affine(x, w, b, dout, reproducible=True)


def relu(x: Array, dout: Array) -> Arrays:
    out, cache = layers.relu_forward(x)
    return {"out": out, "dx": layers.relu_backward(dout, cache)}


def batchnorm(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    dout: Array,
    mode: str = "train",
    axis: int = 1,
) -> Arrays:
    bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
    out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param, axis)
    dx, dgamma, dbeta = layers.batchnorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta, **running(bn_param)}


def batchnorm_test(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    dout: Array,
    axis: int = 1,
) -> Arrays:
    return batchnorm(x, gamma, beta, running_mean, running_var, dout, "test", axis)


def batchnorm_images(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
) -> Arrays:
    return batchnorm(x, gamma, beta, running_mean, running_var, dout)


def batchnorm_channels_last(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
) -> Arrays:
    return batchnorm(x, gamma, beta, running_mean, running_var, dout, axis=-1)


def batchnorm_relu(
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    dout: Array,
    mode: str = "train",
    axis: int = 1,
) -> Arrays:
    bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
    out, cache = layers.batchnorm_relu_forward(x, gamma, beta, bn_param, axis)
    dx, dgamma, dbeta = layers.batchnorm_relu_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta, **running(bn_param)}


def batchnorm_add_relu(
    x: Array,
    residual: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    dout: Array,
    mode: str = "train",
    axis: int = 1,
) -> Arrays:
    bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
    out, cache = layers.batchnorm_add_relu_forward(x, residual, gamma, beta, bn_param, axis)
    gradients = layers.batchnorm_add_relu_backward(dout, cache)
    names = ("dx", "dresidual", "dgamma", "dbeta")
    return {"out": out, **dict(zip(names, gradients, strict=True)), **running(bn_param)}


def running(bn_param: Arrays) -> Arrays:
    return {name: bn_param[name] for name in ("running_mean", "running_var")}


def groupnorm(
    x: Array, gamma: Array, beta: Array, dout: Array, groups: int | None = None, axis: int = 1
) -> Arrays:
    """By default of three groups, or of two or one where three do not divide the channels."""
    groups = groups or next(g for g in (3, 2, 1) if x.shape[axis] % g == 0)
    out, cache = layers.groupnorm_forward(x, gamma, beta, groups, {}, axis)
    dx, dgamma, dbeta = layers.groupnorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def groupnorm_images(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    return groupnorm(x, gamma, beta, dout)


def groupnorm_channels_last(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    return groupnorm(x, gamma, beta, dout, axis=-1)


def instancenorm(x: Array, gamma: Array, beta: Array, dout: Array, axis: int = 1) -> Arrays:
    out, cache = layers.instancenorm_forward(x, gamma, beta, {}, axis)
    dx, dgamma, dbeta = layers.instancenorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def layernorm(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    out, cache = layers.layernorm_forward(x, gamma, beta, {})
    dx, dgamma, dbeta = layers.layernorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def layernorm_images(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    """Over channels and positions: gamma has the shape of a sample."""
    return layernorm(x, gamma, beta, dout)


def rmsnorm(x: Array, gamma: Array, dout: Array) -> Arrays:
    out, cache = layers.rmsnorm_forward(x, gamma, {})
    dx, dgamma = layers.rmsnorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma}


def dropout(x: Array, dout: Array) -> Arrays:
    out, cache = layers.dropout_forward(x, {"mode": "train", "p": 0.7, "seed": 2**63 + 5})
    return {"out": out, "dx": layers.dropout_backward(dout, cache)}


def dropout_test(x: Array, dout: Array) -> Arrays:
    out, cache = layers.dropout_forward(x, {"mode": "test", "p": 0.7})
    return {"out": out, "dx": layers.dropout_backward(dout, cache)}


def softmax_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.softmax_loss(x, y), strict=True))


def svm_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.svm_loss(x, y), strict=True))


def affine_relu(x: Array, w: Array, b: Array, dout: Array) -> Arrays:
    out, cache = layers.affine_relu_forward(x, w, b)
    dx, dw, db = layers.affine_relu_backward(dout, cache)
    return {"out": out, "dx": dx, "dw": dw, "db": db}


def affine_bn_relu(
    x: Array, w: Array, b: Array, gamma: Array, beta: Array, dout: Array, mode: str = "train"
) -> Arrays:
    bn_param: Arrays = {"mode": mode}
    out, cache = layers.affine_bn_relu_forward(x, w, b, gamma, beta, bn_param)
    gradients = layers.affine_bn_relu_backward(dout, cache)
    names = ("dx", "dw", "db", "dgamma", "dbeta")
    return {"out": out, **dict(zip(names, gradients, strict=True)), **running(bn_param)}


Layer = Callable[..., Arrays]
NORMALIZATIONS: tuple[Layer, ...] = (
    *(batchnorm, batchnorm_test, batchnorm_images, batchnorm_channels_last),
    *(batchnorm_relu, batchnorm_add_relu, layernorm, layernorm_images, rmsnorm),
    *(groupnorm, groupnorm_images, groupnorm_channels_last, instancenorm),
)
LAYERS: tuple[Layer, ...] = (
    *(affine, affine_reproducible, affine_relu, affine_bn_relu),
    *(relu, dropout, dropout_test, softmax_loss, svm_loss),
    *NORMALIZATIONS,
)
# Those whose x has more than two dimensions, with its shape for so many samples and channels.
SHAPES: dict[Layer, Callable[[int, int], tuple[int, ...]]] = {
    batchnorm_images: lambda samples, channels: (samples, channels, 2, 3),
    batchnorm_add_relu: lambda samples, channels: (samples, channels, 2),
    batchnorm_channels_last: lambda samples, channels: (samples, 3, channels),
    layernorm_images: lambda samples, channels: (samples, channels, 2, 2),
    groupnorm_images: lambda samples, channels: (samples, channels, 3, 2),
    groupnorm_channels_last: lambda samples, channels: (samples, 5, channels),
    instancenorm: lambda samples, channels: (samples, channels, 7),
}


def argument_names(layer: Layer) -> list[str]:
    choices = ("mode", "reproducible", "axis", "groups")
    return [name for name in inspect.signature(layer).parameters if name not in choices]


def accumulator(dtype: Any) -> np.dtype[Any]:
    """Return the dtype of parameters and statistics beside arrays of this one."""
    return np.dtype(np.float32) if dtype in HALVES else np.dtype(dtype)


def draw(
    layer: Layer, rows: int, columns: int, dtype: Any, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return random NumPy arguments of a layer; ``w`` is square, so ``dout`` has x's shape."""
    shape = SHAPES.get(layer, lambda *shape: shape)(rows, columns)
    return draw_of_shape(layer, shape, dtype, rng, columns)


def draw_of_shape(
    layer: Layer,
    shape: tuple[int, ...],
    dtype: Any,
    rng: np.random.Generator,
    channels: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Return random arguments for x of this shape, with its channels on axis 1 if none are said."""
    channels = shape[1] if channels is None else channels

    def argument(name: str) -> NDArray[Any]:
        if name == "y":
            return rng.integers(channels, size=shape[0])
        of_x = name in ("x", "residual", "dout")
        if of_x:
            size = shape
        elif name == "w":
            size = (channels, channels)
        else:
            size = shape[1:] if layer is layernorm_images else (channels,)
        array = rng.standard_normal(size)
        array = np.abs(array) if name == "running_var" else array
        return array.astype(dtype if of_x else accumulator(dtype))

    return {name: argument(name) for name in argument_names(layer)}


def on_device(device: Device, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name: device.asarray(array) for name, array in arrays.items()}


def on_host(results: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    return {name: to_host(array) for name, array in results.items()}


def run(
    layer: Layer, device: Device, choices: Arrays | None = None, /, **arrays: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Run a layer on the device, with NumPy arguments and results; ``choices`` are no arrays."""
    return on_host(layer(**on_device(device, arrays), **(choices or {})))


def of_rows(arrays: Mapping[str, NDArray[Any]], axis: int) -> dict[str, NDArray[Any]]:
    """Return arrays with their channels as columns, which is what batch norm is defined on."""

    def rows(array: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])

    return {name: rows(a) if a.ndim > 1 else a for name, a in arrays.items()}


def as_channels(rows: NDArray[Any], shape: tuple[int, ...], axis: int) -> NDArray[Any]:
    """Return rows, a column a channel, in this shape with its channels on the axis."""
    others = [length for i, length in enumerate(shape) if i != axis % len(shape)]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(*others, shape[axis]), -1, axis))


# --- Values that a careless normalization gets wrong ---------------------------------------------


def hard_values(
    kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> NDArray[Any]:
    """Return values to be normalized over axis 0."""
    x = rng.standard_normal(shape)
    if kind == "mean 1e6":
        x = 1e6 + 0.5 * x
    elif kind == "constant":
        x = np.broadcast_to(x[0], shape)
    elif kind == "near 1e18":
        x = 1e18 * x
    elif kind == "near 1e30":  # whose squares overflow
        x = x * (1e30 if dtype is np.float32 else 1e200)
    elif kind == "subnormal":
        x = x * (1e-40 if dtype is np.float32 else 1e-310)
    elif kind == "far first row":
        x[0] = 1e5 + x[0]
    return x.astype(dtype)


# All but those whose variance overflows have a reference to be held to.
HARD_VALUES = ("ordinary", "mean 1e6", "constant", "near 1e18", "subnormal", "far first row")

# --- Comparisons ---------------------------------------------------------------------------------


def assert_within(
    row: str, result: NDArray[Any], expected: Any, scale: Any, what: str = ""
) -> None:
    """Hold a result to its row of the table of bounds."""
    error, bound = ulp_error(result, expected, scale), BOUNDS[row].units
    assert error <= bound, f"{row} {what}: {error:.3g} units of the last place, bound {bound:g}"


def assert_all_within(
    layer: str, results: Arrays, expected: Arrays, scales: Arrays, what: str = ""
) -> None:
    """Hold every expected result to the row ``"<layer> <result>"``."""
    for name, value in expected.items():
        assert_within(f"{layer} {name}", results[name], value, scales[name], what)


def assert_same_bits(results: Arrays, expected: Arrays, what: str = "") -> None:
    """Require the same bits; a NaN is a NaN, whatever its payload."""
    assert results.keys() == expected.keys()
    for name, array in results.items():
        a, b = np.asarray(array), np.asarray(expected[name])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what} {name}"
        bits = f"u{a.itemsize}"
        differ = (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))
        if differ.any():
            at = tuple(int(i) for i in np.argwhere(differ)[0])
            first = f"first at {at}: {a[at]!r} {b[at]!r}"
            pytest.fail(f"{what} {name}: {differ.sum()} of {a.size} differ, {first}")


def assert_gradients(
    layer: Layer, device: Device, zero: str = "", choices: Arrays | None = None, **arrays: Any
) -> None:
    """Compare every gradient of a layer with central differences in float64.

    The gradient named ``zero`` is zero, so that its relative error would only compare roundings.
    """
    arguments, choices = on_device(device, arrays), choices or {}
    results = layer(**arguments, **choices)
    output = next(name for name in ("out", "loss") if name in results)
    upstream = arguments.get("dout", device.xp.ones((), np.float64))
    gradients = [name for name in arguments if f"d{name}" in results]
    assert gradients
    for name in gradients:
        numerical = eval_numerical_gradient_array(
            lambda _: layer(**arguments, **choices)[output], arguments[name], upstream
        )
        gradient, numerical = to_host(results[f"d{name}"]), to_host(numerical)
        if name == zero:
            assert np.abs(gradient).max() < 1e-14
            assert np.abs(numerical).max() < 1e-9
        else:
            error = rel_error(gradient, numerical)
            assert error < 1e-6, f"d{name}: relative error {error:.2g}"
