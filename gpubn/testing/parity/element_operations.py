"""Parity's operations on elements, each for itself: activations, dropout, exp, log, update rules.

And the two that sum over all elements: the L2 penalty, and what the norm of a gradient is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn import layers
from gpubn.backend import Array
from gpubn.kernels import for_array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import SQUARES_FIT, Arrays, Held, Operation, Reference, held
from gpubn.testing.parity.shapes import DTYPES, ELEMENTS, KINDS
from gpubn.train import optim

# --- Activations and dropout ----------------------------------------------------------------------


def _gradient_arguments(draw: Draw) -> Arrays:
    return {"x": draw.hard(*draw.shape), "dout": draw.upstream(*draw.shape)}


def _relu(x: Array, dout: Array) -> Arrays:
    out, cache = layers.relu_forward(x)
    return {"out": out, "dx": layers.relu_backward(dout, cache)}


def _relu_reference(x: Array, dout: Array) -> Reference:
    out, dx = reference.relu_forward(x), reference.relu_backward(dout, x)
    return {"out": Held(out, np.abs(out), "relu"), "dx": Held(dx, np.abs(dx), "relu")}


def _dropout_arguments(draw: Draw) -> Arrays:
    return {
        **_gradient_arguments(draw),
        # 1 / p is 1.5 for 2 / 3: its products are often halfway between two of half precision.
        "p": float(draw.rng.choice([0.3, 2 / 3, 0.7, 1.0])),
        "seed": int(draw.rng.integers(2**64, dtype=np.uint64)),
        "stream": int(draw.rng.integers(2**32)),
        "step": int(draw.rng.integers(2**32)),
    }


def _dropout(x: Array, dout: Array, **key: Any) -> Arrays:
    out, cache = layers.dropout_forward(x, {"mode": "train", **key})
    return {"out": out, "dx": layers.dropout_backward(dout, cache)}


def _dropout_reference(x: Array, dout: Array, p: float, **key: int) -> Reference:
    mask = reference.dropout_mask(x.shape, p, **key)
    out = reference.dropout_forward(x, mask, p)
    dx = reference.dropout_backward(dout, mask, p)
    return {"out": Held(out, np.abs(out), "dropout"), "dx": Held(dx, np.abs(dx), "dropout")}


# --- exp and log ----------------------------------------------------------------------------------


def _exp_arguments(draw: Draw) -> Arrays:
    # Over all of exp's range and a bit beyond: results from 0 over the subnormal to infinity.
    low, high = (-110, 95) if draw.dtype == "float32" else (-760, 720)
    return {"x": draw.hard(*draw.shape), "wide": draw.uniform(low, high, *draw.shape)}


def _log_arguments(draw: Draw) -> Arrays:
    return {
        "x": np.abs(draw.hard(*draw.shape)),
        "wide": draw.any_bits(*draw.shape),
        "near_one": draw.uniform(0.5, 2, *draw.shape),
    }


def _elementary_reference(function: str) -> Callable[..., Reference]:
    def expected(**arrays: Array) -> Reference:
        values = {
            f"{function}({name})": getattr(np, function)(array.astype(np.float64))
            for name, array in arrays.items()
        }
        return {name: Held(value, np.abs(value), function) for name, value in values.items()}

    return expected


def _elementary(function: str) -> Callable[..., Arrays]:
    def run(**arrays: Array) -> Arrays:
        call = getattr(for_array("elementary", arrays["x"]), function)
        return {f"{function}({name})": call(array) for name, array in arrays.items()}

    return run


# --- Sums of squares ------------------------------------------------------------------------------


def _l2_arguments(draw: Draw) -> Arrays:
    return {"w": draw.hard(*draw.shape), "reg": float(draw.rng.choice([1e-3, 0.1, 1.0]))}


def _l2(w: Array, reg: float) -> Arrays:
    loss, dw = layers.l2_penalty(w, reg)
    return {"loss": loss, "dw": dw}


def _l2_reference(w: Array, reg: float) -> Reference:
    loss, dw = reference.l2_penalty(w, reg)
    if np.isinf(w.dtype.type(reference.sum_of_squares(w))):
        loss = math.inf  # the sum does not fit, though its product with a small reg might
    scale = 0.5 * reg * tolerance.sum_of_squares_scale(w)
    return {
        "loss": Held(loss, scale, "l2_penalty loss"),
        "dw": Held(dw, np.abs(dw), "l2_penalty dw"),
    }


def _sum_of_squares(w: Array, reg: float) -> Arrays:
    """Return what the norm of a gradient is the root of."""
    return {"sum": for_array("l2", w).sum_of_squares(w)}


def _sum_of_squares_reference(w: Array, reg: float) -> Reference:
    total = reference.sum_of_squares(w)
    return {"sum": Held(total, tolerance.sum_of_squares_scale(w), "sum_of_squares")}


# --- Update rules ---------------------------------------------------------------------------------


def _rule_arguments(rule: str) -> Callable[[Draw], Arrays]:
    def arguments(draw: Draw) -> Arrays:
        drawn = {"w": draw.ordinary(*draw.shape), "dw": draw.hard(*draw.shape)}
        # A mean of squares is not negative.
        states = {name: np.abs(draw.hard(*draw.shape)) for name in optim.state_names(rule)}
        steps = {"t": int(draw.rng.integers(1000))} if "m" in states else {}
        return {**drawn, **states, **steps}

    return arguments


def _rule(rule: str) -> Callable[..., Arrays]:
    def run(w: Array, dw: Array, **state: Any) -> Arrays:
        next_w, config = optim.get(rule)(w, dw, dict(state))
        return {"w": next_w, **{name: config[name] for name in optim.state_names(rule)}}

    return run


def _rule_reference(rule: str) -> Callable[..., Reference]:
    def expected(w: Array, dw: Array, **state: Any) -> Reference:
        results = getattr(reference, rule)(w, dw, **state)
        results = results if isinstance(results, tuple) else (results,)
        names = ("w", *optim.state_names(rule))  # a count of steps comes after them
        scales = tolerance.update_scales(rule, w, dw, **state)
        return held(rule, dict(zip(names, results, strict=False)), scales)

    return expected


# --- All of them ----------------------------------------------------------------------------------

# Results that are too large, infinities and NaN are held to be just that.
_SQUARES_FIT_OR_NOT_FINITE = (*SQUARES_FIT, "signed zeros", "infinities", "NaN")

ACTIVATIONS = (
    Operation(
        "relu",
        shapes=ELEMENTS,
        dtypes=DTYPES,
        arguments=_gradient_arguments,
        run=_relu,
        reference=_relu_reference,
        held=KINDS,
    ),
    Operation(
        "dropout",
        shapes=ELEMENTS,
        dtypes=DTYPES,
        arguments=_dropout_arguments,
        run=_dropout,
        reference=_dropout_reference,
        held=KINDS,
    ),
    *(
        Operation(
            function,
            shapes=ELEMENTS,
            arguments=arguments,
            run=_elementary(function),
            reference=_elementary_reference(function),
            held=KINDS,
        )
        for function, arguments in (("exp", _exp_arguments), ("log", _log_arguments))
    ),
)

OPTIMIZATION = (
    Operation(
        "l2-penalty",
        shapes=ELEMENTS,
        arguments=_l2_arguments,
        run=_l2,
        reference=_l2_reference,
        held=KINDS,
    ),
    Operation(
        "sum-of-squares",
        shapes=ELEMENTS,
        arguments=_l2_arguments,
        run=_sum_of_squares,
        reference=_sum_of_squares_reference,
        held=KINDS,
    ),
    *(
        Operation(
            rule,
            shapes=ELEMENTS,
            arguments=_rule_arguments(rule),
            run=_rule(rule),
            reference=_rule_reference(rule),
            held=KINDS if rule in ("sgd", "sgd_momentum") else _SQUARES_FIT_OR_NOT_FINITE,
        )
        for rule in optim.RULES
    ),
)
