"""Where layers write to arrays of the caller's: ``out=``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layer_cases import assert_same_bits

from gpubn import layers
from gpubn.backend import Array, Device, namespace, to_host

# --- Every layer that has it: what it is called with, and what comes of it ------------------------


def batchnorm(x: Array, dout: Array, out: Any, dx: Any, mode: str = "train", axis: int = 1) -> Any:
    gamma, beta = _channels(x, axis)
    y, cache = layers.batchnorm_forward(x, gamma, beta, {"mode": mode}, axis, out=out)
    return y, *layers.batchnorm_backward(dout, cache, out=dx)


def batchnorm_frozen(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    return batchnorm(x, dout, out, dx, "test")


def batchnorm_last(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    return batchnorm(x, dout, out, dx, axis=-1)


def batchnorm_relu(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    y, cache = layers.batchnorm_relu_forward(x, *_channels(x, 1), {"mode": "train"}, out=out)
    return y, *layers.batchnorm_relu_backward(dout, cache, out=dx)


def batchnorm_add_relu(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    arguments = x, dout[::-1].copy(), *_channels(x, 1), {"mode": "train"}
    y, cache = layers.batchnorm_add_relu_forward(*arguments, out=out)
    return y, *layers.batchnorm_add_relu_backward(dout, cache, out=dx)


def batchnorm_add_relu_frozen(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    arguments = x, dout[::-1].copy(), *_channels(x, 1), {"mode": "test"}
    y, cache = layers.batchnorm_add_relu_forward(*arguments, out=out)
    return y, *layers.batchnorm_add_relu_backward(dout, cache, out=dx)


def layernorm(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    y, cache = layers.layernorm_forward(x, *_channels(x, -1), {}, out=out)
    return y, *layers.layernorm_backward(dout, cache, out=dx)


def rmsnorm(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    y, cache = layers.rmsnorm_forward(x, _channels(x, -1)[0], {}, out=out)
    return y, *layers.rmsnorm_backward(dout, cache, out=dx)


def groupnorm(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    groups = 1 if x.shape[1] % 3 else x.shape[1] // 3
    y, cache = layers.groupnorm_forward(x, *_channels(x, 1), groups, {}, out=out)
    return y, *layers.groupnorm_backward(dout, cache, out=dx)


def relu(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    y, cache = layers.relu_forward(x, out=out)
    return y, layers.relu_backward(dout, cache, out=dx)


def dropout(x: Array, dout: Array, out: Any, dx: Any, mode: str = "train") -> Any:
    y, cache = layers.dropout_forward(x, {"mode": mode, "p": 0.6, "seed": 1}, out=out)
    return y, layers.dropout_backward(dout, cache, out=dx)


def dropout_test(x: Array, dout: Array, out: Any, dx: Any) -> Any:
    return dropout(x, dout, out, dx, "test")


def _channels(x: Array, axis: int) -> tuple[Array, Array]:
    dtype = np.float32 if x.dtype.itemsize == 2 else x.dtype
    gamma = namespace(x).arange(1, x.shape[axis] + 1).astype(dtype)
    return gamma, gamma[::-1].copy()


ANY_LAYOUT = (
    *(batchnorm, batchnorm_frozen, batchnorm_relu, batchnorm_add_relu),
    *(groupnorm, relu),
)
LAYERS = (
    *(*ANY_LAYOUT, batchnorm_add_relu_frozen, batchnorm_last, layernorm, rmsnorm),
    *(dropout, dropout_test),
)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


@pytest.fixture
def draw(device: Device, rng: np.random.Generator) -> Callable[..., Array]:
    def draw(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return device.asarray(rng.standard_normal(shape).astype(dtype))

    return draw


@every_layer
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 7), (2, 3, 33, 5)])
def test_the_same_bits_in_the_callers_memory(
    layer: Any, draw: Any, shape: tuple[int, ...], dtype: Any
) -> None:
    x, dout = draw(shape, dtype), draw(shape, dtype)
    out, dx = draw(shape, dtype), draw(shape, dtype)
    expected = layer(x, dout, None, None)
    found = layer(x, dout, out, dx)
    assert found[0] is out
    assert found[1] is dx
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits({"": to_host(a)}, {"": to_host(b)}, f"result {number}")


@pytest.mark.parametrize("layer", ANY_LAYOUT, ids=lambda layer: layer.__name__)
def test_channels_last(layer: Any, draw: Any) -> None:
    """In arrays whose channels are last in memory, as x's are."""
    arrays = [draw((4, 5, 6, 7)).transpose(0, 3, 1, 2) for _ in range(4)]
    expected = layer(*arrays[:2], None, None)
    found = layer(*arrays)
    assert found[0] is arrays[2]
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits({"": to_host(a)}, {"": to_host(b)}, f"result {number}")


