"""The update rules: ``next_w, config = rule(w, dw, config)``.

``config`` holds a rule's scalars and state; what is absent is set to the rule's default. It is
updated in place, and the state's arrays are replaced, so ``w``, ``dw`` and what the config held
are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

from gpubn.backend import Array, namespace, scope_of
from gpubn.kernels import for_array
from gpubn.layers import _check
from gpubn.train.parameters import Parameters

Config = dict[str, Any]
Rule = Callable[..., tuple[Array, Config]]


@dataclass(frozen=True)
class _Definition:
    """One rule: its scalars and their defaults, its arrays of state, its kernel's arguments."""

    scalars: Mapping[str, float]
    state: tuple[str, ...]
    kernel: str
    arguments: Callable[[Config, int], tuple[Any, ...]]
    counts_steps: bool = False


_ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}

_DEFINITIONS: dict[str, _Definition] = {
    "sgd": _Definition(
        {"learning_rate": 1e-2}, (), "sgd", lambda c, decayed: (c["learning_rate"],)
    ),
    "sgd_momentum": _Definition(
        {"learning_rate": 1e-2, "momentum": 0.9},
        ("velocity",),
        "sgd_momentum",
        lambda c, decayed: (c["learning_rate"], c["momentum"]),
    ),
    "rmsprop": _Definition(
        {"learning_rate": 1e-2, "decay_rate": 0.99, "epsilon": 1e-8},
        ("cache",),
        "rmsprop",
        lambda c, decayed: (c["learning_rate"], c["decay_rate"], c["epsilon"]),
    ),
    "adam": _Definition(
        _ADAM,
        ("m", "v"),
        "adam",
        lambda c, decayed: (*_adam_arguments(c), 0.0, 0),
        counts_steps=True,
    ),
    "adamw": _Definition(
        {**_ADAM, "weight_decay": 1e-2},
        ("m", "v"),
        "adam",
        lambda c, decayed: (*_adam_arguments(c), c["weight_decay"], decayed),
        counts_steps=True,
    ),
}

RULES = tuple(_DEFINITIONS)
"""The names of the update rules."""

_BELOW_ONE = ("momentum", "decay_rate", "beta1", "beta2")


def _adam_arguments(config: Config) -> tuple[Any, ...]:
    beta1, beta2, t = config["beta1"], config["beta2"], config["t"]
    corrections = (1.0 - _power(beta1, t), 1.0 - _power(beta2, t))
    return (config["learning_rate"], beta1, beta2, *corrections, config["epsilon"])


_DIGITS = Context(prec=40)


def _power(base: float, exponent: int) -> float:
    """Return a power, correctly rounded: ``**`` is the C library's, and so is its last bit.

    The exponent is a step's number, at least 1.
    """
    return float(_DIGITS.power(Decimal(base), exponent))


def sgd(w: Array, dw: Array, config: Config | None = None) -> tuple[Array, Config]:
    """Stochastic gradient descent: ``w - learning_rate * dw``; learning_rate 1e-2."""
    return _new("sgd", w, dw, config)


def sgd_momentum(w: Array, dw: Array, config: Config | None = None) -> tuple[Array, Config]:
    """Momentum: ``velocity = momentum * velocity - learning_rate * dw; w + velocity``.

    learning_rate 1e-2, momentum 0.9.
    """
    return _new("sgd_momentum", w, dw, config)


def rmsprop(w: Array, dw: Array, config: Config | None = None) -> tuple[Array, Config]:
    """RMSProp: Tieleman and Hinton 2012, lecture 6.5 of Neural Networks for Machine Learning.

    ``cache = decay_rate * cache + (1 - decay_rate) * dw**2;
    w - learning_rate * dw / (sqrt(cache) + epsilon)``;
    learning_rate 1e-2, decay_rate 0.99, epsilon 1e-8.
    """
    return _new("rmsprop", w, dw, config)


def adam(w: Array, dw: Array, config: Config | None = None) -> tuple[Array, Config]:
    """Adam: Kingma and Ba 2015, arXiv:1412.6980, with bias correction.

    learning_rate 1e-3, beta1 0.9, beta2 0.999, epsilon 1e-8; state m, v and the step count t.
    """
    return _new("adam", w, dw, config)


