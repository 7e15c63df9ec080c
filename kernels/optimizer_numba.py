"""The update rules on the CPU, as in optimizer_cuda; in place where an output is an input."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.threads import split


def sgd(w: Array, dw: Array, lr: float, next_w: Array) -> None:
    """Write ``w - lr * dw`` to ``next_w``."""
    arrays = _flat(w, dw, next_w)
    scalars = _scalars(w, lr)
    split(lambda a, b: _sgd(*arrays, *scalars, a, b), w.size, w.size)


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
    arrays = _flat(w, dw, velocity, next_w, next_velocity)
    scalars = _scalars(w, lr, momentum)
    split(lambda a, b: _sgd_momentum(*arrays, *scalars, a, b), w.size, w.size)


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
    arrays = _flat(w, dw, cache, next_w, next_cache)
    scalars = _scalars(w, lr, decay, 1.0 - decay, epsilon)
    split(lambda a, b: _rmsprop(*arrays, *scalars, a, b), w.size, w.size)


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
    arrays = _flat(w, dw, m, v, next_w, next_m, next_v)
    first = (beta1, 1.0 - beta1, correction1)
    second = (beta2, 1.0 - beta2, correction2)
    scalars = (*_scalars(w, lr, *first, *second, epsilon, weight_decay), decayed)
    split(lambda a, b: _adam(*arrays, *scalars, a, b), w.size, w.size)


def _flat(*arrays: Array) -> tuple[Any, ...]:
    """View arrays in one dimension; they are written to, so they must be in C order already."""
    return tuple(array.reshape(-1) for array in arrays)


def _scalars(w: Array, *values: float) -> tuple[Any, ...]:
    return tuple(w.dtype.type(value) for value in values)


@compiled
def _sgd(w: Any, dw: Any, next_w: Any, lr: Any, first: int, last: int) -> None:
    w, dw, next_w = w[first:last], dw[first:last], next_w[first:last]
    for i in range(next_w.shape[0]):
        next_w[i] = w[i] - lr * dw[i]


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
    for i in range(first, last):
        step = momentum * velocity[i] - lr * dw[i]
        next_w[i] = w[i] + step
        next_velocity[i] = step


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
    for i in range(first, last):
        square = decay * cache[i] + complement * (dw[i] * dw[i])
        next_w[i] = w[i] - (lr * dw[i]) / (np.sqrt(square) + epsilon)
        next_cache[i] = square


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
    for i in range(first, last):
        m_i = beta1 * m[i] + complement1 * dw[i]
        v_i = beta2 * v[i] + complement2 * (dw[i] * dw[i])
        direction = (m_i / correction1) / (np.sqrt(v_i / correction2) + epsilon)
        if i < decayed:
            direction = direction + weight_decay * w[i]
        next_w[i] = w[i] - lr * direction
        next_m[i] = m_i
        next_v[i] = v_i
