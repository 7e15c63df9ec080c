"""Batch normalization: Ioffe and Szegedy 2015, arXiv:1502.03167."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

from gpubn.backend import Array, namespace, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.kernels.statistics import Statistics
from gpubn.layers import _check, _view


class _Cache(NamedTuple):
    """What the backward pass needs: the input as kernels view it, and its channels' statistics."""

    x: Array
    statistics: Statistics
    training: bool
    view: _view.View
    shape: tuple[int, ...]


class _ReluCache(NamedTuple):
    batchnorm: _Cache


class _AddReluCache(NamedTuple):
    batchnorm: _Cache
    out: Array


@foreign
def batchnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    axis: int = 1,
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Normalize every channel over the batch, then scale and shift it.

    ``out = gamma * (x - mean) / sqrt(var + eps) + beta``, with the batch's mean and biased variance
    in training and the running ones in test mode.

    Parameters
    ----------
    x : array (N, C), (N, C, W), (N, C, H, W), ... of float16, bfloat16, float32 or float64
        In training at least two samples of each channel: the variance of one is no estimate.
    gamma, beta : array (C,), x's dtype; float32 beside half precision
        Scale and shift.
    bn_param : dict
        ``mode`` ('train' or 'test', required), ``eps`` (1e-5, inside the root), ``momentum`` (0.9),
        ``unbiased`` (False), ``running_mean`` and ``running_var`` ``(C,)``, zeros of gamma's dtype
        where absent. In training the last two are set to
        ``momentum * running + (1 - momentum) * sample``. Where momentum is None they become the
        mean over all batches so far, which ``num_batches`` counts. Where unbiased is true the
        running variance takes the sample's times ``M / (M - 1)``, for M samples of a channel.
    axis : int
        Which axis the channels are; -1 where they are last. Statistics run over all others.
    out : array, x's shape, dtype and memory layout, optional
        Where to write the output; of a contiguous x ``empty_like(x)`` makes one. It shares no
        memory with any other argument.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``batchnorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; nothing was changed.

    Notes
    -----
    Bits are the same on CPU and CUDA, channels first or last. Half precision is computed with in
    float32 and rounded once. A channel whose squared distances from the mean overflow (float32:
    distances above 1.8e19) has an infinite variance: its output is beta, its gradients are 0, and
    its running variance becomes infinite. Where sums of eight values overflow (from 4e37 on) it is
    NaN. Keys of bn_param that are not named above are ignored.
    """
    out, cache = _forward(x, None, gamma, beta, bn_param, axis, False, out)
    return out, cache


@foreign
def batchnorm_backward(
    dout: Array, cache: Any, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of ``batchnorm_forward``, through the statistics where it was training.

    In test mode statistics are constants, so that a frozen batch norm is one in test mode.

    Parameters
    ----------
    dout : array, x's shape and dtype
        Gradient of the loss with respect to out.
    cache
        What the forward pass returned beside out.
    out : array, x's shape, dtype and memory layout, optional
        Where to write dx. It shares no memory with x and dout.

    Returns
    -------
    dx : array, x's shape and dtype
    dgamma, dbeta : array (C,)

    Notes
    -----
    ``dbeta = sum(dout)``, ``dgamma = sum(dout * xhat)`` over the M samples of a channel, and
    ``dx = gamma * invstd * (dout - dbeta / M - xhat * dgamma / M)``;
    ``gpubn.testing.reference`` derives this on the computation graph.
    """
    _check.cache_of("batchnorm", cache, _Cache)
    return _backward(dout, cache, False, out)


batchnorm_backward_alt = batchnorm_backward
"""The assignment's name for the simplified gradient, which ``batchnorm_backward`` already is."""


@foreign
def batchnorm_relu_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    axis: int = 1,
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Return batch norm then ReLU, in one pass, and a cache; as ``batchnorm_forward`` otherwise.

    The bits are those of ``relu_forward`` after ``batchnorm_forward``.
    """
    out, cache = _forward(x, None, gamma, beta, bn_param, axis, True, out)
    return out, _ReluCache(cache)


@foreign
def batchnorm_relu_backward(
    dout: Array, cache: Any, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma and dbeta; as ``batchnorm_backward`` otherwise.

    What ReLU let pass is computed anew from x: neither its input nor a mask is kept.
    """
    _check.cache_of("batchnorm_relu", cache, _ReluCache)
    return _backward(dout, cache.batchnorm, True, out)


