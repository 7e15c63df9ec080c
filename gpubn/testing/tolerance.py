"""How far a result may lie from the float64 reference: the one table of bounds, and its unit.

A bound is a number of units in the last place: the spacing of the result's dtype at the result's
natural magnitude, its *scale*. The scale is that of the terms that were added up, not of what was
left of them: a sum that cancels to nothing keeps the rounding of its terms, whoever computes it. So
one bound holds for float32 and float64 and for all values, hard ones too. The ``*_scales``
functions give the scales; a matrix product's is that of its partial sums.

Where a term is subnormal its magnitude counts as the smallest normal number: below that the spacing
of floating-point numbers stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpubn.testing import reference

__all__ = [
    "BOUNDS",
    "Bound",
    "affine_scales",
    "batchnorm_moments_scales",
    "batchnorm_scales",
    "batchnorm_test_scales",
    "layernorm_scales",
    "matmul_scale",
    "softmax_loss_scales",
    "sum_of_squares_scale",
    "svm_loss_scales",
    "ulp_error",
    "update_scales",
]

Floats: TypeAlias = NDArray[Any]
Scales: TypeAlias = dict[str, NDArray[np.float64]]


class Bound(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    units : float
        The largest error that is accepted, in units of the last place at the result's scale.
    seen : float
        The worst one seen.
    reason : str
        What adds up to it.
    """

    units: float
    seen: float
    reason: str


_BLOCK = 1 << 20  # values at a time, so that a scale needs little memory
_SUM = "rounding at each of the tree's log2(N) levels"
_CHAIN = "one rounding for each product, or two, as random as the values are"

BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "batchnorm out": Bound(10, 5.0, "half the variance's relative error, and the mean's error"),
        "batchnorm dx": Bound(8, 4.0, "the errors of invstd and xhat, and of the means of dgamma"),
        "batchnorm dgamma": Bound(5, 2.5, f"{_SUM}, and what xhat brings in"),
        "batchnorm dbeta": Bound(5, 2.3, _SUM),
        "batchnorm running_mean": Bound(12, 6.3, f"{_SUM}, of distances from a sample"),
        "batchnorm running_var": Bound(16, 8.0, "several roundings at each of log2(N) mergers"),
        "batchnorm mean": Bound(10, 5.0, f"{_SUM}, of distances from a sample"),
        "batchnorm var": Bound(12, 6.0, "several roundings at each of log2(N) mergers"),
        "batchnorm test out": Bound(6, 3.2, "seven roundings of one element, nothing summed"),
        "batchnorm test dx": Bound(5, 2.5, "five roundings of one element, nothing summed"),
        "batchnorm test dgamma": Bound(5, 2.3, f"{_SUM}, and what xhat brings in"),
        "batchnorm test dbeta": Bound(5, 2.3, _SUM),
        "layernorm out": Bound(8, 4.0, "half the variance's relative error, and the mean's error"),
        "layernorm dx": Bound(6, 3.2, "the errors of invstd and xhat, and of the two means"),
        "layernorm dgamma": Bound(6, 3.0, f"{_SUM}, and what xhat brings in"),
        "layernorm dbeta": Bound(3, 1.3, _SUM),
        "relu": Bound(0, 0.0, "it chooses a value and rounds nothing"),
        "dropout": Bound(1.5, 1.0, "1 / p is rounded, and the product, which may double the first"),
        "affine out": Bound(8, 4.2, _CHAIN),
        "affine dx": Bound(7, 3.3, _CHAIN),
        "affine dw": Bound(6, 2.8, _CHAIN),
        "affine db": Bound(5, 3.0, _SUM),
        "exp": Bound(1, 1.0, "below 1, as all float32 values show; in float64 so is the reference"),
        "log": Bound(1, 1.0, "below 1, as all float32 values show; in float64 so is the reference"),
        "softmax_loss loss": Bound(6, 3.0, "exp, log, and the sums over classes and samples"),
        "softmax_loss dx": Bound(12, 6.0, "two exps (one in the sum), the sum, and two quotients"),
        "svm_loss loss": Bound(4, 2.0, "a margin's two roundings, and the sum"),
        "svm_loss dx": Bound(0.5, 0.5, "a count, which is exact, divided once by N"),
        "count_correct": Bound(0, 0.0, "a whole number"),
        "sum_of_squares": Bound(4, 1.7, f"the squares' rounding, and {_SUM}"),
        "l2_penalty loss": Bound(5, 2.5, "the sum of squares, reg / 2, and their product"),
        "l2_penalty dw": Bound(1.5, 1.3, "reg is rounded, and the product, which may double it"),
        "sgd w": Bound(2, 1.4, "the rate, which may double, its product, and the difference"),
        "sgd_momentum velocity": Bound(2.5, 1.7, "two scalars, two products, a difference"),
        "sgd_momentum w": Bound(3, 1.9, "the velocity, and a sum"),
        "rmsprop cache": Bound(3.5, 2.1, "two scalars, a square, two products, and a sum"),
        "rmsprop w": Bound(6, 2.6, "some ten roundings of one element, nothing summed"),
        "adam m": Bound(2.5, 1.4, "two scalars, two products, and a sum"),
        "adam v": Bound(3.5, 2.2, "two scalars, a square, two products, and a sum"),
        "adam w": Bound(7, 3.5, "some twenty roundings of one element, nothing summed"),
        "adamw m": Bound(2.5, 1.4, "two scalars, two products, and a sum"),
        "adamw v": Bound(3.5, 2.2, "two scalars, a square, two products, and a sum"),
        "adamw w": Bound(7, 3.2, "some twenty roundings of one element, nothing summed"),
    }
)
"""About twice the worst seen in 50 seeds of every shape and hard value (``tests/layers``), or in
3,000 cases of ``gpubn parity`` of each operation.

What is rounded a known number of times has the bound that follows instead. In float64 the
reference's own roundings count too.
"""


