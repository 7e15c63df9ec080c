"""PyTorch's tensors through the layers: tensors come back, with NumPy's bits; none is copied."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch_cases import DTYPES, SINGLES, Arrays, computes_with, numpy, tensor, torch

import gpubn
from gpubn import layers
from gpubn.interop import take

SHAPE = (5, 6, 7, 7)
LAST = torch.channels_last


# --- Every layer, of tensors or of arrays ---------------------------------------------------------


def affine(x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.affine_forward(x.reshape(5, -1), w, b)
    return out, *layers.affine_backward(dout.reshape(5, -1)[:, : b.shape[0]], cache)


def relu(x: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.relu_forward(x)
    return out, layers.relu_backward(dout, cache)


def dropout(x: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.dropout_forward(x, {"mode": "train", "p": 0.5, "seed": 7})
    return out, layers.dropout_backward(dout, cache)


def batchnorm(
    x: Any, gamma: Any, beta: Any, mean: Any, var: Any, dout: Any, mode: str = "train"
) -> tuple[Any, ...]:
    bn_param = {"mode": mode, "running_mean": mean, "running_var": var}
    out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param)
    gradients = layers.batchnorm_backward(dout, cache)
    return out, *gradients, bn_param["running_mean"], bn_param["running_var"]


def batchnorm_test(
    x: Any, gamma: Any, beta: Any, mean: Any, var: Any, dout: Any
) -> tuple[Any, ...]:
    return batchnorm(x, gamma, beta, mean, var, dout, mode="test")


def batchnorm_relu(x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, ...]:
    bn_param: Arrays = {"mode": "train"}  # what is set in it comes back as the result does
    out, cache = layers.batchnorm_relu_forward(x, gamma, beta, bn_param)
    gradients = layers.batchnorm_relu_backward(dout, cache)
    return out, *gradients, bn_param["running_mean"], bn_param["running_var"]


def batchnorm_add_relu(x: Any, residual: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.batchnorm_add_relu_forward(x, residual, gamma, beta, {"mode": "train"})
    return out, *layers.batchnorm_add_relu_backward(dout, cache)


def layernorm(x: Any, weights: Any, shifts: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.layernorm_forward(x, weights, shifts, {})
    return out, *layers.layernorm_backward(dout, cache)


def rmsnorm(x: Any, weights: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.rmsnorm_forward(x, weights, {})
    return out, *layers.rmsnorm_backward(dout, cache)


def groupnorm(x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.groupnorm_forward(x, gamma, beta, 3, {})
    return out, *layers.groupnorm_backward(dout, cache)


def instancenorm(x: Any, gamma: Any, beta: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = layers.instancenorm_forward(x, gamma, beta, {})
    return out, *layers.instancenorm_backward(dout, cache)


def softmax_loss(x: Any, y: Any) -> tuple[Any, ...]:
    return layers.softmax_loss(x.reshape(5, -1), y)


def svm_loss(x: Any, y: Any) -> tuple[Any, ...]:
    return layers.svm_loss(x.reshape(5, -1), y)


def count_correct(x: Any, y: Any) -> tuple[Any, ...]:
    return (layers.count_correct(x.reshape(5, -1), y),)


def l2_penalty(x: Any) -> tuple[Any, ...]:
    return layers.l2_penalty(x, 0.5)


NORMS = (batchnorm, batchnorm_test, batchnorm_relu, batchnorm_add_relu, groupnorm, instancenorm)
HALF = (relu, dropout, layernorm, rmsnorm, *NORMS)
SINGLE = (affine, softmax_loss, svm_loss, count_correct, l2_penalty)
CASES = [(op, dtype) for op in HALF for dtype in DTYPES]
CASES += [(op, dtype) for op in SINGLE for dtype in SINGLES]
every_case = pytest.mark.parametrize(("op", "dtype"), CASES)


def arguments(op: Callable[..., Any], dtype: np.dtype[Any], rng: np.random.Generator) -> Arrays:
    real, channels = computes_with(dtype), SHAPE[1]

    def draw(shape: tuple[int, ...], dtype: np.dtype[Any] = real) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    arrays = {name: draw(SHAPE, dtype) for name in ("x", "residual", "dout")}
    arrays |= {name: draw((channels,)) for name in ("gamma", "beta", "mean")}
    arrays |= {name: draw(SHAPE[2:]) for name in ("weights", "shifts")}
    arrays |= {"w": draw((channels * 49, 3)), "b": draw((3,)), "y": rng.integers(channels, size=5)}
    arrays["var"] = np.square(draw((channels,)))
    names = op.__code__.co_varnames[: op.__code__.co_argcount]
    return {name: arrays[name] for name in names if name in arrays}


def in_layout(tensors: Arrays, layout: Any) -> Arrays:
    """Return the tensors, those of four dimensions in this memory format."""
    return {
        name: value.contiguous(memory_format=layout) if value.ndim == 4 else value
        for name, value in tensors.items()
    }


@every_case
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["plain", "channels last"])
def test_tensors_give_numpy_s_bits(
    op: Callable[..., Any], dtype: str, layout: Any, rng: np.random.Generator
) -> None:
    arrays = arguments(op, DTYPES[dtype], rng)
    tensors = in_layout({name: tensor(array) for name, array in arrays.items()}, layout)
    before = {name: value.clone() for name, value in tensors.items()}
    for result, expected in zip(op(**tensors), op(**arrays), strict=True):
        assert type(result) is torch.Tensor
        assert not result.requires_grad
        got = numpy(result)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_parameters_of_a_module(rng: np.random.Generator) -> None:
    """What trains in PyTorch goes in detached, and its buffers are taken as they are."""
    module = torch.nn.BatchNorm2d(6)
    x = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))
    bn_param = {"mode": "train", "unbiased": True}
    bn_param |= {name: getattr(module, name) for name in ("running_mean", "running_var")}
    out, _ = layers.batchnorm_forward(x, module.weight.detach(), module.bias.detach(), bn_param)
    with torch.no_grad():
        torch.testing.assert_close(out, module(x))
    for name in ("running_mean", "running_var"):  # set anew by us, in place by the module
        torch.testing.assert_close(bn_param[name], getattr(module, name))
    with pytest.raises(TypeError, match=r"^gamma requires a gradient.*gamma\.detach\(\)"):
        layers.batchnorm_forward(x, module.weight, module.bias, bn_param)


# --- Nothing is copied ----------------------------------------------------------------------------

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SHAPES = {"NC": (9, 5), "NCW": (9, 5, 7), "NCHW": SHAPE, "NCDHW": (2, 5, 3, 4, 2)}
LAYOUTS = {
    **{name: (shape, None) for name, shape in SHAPES.items()},
    "NHWC": (SHAPES["NCHW"], torch.channels_last),
    "NDHWC": (SHAPES["NCDHW"], torch.channels_last_3d),
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_shared(dtype: str, layout: str, rng: np.random.Generator) -> None:
    """The input's, into the cache of batch norm; results have its strides."""
    shape, memory_format = LAYOUTS[layout]
    kind = getattr(torch, dtype)
    x, dout = (torch.from_numpy(rng.standard_normal(shape)).to(kind) for _ in range(2))
    if memory_format is not None:
        x, dout = (value.contiguous(memory_format=memory_format) for value in (x, dout))
        assert not x.is_contiguous()
    ones = torch.ones(shape[1], dtype=kind if dtype in SINGLES else torch.float32)

    taken = take(x)
    assert taken.ctypes.data == x.data_ptr()
    assert taken.strides == tuple(x.element_size() * stride for stride in x.stride())
    for forward, backward, more in (
        (layers.batchnorm_forward, layers.batchnorm_backward, ({"mode": "train"},)),
        (layers.batchnorm_forward, layers.batchnorm_backward, ({"mode": "test"},)),
        (layers.groupnorm_forward, layers.groupnorm_backward, (1, {})),
    ):
        out, cache = forward(x, ones, ones, *more)
        assert np.shares_memory(cache.x, taken)
        assert cache.x.size == taken.size
        dx, *_ = backward(dout, cache)
        for result in (out, dx):
            assert result.stride() == x.stride()
            assert take(result).ctypes.data == result.data_ptr()


