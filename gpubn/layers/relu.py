"""The rectified linear unit."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpubn.backend import Array, scope_of
from gpubn.interop import foreign
from gpubn.kernels import for_array
from gpubn.layers import _check, _view


class _Cache(NamedTuple):
    x: Array  # with its axes in the order of memory
    order: tuple[int, ...]
    inverse: tuple[int, ...]
    shape: tuple[int, ...]


@foreign
def relu_forward(x: Array) -> tuple[Array, Any]:
    """Return ``max(0, x)``, for a floating-point array of any shape and precision, and a cache.

    A NaN stays a NaN. The output lies in memory as x does. Raises TypeError or ValueError where x
    is no such array.
    """
    _check.floating("x", x, half=True)
    order, inverse = _view.of_elements(x)
    with scope_of(x):
        taken = x.transpose(order)
        out = for_array("relu", x).forward(taken)
    return out.transpose(inverse), _Cache(taken, order, inverse, x.shape)


@foreign
def relu_backward(dout: Array, cache: Any) -> Array:
    """Return dx: ``dout`` where x was above 0, else 0; ``dout`` has x's shape and dtype."""
    _check.cache_of("relu", cache, _Cache)
    x, order, inverse, shape = cache
    _check.like("dout", dout, shape, x)
    with scope_of(x):
        return for_array("relu", x).backward(dout.transpose(order), x).transpose(inverse)
