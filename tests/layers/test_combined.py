from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    Arrays,
    affine_bn_relu,
    affine_relu,
    assert_gradients,
    assert_same_bits,
    both_dtypes,
    draw,
    on_device,
    on_host,
)

from gpubn import layers
from gpubn.backend import Array, Device


def affine_relu_by_steps(x: Array, w: Array, b: Array, dout: Array) -> Arrays:
    out, affine = layers.affine_forward(x, w, b)
    out, relu = layers.relu_forward(out)
    dx, dw, db = layers.affine_backward(layers.relu_backward(dout, relu), affine)
    return {"out": out, "dx": dx, "dw": dw, "db": db}


def affine_bn_relu_by_steps(
    x: Array, w: Array, b: Array, gamma: Array, beta: Array, dout: Array, mode: str = "train"
) -> Arrays:
    bn_param: Arrays = {"mode": mode}
    out, affine = layers.affine_forward(x, w, b)
    out, norm = layers.batchnorm_forward(out, gamma, beta, bn_param)
    out, relu = layers.relu_forward(out)
    dnorm, dgamma, dbeta = layers.batchnorm_backward(layers.relu_backward(dout, relu), norm)
    dx, dw, db = layers.affine_backward(dnorm, affine)
    running = {name: bn_param[name] for name in ("running_mean", "running_var")}
    results = {"out": out, "dx": dx, "dw": dw, "db": db, "dgamma": dgamma, "dbeta": dbeta}
    return results | running


@both_dtypes
@pytest.mark.parametrize(
    ("layer", "by_steps"),
    [(affine_relu, affine_relu_by_steps), (affine_bn_relu, affine_bn_relu_by_steps)],
)
def test_the_bits_of_its_steps(
    device: Device, dtype: Any, layer: Any, by_steps: Any, rng: np.random.Generator
) -> None:
    arrays = on_device(device, draw(layer, 33, 7, dtype, rng))
    assert_same_bits(on_host(layer(**arrays)), on_host(by_steps(**arrays)))


@both_dtypes
def test_test_mode(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    arrays = on_device(device, draw(affine_bn_relu, 33, 7, dtype, rng))
    expected = affine_bn_relu_by_steps(**arrays, mode="test")
    assert_same_bits(on_host(affine_bn_relu(**arrays, mode="test")), on_host(expected))


def test_gradients_of_affine_relu(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(affine_relu, device, **draw(affine_relu, 5, 3, np.float64, rng))


def test_gradients_of_affine_bn_relu(device: Device, rng: np.random.Generator) -> None:
    # A batch norm after it takes b away again.
    arrays = draw(affine_bn_relu, 5, 3, np.float64, rng)
    assert_gradients(affine_bn_relu, device, zero="b", **arrays)
