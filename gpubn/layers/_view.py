"""How the normalizations see an array: as (instances, batch, channels, inner), without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from gpubn.backend import Array, namespace


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

    def give(self, array: Array) -> Array:
        """Return a result of the kernels with the axes of the array that was viewed."""
        return array.reshape(self.moved).transpose(self.inverse)


def of_batch(x: Array, axis: int) -> View:
    """View ``x`` as one instance, of which every channel is normalized over all other axes.

    Channels may be at any place in memory, if the other axes are in order: then nothing is copied.
    These keep their order, and so samples their numbers.
    """
    others = tuple(i for i in range(x.ndim) if i != axis)
    order = _in_memory(x, ((*others[:k], axis, *others[k:]) for k in range(x.ndim)))
    moved = tuple(x.shape[i] for i in order)
    at = order.index(axis)
    shape = (1, math.prod(moved[:at]), moved[at], math.prod(moved[at + 1 :]))
    return View(order, _inverse(order), moved, shape)


def of_samples(x: Array, axis: int) -> View:
    """View ``x (N, ...)`` as an instance a sample, normalized over the axes but the channels'."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    order = _in_memory(x, ((*others[:k], axis, *others[k:]) for k in range(1, x.ndim)))
    moved = tuple(x.shape[i] for i in order)
    at = order.index(axis)
    shape = (moved[0], math.prod(moved[1:at]), moved[at], math.prod(moved[at + 1 :]))
    return View(order, _inverse(order), moved, shape)


def of_elements(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the order of the axes in which ``x`` is contiguous, if there is one, and its inverse.

    For what is done to every element by itself, in whatever order.
    """
    by_stride = tuple(sorted(range(x.ndim), key=lambda i: (-x.strides[i], i)))
    order = _in_memory(x, (by_stride,))
    return order, _inverse(order)


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
