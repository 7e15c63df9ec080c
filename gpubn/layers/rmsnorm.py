"""Root mean square layer normalization: Zhang and Sennrich 2019, arXiv:1910.07467."""

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
    invrms: Array
    shape: tuple[int, ...]
    normalized: tuple[int, ...]


@foreign
def rmsnorm_forward(
    x: Array, gamma: Array, rms_param: Mapping[str, Any], *, out: Array | None = None
) -> tuple[Array, Any]:
    """Divide every sample by the root of its mean square, then scale each feature.

    ``out = gamma * x / sqrt(mean(x**2) + eps)``, the mean over the last axes, as many as gamma has;
    the same in training and test.

    Parameters
    ----------
    x : array (N, D), (N, T, D), ... of float16, bfloat16, float32 or float64
    gamma : array of the shape of x's last axes, x's dtype; float32 beside half precision
    rms_param : dict
        ``eps`` (1e-5, inside the root); other keys are ignored.
    out : array in C order, x's shape and dtype, optional
        Where to write the output. It shares no memory with any other argument.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``rmsnorm_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.

    Notes
    -----
    Bits are the same on CPU and CUDA. Half precision is computed with in float32 and rounded once.
    A sample whose mean square overflows (float32: values above 1.8e19) gives 0 and no gradient.
    """
    _check.floating("x", x, half=True)
    normalized = _check.last_axes("gamma", gamma, x)
    _check.parameter("gamma", gamma, normalized, x)
    _check.mapping("rms_param", rms_param)
    eps = _check.epsilon(rms_param.get("eps", 1e-5), gamma.dtype)
    with scope_of(x):
        rows = _view.contiguous(x.reshape(-1, math.prod(normalized)))
        target = None
        if out is not None:
            target = _view.rows_of(out, x, rows, x.shape, gamma=gamma)
        gamma = gamma.reshape(-1)
        result, invrms = for_array("rmsnorm", x).forward(rows, gamma, eps, target)
        out = result.reshape(x.shape) if out is None else out
    return out, _Cache(rows, gamma, invrms, x.shape, normalized)


@foreign
def rmsnorm_backward(dout: Array, cache: Any, *, out: Array | None = None) -> tuple[Array, Array]:
    """Return the gradients of ``rmsnorm_forward``.

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
    dgamma : array, gamma's shape and dtype

    Notes
    -----
    With ``g = dout * gamma`` and ``xhat = x * invrms``:
    ``dx = invrms * (g - xhat * sum(g * xhat) / D)``, the sum over a sample; ``dgamma`` sums
    ``dout * xhat`` over the samples.
    """
    _check.cache_of("rmsnorm", cache, _Cache)
    x, gamma, invrms, shape, normalized = cache
    _check.like("dout", dout, shape, x)
    kernels = for_array("rmsnorm", x)
    with scope_of(x):
        target = None
        if out is not None:
            target = _view.rows_of(out, x, x, shape, dout=dout, gamma=gamma)
        dout = _view.contiguous(dout.reshape(x.shape))
        dx, dgamma = kernels.backward(dout, x, gamma, invrms, target)
        out = dx.reshape(shape) if out is None else out
    return out, dgamma.reshape(normalized)
