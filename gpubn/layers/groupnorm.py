"""Group normalization (Wu and He 2018, arXiv:1803.08494), and instance normalization.

Instance normalization (Ulyanov et al. 2016, arXiv:1607.08022) is that of one channel a group.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    gamma: Array  # of every sample's channels
    size: int
    view: _view.View
    shape: tuple[int, ...]
    parameters: tuple[int, ...]


@foreign
def groupnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    G: int,
    gn_param: Mapping[str, Any],
    axis: int = 1,
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Normalize groups of neighbouring channels within every sample, then scale and shift channels.

    ``out = gamma * (x - mean) / sqrt(var + eps) + beta``, with the mean and biased variance of each
    of the sample's G groups over their C / G channels and all positions; the same in training and
    test.

    Parameters
    ----------
    x : array (N, C), (N, C, W), (N, C, H, W), ... of float16, bfloat16, float32 or float64
    gamma, beta : array (C,), x's dtype; float32 beside half precision
    G : int
        The number of groups; it divides C.
    gn_param : dict
        ``eps`` (1e-5, inside the root); other keys are ignored.
    axis : int
        Which axis the channels are; -1 where they are last.
    out : array, x's shape, dtype and memory layout, optional
        Where to write the output. It shares no memory with any other argument.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``groupnorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.

    Notes
    -----
    Bits are the same on CPU and CUDA, channels first or last. Half precision is computed with in
    float32 and rounded once. A group whose variance overflows gives beta and no gradient, and so
    does a group of a single value.
    """
    axis = _axis(x, axis)
    parameters, size = (x.shape[axis],), _size(x, axis, G)
    return _forward(x, gamma, beta, size, "gn_param", gn_param, axis, parameters, out)


@foreign
def groupnorm_backward(
    dout: Array, cache: Any, *, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of ``groupnorm_forward``, or of its relatives.

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
    dgamma, dbeta : array, gamma's shape and dtype

    Notes
    -----
    With ``g = dout * gamma`` and M values in a group:
    ``dx = invstd * (g - sum(g) / M - xhat * sum(g * xhat) / M)``, the sums over a group; ``dgamma``
    and ``dbeta`` sum ``dout * xhat`` and ``dout`` over samples and positions.
    """
    _check.cache_of("groupnorm", cache, _Cache)
    x, statistics, gamma, size, view, shape, parameters = cache
    _check.like("dout", dout, shape, x)
    norm, group = for_array("batchnorm", x), for_array("groupnorm", x)
    channel_sum = for_array("samples", x).channel_sum
    with scope_of(x):
        target = None
        if out is not None:
            target = view.target(out, x, dout=dout, gamma=gamma, **statistics._asdict())
        dout = view.take(dout)
        sums = norm.backward_sums(dout, x, statistics)
        gradients = group.gradients(gamma, statistics.invstd, *sums, size, view.samples)
        dx = norm.backward_dx(dout, x, statistics, gradients, out=target)
        instances, _, channels, _ = view.shape
        dgamma, dbeta = (channel_sum(part.reshape(1, instances, channels, 1)) for part in sums)
        dx = view.give(dx) if out is None else out
    return dx, dgamma.reshape(parameters), dbeta.reshape(parameters)


@foreign
def instancenorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    in_param: Mapping[str, Any],
    axis: int = 1,
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Normalize every channel of every sample over its positions, then scale and shift it.

    Parameters
    ----------
    x : array (N, C, W), (N, C, H, W), ... of float16, bfloat16, float32 or float64
        At least two positions: the variance of one is 0.
    gamma, beta : array (C,), x's dtype; float32 beside half precision
    in_param : dict
        ``eps`` (1e-5, inside the root); other keys are ignored.
    axis : int
        Which axis the channels are; -1 where they are last.
    out : array, x's shape, dtype and memory layout, optional
        Where to write the output. It shares no memory with any other argument.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``instancenorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.
    """
    axis = _axis(x, axis)
    if x.size == x.shape[0] * x.shape[axis]:
        raise ValueError(
            f"x has shape {x.shape}, expected at least 2 positions of each sample and channel"
        )
    return _forward(x, gamma, beta, 1, "in_param", in_param, axis, (x.shape[axis],), out)


instancenorm_backward = groupnorm_backward
"""The gradients of ``instancenorm_forward``, which ``groupnorm_backward`` gives too."""


@foreign
def spatial_groupnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    G: int,
    gn_param: Mapping[str, Any],
    *,
    out: Array | None = None,
) -> tuple[Array, Any]:
    """Return ``groupnorm_forward`` of ``x (N, C, H, W)``, gamma and beta ``(1, C, 1, 1)``."""
    _check.floating("x", x, ndim=4, half=True)
    parameters = (1, x.shape[1], 1, 1)
    return _forward(x, gamma, beta, _size(x, 1, G), "gn_param", gn_param, 1, parameters, out)


spatial_groupnorm_backward = groupnorm_backward
"""The assignment's name for the gradients of images; gamma's and beta's are ``(1, C, 1, 1)``."""


def _axis(x: Array, axis: int) -> int:
    """Check x, and return which of its axes are the channels."""
    _check.floating("x", x, half=True)
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}, expected at least 2 dimensions")
    return _check.axis(axis, x.ndim, least=1)


def _size(x: Array, axis: int, G: int) -> int:
    """Return how many channels a group has."""
    channels, groups = int(x.shape[axis]), _check.whole("G", G)
    if channels % groups:
        raise ValueError(f"G is {G}, expected a divisor of x's {channels} channels")
    return channels // groups


def _forward(
    x: Array,
    gamma: Array,
    beta: Array,
    size: int,
    param_name: str,
    param: Mapping[str, Any],
    axis: int,
    parameters: tuple[int, ...],
    out: Array | None,
) -> tuple[Array, _Cache]:
    """Normalize groups of ``size`` channels; gamma and beta have the shape ``parameters``."""
    _check.parameter("gamma", gamma, parameters, x)
    _check.parameter("beta", beta, parameters, x)
    _check.mapping(param_name, param)
    eps = _check.epsilon(param.get("eps", 1e-5), gamma.dtype)
    view = _view.of_samples(x, axis)
    norm, group, xp = for_array("batchnorm", x), for_array("groupnorm", x), namespace(x)
    with scope_of(x):
        target = None if out is None else view.target(out, x, gamma=gamma, beta=beta)
        taken, instances = view.take(x), view.shape[0]
        gamma, beta = (xp.tile(array.reshape(-1), instances) for array in (gamma, beta))
        shift = group.shift(taken, size)
        mean, var = group.merge_channels(*norm.moments(taken, shift), size, view.samples)
        invstd, scale = norm.statistics(var, gamma, eps)
        statistics = Statistics(shift, mean, invstd, scale, beta)
        result = norm.normalize(taken, statistics, out=target)
        out = view.give(result) if out is None else out
    return out, _Cache(taken, statistics, gamma, size, view, x.shape, parameters)