def peak_of(function: Callable[[], Any]) -> int:
    """Return the most bytes that NumPy had at a time, of all that it took for the call."""
    function()  # kernels are compiled for their arguments' types
    gpubn.release_memory()  # what was used before would not count
    tracemalloc.start()
    try:
        result = function()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del result
    return peak


@every_dtype
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, LAST], ids=["plain", "channels last"]
)
def test_no_memory_but_the_result_s(dtype: str, memory_format: Any) -> None:
    """A pass over a tensor takes the memory of its result, and buffers for a group of channels."""
    kind = getattr(torch, dtype)
    x = torch.linspace(-1, 1, 64 * 32 * 16 * 16, dtype=torch.float64).to(kind)
    x = x.reshape(64, 32, 16, 16).contiguous(memory_format=memory_format)
    ones = torch.ones(32, dtype=kind if dtype in SINGLES else torch.float32)
    size, little = x.numel() * x.element_size(), 768 << 10  # less than a copy of x

    train: Arrays = {"mode": "train"}
    calls = {
        "batchnorm": lambda: layers.batchnorm_forward(x, ones, ones, train),
        "batchnorm_relu": lambda: layers.batchnorm_relu_forward(x, ones, ones, train),
        "batchnorm_add_relu": lambda: layers.batchnorm_add_relu_forward(x, x, ones, ones, train),
        "groupnorm": lambda: layers.groupnorm_forward(x, ones, ones, 4, {}),
    }
    backward = {name: getattr(layers, f"{name}_backward") for name in calls}
    for name, forward in calls.items():
        _, cache = forward()
        both = {
            "forward": (forward, 1),
            "backward": (
                lambda name=name, cache=cache: backward[name](x, cache),
                2 if "add" in name else 1,
            ),
        }
        for way, (call, results) in both.items():
            peak = peak_of(call)
            expected = results * size
            assert expected <= peak < expected + little, f"{name} {way}: {peak}, not {expected}"
    # What cannot be taken as it lies is copied, and is seen to be.
    scattered = x.repeat_interleave(2, dim=2)[:, :, ::2]
    assert peak_of(lambda: layers.batchnorm_forward(scattered, ones, ones, train)) >= 2 * size
