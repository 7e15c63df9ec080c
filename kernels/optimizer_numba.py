"""The update rules on the CPU, as in optimizer_cuda; in place where an output is an input."""

from typing import Any

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled, inlined, plain
from gpubn.kernels.threads_numba import split
from gpubn.kernels.vectors_numba import fill, lanes, read, sqrt_of, store, store_part


def sgd(w: Array, dw: Array, lr: float, next_w: Array) -> None:
    """Write ``w - lr * dw`` to ``next_w``."""
    arrays = _flat(w, *plain(dw), next_w)
    scalars = _scalars(w, lr)
    split(_sgd, (*arrays, *scalars), w.size, w.size)


def sgd_momentum(
    w: Array,
    dw: Array,
    velocity: Array,
    lr: float,
    momentum: float,
    next_w: Array,
    next_velocity: Array,
) -> None:
    """Write ``v = momentum * velocity - lr * dw`` and ``w + v``."""
    arrays = _flat(w, *plain(dw), velocity, next_w, next_velocity)
    scalars = _scalars(w, lr, momentum)
    split(_sgd_momentum, (*arrays, *scalars), w.size, w.size)


def rmsprop(
    w: Array,
    dw: Array,
    cache: Array,
    lr: float,
    decay: float,
    epsilon: float,
    next_w: Array,
    next_cache: Array,
) -> None:
    """Write ``c = decay * cache + (1 - decay) * dw**2``, ``w - lr * dw / (sqrt(c) + epsilon)``."""
    arrays = _flat(w, *plain(dw), cache, next_w, next_cache)
    scalars = _scalars(w, lr, decay, 1.0 - decay, epsilon)
    split(_rmsprop, (*arrays, *scalars), w.size, w.size)


def adam(
    w: Array,
    dw: Array,
    m: Array,
    v: Array,
    lr: float,
    beta1: float,
    beta2: float,
    correction1: float,
    correction2: float,
    epsilon: float,
    weight_decay: float,
    decayed: int,
    next_w: Array,
    next_m: Array,
    next_v: Array,
) -> None:
    """Write a step of Adam; the first ``decayed`` elements also decay, decoupled.

    The corrections are ``1 - beta1**t`` and ``1 - beta2**t`` of step t, counted from 1.
    """
    arrays = _flat(w, *plain(dw), m, v, next_w, next_m, next_v)
    first = (beta1, 1.0 - beta1, correction1)
    second = (beta2, 1.0 - beta2, correction2)
    scalars = (*_scalars(w, lr, *first, *second, epsilon, weight_decay), decayed)
    split(_adam, (*arrays, *scalars), w.size, w.size)


def _flat(*arrays: Array) -> tuple[Any, ...]:
    """View arrays in one dimension; those that are written to must be in C order already."""
    return tuple(array.reshape(-1) for array in arrays)


def _scalars(w: Array, *values: float) -> tuple[Any, ...]:
    return tuple(w.dtype.type(value) for value in values)


# Vectors by hand: LLVM vectorises no loop that may write what it reads, as updates in place do.


@inlined
def _put(out: Any, i: int, part: int | None, value: Any) -> None:
    if part is None:
        store(out, i, value)
    else:
        store_part(out, i, part, value)


@compiled
def _sgd(w: Any, dw: Any, next_w: Any, lr: Any, first: int, last: int) -> None:
    part = (last - first) % lanes(w)
    for i in range(first, last - part, lanes(w)):
        _sgd_at(w, dw, next_w, fill(lr), i, None)
    if part:
        _sgd_at(w, dw, next_w, fill(lr), last - part, part)


@inlined
def _sgd_at(w: Any, dw: Any, next_w: Any, lr: Any, i: int, part: int | None) -> None:
    _put(next_w, i, part, read(w, i, part) - lr * read(dw, i, part))


