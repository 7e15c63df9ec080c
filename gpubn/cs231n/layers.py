"""The assignment's ``cs231n.layers``: the functions of ``gpubn.layers``, and its own dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpubn.backend import Array, namespace, scope_of
from gpubn.layers import (
    _check,
    affine_backward,
    affine_forward,
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
    layernorm_backward,
    layernorm_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
    spatial_groupnorm_backward,
    spatial_groupnorm_forward,
    svm_loss,
)

__all__ = [
    "affine_backward",
    "affine_forward",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_forward",
    "dropout_backward",
    "dropout_forward",
    "layernorm_backward",
    "layernorm_forward",
    "relu_backward",
    "relu_forward",
    "softmax_loss",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
    "svm_loss",
]


class _Cache(NamedTuple):
    mask: Array | None  # already divided by p; None in test mode
    like: Array  # an empty array of x's dtype, on x's device
    shape: tuple[int, ...]


def dropout_forward(x: Array, dropout_param: Mapping[str, Any]) -> tuple[Array, Any]:
    """Keep values with probability ``p``, scaled by ``1 / p``; return the output and a cache.

    The mask is drawn by ``np.random.rand``, as in the assignment. ``gpubn.layers.dropout_forward``
    draws by counters instead, on the device, and stores nothing.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    dropout_param : dict
        ``p``: the probability of keeping a value, above 0 and at most 1. ``mode``: 'train' or
        'test'; in test mode the output is x, and nothing is drawn. ``seed``, optional: the global
        stream starts anew from it, in either mode.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.
    """
    _check.floating("x", x)
    _check.mapping("dropout_param", dropout_param)
    mode = _check.mode("dropout_param", dropout_param)
    if "p" not in dropout_param:
        raise ValueError("dropout_param has no 'p', expected the probability of keeping a value")
    p = _check.number("p", dropout_param["p"])
    if not 0 < p <= 1:
        raise ValueError(f"p is {p!r}, expected a probability of keeping above 0 and at most 1")
    if dropout_param.get("seed") is not None:
        np.random.seed(dropout_param["seed"])
    with scope_of(x):
        xp = namespace(x)
        like = xp.empty(0, x.dtype)
        if mode == "test":
            return x, _Cache(None, like, x.shape)
        mask = xp.asarray((np.random.rand(*x.shape) < p) / p)
        return (x * mask).astype(x.dtype, copy=False), _Cache(mask, like, x.shape)


def dropout_backward(dout: Array, cache: Any) -> Array:
    """Return dx: ``dout / p`` where the forward pass kept a value, else 0."""
    _check.cache_of("dropout", cache, _Cache)
    _check.like("dout", dout, cache.shape, cache.like)
    if cache.mask is None:
        return dout
    with scope_of(dout):
        return (dout * cache.mask).astype(dout.dtype, copy=False)
