from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import (
    Layer,
    assert_all_within,
    assert_gradients,
    both_dtypes,
    draw,
    run,
    softmax_loss,
    svm_loss,
)

from gpubn.backend import Device
from gpubn.testing import reference
from gpubn.testing.tolerance import softmax_loss_scales, svm_loss_scales

# One sample, one class, two classes, and more classes than a row has lanes (256).
SHAPES = ((1, 3), (5, 1), (7, 2), (50, 10), (9, 300), (1025, 7))

losses = pytest.mark.parametrize("loss", [softmax_loss, svm_loss])
SCALES = {softmax_loss: softmax_loss_scales, svm_loss: svm_loss_scales}


def check(loss: Layer, device: Device, x: Any, y: Any) -> None:
    expected = dict(zip(("loss", "dx"), getattr(reference, loss.__name__)(x, y), strict=True))
    results = run(loss, device, x=x, y=y)
    assert_all_within(loss.__name__, results, expected, SCALES[loss](x, y), f"{x.shape}")


@losses
@both_dtypes
@pytest.mark.parametrize("size", [1e-3, 1, 30])
def test_values(
    device: Device, loss: Layer, dtype: Any, size: float, rng: np.random.Generator
) -> None:
    for rows, columns in SHAPES:
        arrays = draw(loss, rows, columns, dtype, rng)
        check(loss, device, arrays["x"] * dtype(size), arrays["y"])


@losses
@both_dtypes
def test_scores_far_from_zero(
    device: Device, loss: Layer, dtype: Any, rng: np.random.Generator
) -> None:
    arrays = draw(loss, 20, 5, dtype, rng)
    for level in (1e4, -1e4):
        check(loss, device, arrays["x"] + dtype(level), arrays["y"])


@losses
@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_type(device: Device, loss: Layer, integer: Any) -> None:
    check(loss, device, np.eye(4), np.array([3, 0, 2, 1], integer))


def test_a_sure_answer_costs_nothing(device: Device) -> None:
    x, y = 1000 * np.eye(3), np.arange(3)
    for loss in (softmax_loss, svm_loss):
        results = run(loss, device, x=x, y=y)
        assert results["loss"] == 0
        np.testing.assert_array_equal(results["dx"], 0)


def test_a_wrong_answer_costs_its_margin(device: Device) -> None:
    x, y = np.array([[1e4, 0.0]], np.float32), np.array([1])
    assert run(softmax_loss, device, x=x, y=y)["loss"] == 10_000
    assert run(svm_loss, device, x=x, y=y)["loss"] == 10_001


@losses
def test_gradients(device: Device, loss: Layer, rng: np.random.Generator) -> None:
    assert_gradients(loss, device, **draw(loss, 5, 4, np.float64, rng))
