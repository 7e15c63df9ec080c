"""Layers that often follow each other, as one call."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from gpubn.backend import Array
from gpubn.layers import _check
from gpubn.layers.affine import affine_backward, affine_forward
from gpubn.layers.batchnorm import batchnorm_backward, batchnorm_forward
from gpubn.layers.relu import relu_backward, relu_forward


class _AffineReLU(NamedTuple):
    affine: Any
    relu: Any


class _AffineBNReLU(NamedTuple):
    affine: Any
    norm: Any
    relu: Any


def affine_relu_forward(
    x: Array, w: Array, b: Array, reproducible: bool | None = None
) -> tuple[Array, Any]:
    """Return affine then ReLU, and a cache; arguments as in ``affine_forward``."""
    out, affine = affine_forward(x, w, b, reproducible)
    out, relu = relu_forward(out)
    return out, _AffineReLU(affine, relu)


def affine_relu_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return dx, dw and db."""
    _check.cache_of("affine_relu", cache, _AffineReLU)
    affine, relu = cache
    return affine_backward(relu_backward(dout, relu), affine)


def affine_bn_relu_forward(
    x: Array,
    w: Array,
    b: Array,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    reproducible: bool | None = None,
) -> tuple[Array, Any]:
    """Return affine, batch norm, then ReLU, and a cache; arguments as in the single layers."""
    out, affine = affine_forward(x, w, b, reproducible)
    out, norm = batchnorm_forward(out, gamma, beta, bn_param)
    out, relu = relu_forward(out)
    return out, _AffineBNReLU(affine, norm, relu)


def affine_bn_relu_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array, Array, Array]:
    """Return dx, dw, db, dgamma and dbeta."""
    _check.cache_of("affine_bn_relu", cache, _AffineBNReLU)
    affine, norm, relu = cache
    dout, dgamma, dbeta = batchnorm_backward(relu_backward(dout, relu), norm)
    return (*affine_backward(dout, affine), dgamma, dbeta)
