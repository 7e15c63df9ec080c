"""How the normalizations see an array: as (instances, batch, channels, inner), without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from gpubn.backend import Array, namespace
from gpubn.layers import _check


class View(NamedTuple):
    """A view of arrays of one shape as kernels take them, and back.

    Attributes
    ----------
    order : tuple of int
        The axes as they lie in memory.
    inverse : tuple of int
        The order that undoes it.
    moved : tuple of int
        The shape in that order.
    shape : tuple of int
        The kernels': (instances, batch, channels, inner).
    """

    order: tuple[int, ...]
    inverse: tuple[int, ...]
    moved: tuple[int, ...]
    shape: tuple[int, int, int, int]

    @property
    def samples(self) -> int:
        """How many samples a channel of an instance has."""
        return self.shape[1] * self.shape[3]

    def take(self, array: Array) -> Array:
        """Return the kernels' view, contiguous: a copy only of what lies otherwise in memory."""
        return contiguous(array.transpose(self.order).reshape(self.shape))

    def target(self, out: Array, x: Array, **others: Array | None) -> Array:
        """Return the kernels' view of an array to write to, which shares memory with no input.

        Raises
        ------
        ValueError, TypeError
            It is not as x is, or lies otherwise in memory; nothing was changed.
        """
        shape = tuple(self.moved[i] for i in self.inverse)
        return writable(out, x, shape, self.order, others).reshape(self.shape)

    def give(self, array: Array) -> Array:
        """Return a result of the kernels with the axes of the array that was viewed."""
        return array.reshape(self.moved).transpose(self.inverse)


def of_batch(x: Array, axis: int) -> View:
    """View ``x`` as one instance, of which every channel is normalized over all other axes.

    Channels may be at any place in memory, if the other axes are in order: then nothing is copied.
    These keep their order, and so samples their numbers.
    """
    return _of(x.shape, _order(x, axis, 0), axis, 0)


def of_samples(x: Array, axis: int) -> View:
    """View ``x (N, ...)`` as an instance a sample, normalized over the axes but the channels'."""
    return _of(x.shape, _order(x, axis, 1), axis, 1)


def _order(x: Array, axis: int, first: int) -> tuple[int, ...]:
    """Return the axes as they lie in memory: channels anywhere from place ``first`` on."""
    if x.flags.c_contiguous:
        return tuple(range(x.ndim))
    others = tuple(i for i in range(x.ndim) if i != axis)
    return _in_memory(x, ((*others[:k], axis, *others[k:]) for k in range(first, x.ndim)))


@lru_cache(maxsize=1024)  # every layer's call asks
def _of(shape: tuple[int, ...], order: tuple[int, ...], axis: int, instances: int) -> View:
    """Return the view of arrays of one shape whose first axes, none or one, are instances."""
    moved = tuple(shape[i] for i in order)
    at = order.index(axis)
    batch, inner = math.prod(moved[instances:at]), math.prod(moved[at + 1 :])
    if moved[at] == 1:  # all samples lie side by side, wherever the one channel's axis is
        batch, inner = 1, batch * inner
    seen = (math.prod(moved[:instances]), batch, moved[at], inner)
    return View(order, _inverse(order), moved, seen)


def of_elements(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the order of the axes in which ``x`` is contiguous, if there is one, and its inverse.

    For what is done to every element by itself, in whatever order.
    """
    by_stride = tuple(sorted(range(x.ndim), key=lambda i: (-x.strides[i], i)))
    order = _in_memory(x, (by_stride,))
    return order, _inverse(order)


def writable(
    out: Array,
    x: Array,
    shape: tuple[int, ...],
    order: tuple[int, ...],
    others: Mapping[str, Array | None],
) -> Array:
    """Return ``out`` with its axes in this order, in which it must be contiguous.

    It must have this shape, x's dtype and device, and share no memory with x and the others.

    Raises
    ------
    ValueError, TypeError
        It is not so; nothing was changed.
    """
    _check.like("out", out, shape, x)
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out is read-only, expected an array to write to")
    moved = out.transpose(order)
    if not moved.flags.c_contiguous:
        wanted = "C order" if order == tuple(range(out.ndim)) else f"its axes {order} in C order"
        raise ValueError(f"out has strides {out.strides}, expected {wanted}, as x is read")
    if not getattr(out.flags, "aligned", True):
        raise ValueError(f"out is not aligned, expected it at a multiple of {out.itemsize} bytes")
    for name, value in {"x": x, **others}.items():
        if value is not None and namespace(x).may_share_memory(out, value):
            raise ValueError(f"out shares memory with {name}, expected an array of its own")
    return moved


def rows_of(out: Array, x: Array, rows: Array, shape: tuple[int, ...], **others: Array) -> Array:
    """Return an array to write to, of ``shape`` and in C order, in the shape of ``rows``.

    Raises as ``writable`` does.
    """
    return writable(out, x, shape, tuple(range(len(shape))), others).reshape(rows.shape)


def contiguous(array: Array) -> Array:
    """Return an array in C order: a copy of what is not, once for all kernels to come."""
    return array if array.flags.c_contiguous else namespace(array).ascontiguousarray(array)


def _in_memory(x: Array, orders: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the order of the axes in which ``x`` is contiguous, or else as they are."""
    as_they_are = tuple(range(x.ndim))
    if x.flags.c_contiguous:
        return as_they_are
    contiguous = (order for order in orders if x.transpose(order).flags.c_contiguous)
    return next(contiguous, as_they_are)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
