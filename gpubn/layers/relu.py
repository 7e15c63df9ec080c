"""The rectified linear unit."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpubn.backend import Array, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check


class _Cache(NamedTuple):
    x: Array


def relu_forward(x: Array) -> tuple[Array, Any]:
    """Return ``max(0, x)``, for a float32 or float64 array of any shape, and a cache.

    A NaN stays a NaN. Raises TypeError or ValueError where x is no such array.
    """
    _check.floating("x", x)
    with scope_of(x):
        return for_array("relu", x).forward(x), _Cache(x)


def relu_backward(dout: Array, cache: Any) -> Array:
    """Return dx: ``dout`` where x was above 0, else 0; ``dout`` has x's shape and dtype."""
    _check.cache_of("relu", cache, _Cache)
    (x,) = cache
    _check.like("dout", dout, x.shape, x)
    with scope_of(x):
        return for_array("relu", x).backward(dout, x)
