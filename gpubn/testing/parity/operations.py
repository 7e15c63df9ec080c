"""The operations that parity runs. To add one: its arguments, its call, its entry at the end.

Arguments are drawn by a ``Draw``; the call takes them by name, NumPy or CuPy arrays alike, and
returns named results. A reference, where ``gpubn.testing.tolerance`` has a bound, gives for results
the float64 value, its scale and the row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpubn import layers
from gpubn.backend import Array, namespace
from gpubn.kernels import for_array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.cases import (
    COLUMNS,
    ELEMENTS,
    KINDS,
    PRODUCTS,
    ROWS,
    Case,
    Draw,
    Shapes,
)
from gpubn.train import optim

Arrays: TypeAlias = dict[str, Any]


class Held(NamedTuple):
    """What a result is held to: the float64 value, its scale, and its row in ``BOUNDS``."""

    value: Any
    scale: Any
    row: str


Reference: TypeAlias = dict[str, Held]

SQUARES_FIT = ("ordinary", "mean 1e6", "constant", "near 1e18", "subnormal")
"""The kinds that have a float64 reference, finite in float32, where the formula squares them."""


@dataclass(frozen=True)
class Operation:
    """An operation of the library.

    Attributes
    ----------
    name : str
    shapes : Shapes
    arguments : callable
        Draws host arrays and plain numbers.
    run : callable
        Takes the arguments by name, arrays on any one device, and returns named arrays there.
    reference : callable, optional
        Takes the arguments on the host.
    held : collection of str
        The kinds of values for which the reference holds.
    """

    name: str
    shapes: Shapes
    arguments: Callable[[Draw], Arrays]
    run: Callable[..., Arrays]
    reference: Callable[..., Reference] | None = None
    held: Collection[str] = SQUARES_FIT

    def holds(self, case: Case) -> bool:
        """Tell whether the case has a reference."""
        # Among its own subnormal numbers the reference rounds as well.
        rounds = (case.kind, case.dtype) == ("subnormal", "float64")
        return self.reference is not None and case.kind in self.held and not rounds

    def case(self, seed: int) -> Case:
        """Return the case of this number."""
        return Case.numbered(self.name, self.shapes, seed)

    def draw(self, case: Case) -> Arrays:
        """Return the arguments of a case, the same ones at every call."""
        with np.errstate(all="ignore"):  # values may be too large or small for the dtype
            return self.arguments(Draw(case))


def _held(layer: str, expected: Arrays, scales: Arrays) -> Reference:
    return {name: Held(value, scales[name], f"{layer} {name}") for name, value in expected.items()}


# --- Batch norm -----------------------------------------------------------------------------------


def _batchnorm_arguments(draw: Draw) -> Arrays:
    rows, columns = draw.shape
    return {
        "x": draw.hard(rows, columns),
        "gamma": draw.ordinary(columns),
        "beta": draw.visible(columns),
        "running_mean": draw.hard(columns),
        "running_var": np.abs(draw.ordinary(columns)),
        "dout": draw.upstream(rows, columns),
    }


def _batchnorm(mode: str) -> Callable[..., Arrays]:
    def run(
        x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
    ) -> Arrays:
        bn_param = {"mode": mode, "running_mean": running_mean, "running_var": running_var}
        out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param)
        dx, dgamma, dbeta = layers.batchnorm_backward(dout, cache)
        results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        if mode == "train":
            results |= {name: bn_param[name] for name in ("running_mean", "running_var")}
        return results

    return run


def _batchnorm_reference(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
) -> Reference:
    # The reference shifts by its first row: upside down, a far first row costs it no digits.
    graph = reference.batchnorm_forward(x[::-1], gamma, beta)
    dx, dgamma, dbeta = reference.batchnorm_backward_graph(dout[::-1], graph)
    expected = {"out": graph.out[::-1], "dx": dx[::-1], "dgamma": dgamma, "dbeta": dbeta}
    scales: Arrays = {**tolerance.batchnorm_scales(x, gamma, beta, dout)}
    mean, var = reference.batchnorm_running(running_mean, running_var, x[::-1])
    magnitude = np.abs(x.astype(np.float64)).mean(axis=0)
    expected |= {"running_mean": mean, "running_var": var}
    scales |= {"running_mean": 0.9 * np.abs(running_mean) + 0.1 * magnitude, "running_var": var}
    return _held("batchnorm", expected, scales)


def _batchnorm_test_reference(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, dout: Array
) -> Reference:
    statistics = running_mean, running_var
    invstd = 1 / np.sqrt(running_var.astype(np.float64) + 1e-5)
    xhat, g = (x.astype(np.float64) - running_mean) * invstd, dout.astype(np.float64)
    expected = {
        "out": reference.batchnorm_test(x, gamma, beta, *statistics),
        "dx": g * gamma * invstd,
        "dgamma": (g * xhat).sum(axis=0),
        "dbeta": g.sum(axis=0),
    }
    scales = tolerance.batchnorm_test_scales(x, gamma, beta, *statistics, dout)
    return _held("batchnorm test", expected, scales)


def _parts_arguments(draw: Draw) -> Arrays:
    return {"x": draw.hard(*draw.shape)}


def _merged_moments(x: Array) -> Arrays:
    """Return the moments of parts of 64 rows, merged as several processes would."""
    kernels = for_array("batchnorm", x)
    shift = kernels.shift(x)
    parts = [kernels.moments(x[start : start + 64], shift) for start in range(0, len(x), 64)]
    means, variances = (namespace(x).stack(each) for each in zip(*parts, strict=True))
    mean, var = kernels.merge_moments(means, variances, 64, len(x))
    return {"mean": mean, "var": var}


def _merged_moments_reference(x: Array) -> Reference:
    # The middle one of three values is their median.
    shift = np.median(x[[0, len(x) // 2, -1]], axis=0)
    columns = np.ascontiguousarray((x.astype(np.float64) - shift).T)  # NumPy sums these in pairs
    expected = {"mean": columns.mean(axis=1), "var": columns.var(axis=1)}
    return _held("batchnorm", expected, tolerance.batchnorm_moments_scales(x, shift))


# --- Layer norm -----------------------------------------------------------------------------------


def _layernorm_arguments(draw: Draw) -> Arrays:
    arguments = _batchnorm_arguments(draw)
    return {name: arguments[name] for name in ("x", "gamma", "beta", "dout")}


def _layernorm(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    out, cache = layers.layernorm_forward(x, gamma, beta, {})
    dx, dgamma, dbeta = layers.layernorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _layernorm_reference(x: Array, gamma: Array, beta: Array, dout: Array) -> Reference:
    # Backwards, as batch norm's upside down.
    backwards = x[:, ::-1], gamma[::-1]
    dx, dgamma, dbeta = reference.layernorm_backward(dout[:, ::-1], *backwards)
    expected = {
        "out": reference.layernorm_forward(*backwards, beta[::-1])[:, ::-1],
        **{"dx": dx[:, ::-1], "dgamma": dgamma[::-1], "dbeta": dbeta[::-1]},
    }
    return _held("layernorm", expected, tolerance.layernorm_scales(x, gamma, beta, dout))


# --- Activations, dropout, sums -------------------------------------------------------------------


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
        "p": float(draw.rng.choice([0.3, 0.7, 1.0])),
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


def _column_sum(x: Array) -> Arrays:
    return {"sum": for_array("columns", x).column_sum(x)}


def _column_sum_reference(x: Array) -> Reference:
    exact = [math.fsum(column) for column in x.T.tolist()]
    return {"sum": Held(exact, np.abs(x.astype(np.float64)).sum(axis=0), "affine db")}


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


# --- Matrix products ------------------------------------------------------------------------------


def _product_arguments(draw: Draw) -> Arrays:
    rows, depth, columns = draw.shape
    return {
        "x": draw.hard(rows, depth),
        "w": draw.ordinary(depth, columns),
        "dout": draw.upstream(rows, columns),
    }


def _matmul(x: Array, w: Array, dout: Array) -> Arrays:
    """Return the products of a fully connected layer: transposed factors are views."""
    matmul = for_array("gemm", x).matmul
    return {"out": matmul(x, w), "dw": matmul(x.T, dout), "dx": matmul(dout, w.T)}


def _matmul_reference(x: Array, w: Array, dout: Array) -> Reference:
    held = _affine_reference(x, w, np.zeros(w.shape[1], x.dtype), dout)
    return {name: held[name] for name in ("out", "dx", "dw")}


def _affine_arguments(draw: Draw) -> Arrays:
    return {**_product_arguments(draw), "b": draw.visible(draw.shape[2])}


def _affine(x: Array, w: Array, b: Array, dout: Array) -> Arrays:
    out, cache = layers.affine_forward(x, w, b, reproducible=True)
    dx, dw, db = layers.affine_backward(dout, cache)
    return {"out": out, "dx": dx, "dw": dw, "db": db}


def _affine_reference(x: Array, w: Array, b: Array, dout: Array) -> Reference:
    dx, dw, db = reference.affine_backward(dout, x, w)
    expected = {"out": reference.affine_forward(x, w, b), "dx": dx, "dw": dw, "db": db}
    return _held("affine", expected, tolerance.affine_scales(x, w, b, dout))


# --- Losses ---------------------------------------------------------------------------------------


def _loss_arguments(draw: Draw) -> Arrays:
    rows, classes = draw.shape
    return {"x": draw.hard(rows, classes), "y": draw.rng.integers(classes, size=rows)}


def _softmax_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.softmax_loss(x, y), strict=True))


def _softmax_loss_reference(x: Array, y: Array) -> Reference:
    expected = dict(zip(("loss", "dx"), reference.softmax_loss(x, y), strict=True))
    return _held("softmax_loss", expected, tolerance.softmax_loss_scales(x, y))


def _svm_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.svm_loss(x, y), strict=True))


def _svm_loss_reference(x: Array, y: Array) -> Reference:
    expected = dict(zip(("loss", "dx"), reference.svm_loss(x, y), strict=True))
    return _held("svm_loss", expected, tolerance.svm_loss_scales(x, y))


def _count_correct(x: Array, y: Array) -> Arrays:
    return {"count": layers.count_correct(x, y)}


def _count_correct_reference(x: Array, y: Array) -> Reference:
    return {"count": Held(reference.count_correct(x, y), 1, "count_correct")}


def _l2_arguments(draw: Draw) -> Arrays:
    return {"w": draw.hard(*draw.shape), "reg": float(draw.rng.choice([1e-3, 0.1, 1.0]))}


def _l2(w: Array, reg: float) -> Arrays:
    loss, dw = layers.l2_penalty(w, reg)
    return {"loss": loss, "dw": dw}


def _sum_of_squares(w: Array, reg: float) -> Arrays:
    """Return what the norm of a gradient is the root of."""
    return {"sum": for_array("l2", w).sum_of_squares(w)}


def _sum_of_squares_reference(w: Array, reg: float) -> Reference:
    total = reference.sum_of_squares(w)
    return {"sum": Held(total, tolerance.sum_of_squares_scale(w), "sum_of_squares")}


def _l2_reference(w: Array, reg: float) -> Reference:
    loss, dw = reference.l2_penalty(w, reg)
    if np.isinf(w.dtype.type(reference.sum_of_squares(w))):
        loss = math.inf  # the sum does not fit, though its product with a small reg might
    scale = 0.5 * reg * tolerance.sum_of_squares_scale(w)
    return {
        "loss": Held(loss, scale, "l2_penalty loss"),
        "dw": Held(dw, np.abs(dw), "l2_penalty dw"),
    }


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
        return _held(rule, dict(zip(names, results, strict=False)), scales)

    return expected


# --- All of them ----------------------------------------------------------------------------------

# Where the scale's squares fit.
_PRODUCTS_HELD = (*SQUARES_FIT, "signed zeros")
# Results that are too large, infinities and NaN are held to be just that.
_SQUARES_FIT_OR_NOT_FINITE = (*SQUARES_FIT, "signed zeros", "infinities", "NaN")

_ALL = (
    Operation(
        *("batchnorm", COLUMNS, _batchnorm_arguments, _batchnorm("train")),
        _batchnorm_reference,
    ),
    Operation(
        *("batchnorm-test", COLUMNS, _batchnorm_arguments, _batchnorm("test")),
        _batchnorm_test_reference,
    ),
    Operation(
        *("batchnorm-merged", COLUMNS, _parts_arguments, _merged_moments),
        _merged_moments_reference,
    ),
    Operation("layernorm", ROWS, _layernorm_arguments, _layernorm, _layernorm_reference),
    Operation("relu", ELEMENTS, _gradient_arguments, _relu, _relu_reference, KINDS),
    Operation("dropout", ELEMENTS, _dropout_arguments, _dropout, _dropout_reference, KINDS),
    Operation("column-sum", COLUMNS, _parts_arguments, _column_sum, _column_sum_reference),
    Operation(
        *("matmul", PRODUCTS, _product_arguments, _matmul, _matmul_reference, _PRODUCTS_HELD)
    ),
    Operation("affine", PRODUCTS, _affine_arguments, _affine, _affine_reference, _PRODUCTS_HELD),
    Operation(
        *("exp", ELEMENTS, _exp_arguments, _elementary("exp")),
        *(_elementary_reference("exp"), KINDS),
    ),
    Operation(
        *("log", ELEMENTS, _log_arguments, _elementary("log")),
        *(_elementary_reference("log"), KINDS),
    ),
    Operation("softmax-loss", ROWS, _loss_arguments, _softmax_loss, _softmax_loss_reference),
    Operation("svm-loss", ROWS, _loss_arguments, _svm_loss, _svm_loss_reference),
    Operation(
        *("count-correct", ROWS, _loss_arguments, _count_correct, _count_correct_reference, KINDS)
    ),
    Operation("l2-penalty", ELEMENTS, _l2_arguments, _l2, _l2_reference, KINDS),
    Operation(
        *("sum-of-squares", ELEMENTS, _l2_arguments, _sum_of_squares),
        *(_sum_of_squares_reference, KINDS),
    ),
    *(
        Operation(
            *(rule, ELEMENTS, _rule_arguments(rule), _rule(rule), _rule_reference(rule)),
            KINDS if rule in ("sgd", "sgd_momentum") else _SQUARES_FIT_OR_NOT_FINITE,
        )
        for rule in optim.RULES
    ),
)

OPERATIONS = {operation.name: operation for operation in _ALL}
"""Every operation by name, in the order in which they run."""
