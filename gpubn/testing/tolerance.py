"""How far a result may lie from the float64 reference: the one table of bounds, and its unit.

A bound is a number of units in the last place: the spacing of the result's dtype at the result's
natural magnitude, its *scale*. The scale is that of the terms that were added up, not of what was
left of them: a sum that cancels to nothing keeps the rounding of its terms, whoever computes it. So
one bound holds for float32 and float64 and for all values, hard ones too. The ``*_scales``
functions give the scales; a matrix product's is that of its partial sums.

Half precision, float16 and bfloat16, is computed with in float32 and rounded once at the end. That
rounding is known exactly and no bound needs to allow for it: the error is how far the reference
lies from all that would have been rounded to the result, in float32's units. So the same bounds
hold for it, and a second rounding on the way, of some thousand such units, is seen.

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
    "groupnorm_scales",
    "layernorm_scales",
    "matmul_scale",
    "rmsnorm_scales",
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
_TOO = "in float64 the reference's too"
_CHAIN = "one rounding for each product, or two, as random as the values are"

BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "batchnorm out": Bound(10, 5.0, "half the variance's relative error, and the mean's error"),
        "batchnorm dx": Bound(10, 5.0, f"errors of invstd, xhat and two scaled means, {_TOO}"),
        "batchnorm dgamma": Bound(5, 2.5, f"{_SUM}, and what xhat brings in"),
        "batchnorm dbeta": Bound(5, 2.3, _SUM),
        "batchnorm running_mean": Bound(20, 10.3, f"as mean, beside a sample of any size, {_TOO}"),
        "batchnorm running_var": Bound(16, 8.0, "several roundings at each of log2(N) mergers"),
        "batchnorm mean": Bound(10, 5.0, f"{_SUM}, of distances from a sample"),
        "batchnorm var": Bound(12, 6.0, "several roundings at each of log2(N) mergers"),
        "batchnorm test out": Bound(7, 3.5, "seven roundings of one element, nothing summed"),
        "batchnorm test dx": Bound(6, 3.1, "five roundings of one element, nothing summed"),
        "batchnorm test dgamma": Bound(6, 3.2, f"{_SUM}, and what xhat brings in"),
        "batchnorm test dbeta": Bound(5, 2.3, _SUM),
        "layernorm out": Bound(10, 5.0, f"half the variance's error, the mean's error, {_TOO}"),
        "layernorm dx": Bound(10, 5.0, f"the errors of invstd, xhat and two means, {_TOO}"),
        "layernorm dgamma": Bound(8, 4.0, f"{_SUM}, and what xhat brings in"),
        "layernorm dbeta": Bound(4, 2.0, _SUM),
        "groupnorm out": Bound(12, 6.0, f"as batch norm's, and a group's mergers, {_TOO}"),
        "groupnorm dx": Bound(10, 5.0, f"errors of invstd, xhat and two scaled means, {_TOO}"),
        "groupnorm dgamma": Bound(8, 4.0, f"{_SUM}, and what xhat brings in"),
        "groupnorm dbeta": Bound(4, 2.0, _SUM),
        "rmsnorm out": Bound(12, 6.0, f"half the mean square's error, two products, {_TOO}"),
        "rmsnorm dx": Bound(20, 10.0, f"seven roundings of one element and a sum, {_TOO}"),
        "rmsnorm dgamma": Bound(12, 6.0, f"{_SUM}, and xhat, {_TOO}"),
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
reference's own roundings count too: where the worst is float64's, float32's is some 3 to 7.
"""


