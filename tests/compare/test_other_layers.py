"""ReLU, dropout, affine layers, losses and penalties against PyTorch: forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from torch_cases import (
    CASES,
    Scale,
    assert_close,
    both,
    both_singles,
    chain_growth,
    compare,
    computes_with,
    differentiate,
    every_dtype,
    margin,
    numpy,
    seeds,
    shapes,
    size,
    tensor,
    torch,
    wide,
)

from gpubn import layers
from gpubn.testing.tolerance import (
    affine_scales,
    softmax_loss_scales,
    sum_of_squares_scale,
    svm_loss_scales,
)

F = torch.nn.functional

any_shapes = st.integers(1, 4).flatmap(shapes)

# --- ReLU and dropout ----------------------------------------------------------------------------


@CASES
@given(shape=any_shapes, seed=seeds)
@example((1,), 0)
@example((2, 3, 7, 7), 0)
@every_dtype
def test_relu(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers too, so that some are 0: there PyTorch's gradient is 0 as well.
    x = np.where(rng.random(shape) < 0.5, rng.integers(-1, 2, shape), rng.standard_normal(shape))
    x, dout = x.astype(dtype), rng.standard_normal(shape).astype(dtype)
    out, cache = layers.relu_forward(x)
    expected = differentiate(lambda x: F.relu(x), wide({"x": x}), dout.astype(np.float64))
    assert_close("relu out", out, expected["out"], 0, dtype, roundings=0)
    dx = layers.relu_backward(dout, cache)
    assert_close("relu dx", dx, expected["dx"], 0, dtype, roundings=0)


@CASES
@given(shape=any_shapes, seed=seeds, p=st.sampled_from([1.0, 0.9, 0.7, 0.5, 1 / 3, 0.1, 0.01]))
@example((1,), 0, 1.0)
@example((2, 3, 7, 7), 0, 0.7)
@every_dtype
def test_dropout(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int, p: float) -> None:
    """What both keep is scaled alike, forward and backward; masks are each library's own."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("x", "dout")}
    x, dout = arrays.values()
    out, cache = layers.dropout_forward(x, {"mode": "train", "p": p, "seed": seed})
    results = {"out": out, "dx": layers.dropout_backward(dout, cache)}
    values = wide(arrays)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = differentiate(
            lambda x: F.dropout(x, p=1 - p), {"x": values["x"]}, values["dout"]
        )
    kept = (results["out"] != 0) & (expected["out"] != 0)
    for name, array in (("out", values["x"]), ("dx", values["dout"])):
        scale = np.abs(array / p)
        # PyTorch is given 1 - p, and takes that from 1 again.
        allowed = margin("dropout", computes_with(dtype), Scale(scale, scale / p))
        what = f"dropout {name}"
        assert_close(what, results[name][kept], expected[name][kept], allowed[kept], dtype)
        assert not results[name][results["out"] == 0].any(), what
    if p == 1:  # nothing is dropped on either side
        assert np.array_equal(kept, x != 0)


