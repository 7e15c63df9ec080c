"""Batch normalization of features: Ioffe and Szegedy 2015, arXiv:1502.03167."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from gpubn.backend import Array, namespace, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check


class _Cache(NamedTuple):
    """What the backward pass needs of a forward pass: the input and its channels' statistics."""

    x: Array
    shift: Array
    mean: Array
    invstd: Array
    scale: Array
    training: bool


def batchnorm_forward(
    x: Array, gamma: Array, beta: Array, bn_param: MutableMapping[str, Any]
) -> tuple[Array, Any]:
    """Normalize every feature over the batch, then scale and shift it.

    ``out = gamma * (x - mean) / sqrt(var + eps) + beta``, with the batch's mean and biased variance
    in training and the running ones in test mode.

    Parameters
    ----------
    x : array (N, D), float32 or float64
        In training at least two samples: the variance of one is no estimate.
    gamma, beta : array (D,), x's dtype
        Scale and shift.
    bn_param : dict
        ``mode`` ('train' or 'test', required), ``eps`` (1e-5, inside the root), ``momentum`` (0.9),
        ``running_mean`` and ``running_var`` ``(D,)``, zeros of x's dtype where absent. In training
        the last two are set to ``momentum * running + (1 - momentum) * sample``.

    Returns
    -------
    out : array (N, D), x's dtype
    cache
        For ``batchnorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; nothing was changed.

    Notes
    -----
    Bits are the same on CPU and CUDA. A feature whose squared distances from the mean overflow
    (float32: distances above 1.8e19) has an infinite variance: its output is beta, its gradients
    are 0, and its running variance becomes infinite.
    """
    _check.floating("x", x, ndim=2)
    rows, columns = x.shape
    _check.like("gamma", gamma, (columns,), x)
    _check.like("beta", beta, (columns,), x)
    _check.mapping("bn_param", bn_param, mutable=True)
    mode = _check.mode("bn_param", bn_param)
    eps = _check.epsilon(bn_param.get("eps", 1e-5), x.dtype)
    momentum = _check.number("momentum", bn_param.get("momentum", 0.9))
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum!r}, expected a number from 0 to 1")
    running = [bn_param.get("running_mean"), bn_param.get("running_var")]
    for name, value in zip(("running_mean", "running_var"), running, strict=True):
        if value is not None:
            _check.like(name, value, (columns,), x)
    if mode == "train" and rows < 2:
        raise ValueError(
            f"x has shape {x.shape}, expected at least 2 samples in training: "
            "the variance of one sample is no estimate (mode 'test' takes one)"
        )

    kernels = for_array("batchnorm", x)
    xp = namespace(x)
    with scope_of(x):
        running_mean, running_var = (
            xp.zeros(columns, x.dtype) if value is None else value for value in running
        )
        if mode == "train":
            shift = kernels.shift(x)
            mean, var = kernels.moments(x, shift)
            invstd, scale = kernels.statistics(var, gamma, eps)
            out = kernels.normalize(x, shift, mean, scale, beta)
            running_mean, running_var = kernels.running_update(
                running_mean, running_var, shift, mean, var, momentum
            )
        else:
            shift, mean = running_mean, xp.zeros_like(running_mean)
            invstd, scale = kernels.statistics(running_var, gamma, eps)
            out = kernels.normalize(x, shift, mean, scale, beta)
    bn_param["running_mean"], bn_param["running_var"] = running_mean, running_var
    return out, _Cache(x, shift, mean, invstd, scale, mode == "train")


def batchnorm_backward(dout: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return the gradients of ``batchnorm_forward``, through the statistics where it was training.

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
    ``dbeta = sum(dout)``, ``dgamma = sum(dout * xhat)`` over the batch, and
    ``dx = gamma * invstd * (dout - dbeta / N - xhat * dgamma / N)``;
    ``gpubn.testing.reference`` derives this on the computation graph.
    """
    _check.cache_of("batchnorm", cache, _Cache)
    x, shift, mean, invstd, scale, training = cache
    _check.like("dout", dout, x.shape, x)
    kernels = for_array("batchnorm", x)
    with scope_of(x):
        dgamma, dbeta = kernels.backward_sums(dout, x, shift, mean, invstd)
        if training:
            dx = kernels.backward_dx(dout, x, shift, mean, invstd, scale, dgamma, dbeta, x.shape[0])
        else:
            dx = kernels.backward_dx_fixed(dout, scale)
    return dx, dgamma, dbeta


batchnorm_backward_alt = batchnorm_backward
"""The assignment's name for the simplified gradient, which ``batchnorm_backward`` already is."""