def ulp_error(result: Floats, expected: ArrayLike, scale: ArrayLike) -> float:
    """Return the largest error of a result, in units of its last place at ``scale``.

    ``max(|result - expected| / spacing(scale))``, with the spacing of the result's dtype.

    Parameters
    ----------
    result : float array or scalar, in host memory
    expected : array_like of the result's shape
        The float64 reference. A value too large for the result's dtype counts as infinite.
    scale : array_like, broadcastable to the result's shape
        The natural magnitude of each result. A scale below the smallest normal number has the
        spacing there; one too large for the dtype has the spacing of the largest number.

    Returns
    -------
    float
        Infinity where one of the two is NaN and the other is not, or an infinity stands against
        anything but itself; two NaN agree.

    Raises
    ------
    TypeError
        If the result is not of a floating-point dtype.
    ValueError
        If the shapes do not fit.
    """
    result, reference_ = np.asarray(result), np.asarray(expected, dtype=np.float64)
    if result.dtype.kind != "f":
        raise TypeError(f"result has dtype {result.dtype}, expected floating point")
    if result.shape != reference_.shape:
        raise ValueError(f"result has shape {result.shape}, expected {reference_.shape}")
    largest = np.finfo(result.dtype).max
    magnitude = np.minimum(np.abs(np.broadcast_to(scale, result.shape)), largest)
    with np.errstate(over="ignore", invalid="ignore"):
        representable = np.isfinite(reference_.astype(result.dtype))
        unit = np.spacing(magnitude.astype(result.dtype)).astype(np.float64)
        errors = np.abs(result.astype(np.float64) - reference_) / unit
        same = (result == reference_.astype(result.dtype)) | (
            np.isnan(result) & np.isnan(reference_)
        )
    errors = np.where(representable & np.isfinite(result), errors, np.where(same, 0.0, np.inf))
    return float(errors.max(initial=0.0))


