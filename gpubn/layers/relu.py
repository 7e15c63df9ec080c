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
def relu_forward(x: Array, *, out: Array | None = None) -> tuple[Array, Any]:
    """Return ``max(0, x)``, for a floating-point array of any shape and precision, and a cache.

    A NaN stays a NaN. The output lies in memory as x does; it is written to ``out`` if given, of
    x's shape, dtype and memory layout, of no memory of x's. Raises TypeError or ValueError
    where x or ``out`` is no such array.
    """
    _check.floating("x", x, half=True)
    order, inverse = _view.of_elements(x)
    with scope_of(x):
        target = None if out is None else _view.writable(out, x, x.shape, order, {})
        taken = x.transpose(order)
        result = for_array("relu", x).forward(taken, target).transpose(inverse)
    return result if out is None else out, _Cache(taken, order, inverse, x.shape)


@foreign
def relu_backward(dout: Array, cache: Any, *, out: Array | None = None) -> Array:
    """Return dx: ``dout`` where x was above 0, else 0; ``dout`` has x's shape and dtype.

    Written to ``out`` if given, as in ``relu_forward``.
    """
    _check.cache_of("relu", cache, _Cache)
    x, order, inverse, shape = cache
    _check.like("dout", dout, shape, x)
    with scope_of(x):
        target = None
        if out is not None:
            target = _view.writable(out, x.transpose(inverse), shape, order, {"dout": dout})
        dx = for_array("relu", x).backward(dout.transpose(order), x, target).transpose(inverse)
    return dx if out is None else out
