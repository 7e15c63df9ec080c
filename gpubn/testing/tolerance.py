"""How far a result may lie from the float64 reference: the one table of bounds, and its unit.

A bound is a number of units in the last place: the spacing of the result's dtype at the result's
natural magnitude, its *scale*. The scale is that of the terms that were added up, not of what was
left of them: a sum that cancels to nothing keeps the rounding of its terms, whoever computes it. So
one bound holds for float32 and float64 and for all values, hard ones too. The ``*_scales``
functions give the scales.

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
    "batchnorm_scales",
    "batchnorm_test_scales",
    "layernorm_scales",
    "softmax_loss_scales",
    "svm_loss_scales",
    "ulp_error",
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


_SUM = "rounding at each of the tree's log2(N) levels"

BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "batchnorm out": Bound(10, 5.0, "half the variance's relative error, and the mean's error"),
        "batchnorm dx": Bound(8, 4.0, "the errors of invstd and xhat, and of the means of dgamma"),
        "batchnorm dgamma": Bound(5, 2.5, f"{_SUM}, and what xhat brings in"),
        "batchnorm dbeta": Bound(5, 2.3, _SUM),
        "batchnorm running_mean": Bound(12, 6.3, f"{_SUM}, of distances from a sample"),
        "batchnorm running_var": Bound(16, 8.0, "several roundings at each of log2(N) mergers"),
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
        "affine out": Bound(8, 3.3, "a sum in the BLAS's order: a chain, or several"),
        "affine dx": Bound(8, 3.8, "a sum in the BLAS's order: a chain, or several"),
        "affine dw": Bound(10, 4.9, "a sum in the BLAS's order: a chain, or several"),
        "affine db": Bound(3, 1.4, _SUM),
        "softmax_loss loss": Bound(6, 3.0, "exp, log, and the sums over classes and samples"),
        "softmax_loss dx": Bound(12, 6.0, "two exps (one in the sum), the sum, and two quotients"),
        "svm_loss loss": Bound(4, 2.0, "a margin's two roundings, and the sum"),
        "svm_loss dx": Bound(0.5, 0.5, "a count, which is exact, divided once by N"),
    }
)
"""About twice the worst seen in 50 seeds of every shape and hard value (``tests/layers``).

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
    """Return the scales of an affine layer's out, dx, dw and db: its sums with every sign plus."""
    x, w, b, dout = (np.abs(array).astype(np.float64) for array in (x, w, b, dout))
    dx, dw, db = reference.affine_backward(dout, x, w)
    return {"out": reference.affine_forward(x, w, b), "dx": dx, "dw": dw, "db": db}


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


def _at_least(smallest: float, array: Floats) -> NDArray[np.float64]:
    magnitude: NDArray[np.float64] = np.maximum(np.abs(array.astype(np.float64)), smallest)
    return magnitude