def batchnorm_scales(
    x: Floats, gamma: Floats, beta: Floats, dout: Floats, eps: float = 1e-5
) -> Scales:
    """Return the scales of out, dx, dgamma and dbeta of batch norm in training.

    A channel's rounding errors come through its mean and variance, so they are as large as its
    largest value asks for: out and dx have one scale a channel.
    """
    tiny = np.finfo(x.dtype).tiny
    graph = reference.batchnorm_forward(x, gamma, beta, eps)
    centred, g = np.abs(graph.centred), _at_least(tiny, dout)
    xhat = np.maximum(centred.max(axis=0), tiny) * graph.invstd
    gx = (g * np.maximum(centred, tiny) * graph.invstd).mean(axis=0)
    scale = np.abs(graph.gamma) * graph.invstd
    return {
        "out": np.abs(graph.gamma) * xhat + np.abs(beta),
        "dx": scale * (g.max(axis=0) + g.mean(axis=0) + xhat * gx),
        "dgamma": g.sum(axis=0) * xhat,
        "dbeta": g.sum(axis=0),
    }


def batchnorm_moments_scales(x: Floats, shift: Floats) -> Scales:
    """Return the scales of the mean and the variance of ``x - shift`` over the rows.

    The mean's is the mean distance from the shift; the variance is a sum of what is not negative.
    """
    tiny = np.finfo(x.dtype).tiny
    distance = x.astype(np.float64) - shift
    squares = (distance - distance.mean(axis=0)) ** 2
    return {
        "mean": _at_least(tiny, distance).mean(axis=0),
        "var": _at_least(tiny, squares).mean(axis=0),
    }


def batchnorm_test_scales(
    x: Floats,
    gamma: Floats,
    beta: Floats,
    running_mean: Floats,
    running_var: Floats,
    dout: Floats,
    eps: float = 1e-5,
) -> Scales:
    """Return the scales of out, dx, dgamma and dbeta of batch norm in test mode.

    Nothing is estimated from x here, so nothing is shared: out and dx have a scale an element.
    """
    tiny = np.finfo(x.dtype).tiny
    mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)
    invstd = 1 / np.sqrt(var + eps)
    xhat = np.maximum(np.abs(x - mean), tiny) * invstd
    g = _at_least(tiny, dout)
    return {
        "out": np.abs(gamma) * xhat + np.abs(beta),
        "dx": np.abs(gamma) * invstd * g,
        "dgamma": (g * xhat).sum(axis=0),
        "dbeta": g.sum(axis=0),
    }


def layernorm_scales(
    x: Floats, gamma: Floats, beta: Floats, dout: Floats, eps: float = 1e-5
) -> Scales:
    """Return the scales of out, dx, dgamma and dbeta of layer norm.

    As in batch norm, with a row's largest value for what the row's mean and variance bring in.
    """
    tiny = np.finfo(x.dtype).tiny
    rows = x.shape[0]
    graph = reference.batchnorm_forward(x.T, np.ones(rows), np.zeros(rows), eps)
    centred, g = np.abs(graph.centred.T), _at_least(tiny, dout)
    invstd = graph.invstd[:, np.newaxis]
    xhat = np.maximum(centred.max(axis=1, keepdims=True), tiny) * invstd
    h = g * np.abs(gamma)
    hx = (h * np.maximum(centred, tiny) * invstd).mean(axis=1, keepdims=True)
    return {
        "out": xhat * np.abs(gamma) + np.abs(beta),
        "dx": invstd * (h.max(axis=1, keepdims=True) + h.mean(axis=1, keepdims=True) + xhat * hx),
        "dgamma": (g * xhat).sum(axis=0),
        "dbeta": g.sum(axis=0),
    }


def affine_scales(x: Floats, w: Floats, b: Floats, dout: Floats) -> Scales:
    """Return the scales of an affine layer's out, dx, dw and db, for products of any order."""
    rows = x.reshape(len(x), -1)
    return {
        "out": matmul_scale(rows, w) + np.abs(b.astype(np.float64)),
        "dx": matmul_scale(dout, w.T).reshape(x.shape),
        "dw": matmul_scale(rows.T, dout),
        "db": _at_least(np.finfo(x.dtype).tiny, dout).sum(axis=0),
    }


