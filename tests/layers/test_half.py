"""float16 and bfloat16: computed with in float32, rounded once; parameters stay float32."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layer_cases import (
    CPU,
    HALVES,
    Arrays,
    Layer,
    accumulator,
    assert_all_within,
    assert_same_bits,
    assert_within,
    batchnorm,
    batchnorm_add_relu,
    batchnorm_channels_last,
    batchnorm_images,
    batchnorm_relu,
    batchnorm_test,
    both_halves,
    draw,
    dropout,
    dropout_test,
    groupnorm,
    groupnorm_channels_last,
    groupnorm_images,
    instancenorm,
    layernorm,
    layernorm_images,
    of_rows,
    on_device,
    relu,
    rmsnorm,
    run,
)
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Device, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import (
    batchnorm_scales,
    groupnorm_scales,
    layernorm_scales,
    rmsnorm_scales,
)

LAYERS: tuple[Layer, ...] = (
    *(batchnorm, batchnorm_test, batchnorm_images, batchnorm_channels_last, batchnorm_relu),
    *(batchnorm_add_relu, layernorm, layernorm_images, rmsnorm, groupnorm, groupnorm_images),
    *(groupnorm_channels_last, instancenorm, relu, dropout, dropout_test),
)
every_layer = pytest.mark.parametrize("layer", LAYERS)
SIZES = ("ordinary", "60,000", "1e-7", "mean 1000")


def sized(size: str, array: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Return values of a size at which half precision ends, or does not resolve much."""
    if size == "60,000":  # their squares are far beyond float16, whose largest number is 65,504
        return (rng.choice([-1, 1], array.shape) * rng.uniform(3e4, 6e4, array.shape)).astype(
            array.dtype
        )
    if size == "1e-7":  # float16's smallest number is 6e-8
        return (1e-7 * rng.integers(-5, 6, array.shape)).astype(array.dtype)
    if size == "mean 1000":
        return (1000 + 4 * rng.standard_normal(array.shape)).astype(array.dtype)
    return array