@foreign
def batchnorm_add_relu_forward(
    x: Array,
    residual: Array,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    axis: int = 1,
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Return ``max(0, batchnorm(x) + residual)``, in one pass, and a cache.

    The end of a residual block (He et al. 2016, arXiv:1512.03385). ``residual`` has x's shape and
    dtype; all else is as in ``batchnorm_forward``. The bits are those of the separate calls. The
    backward pass reads out: leave it as it is until then.
    """
    out, cache = _forward(x, residual, gamma, beta, bn_param, axis, True, out)
    return out, _AddReluCache(cache, cache.view.take(out))


@foreign
def batchnorm_add_relu_backward(
    dout: Array, cache: Any, *, out: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Return dx, dresidual, dgamma and dbeta."""
    _check.cache_of("batchnorm_add_relu", cache, _AddReluCache)
    (x, statistics, training, view, shape), y = cache
    _check.like("dout", dout, shape, x)
    kernels = for_array("batchnorm", x)
    with scope_of(x):
        target = (
            None
            if out is None
            else view.target(out, x=x, dout=dout, **{"the forward pass's out": y})
        )
        dout = view.take(dout)
        dgamma, dbeta, g = kernels.backward_sums_add_relu(dout, y, x, statistics)
        if training:
            sums = kernels.gradients(statistics.scale, dgamma, dbeta, view.samples)
            dx = kernels.backward_dx(g, x, statistics, sums, out=target)
        else:
            dx = kernels.backward_dx_fixed(g, x, statistics, out=target)
        return view.give(dx) if out is None else out, view.give(g), dgamma, dbeta


@foreign
def spatial_batchnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Return ``batchnorm_forward`` of images ``x (N, C, H, W)``, over N, H and W."""
    _check.floating("x", x, ndim=4, half=True)
    return batchnorm_forward(x, gamma, beta, bn_param, out=out)


spatial_batchnorm_backward = batchnorm_backward
"""The assignment's name for the gradients of images, which ``batchnorm_backward`` gives too."""


def _forward(
    x: Array,
    residual: Array | None,
    gamma: Array,
    beta: Array,
    bn_param: MutableMapping[str, Any],
    axis: int,
    relu: bool,
    out: Array | None,
) -> tuple[Array, _Cache]:
    """Return out and the cache."""
    _check.floating("x", x, half=True)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}, expected at least 2 dimensions")
    axis = _check.axis(axis, x.ndim)
    channels = x.shape[axis]
    if residual is not None:
        _check.like("residual", residual, x.shape, x)
    _check.parameter("gamma", gamma, (channels,), x)
    _check.parameter("beta", beta, (channels,), x)
    _check.mapping("bn_param", bn_param, mutable=True)
    mode = _check.mode("bn_param", bn_param)
    eps = _check.epsilon(bn_param.get("eps", 1e-5), gamma.dtype)
    momentum, updates = _momentum(bn_param)
    unbiased = _check.boolean("unbiased", bn_param.get("unbiased", False))
    running = [bn_param.get("running_mean"), bn_param.get("running_var")]
    for name, value in zip(("running_mean", "running_var"), running, strict=True):
        if value is not None:
            _check.parameter(name, value, (channels,), x)
    view = _view.of_batch(x, axis)
    samples = view.samples
    if mode == "train" and samples < 2:
        raise ValueError(
            f"x has shape {x.shape}, expected at least 2 samples in training: "
            "the variance of one sample is no estimate (mode 'test' takes one)"
        )

    kernels = for_array("batchnorm", x)
    xp = namespace(x)
    with scope_of(x):
        target = None
        if out is not None:
            target = view.target(
                *(out, x), residual=residual, gamma=gamma, beta=beta,
                running_mean=running[0], running_var=running[1],
            )  # fmt: skip
        taken, added = view.take(x), None if residual is None else view.take(residual)
        running_mean, running_var = (
            xp.zeros(channels, gamma.dtype) if value is None else value for value in running
        )
        if mode == "train":
            correction = samples / (samples - 1) if unbiased else 1.0
            result, statistics, running_mean, running_var = kernels.train(
                *(taken, gamma, beta, running_mean, running_var, eps, momentum, correction),
                *(added, relu, target),
            )
        else:
            invstd, scale = kernels.statistics(running_var, gamma, eps)
            zeros = xp.zeros_like(running_mean)
            statistics = Statistics(running_mean, zeros, invstd, scale, beta)
            result = kernels.normalize(taken, statistics, added, relu, target)
        out = view.give(result) if out is None else out
    # All at once: an interrupt in between must not leave the count behind the averages.
    running_statistics = {"running_mean": running_mean, "running_var": running_var}
    bn_param.update(running_statistics | (updates if mode == "train" else {}))
    return out, _Cache(taken, statistics, mode == "train", view, x.shape)


def _momentum(bn_param: MutableMapping[str, Any]) -> tuple[float, dict[str, int]]:
    """Return the momentum of this batch, and what to write down if it is a training one."""
    momentum = bn_param.get("momentum", 0.9)
    if momentum is None:
        count = _check.whole("num_batches", bn_param.get("num_batches", 0), 0)
        if count >= 2**63 - 1:
            raise ValueError(f"num_batches is {count}, expected less than 2**63 - 1")
        return count / (count + 1), {"num_batches": count + 1}
    momentum = _check.number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum!r}, expected a number from 0 to 1, or None")
    return momentum, {}


def _backward(
    dout: Array, cache: _Cache, relu: bool, out: Array | None
) -> tuple[Array, Array, Array]:
    x, statistics, training, view, shape = cache
    _check.like("dout", dout, shape, x)
    kernels = for_array("batchnorm", x)
    with scope_of(x):
        target = None
        if out is not None:
            target = view.target(out, x, dout=dout, **statistics._asdict())
        dout = view.take(dout)
        if training:
            dx, dgamma, dbeta = kernels.backward(dout, x, statistics, relu, target)
        else:
            dgamma, dbeta = kernels.backward_sums(dout, x, statistics, relu)
            dx = kernels.backward_dx_fixed(dout, x, statistics, relu, target)
        return view.give(dx) if out is None else out, dgamma, dbeta
