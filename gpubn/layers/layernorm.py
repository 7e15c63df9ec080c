"""Layer normalization: Ba, Kiros and Hinton 2016, arXiv:1607.06450."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpubn.backend import Array, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check


class _Cache(NamedTuple):
    """What the backward pass needs of a forward pass: the input and its rows' statistics."""

    x: Array
    gamma: Array
    shift: Array
    mean: Array
    invstd: Array


def layernorm_forward(
    x: Array, gamma: Array, beta: Array, ln_param: Mapping[str, Any]
) -> tuple[Array, Any]:
    """Normalize every sample over its features, then scale and shift each feature.

    ``out = gamma * (x - mean) / sqrt(var + eps) + beta``, with each row's mean and biased variance;
    the same in training and test.

    Parameters
    ----------
    x : array (N, D), float32 or float64
    gamma, beta : array (D,), x's dtype
    ln_param : dict
        ``eps`` (1e-5, inside the root); other keys are ignored.

    Returns
    -------
    out : array (N, D), x's dtype
    cache
        For ``layernorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.

    Notes
    -----
    Bits are the same on CPU and CUDA. A row whose variance overflows gives beta and no gradient.
    """
    _check.floating("x", x, ndim=2)
    columns = x.shape[1]
    _check.like("gamma", gamma, (columns,), x)
    _check.like("beta", beta, (columns,), x)
    _check.mapping("ln_param", ln_param)
    eps = _check.epsilon(ln_param.get("eps", 1e-5), x.dtype)
    with scope_of(x):
        out, shift, mean, invstd = for_array("layernorm", x).forward(x, gamma, beta, eps)
    return out, _Cache(x, gamma, shift, mean, invstd)


def layernorm_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return the gradients of ``layernorm_forward``.

    Parameters
    ----------
    dout : array (N, D)
        Gradient of the loss with respect to out.
    cache
        What the forward pass returned beside out.

    Returns
    -------
    dx : array (N, D)
    dgamma, dbeta : array (D,)

    Notes
    -----
    With ``g = dout * gamma``: ``dx = invstd * (g - sum(g) / D - xhat * sum(g * xhat) / D)``, the
    sums over a row; ``dgamma`` and ``dbeta`` sum ``dout * xhat`` and ``dout`` over the rows.
    """
    _check.cache_of("layernorm", cache, _Cache)
    x, gamma, shift, mean, invstd = cache
    _check.like("dout", dout, x.shape, x)
    kernels = for_array("layernorm", x)
    with scope_of(x):
        dx = kernels.backward_dx(dout, x, gamma, shift, mean, invstd)
        dgamma, dbeta = kernels.backward_sums(dout, x, shift, mean, invstd)
    return dx, dgamma, dbeta