@CASES
@given(shape=any_shapes, seed=seeds)
@every_dtype
def test_dropout_in_evaluation_mode(
    dtype: np.dtype[Any], shape: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    out, cache = layers.dropout_forward(x, {"mode": "test", "p": 0.7})
    expected = differentiate(lambda x: F.dropout(x, 0.3, training=False), {"x": x}, dout)
    assert_close("dropout out", out, expected["out"], 0, dtype, roundings=0)
    dx = layers.dropout_backward(dout, cache)
    assert_close("dropout dx", dx, expected["dx"], 0, dtype, roundings=0)


# --- Affine --------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A case of an affine layer from ``x`` to ``width`` outputs."""

    shape: tuple[int, ...]
    width: int = 1
    seed: int = 0
    reproducible: bool = False


@st.composite
def products(draw: Any) -> Product:
    shape = draw(shapes(draw(st.integers(2, 4)), 1 << 12))
    width = draw(size(max(1, (1 << 16) // math.prod(shape))))
    return Product(shape, width, draw(seeds), draw(st.booleans()))


@CASES
@given(case=products())
@example(Product((1, 1)))
@example(Product((1, 257), 1, reproducible=True))
@example(Product((7, 1), 13))
@example(Product((2, 3, 7, 7), 31))
@example(Product((2, 3, 7, 7), 31, reproducible=True))
@example(Product((2, 2048), 3, reproducible=True))
@both_singles
def test_affine(dtype: np.dtype[Any], case: Product) -> None:
    rng, features = np.random.default_rng(case.seed), math.prod(case.shape[1:])
    arrays = {
        "x": rng.standard_normal(case.shape).astype(dtype),
        "w": rng.standard_normal((features, case.width)).astype(dtype),
        "b": rng.standard_normal(case.width).astype(dtype),
    }
    dout = rng.standard_normal((case.shape[0], case.width)).astype(dtype)
    out, cache = layers.affine_forward(**arrays, reproducible=case.reproducible)
    dx, dw, db = layers.affine_backward(dout, cache)
    expected = differentiate(
        lambda x, w, b: F.linear(x.flatten(1), w.T, b), wide(arrays), dout.astype(np.float64)
    )
    scales = affine_scales(**arrays, dout=dout)  # PyTorch's products are such sums too
    results = {"out": out, "dx": dx, "dw": dw, "db": db}
    compare("affine", dtype, results, expected, both(scales))


# --- Losses --------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """A case of a loss: N samples of C classes."""

    shape: tuple[int, int]
    kind: str = "ordinary"
    seed: int = 0


scores = st.builds(
    Scores, shapes(2), st.sampled_from(["ordinary", "ordinary", "far", "wide"]), seeds
)


def named_scores(test: Any) -> Any:
    """Add the corner cases: one sample, one class, primes, 49 classes, edges, hard values."""
    for case in (
        Scores((1, 1)),
        Scores((1, 257)),
        Scores((37, 1)),
        Scores((7, 49), "far"),
        Scores((31, 13), "wide"),
        Scores((2048, 8)),
        Scores((3, 2049), "far"),
    ):
        test = example(case)(test)
    return test


def draw_scores(case: Scores, dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Return scores with few digits, so that margins of the hinge loss are exact, and labels.

    Else the two sides could disagree on whether one is above 0, and by a whole gradient.
    """
    rng = np.random.default_rng(case.seed)
    x = rng.standard_normal(case.shape)
    if case.kind == "far":
        x += 1e3
    elif case.kind == "wide":  # most of the exponentials vanish
        x *= 1e2
    y = rng.integers(case.shape[1], size=case.shape[0])
    return (np.round(x * 256) / 256).astype(dtype), y


def differentiate_loss(function: Any, x: Any) -> dict[str, Any]:
    results = differentiate(function, wide({"x": x}), None)
    return {"loss": results["out"], "dx": results["dx"]}


@CASES
@given(case=scores)
@named_scores
@both_singles
def test_softmax_loss(dtype: np.dtype[Any], case: Scores) -> None:
    x, y = draw_scores(case, dtype)
    results = dict(zip(("loss", "dx"), layers.softmax_loss(x, y), strict=True))
    expected = differentiate_loss(lambda x: F.cross_entropy(x, torch.from_numpy(y)), x)
    scales = both(softmax_loss_scales(x, y))
    compare("softmax_loss", dtype, results, expected, scales)


@CASES
@given(case=scores)
@named_scores
@both_singles
def test_svm_loss(dtype: np.dtype[Any], case: Scores) -> None:
    """PyTorch's is the mean over the classes, ours their sum."""
    x, y = draw_scores(case, dtype)
    results = dict(zip(("loss", "dx"), layers.svm_loss(x, y), strict=True))
    expected = differentiate_loss(
        lambda x: case.shape[1] * F.multi_margin_loss(x, torch.from_numpy(y)), x
    )
    scales = svm_loss_scales(x, y)
    # PyTorch adds up one value after the other, in dx that of a class over and over.
    growth = {"loss": chain_growth(x.size), "dx": chain_growth(case.shape[1], equal=True)}
    theirs = {name: growth[name] * scale for name, scale in scales.items()}
    compare("svm_loss", dtype, results, expected, both(scales, theirs))


@CASES
@given(case=scores)
@named_scores
@both_singles
def test_count_correct(dtype: np.dtype[Any], case: Scores) -> None:
    x, y = draw_scores(case, dtype)
    scores = tensor(x)
    # The first of the largest: PyTorch's argmax does not say which of several it gives.
    first = (scores == scores.amax(1, keepdim=True)).to(torch.uint8).cumsum(1).eq(0).sum(1)
    assert layers.count_correct(x, y) == int((first == torch.from_numpy(y)).sum())


@CASES
@given(shape=any_shapes, seed=seeds, reg=st.just(0.0) | st.floats(1e-6, 10))
@both_singles
def test_l2_penalty(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int, reg: float) -> None:
    w = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    results = dict(zip(("loss", "dw"), layers.l2_penalty(w, reg), strict=True))
    value = tensor(w.astype(np.float64), grad=True)
    loss = 0.5 * reg * value.square().sum()
    loss.backward()
    expected = {"loss": numpy(loss), "dw": numpy(value.grad)}
    magnitudes = {"loss": 0.5 * reg * sum_of_squares_scale(w), "dw": np.abs(expected["dw"])}
    compare("l2_penalty", dtype, results, expected, both(magnitudes))
