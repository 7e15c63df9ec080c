"""The update rules on CUDA, each one kernel; in place where an output is an input."""

import cupy

from gpubn.backend import Array
from gpubn.kernels.compile_cuda import source

_SOURCE = source("real", "optimizer")


def _rule(inputs: str, outputs: str, operation: str, name: str) -> cupy.ElementwiseKernel:
    text = "using R = gpubn::real<T>;\n" + operation
    return cupy.ElementwiseKernel(inputs, outputs, text, f"gpubn_{name}", preamble=_SOURCE)


_sgd = _rule("T w, T dw, T lr", "T next_w", "next_w = gpubn::sgd<T>(w, dw, lr);", "sgd")

_sgd_momentum = _rule(
    "T w, T dw, T velocity, T lr, T momentum",
    "T next_w, T next_velocity",
    """
    R step = R(momentum) * R(velocity) - R(lr) * R(dw);
    next_w = (R(w) + step).v;
    next_velocity = step.v;
    """,
    "sgd_momentum",
)

_rmsprop = _rule(
    "T w, T dw, T cache, T lr, T decay, T complement, T epsilon",
    "T next_w, T next_cache",
    """
    R square = gpubn::blend<T>(cache, R(dw) * R(dw), decay, complement);
    next_w = (R(w) - (R(lr) * R(dw)) / (sqrt(square) + R(epsilon))).v;
    next_cache = square.v;
    """,
    "rmsprop",
)

_adam = _rule(
    "T w, T dw, T m, T v, T lr, T beta1, T complement1, T correction1, T beta2, T complement2, "
    "T correction2, T epsilon, T weight_decay, int64 decayed",
    "T next_w, T next_m, T next_v",
    """
    R first = gpubn::blend<T>(m, R(dw), beta1, complement1);
    R second = gpubn::blend<T>(v, R(dw) * R(dw), beta2, complement2);
    R direction = gpubn::adam_direction<T>(first, second, correction1, correction2, epsilon);
    if (i < decayed) direction = direction + R(weight_decay) * R(w);
    next_w = (R(w) - R(lr) * direction).v;
    next_m = first.v;
    next_v = second.v;
    """,
    "adam",
)


def sgd(w: Array, dw: Array, lr: float, next_w: Array) -> None:
    """Write ``w - lr * dw`` to ``next_w``."""
    _sgd(w, dw, lr, next_w)


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
    _sgd_momentum(w, dw, velocity, lr, momentum, next_w, next_velocity)


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
    _rmsprop(w, dw, cache, lr, decay, 1.0 - decay, epsilon, next_w, next_cache)


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
    first = (beta1, 1.0 - beta1, correction1)
    second = (beta2, 1.0 - beta2, correction2)
    scalars = (lr, *first, *second, epsilon, weight_decay, decayed)
    _adam(w, dw, m, v, *scalars, next_w, next_m, next_v)
