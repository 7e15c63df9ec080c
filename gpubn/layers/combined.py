"""Layers that often follow each other, as one call."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from gpubn.backend import Array
from gpubn.interop import foreign
from gpubn.layers import _check
from gpubn.layers.affine import affine_backward, affine_forward
from gpubn.layers.batchnorm import batchnorm_relu_backward, batchnorm_relu_forward
from gpubn.layers.relu import relu_backward, relu_forward


class _AffineReLU(NamedTuple):
    affine: Any
    relu: Any


class _AffineBNReLU(NamedTuple):
    affine: Any
    norm_relu: Any


@foreign
def affine_relu_forward(
    x: Array, w: Array, b: Array, reproducible: bool | None = None
) -> tuple[Array, Any]:
    """Return affine then ReLU, and a cache; arguments as in ``affine_forward``."""
    out, affine = affine_forward(x, w, b, reproducible)
    out, relu = relu_forward(out)
    return out, _AffineReLU(affine, relu)


@foreign
def affine_relu_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return dx, dw and db."""
    _check.cache_of("affine_relu", cache, _AffineReLU)
    affine, relu = cache
    return affine_backward(relu_backward(dout, relu), affine)


@foreign
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
    out, norm_relu = batchnorm_relu_forward(out, gamma, beta, bn_param)
    return out, _AffineBNReLU(affine, norm_relu)


@foreign
def affine_bn_relu_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array, Array, Array]:
    """Return dx, dw, db, dgamma and dbeta."""
    _check.cache_of("affine_bn_relu", cache, _AffineBNReLU)
    affine, norm_relu = cache
    dout, dgamma, dbeta = batchnorm_relu_backward(dout, norm_relu)
    return (*affine_backward(dout, affine), dgamma, dbeta)