@compiled
def _sgd_momentum(
    w: Any,
    dw: Any,
    velocity: Any,
    next_w: Any,
    next_velocity: Any,
    lr: Any,
    momentum: Any,
    first: int,
    last: int,
) -> None:
    arrays, scalars = (w, dw, velocity, next_w, next_velocity), (fill(lr), fill(momentum))
    part = (last - first) % lanes(w)
    for i in range(first, last - part, lanes(w)):
        _sgd_momentum_at(arrays, scalars, i, None)
    if part:
        _sgd_momentum_at(arrays, scalars, last - part, part)


@inlined
def _sgd_momentum_at(arrays: Any, scalars: Any, i: int, part: int | None) -> None:
    w, dw, velocity, next_w, next_velocity = arrays
    lr, momentum = scalars
    step = momentum * read(velocity, i, part) - lr * read(dw, i, part)
    _put(next_w, i, part, read(w, i, part) + step)
    _put(next_velocity, i, part, step)


@compiled
def _rmsprop(
    w: Any,
    dw: Any,
    cache: Any,
    next_w: Any,
    next_cache: Any,
    lr: Any,
    decay: Any,
    complement: Any,
    epsilon: Any,
    first: int,
    last: int,
) -> None:
    arrays = w, dw, cache, next_w, next_cache
    scalars = fill(lr), fill(decay), fill(complement), fill(epsilon)
    part = (last - first) % lanes(w)
    for i in range(first, last - part, lanes(w)):
        _rmsprop_at(arrays, scalars, i, None)
    if part:
        _rmsprop_at(arrays, scalars, last - part, part)


@inlined
def _rmsprop_at(arrays: Any, scalars: Any, i: int, part: int | None) -> None:
    w, dw, cache, next_w, next_cache = arrays
    lr, decay, complement, epsilon = scalars
    g = read(dw, i, part)
    square = decay * read(cache, i, part) + complement * (g * g)
    _put(next_w, i, part, read(w, i, part) - (lr * g) / (sqrt_of(square) + epsilon))
    _put(next_cache, i, part, square)


@compiled
def _adam(
    w: Any,
    dw: Any,
    m: Any,
    v: Any,
    next_w: Any,
    next_m: Any,
    next_v: Any,
    lr: Any,
    beta1: Any,
    complement1: Any,
    correction1: Any,
    beta2: Any,
    complement2: Any,
    correction2: Any,
    epsilon: Any,
    weight_decay: Any,
    decayed: int,
    first: int,
    last: int,
) -> None:
    arrays = w, dw, m, v, next_w, next_m, next_v
    scalars = (
        *(fill(lr), fill(beta1), fill(complement1), fill(correction1)),
        *(fill(beta2), fill(complement2), fill(correction2), fill(epsilon)),
    )
    border = min(max(first, decayed), last)
    part = (border - first) % lanes(w)
    for i in range(first, border - part, lanes(w)):
        _adam_at(arrays, scalars, fill(weight_decay), i, None)
    if part:
        _adam_at(arrays, scalars, fill(weight_decay), border - part, part)
    part = (last - border) % lanes(w)
    for i in range(border, last - part, lanes(w)):
        _adam_at(arrays, scalars, None, i, None)
    if part:
        _adam_at(arrays, scalars, None, last - part, part)


@inlined
def _adam_at(arrays: Any, scalars: Any, weight_decay: Any, i: int, part: int | None) -> None:
    w, dw, m, v, next_w, next_m, next_v = arrays
    lr, beta1, complement1, correction1, beta2, complement2, correction2, epsilon = scalars
    g, old = read(dw, i, part), read(w, i, part)
    m_i = beta1 * read(m, i, part) + complement1 * g
    v_i = beta2 * read(v, i, part) + complement2 * (g * g)
    direction = (m_i / correction1) / (sqrt_of(v_i / correction2) + epsilon)
    if weight_decay is not None:
        direction = direction + weight_decay * old
    _put(next_w, i, part, old - lr * direction)
    _put(next_m, i, part, m_i)
    _put(next_v, i, part, v_i)
