"""Layer normalization: Ba, Kiros and Hinton 2016, arXiv:1607.06450."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpubn.backend import Array, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.layers import _check, _view


class _Cache(NamedTuple):
    """What the backward pass needs of a forward pass: the input and its rows' statistics."""

    x: Array  # (rows, D)
    gamma: Array  # (D,)
    shift: Array
    mean: Array
    invstd: Array
    shape: tuple[int, ...]
    normalized: tuple[int, ...]


@foreign
def layernorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    ln_param: Mapping[str, Any],
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Normalize every sample over its features, then scale and shift each feature.

    ``out = gamma * (x - mean) / sqrt(var + eps) + beta``, with each sample's mean and biased
    variance over the last axes, as many as gamma has; the same in training and test.

    Parameters
    ----------
    x : array (N, D), (N, T, D), (N, C, H, W), ... of float16, bfloat16, float32 or float64
    gamma, beta : array of the shape of x's last axes, x's dtype; float32 beside half precision
    ln_param : dict
        ``eps`` (1e-5, inside the root); other keys are ignored.
    out : array in C order, x's shape and dtype, optional
        Where to write the output. It shares no memory with any other argument.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``layernorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.

    Notes
    -----
    Bits are the same on CPU and CUDA. Half precision is computed with in float32 and rounded once.
    A sample whose variance overflows gives beta and no gradient.
    """
    _check.floating("x", x, half=True)
    normalized = _check.last_axes("gamma", gamma, x)
    _check.parameter("gamma", gamma, normalized, x)
    _check.parameter("beta", beta, normalized, x)
    _check.mapping("ln_param", ln_param)
    eps = _check.epsilon(ln_param.get("eps", 1e-5), gamma.dtype)
    with scope_of(x):
        rows = _view.contiguous(x.reshape(-1, math.prod(normalized)))
        target = None
        if out is not None:
            target = _view.rows_of(out, x, rows, x.shape, gamma=gamma, beta=beta)
        gamma, beta = gamma.reshape(-1), beta.reshape(-1)
        kernels = for_array("layernorm", x)
        result, shift, mean, invstd = kernels.forward(rows, gamma, beta, eps, target)
        out = result.reshape(x.shape) if out is None else out
    return out, _Cache(rows, gamma, shift, mean, invstd, x.shape, normalized)


@foreign
def layernorm_backward(
    dout: Array, cache: Any, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of ``layernorm_forward``.

    Parameters
    ----------
    dout : array, x's shape and dtype
        Gradient of the loss with respect to out.
    cache
        What the forward pass returned beside out.
    out : array in C order, x's shape and dtype, optional
        Where to write dx. It shares no memory with x and dout.

    Returns
    -------
    dx : array, x's shape and dtype
    dgamma, dbeta : array, gamma's shape and dtype

    Notes
    -----
    With ``g = dout * gamma``: ``dx = invstd * (g - sum(g) / D - xhat * sum(g * xhat) / D)``, the
    sums over a sample; ``dgamma`` and ``dbeta`` sum ``dout * xhat`` and ``dout`` over the samples.
    """
    _check.cache_of("layernorm", cache, _Cache)
    x, gamma, shift, mean, invstd, shape, normalized = cache
    _check.like("dout", dout, shape, x)
    kernels = for_array("layernorm", x)
    with scope_of(x):
        target = None
        if out is not None:
            target = _view.rows_of(out, x, x, shape, dout=dout, gamma=gamma, mean=mean)
        dout = _view.contiguous(dout.reshape(x.shape))
        dx, dgamma, dbeta = kernels.backward(dout, x, gamma, shift, mean, invstd, target)
        out = dx.reshape(shape) if out is None else out
    return out, dgamma.reshape(normalized), dbeta.reshape(normalized)
