"""What the tests of the layers share: every layer as one call, hard values, and comparisons."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
) -> Arrays:
    bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
    out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param)
    dx, dgamma, dbeta = layers.batchnorm_backward(dout, cache)
    running = {name: bn_param[name] for name in ("running_mean", "running_var")}
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta, **running}


def batchnorm_test(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
) -> Arrays:
    return batchnorm(x, gamma, beta, running_mean, running_var, dout, "test")


def layernorm(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    out, cache = layers.layernorm_forward(x, gamma, beta, {})
    dx, dgamma, dbeta = layers.layernorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


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
    running = {name: bn_param[name] for name in ("running_mean", "running_var")}
    return {"out": out, **dict(zip(names, gradients, strict=True)), **running}


Layer = Callable[..., Arrays]
LAYERS: tuple[Layer, ...] = (
    *(
        affine,
        affine_reproducible,
        relu,
        batchnorm,
        batchnorm_test,
        layernorm,
        dropout,
        dropout_test,
    ),
    *(softmax_loss, svm_loss, affine_relu, affine_bn_relu),
)


def argument_names(layer: Layer) -> list[str]:
    choices = ("mode", "reproducible")
    return [name for name in inspect.signature(layer).parameters if name not in choices]


def draw(
    layer: Layer, rows: int, columns: int, dtype: Any, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return random NumPy arguments of a layer; ``w`` is square, so ``dout`` has x's shape."""

    def argument(name: str) -> NDArray[Any]:
        if name == "y":
            return rng.integers(columns, size=rows)
        shape = {"x": (rows, columns), "dout": (rows, columns), "w": (columns, columns)}
        array = rng.standard_normal(shape.get(name, columns))
        return (np.abs(array) if name == "running_var" else array).astype(dtype)

    return {name: argument(name) for name in argument_names(layer)}


def on_device(device: Device, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {name: device.asarray(array) for name, array in arrays.items()}


def on_host(results: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    return {name: to_host(array) for name, array in results.items()}


def run(layer: Layer, device: Device, **arrays: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run a layer on the device, with NumPy arguments and results."""
    return on_host(layer(**on_device(device, arrays)))


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


def assert_gradients(layer: Layer, device: Device, zero: str = "", **arrays: Any) -> None:
    """Compare every gradient of a layer with central differences in float64.

    The gradient named ``zero`` is zero, so that its relative error would only compare roundings.
    """
    arguments = on_device(device, arrays)
    results = layer(**arguments)
    output = next(name for name in ("out", "loss") if name in results)
    upstream = arguments.get("dout", device.xp.ones((), np.float64))
    gradients = [name for name in arguments if f"d{name}" in results]
    assert gradients
    for name in gradients:
        numerical = eval_numerical_gradient_array(
            lambda _: layer(**arguments)[output], arguments[name], upstream
        )
        gradient, numerical = to_host(results[f"d{name}"]), to_host(numerical)
        if name == zero:
            assert np.abs(gradient).max() < 1e-14
            assert np.abs(numerical).max() < 1e-9
        else:
            error = rel_error(gradient, numerical)
            assert error < 1e-6, f"d{name}: relative error {error:.2g}"