def ulp_error(result: Floats, expected: ArrayLike, scale: ArrayLike) -> float:
    """Return the largest error of a result, in units of its last place at ``scale``.

    ``max(|result - expected| / spacing(scale))``, with the spacing of the result's dtype. For half
    precision the distance is that of ``expected`` from the nearest number that would have been
    rounded to the result, and the spacing float32's.

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
        anything but itself; two NaN agree. Half precision has an infinity for what is rounded to
        one: a float16 of infinity agrees with 65,520 and more.

    Raises
    ------
    TypeError
        If the result is not of a floating-point dtype.
    ValueError
        If the shapes do not fit.
    """
    result, reference_ = np.asarray(result), np.asarray(expected, dtype=np.float64)
    half = result.dtype.name in ("float16", "bfloat16")
    if not (result.dtype.kind == "f" or half):
        raise TypeError(f"result has dtype {result.dtype}, expected floating point")
    if result.shape != reference_.shape:
        raise ValueError(f"result has shape {result.shape}, expected {reference_.shape}")
    dtype = np.dtype(np.float32) if half else result.dtype
    magnitude = np.minimum(np.abs(np.broadcast_to(scale, result.shape)), np.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.spacing(magnitude.astype(dtype)).astype(np.float64)
        value = result.astype(np.float64)
        if half:
            low, high = _rounded_to(result)
            distance = np.maximum(np.maximum(low - reference_, reference_ - high), 0.0)
            finite = ~np.isnan(value)
        else:
            reference_ = np.where(np.isinf(reference_.astype(dtype)), np.inf, 1) * reference_
            distance = np.abs(value - reference_)
            finite = np.isfinite(value)
        same = (value == reference_) | (np.isnan(value) & np.isnan(reference_))
        errors = np.where(finite & ~np.isnan(reference_), distance / unit, np.inf)
    return float(np.where(same, 0.0, errors).max(initial=0.0))


def _rounded_to(result: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and the greatest number that are rounded to each value of half precision.

    They lie halfway to its neighbours, whose bits are the next whole numbers. Beyond the largest
    number a rounding goes on as if there were one more, and calls it infinity.
    """

    def number(bits: Any) -> NDArray[np.float64]:
        return np.asarray(bits, np.uint16).view(result.dtype).astype(np.float64)

    infinity = int(np.asarray(np.inf, result.dtype).view(np.uint16))
    beyond = 2 * number(infinity - 1) - number(infinity - 2)
    bits = np.minimum(result.view(np.uint16) & 0x7FFF, infinity)
    at = np.where(bits < infinity, number(bits), beyond)
    below = np.where(bits > 0, number(np.maximum(bits, 1) - 1), -number(1))
    above = np.where(bits < infinity - 1, number(np.minimum(bits + 1, infinity)), beyond)
    low, high = (below + at) / 2, np.where(bits < infinity, (at + above) / 2, np.inf)
    negative = np.signbit(result)
    return np.where(negative, -high, low), np.where(negative, -low, high)


def batchnorm_scales(
    x: Floats, gamma: Floats, beta: Floats, dout: Floats, eps: float = 1e-5
) -> Scales:
    """Return the scales of out, dx, dgamma and dbeta of batch norm in training.

    A channel's rounding errors come through its mean and variance, so they are as large as its
    largest value asks for: out and dx have one scale a channel.
    """
    tiny = _tiny(x)
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
    tiny = _tiny(x)
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
    tiny = _tiny(x)
    mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)
    invstd = 1 / np.sqrt(var + eps)
    xhat = _at_least(tiny, x.astype(np.float64) - mean) * invstd
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
    tiny = _tiny(x)
    rows = x.shape[0]
    graph = reference.batchnorm_forward(x.T, np.ones(rows), np.zeros(rows), eps)
    centred, g = np.abs(graph.centred.T), _at_least(tiny, dout)
    invstd = graph.invstd[:, np.newaxis]
    xhat = np.maximum(centred.max(axis=1, keepdims=True), tiny) * invstd
    h = np.maximum(g * np.abs(gamma), tiny)
    hx = (h * np.maximum(centred, tiny) * invstd).mean(axis=1, keepdims=True)
    return {
        "out": xhat * np.abs(gamma) + np.abs(beta),
        "dx": invstd * (h.max(axis=1, keepdims=True) + h.mean(axis=1, keepdims=True) + xhat * hx),
        "dgamma": (g * xhat).sum(axis=0),
        "dbeta": g.sum(axis=0),
    }


def groupnorm_scales(
    x: Floats,
    gamma: Floats,
    beta: Floats,
    dout: Floats,
    num_groups: int,
    eps: float = 1e-5,
    axis: int = 1,
) -> Scales:
    """Return the scales of out, dx, dgamma and dbeta of group norm, channels on ``axis``.

    As in layer norm, with a group in the place of a row.
    """
    tiny = _tiny(x)
    x, dout = (np.moveaxis(array.astype(np.float64), axis, 1) for array in (x, dout))
    by_group = len(x), num_groups, -1
    groups = x.reshape(len(x) * num_groups, -1).T
    ones = np.ones(groups.shape[1])
    graph = reference.batchnorm_forward(groups, ones, 0 * ones, eps)

    def per_group(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give a value a group the shape of x: (N, C, 1, ...)."""
        per_channel = values.reshape(len(x), num_groups).repeat(x.shape[1] // num_groups, axis=1)
        return per_channel.reshape(*per_channel.shape, *(1 for _ in x.shape[2:]))

    def per_channel(values: Floats) -> NDArray[np.float64]:
        return np.abs(values.astype(np.float64)).reshape(-1, *(1 for _ in x.shape[2:]))

    centred, g = np.abs(graph.centred.T).reshape(x.shape), _at_least(tiny, dout)
    invstd = per_group(graph.invstd)
    xhat = np.maximum(per_group(np.abs(graph.centred).max(axis=0)), tiny) * invstd
    h = np.maximum(g * per_channel(gamma), tiny)
    hx = (h * np.maximum(centred, tiny) * invstd).reshape(by_group).mean(axis=2)
    largest, mean = h.reshape(by_group).max(axis=2), h.reshape(by_group).mean(axis=2)
    others = tuple(i for i in range(x.ndim) if i != 1)
    out = np.broadcast_to(xhat * per_channel(gamma) + per_channel(beta), x.shape)
    dx = invstd * (per_group(largest) + per_group(mean) + xhat * per_group(hx))
    return {
        "out": np.moveaxis(out, 1, axis),
        "dx": np.moveaxis(np.broadcast_to(dx, x.shape), 1, axis),
        "dgamma": (g * xhat).sum(axis=others),
        "dbeta": g.sum(axis=others),
    }


def rmsnorm_scales(x: Floats, gamma: Floats, dout: Floats, eps: float = 1e-5) -> Scales:
    """Return the scales of out, dx and dgamma of RMS norm.

    Nothing is taken from x, and what is added up to the mean square has one sign: so a value's
    error is relative to itself, and out and dx have a scale an element.
    """
    tiny = _tiny(x)
    x = x.astype(np.float64)
    invrms = 1 / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps)
    xhat, g = _at_least(tiny, x * invrms), _at_least(tiny, dout)
    h = np.maximum(g * np.abs(gamma), tiny)
    hx = np.maximum(h * xhat, tiny)
    return {
        "out": xhat * np.abs(gamma),
        "dx": invrms * (h + xhat * hx.mean(axis=1, keepdims=True)),
        "dgamma": np.maximum(g * xhat, tiny).sum(axis=0),
    }


def affine_scales(x: Floats, w: Floats, b: Floats, dout: Floats) -> Scales:
    """Return the scales of an affine layer's out, dx, dw and db, for products of any order."""
    rows = x.reshape(len(x), -1)
    return {
        "out": matmul_scale(rows, w) + np.abs(b.astype(np.float64)),
        "dx": matmul_scale(dout, w.T).reshape(x.shape),
        "dw": matmul_scale(rows.T, dout),
        "db": _at_least(_tiny(x), dout).sum(axis=0),
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
    tiny = _tiny(x)
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


def _tiny(x: Floats) -> float:
    """Return the smallest normal number of the dtype that is computed with."""
    return float(np.finfo(np.float32 if x.dtype.itemsize == 2 else x.dtype).tiny)


def _at_least(smallest: float, array: Floats) -> NDArray[np.float64]:
    magnitude: NDArray[np.float64] = np.maximum(np.abs(array.astype(np.float64)), smallest)
    return magnitude