def adamw(w: Array, dw: Array, config: Config | None = None) -> tuple[Array, Config]:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101.

    Adam's step, less ``learning_rate * weight_decay * w``; weight_decay 1e-2. A network's training
    decays its weights only, not biases, gamma and beta.
    """
    return _new("adamw", w, dw, config)


_FUNCTIONS: dict[str, Rule] = {
    rule.__name__: rule for rule in (sgd, sgd_momentum, rmsprop, adam, adamw)
}


def get(rule: str) -> Rule:
    """Return the update rule of this name; ValueError if there is none."""
    _definition(rule)
    return _FUNCTIONS[rule]


def complete(rule: str, config: Mapping[str, Any] | None) -> Config:
    """Return a new config with every scalar of the rule, checked.

    Raises
    ------
    ValueError, TypeError
        The rule is unknown, a key is none of the rule's, or a value is out of range.
    """
    definition = _definition(rule)
    given = {} if config is None else config
    _check.mapping("config", given)
    known = (*definition.scalars, *definition.state, *(("t",) if definition.counts_steps else ()))
    for key in given:
        if key not in known:
            raise ValueError(f"config has a key {key!r}, expected for {rule}: {', '.join(known)}")
    full = {**definition.scalars, **given}
    for key in definition.scalars:
        value = _check.number(key, full[key])
        if key in _BELOW_ONE and not 0 <= value < 1:
            raise ValueError(f"{key} is {full[key]!r}, expected a number from 0 to below 1")
        if key == "epsilon" and not value > 0:
            raise ValueError(f"epsilon is {full[key]!r}, expected a number above 0")
        if value < 0:
            raise ValueError(f"{key} is {full[key]!r}, expected a number of at least 0")
        full[key] = value  # a Python float: what follows from it is computed in float64
    if definition.counts_steps:
        full["t"] = _check.whole("t", full.get("t", 0), 0)
    return full


def scalar_names(rule: str) -> tuple[str, ...]:
    """Return the names of a rule's scalars."""
    return tuple(_definition(rule).scalars)


def state_names(rule: str) -> tuple[str, ...]:
    """Return the names of a rule's arrays of state."""
    return _definition(rule).state


def update_in_place(
    rule: str, w: Array, dw: Array, config: Config, decayed: int | None = None
) -> None:
    """Take a step on the C-ordered buffer ``w`` and on the state in ``config``, without new memory.

    ``config`` is one that ``complete`` gave. Of adamw's elements only the first ``decayed`` decay;
    all where it is None.
    """
    definition = _definition(rule)
    with scope_of(w):
        states = [_state(config, name, w) for name in definition.state]
        config.update(zip(definition.state, states, strict=True))
        _step(definition, w, dw, states, config, w.size if decayed is None else decayed, w, states)


def gradient_norm(grads: Mapping[str, Array]) -> float:
    """Return the L2 norm of all gradients together, to watch or to scale by. Waits for the device.

    The same bits on every device. Squares are of the gradients' dtype: in float32 a norm above some
    1e19 is infinite, and gradients below some 1e-23 count as 0.

    Raises
    ------
    ValueError, TypeError
        The gradients are no dict of float32 or float64 arrays.
    """
    _check.mapping("grads", grads)
    total = 0.0
    arrays = {"flat": grads.flat} if isinstance(grads, Parameters) else grads
    for name, dw in arrays.items():
        _check.floating(f"grads[{name!r}]", dw)
        with scope_of(dw):
            total += float(for_array("l2", dw).sum_of_squares(dw))
    return math.sqrt(total)


def _new(rule: str, w: Array, dw: Array, config: Config | None) -> tuple[Array, Config]:
    definition = _definition(rule)
    _check.floating("w", w)
    _check.like("dw", dw, w.shape, w, "w")
    config = {} if config is None else config
    _check.mapping("config", config, mutable=True)
    full = complete(rule, config)
    xp = namespace(w)
    with scope_of(w):
        states = [xp.ascontiguousarray(_state(full, name, w)) for name in definition.state]
        next_w, *next_states = (xp.empty(w.shape, w.dtype) for _ in range(1 + len(states)))
        w, dw = xp.ascontiguousarray(w), xp.ascontiguousarray(dw)
        shape = next_w.shape  # ascontiguousarray makes one dimension of none
        w, dw, *states = (array.reshape(shape) for array in (w, dw, *states))
        _step(definition, w, dw, states, full, w.size, next_w, next_states)
    config.update(full)
    config.update(zip(definition.state, next_states, strict=True))
    return next_w, config


def _step(
    definition: _Definition,
    w: Array,
    dw: Array,
    states: list[Array],
    config: Config,
    decayed: int,
    next_w: Array,
    next_states: list[Array],
) -> None:
    if definition.counts_steps:
        config["t"] += 1
    kernel = getattr(for_array("optimizer", w), definition.kernel)
    kernel(w, dw, *states, *definition.arguments(config, decayed), next_w, *next_states)


def _state(config: Config, name: str, w: Array) -> Array:
    if config.get(name) is None:
        return namespace(w).zeros(w.shape, w.dtype)
    _check.like(name, config[name], w.shape, w, "w")
    return config[name]


def _definition(rule: str) -> _Definition:
    if rule not in _DEFINITIONS:
        raise ValueError(f"update_rule is {rule!r}, expected one of {', '.join(_DEFINITIONS)}")
    return _DEFINITIONS[rule]
