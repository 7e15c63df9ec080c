from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import host_cuda
from layer_cases import (
    Arrays,
    Layer,
    assert_all_within,
    assert_gradients,
    assert_same_bits,
    both_dtypes,
    draw,
    on_host,
    run,
    softmax_loss,
    svm_loss,
)

from gpubn import layers
from gpubn.backend import Array, Device, namespace, to_host
from gpubn.testing import reference
from gpubn.testing.tolerance import softmax_loss_scales, sum_of_squares_scale, svm_loss_scales

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


# --- The L2 penalty ------------------------------------------------------------------------------

# Around the edges of a row's lanes (256) and of a lane's leaf (2048); no dimensions, and three.
W_SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (1,), (7,), (255,), (257,), (3, 5, 7), (33, 65), (2049,), (9001,)),
)


def l2_penalty(w: Array, reg: float) -> Arrays:
    return dict(zip(("loss", "dw"), layers.l2_penalty(w, reg), strict=True))


@both_dtypes
@pytest.mark.parametrize("reg", [0.0, 1e-3, 0.7, 30, np.float32(0.1)])
def test_l2_penalty(device: Device, dtype: Any, reg: float, rng: np.random.Generator) -> None:
    for shape in W_SHAPES:
        for size in (1e-30, 1e-3, 1, 1e6):
            w = np.asarray(size * rng.standard_normal(shape), dtype)
            results = on_host(l2_penalty(device.asarray(w), reg))
            expected = dict(zip(("loss", "dw"), reference.l2_penalty(w, float(reg)), strict=True))
            assert {array.dtype for array in results.values()} == {np.dtype(dtype)}
            scales = {
                "loss": np.asarray(0.5 * float(reg) * sum_of_squares_scale(w)),
                "dw": np.abs(expected["dw"]),
            }
            assert_all_within("l2_penalty", results, expected, scales, f"{shape} {size}")


def test_l2_penalty_where_it_is_exact(device: Device) -> None:
    loss, dw = layers.l2_penalty(device.asarray(np.array([[3.0, -4.0]])), 2)
    assert loss == 25
    np.testing.assert_array_equal(to_host(dw), [[6.0, -8.0]])


def test_l2_penalty_of_what_is_not_finite(device: Device) -> None:
    for value, loss in ((np.inf, np.inf), (-1e30, np.inf), (np.nan, np.nan)):
        results = on_host(l2_penalty(device.asarray(np.float32([1, value])), 0.5))
        np.testing.assert_array_equal(results["loss"], loss)
        np.testing.assert_array_equal(results["dw"], np.float32([0.5, 0.5 * value]))


