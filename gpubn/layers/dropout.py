"""Inverted dropout: Srivastava et al. 2014, Journal of Machine Learning Research 15."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpubn.backend import Array, namespace, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.layers import _check, _view


class _Cache(NamedTuple):
    """The mask's key. The mask itself is computed anew in the backward pass, and x is not kept."""

    shape: tuple[int, ...]
    empty: Array  # of x's dtype, on x's device
    p: float
    seed: int
    stream: int
    step: int
    training: bool


@foreign
def dropout_forward(
    x: Array, dropout_param: Mapping[str, Any], *, out: Array | None = None
) -> tuple[Array, Any]:
    """Drop values at random in training, and scale what is kept by ``1 / p``.

    Parameters
    ----------
    x : array of any shape, float16, bfloat16, float32 or float64
    dropout_param : dict
        ``p``: the probability of keeping a value, above 0 and at most 1. ``mode``: 'train' or
        'test'; in test mode ``out = x``. ``seed`` (0 to 2**64 - 1), ``stream`` and ``step`` (0 to
        2**32 - 1, both 0 where absent) name the mask: the same three give the same mask on every
        device. Without a seed every call draws a mask of its own.
    out : array in C order, x's shape and dtype, optional
        Where to write the output. It shares no memory with x.

    Returns
    -------
    out : array, x's shape and dtype
    cache
        For ``dropout_backward``.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above.

    Notes
    -----
    Masks come from Philox4x32-10, keyed by the seed and counted by element, stream and step.
    Dropped values become 0, an infinity or NaN too.
    """
    _check.floating("x", x, half=True)
    _check.mapping("dropout_param", dropout_param)
    mode = _check.mode("dropout_param", dropout_param)
    if "p" not in dropout_param:
        raise ValueError("dropout_param has no 'p', expected the probability of keeping a value")
    p = _check.number("p", dropout_param["p"])
    if not 0 < p <= 1:
        raise ValueError(f"p is {p!r}, expected a probability of keeping above 0 and at most 1")
    if p < 2**-32:
        raise ValueError(f"p is {p!r}, expected at least 2**-32: masks have no finer probability")
    seed = dropout_param.get("seed")
    seed = secrets.randbits(64) if seed is None else _check.counter("seed", seed, 64)
    stream = _check.counter("stream", dropout_param.get("stream", 0), 32)
    step = _check.counter("step", dropout_param.get("step", 0), 32)

    with scope_of(x):
        empty = namespace(x).empty(0, x.dtype)
    cache = _Cache(x.shape, empty, p, seed, stream, step, mode == "train")
    return _masked("x", x, cache, out), cache


@foreign
def dropout_backward(dout: Array, cache: Any, *, out: Array | None = None) -> Array:
    """Return dx: ``dout / p`` where the forward pass kept a value, else 0.

    Written to ``out`` if given, as in ``dropout_forward``.
    """
    _check.cache_of("dropout", cache, _Cache)
    _check.like("dout", dout, cache.shape, cache.empty)
    return _masked("dout", dout, cache, out)


def _masked(name: str, array: Array, cache: _Cache, out: Array | None) -> Array:
    with scope_of(array):
        if out is not None:
            order = tuple(range(array.ndim))
            _view.writable(out, cache.empty, array.shape, order, {name: array})
        if cache.training:
            kernels = for_array("dropout", array)
            result = kernels.apply(array, cache.p, cache.seed, cache.stream, cache.step, out)
            return result if out is None else out
        if out is None:
            return array.copy()
        out[...] = array
        return out