def draw_sized(
    layer: Layer, size: str, rows: int, columns: int, dtype: Any, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    arrays = draw(layer, rows, columns, dtype, rng)
    arrays["x"] = sized(size, arrays["x"], rng)
    if size == "1e-7":  # beside a beta of 1 nothing of them could be seen
        arrays = {n: np.zeros_like(a) if n == "beta" else a for n, a in arrays.items()}
    return arrays


def in_float32(arrays: Arrays) -> Arrays:
    halves = {np.dtype(half) for half in HALVES}
    return {n: a.astype(np.float32) if a.dtype in halves else a for n, a in arrays.items()}


# --- Values --------------------------------------------------------------------------------------


@both_halves
@pytest.mark.parametrize("size", SIZES)
@every_layer
def test_float32_rounded_once(
    device: Device, dtype: Any, size: str, layer: Layer, rng: np.random.Generator
) -> None:
    """What float32 gives, to the bit, and rounded where it is of x's dtype."""
    arrays = draw_sized(layer, size, 17, 6, dtype, rng)
    results = run(layer, device, **arrays)
    expected = run(layer, CPU, **in_float32(arrays))
    if layer is batchnorm_add_relu:
        without_residual = {n: a for n, a in arrays.items() if n != "residual"}
        # Two roundings: of what batch norm gives, as a separate call would, and of the sum.
        rounded = run(batchnorm, CPU, **in_float32(without_residual))
        total = rounded["out"].astype(dtype).astype(np.float32) + in_float32(arrays)["residual"]
        expected["out"] = np.maximum(total.astype(dtype), dtype(0))
        # What ReLU lets pass was decided by the rounded sum, so gradients may differ altogether.
        expected = {n: expected[n] for n in ("out", "running_mean", "running_var")}
        results = {n: results[n] for n in expected}
    with np.errstate(over="ignore"):
        expected = {n: a.astype(dtype) if n in ("out", "dx") else a for n, a in expected.items()}
    assert_same_bits(results, expected)
    if layer not in (batchnorm_test, dropout):  # which do not take a size away
        assert np.isfinite(results["out"].astype(np.float32)).all()


@both_halves
@pytest.mark.parametrize("size", SIZES)
def test_values(device: Device, dtype: Any, size: str, rng: np.random.Generator) -> None:
    """By the same bounds as in float32: what the last rounding does is known."""
    for rows, columns in ((2, 5), (37, 4), (19, 9)):
        arrays = draw_sized(batchnorm_images, size, rows, columns, dtype, rng)
        results = of_rows(run(batchnorm_images, device, **arrays), 1)
        arrays = of_rows(arrays, 1)
        four = [arrays[name] for name in ("x", "gamma", "beta", "dout")]
        x, gamma, beta, dout = four
        graph = reference.batchnorm_forward(x, gamma, beta)
        dx, dgamma, dbeta = reference.batchnorm_backward(dout, x, gamma)
        expected = {"out": graph.out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        assert_all_within("batchnorm", results, expected, batchnorm_scales(*four), size)

        arrays = draw_sized(layernorm, size, rows, columns, dtype, rng)
        four = [arrays[name] for name in ("x", "gamma", "beta", "dout")]
        x, gamma, beta, dout = four
        dx, dgamma, dbeta = reference.layernorm_backward(dout, x, gamma)
        out = reference.layernorm_forward(x, gamma, beta)
        expected = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        results = run(layernorm, device, **arrays)
        assert_all_within("layernorm", results, expected, layernorm_scales(*four), size)

        three = [arrays[name] for name in ("x", "gamma", "dout")]
        dx, dgamma = reference.rmsnorm_backward(dout, x, gamma)
        expected = {"out": reference.rmsnorm_forward(x, gamma), "dx": dx, "dgamma": dgamma}
        results = run(rmsnorm, device, **dict(zip(("x", "gamma", "dout"), three, strict=True)))
        assert_all_within("rmsnorm", results, expected, rmsnorm_scales(*three), size)

        arrays = draw_sized(groupnorm_images, size, rows, 2 * columns, dtype, rng)
        four = [arrays[name] for name in ("x", "gamma", "beta", "dout")]
        x, gamma, beta, dout = four
        dx, dgamma, dbeta = reference.groupnorm_backward(dout, x, gamma, 2)
        out = reference.groupnorm_forward(x, gamma, beta, 2)
        expected = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        results = run(groupnorm, device, {"groups": 2}, **arrays)
        assert_all_within("groupnorm", results, expected, groupnorm_scales(*four, 2), size)


@both_halves
def test_dropout(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = draw(dropout, 33, 7, dtype, rng)
    results = run(dropout, device, **arrays)
    mask = reference.dropout_mask((33, 7), 0.7, 2**63 + 5, 0, 0)
    for result, name in (("out", "x"), ("dx", "dout")):
        expected = reference.dropout_forward(arrays[name], mask, 0.7)
        assert_within("dropout", results[result], expected, expected)


def test_what_is_too_large_for_float16_is_an_infinity(device: Device) -> None:
    """As float16 arithmetic has it: out of range is a result of its own, not an error."""
    x = np.array([[-1.0], [1.0], [-1.0], [1.0]], np.float16)
    gamma, beta = np.float32([65_519]), np.float32([0])
    arguments = (device.asarray(a) for a in (x, gamma, beta))
    out, cache = layers.batchnorm_forward(*arguments, {"mode": "train", "eps": 1e-30})
    assert to_host(out).tolist() == [[-65_504], [65_504], [-65_504], [65_504]]
    gamma[:] = 65_520
    arguments = (device.asarray(a) for a in (x, gamma, beta))
    out, cache = layers.batchnorm_forward(*arguments, {"mode": "train", "eps": 1e-30})
    assert to_host(out).tolist() == [[-np.inf], [np.inf], [-np.inf], [np.inf]]
    # Statistics and gradients of parameters know nothing of it.
    _, dgamma, dbeta = layers.batchnorm_backward(device.asarray(x), cache)
    assert (to_host(dgamma).tolist(), to_host(dbeta).tolist()) == ([4], [0])


@both_halves
def test_sums_do_not_stop_growing(device: Device, dtype: Any) -> None:
    """A sum in float16 ends at 65,504, and one in bfloat16 stands still at 256."""
    x = np.tile(np.array([1.0, 3.0], dtype), 40_000).reshape(-1, 1)
    bn_param: Arrays = {"mode": "train", "momentum": 0.0}
    ones, zeros = (device.asarray(np.full(1, v, np.float32)) for v in (1, 0))
    _, cache = layers.batchnorm_forward(device.asarray(x), ones, zeros, bn_param)
    assert to_host(bn_param["running_mean"]).tolist() == [2]
    assert to_host(bn_param["running_var"]).tolist() == [1]
    _, _, dbeta = layers.batchnorm_backward(device.asarray(np.ones_like(x)), cache)
    assert to_host(dbeta).tolist() == [80_000]


# --- Dtypes --------------------------------------------------------------------------------------


@both_halves
@every_layer
def test_dtypes(device: Device, dtype: Any, layer: Layer, rng: np.random.Generator) -> None:
    results = run(layer, device, **draw(layer, 9, 6, dtype, rng))
    for name, result in results.items():
        of_x = name in ("out", "dx", "dresidual")
        assert result.dtype == (dtype if of_x else np.float32), name


@both_halves
@pytest.mark.parametrize("mode", ["train", "test"])
def test_new_running_statistics_are_float32(device: Device, dtype: Any, mode: str) -> None:
    bn_param: Arrays = {"mode": mode}
    ones = device.asarray(np.ones(3, np.float32))
    layers.batchnorm_forward(device.asarray(np.ones((4, 3), dtype)), ones, ones, bn_param)
    assert bn_param["running_mean"].dtype == bn_param["running_var"].dtype == np.float32


NORMALIZATIONS = [layer for layer in LAYERS if layer not in (relu, dropout, dropout_test)]


@both_halves
@pytest.mark.parametrize("layer", NORMALIZATIONS)
def test_parameters_are_never_cast(
    device: Device, dtype: Any, layer: Layer, rng: np.random.Generator
) -> None:
    arrays = draw(layer, 9, 6, dtype, rng)
    name = np.dtype(dtype).name
    for parameter in [n for n, a in arrays.items() if a.dtype == np.float32]:
        for wrong in (dtype, np.float64):
            changed = arrays | {parameter: arrays[parameter].astype(wrong)}
            text = (
                f"{parameter} has dtype {np.dtype(wrong)}, expected float32 "
                f"as parameters have beside {name} arrays"
            )
            with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
                layer(**on_device(device, changed))
    text = f"dout has dtype float32, expected {name} as x has"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        layer(**on_device(device, arrays | {"dout": arrays["dout"].astype(np.float32)}))


def test_the_two_halves_do_not_mix(device: Device, rng: np.random.Generator) -> None:
    arrays = draw(batchnorm_add_relu, 9, 6, np.float16, rng)
    for name in ("residual", "dout"):
        changed = arrays | {name: arrays[name].astype(ml_dtypes.bfloat16)}
        with pytest.raises(TypeError, match=f"^{name} has dtype bfloat16, expected float16 as x"):
            batchnorm_add_relu(**on_device(device, changed))


@both_halves
def test_eps_is_above_0_in_float32(device: Device, dtype: Any) -> None:
    """1e-8 is 0 in float16, where nothing is computed."""
    x, ones = device.asarray(np.ones((4, 3), dtype)), device.asarray(np.ones(3, np.float32))
    out, _ = layers.batchnorm_forward(x, ones, ones, {"mode": "train", "eps": 1e-8})
    assert (to_host(out) == 1).all()
    with pytest.raises(ValueError, match=r"^eps is 1e-60, which is 0\.0 in float32$"):
        layers.layernorm_forward(x, ones, ones, {"eps": 1e-60})


# --- Same bits -----------------------------------------------------------------------------------


@both_halves
@every_layer
def test_layouts_and_devices(
    device: Device, dtype: Any, layer: Layer, rng: np.random.Generator
) -> None:
    arrays = draw(layer, 19, 6, dtype, rng)
    expected = run(layer, CPU, **arrays)
    there = on_device(device, arrays)
    for layout in (
        lambda a: a,
        lambda a: a.T.copy().T,
        lambda a: device.xp.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
        lambda a: a[::-1].copy()[::-1],
    ):
        results = layer(**{name: layout(array) for name, array in there.items()})
        assert_same_bits({name: to_host(a) for name, a in results.items()}, expected)
    assert {a.dtype for a in expected.values()} <= {np.dtype(dtype), accumulator(dtype)}