@both_dtypes
def test_l2_penalty_of_any_layout(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    w = device.asarray(rng.standard_normal((40, 70)).astype(dtype))
    expected = on_host(l2_penalty(w, 0.3))
    wider = device.xp.full((80, 140), np.nan, dtype)
    wider[::2, ::2] = w
    for layout in (namespace(w).asfortranarray(w), w[::-1, ::-1].copy()[::-1, ::-1]):
        assert_same_bits(on_host(l2_penalty(layout, 0.3)), expected)
    assert_same_bits(on_host(l2_penalty(wider[::2, ::2], 0.3)), expected)


def test_gradient_of_the_l2_penalty(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(lambda w: l2_penalty(w, 0.3), device, w=rng.standard_normal((3, 5)))


@pytest.mark.parametrize(
    ("w", "error", "text"),
    [
        (np.ones(3, np.int64), TypeError, "w has dtype int64, expected float32 or float64"),
        (np.ones(3, np.float16), TypeError, "w has dtype float16, expected float32 or float64"),
        (np.ones((0, 2)), ValueError, "w has shape (0, 2), expected at least one value"),
        ([1.0], TypeError, "w is a list, expected a NumPy or CuPy array"),
    ],
)
def test_weights_that_are_refused(
    device: Device, w: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layers.l2_penalty(device.asarray(w) if isinstance(w, np.ndarray) else w, 0.1)


@pytest.mark.parametrize(
    ("reg", "error", "text"),
    [
        ("0.1", TypeError, "reg is '0.1', expected a number"),
        (None, TypeError, "reg is None, expected a number"),
        (True, TypeError, "reg is True, expected a number"),
        (np.nan, ValueError, "reg is nan, expected a finite number"),
        (-np.inf, ValueError, "reg is -inf, expected a finite number"),
    ],
)
def test_regs_that_are_refused(device: Device, reg: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        layers.l2_penalty(device.xp.ones(3), reg)


# --- How many are right --------------------------------------------------------------------------


def count_correct(device: Device, x: Any, y: Any) -> int:
    count = layers.count_correct(device.asarray(x), device.asarray(y))
    assert count.dtype == np.int64
    assert count.shape == ()
    return int(count)


@both_dtypes
def test_count_correct(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    for rows, columns in SHAPES:
        for values in (rng.standard_normal((rows, columns)), rng.integers(3, size=(rows, columns))):
            x, y = values.astype(dtype), rng.integers(columns, size=rows)
            assert count_correct(device, x, y) == reference.count_correct(x, y)
            assert count_correct(device, x, x.argmax(axis=1)) == rows


INF, NAN = np.inf, np.nan


@both_dtypes
@pytest.mark.parametrize(
    ("row", "first_largest"),
    [
        ([2, 1, 2], 0),
        ([0, 1, 1], 1),
        ([-0.0, 0.0, 0.0], 0),
        ([0.0, 0.0, -0.0], 0),
        ([-1, -INF, -INF], 0),
        ([-INF, -INF, -INF], 0),
        ([1, INF, INF], 1),
        ([1, NAN, 2], 1),
        ([NAN, INF, NAN], 0),
        ([INF, 0, NAN], 2),
        ([INF, -NAN, NAN], 1),
        ([-1e-45, -1e-40, 0], 2),
        ([1e-40, 2e-40, 1e-40], 1),
    ],
)
def test_the_first_largest_score(
    device: Device, dtype: Any, row: list[float], first_largest: int
) -> None:
    x = np.array([row], dtype)
    right = [count_correct(device, x, np.array([label])) for label in (0, 1, 2)]
    assert right == [int(label == first_largest) for label in (0, 1, 2)]
    assert right == [reference.count_correct(x, [label]) for label in (0, 1, 2)]


def test_a_label_that_is_no_class_is_never_right(device: Device) -> None:
    x = np.eye(4)
    assert count_correct(device, x, np.array([-1, 4, -4, 3])) == 1
    assert count_correct(device, x, np.array([2**63, 2**64 - 4, 2, 2**32 + 3], np.uint64)) == 1
    assert count_correct(device, x, np.array([0, -127, 100, -1], np.int8)) == 1


def test_count_correct_in_any_layout(device: Device, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((50, 4)), rng.integers(4, size=50)
    expected = reference.count_correct(x, y)
    assert 0 < expected < 50
    x_there, y_there = device.asarray(x), device.asarray(y)
    twice = device.xp.concatenate([y_there, y_there]).reshape(2, 50).T.copy()
    x_views = namespace(x_there).asfortranarray(x_there), x_there[::-1].copy()[::-1]
    for x_view in x_views:
        assert int(layers.count_correct(x_view, twice[:, 1])) == expected


@pytest.mark.parametrize(
    ("x", "y", "error", "text"),
    [
        (np.ones(3), np.arange(3), ValueError, "x has shape (3,), expected 2 dimensions"),
        (np.ones((2, 0)), np.arange(2), ValueError, "x has shape (2, 0), expected at least one"),
        (np.ones((2, 2), int), np.arange(2), TypeError, "x has dtype int64, expected float32 or"),
        ([[1.0]], np.arange(1), TypeError, "x is a list, expected a NumPy or CuPy array"),
        (np.ones((2, 2)), np.arange(3), ValueError, "y has shape (3,), expected (2,)"),
        (np.ones((2, 2)), np.ones((2, 1), int), ValueError, "y has shape (2, 1), expected (2,)"),
        (np.ones((2, 2)), np.ones(2), TypeError, "y has dtype float64, expected integers"),
        (np.ones((2, 2)), np.ones(2, bool), TypeError, "y has dtype bool, expected integers"),
        (np.ones((2, 2)), [0, 1], TypeError, "y is a list, expected a NumPy or CuPy array"),
    ],
)
def test_scores_and_labels_that_are_refused(
    device: Device, x: Any, y: Any, error: type[Exception], text: str
) -> None:
    x, y = (device.asarray(a) if isinstance(a, np.ndarray) else a for a in (x, y))
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        layers.count_correct(x, y)


@pytest.fixture
def cupy(device: Device) -> Iterator[Any]:
    """CuPy, or its stand-in where the device under test is the CPU."""
    if device.kind == "cuda":
        yield device.xp
    else:
        with host_cuda():
            yield importlib.import_module("cupy")


def test_scores_and_labels_on_two_devices(cupy: Any) -> None:
    x, y = np.eye(3), np.arange(3)
    with pytest.raises(ValueError, match=r"^y is on cuda:0 and x on cpu, expected one device$"):
        layers.count_correct(x, cupy.asarray(y))
    with pytest.raises(ValueError, match=r"^y is on cpu and x on cuda:0, expected one device$"):
        layers.count_correct(cupy.asarray(x), y)