@every_layer
@pytest.mark.parametrize("place", [0, 1], ids=["out", "dx"])
def test_what_is_refused(layer: Any, draw: Any, place: int) -> None:
    x, dout = draw((4, 6)), draw((4, 6))

    def refused(array: Any, error: type[Exception], message: str) -> None:
        before = {"x": to_host(x).copy(), "dout": to_host(dout).copy()}
        targets = [array, None] if place == 0 else [None, array]
        with pytest.raises(error, match=message):
            layer(x, dout, *targets)
        assert_same_bits({"x": to_host(x), "dout": to_host(dout)}, before)

    refused([[1.0]], TypeError, "out is a list, expected a NumPy or CuPy array")
    refused(draw((4, 5)), ValueError, r"out has shape \(4, 5\), expected \(4, 6\)")
    refused(draw((4, 6), np.float64), TypeError, "out has dtype float64, expected float32")
    refused(draw((6, 4)).T, ValueError, r"out has strides .*expected C order")
    refused(draw((8, 6))[::2], ValueError, r"out has strides .*expected C order")
    if not (place and layer in (dropout, dropout_test)):  # whose backward pass does not read x
        refused(x, ValueError, "out shares memory with x")
    if place:
        refused(dout, ValueError, "out shares memory with dout")
    if isinstance(x, np.ndarray):
        array = np.zeros((4, 6), np.float32)
        array.flags.writeable = False
        refused(array, ValueError, "out is read-only")
        memory = bytearray(4 * 6 * 4 + 1)
        array = np.frombuffer(memory, np.float32, offset=1, count=24).reshape(4, 6)
        refused(array, ValueError, "out is not aligned, expected it at a multiple of 4 bytes")


def test_parameters_are_not_overwritten(draw: Any) -> None:
    x, gamma = draw((2, 2, 3)), draw((12,))
    out = gamma.reshape(2, 2, 3)
    with pytest.raises(ValueError, match="out shares memory with gamma"):
        layers.batchnorm_forward(x, gamma[:2], gamma[2:4].copy(), {"mode": "train"}, out=out)
    bn_param = {"mode": "train", "running_mean": gamma[:2], "running_var": gamma[:2].copy()}
    with pytest.raises(ValueError, match="out shares memory with running_mean"):
        layers.batchnorm_forward(x, draw((2,)), draw((2,)), bn_param, out=out)
    with pytest.raises(ValueError, match="out shares memory with beta"):
        layers.layernorm_forward(x, draw((3,)), gamma[:3], {}, out=out)


def test_a_residual_is_not_overwritten(draw: Any) -> None:
    x, residual = draw((4, 6)), draw((4, 6))
    arguments = x, residual, *_channels(x, 1), {"mode": "train"}
    with pytest.raises(ValueError, match="out shares memory with residual"):
        layers.batchnorm_add_relu_forward(*arguments, out=residual)
    out, cache = layers.batchnorm_add_relu_forward(*arguments)
    with pytest.raises(ValueError, match="out shares memory with the forward pass's out"):
        layers.batchnorm_add_relu_backward(x, cache, out=out)