def matmul_scale(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Return the scale of ``a @ b``, each of whose outputs is a sum of K products.

    A sum of one chain rounds each of its partial sums once. The errors of many roundings add up as
    random ones do, to the root of the sum of their squares; so this scale is the root of the sum of
    the squares of the partial sums. It grows with sqrt(K) times the sum where the terms are of one
    sign, and less where they cancel. The several, shorter chains of a BLAS err less.

    Where every rounding goes the same way, as in a sum of equal products, the error of one chain is
    up to sqrt(K) times larger, and not held to any bound.

    Parameters
    ----------
    a : float array (M, K)
    b : float array (K, N)
        Partial sums must have squares that are neither too large nor too small for float64.
    """
    depth, outputs, tiny = len(b), a.shape[0] * b.shape[1], np.finfo(a.dtype).tiny
    block = max(1, _BLOCK // outputs)
    a, b = a.T.astype(np.float64), b.astype(np.float64)
    total, squares = np.zeros((2, a.shape[1], b.shape[1]))
    for k in range(0, depth, block):
        terms = a[k : k + block, :, np.newaxis] * b[k : k + block, np.newaxis, :]
        terms[0] += total
        sums = np.cumsum(terms, axis=0)
        total = sums[-1]
        squares += np.sum(sums**2, axis=0)
    # The root of a sum of squares is at most the sum of the roots of its parts.
    scale: NDArray[np.float64] = np.sqrt(squares) + np.sqrt(depth) * tiny
    return scale


def softmax_loss_scales(x: Floats, y: NDArray[Any]) -> Scales:
    """Return the scales of the softmax loss and its dx.

    The sum of exponentials is at least 1, so its logarithm keeps an error of one unit of 1 however
    small it is. A difference of scores is rounded before exp, which turns its error into a relative
    one: an exponential's scale is itself times 1 + the difference.
    """
    samples, x = np.arange(x.shape[0]), x.astype(np.float64)
    shifted = x - x.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    totals = exps.sum(axis=1, keepdims=True)
    dx = exps / totals * (1 - shifted)
    dx[samples, y] += 1
    losses = 1 + np.log(totals[:, 0]) - shifted[samples, y]
    return {"loss": np.asarray(losses.mean()), "dx": dx / len(x)}


def svm_loss_scales(x: Floats, y: NDArray[Any]) -> Scales:
    """Return the scales of the hinge loss, its margins with every sign plus, and of its dx."""
    _, dx = reference.svm_loss(x, y)
    right = np.take_along_axis(x, y[:, np.newaxis], axis=1).astype(np.float64)
    wrong = dx > 0
    total = np.sum(np.abs(x) + np.abs(right) + 1.0, where=wrong)
    return {"loss": np.asarray(total / len(x)), "dx": np.abs(dx)}


def sum_of_squares_scale(x: Floats) -> float:
    """Return the scale of a sum of squares: itself, each square a normal number at the least."""
    tiny = np.finfo(x.dtype).tiny
    return float(np.maximum(x.astype(np.float64) ** 2, tiny).sum())


def update_scales(rule: str, w: Floats, dw: Floats, t: int = 0, **state: Floats) -> Scales:
    """Return the scales of what an update rule gives: ``w``, and each of its arrays of state.

    They are the rule's results where all that it adds has one sign; scalars are the defaults.
    Adam's ``1 - beta**t`` loses digits: its relative error is up to ``1 / (1 - beta)`` roundings,
    most of them where t is small. In float32 none of that is seen, since scalars are float64.
    """
    # Against the gradient, so that it is added and not taken away; m is one of gradients.
    signs = {"velocity": 1.0, "cache": 1.0, "m": -1.0, "v": 1.0}
    states = {name: sign * np.abs(state[name]) for name, sign in signs.items() if name in state}
    steps = {"t": t} if "m" in state else {}
    results = getattr(reference, rule)(np.abs(w), -np.abs(dw), **states, **steps)
    results = results if isinstance(results, tuple) else (results,)
    scales = {name: np.abs(value) for name, value in zip(("w", *states), results, strict=False)}
    if steps and w.dtype == np.float64:
        step = scales["w"] - np.abs(w)
        scales["w"] += step * (1 / (1 - 0.9) + 0.5 / (1 - 0.999))  # the second under a root
    return scales


def _at_least(smallest: float, array: Floats) -> NDArray[np.float64]:
    magnitude: NDArray[np.float64] = np.maximum(np.abs(array.astype(np.float64)), smallest)
    return magnitude
