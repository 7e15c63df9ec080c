"""Parity's batch norm with what follows it in one pass: ReLU, or a sum with a residual and ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn import layers
from gpubn.backend import Array, namespace, to_host
from gpubn.testing.parity.batchnorm_operations import (
    batchnorm_arguments,
    batchnorm_reference,
    batchnorm_test_reference,
    by_rows,
    in_both_layouts,
    running_of,
    spatial_arguments,
)
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import Arrays, Held, Operation, Reference, also
from gpubn.testing.parity.shapes import DTYPES, FEW_PLANES, PLANES

# --- Batch norm and what follows it in one pass ---------------------------------------------------


def _batchnorm_relu(mode: str) -> Callable[..., Arrays]:
    def run(x: Array, gamma: Array, beta: Array, dout: Array, axis: int, **running: Any) -> Arrays:
        bn_param = {"mode": mode, **running}
        out, cache = layers.batchnorm_relu_forward(x, gamma, beta, bn_param, axis)
        dx, dgamma, dbeta = layers.batchnorm_relu_backward(dout, cache)
        results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        results |= running_of(bn_param) if mode == "train" else {}
        if axis != 1:
            return results

        normalized, cache = layers.batchnorm_forward(x, gamma, beta, {"mode": mode, **running})
        out, relu_cache = layers.relu_forward(normalized)
        dx, *sums = layers.batchnorm_backward(layers.relu_backward(dout, relu_cache), cache)
        apart = {"out": out, "dx": dx, "dgamma": sums[0], "dbeta": sums[1]}
        return results | also("step by step", apart)

    return in_both_layouts(run)


def _batchnorm_add_relu(mode: str) -> Callable[..., Arrays]:
    def run(
        x: Array,
        residual: Array,
        gamma: Array,
        beta: Array,
        dout: Array,
        axis: int,
        **running: Any,
    ) -> Arrays:
        bn_param = {"mode": mode, **running}
        out, cache = layers.batchnorm_add_relu_forward(x, residual, gamma, beta, bn_param, axis)
        dx, dresidual, *sums = layers.batchnorm_add_relu_backward(dout, cache)
        results = {"out": out, "dx": dx, "dresidual": dresidual}
        results |= {"dgamma": sums[0], "dbeta": sums[1]}
        results |= running_of(bn_param) if mode == "train" else {}
        if axis != 1:
            return results

        normalized, cache = layers.batchnorm_forward(x, gamma, beta, {"mode": mode, **running})
        out, relu_cache = layers.relu_forward(_sum(normalized, residual))
        dresidual = layers.relu_backward(dout, relu_cache)
        dx, *_ = layers.batchnorm_backward(dresidual, cache)
        apart = {"out": out, "dx": dx, "dresidual": dresidual}
        return {**results, "normalized": normalized, **also("step by step", apart)}

    return in_both_layouts(run)


def _sum(a: Array, b: Array) -> Array:
    """Return ``a + b``, added by NumPy: CuPy's sum flushes subnormal numbers."""
    return namespace(a).asarray(to_host(a) + to_host(b))


def _with_residual(draw: Draw, arguments: Arrays) -> Arrays:
    return {**arguments, "residual": draw.visible_values(*draw.shape)}


def _with_relu(of_rows: Callable[..., Reference]) -> Callable[..., Reference]:
    """Hold batch norm and ReLU to batch norm's reference; ``out`` says what ReLU let pass."""

    def expected(out: Array, dout: Array, **others: Any) -> Reference:
        held_to = of_rows(dout=_masked(dout, out), **others)
        linear = held_to["out"]
        return {**held_to, "out": linear._replace(value=np.maximum(linear.value, 0))}

    return by_rows(expected)


def _with_add_relu(of_rows: Callable[..., Reference]) -> Callable[..., Reference]:
    """Hold the sum with a residual too, as one of stored values: half precision rounds them."""

    def expected(
        out: Array, normalized: Array, residual: Array, dout: Array, **others: Any
    ) -> Reference:
        g = _masked(dout, out)
        held_to = of_rows(dout=g, **others)
        linear, terms = held_to["out"], (np.float64(normalized), np.float64(residual))
        total = Held(np.maximum(sum(terms), 0), sum(map(np.abs, terms)), linear.row)
        of_residual = {"dresidual": Held(g, np.abs(g), "relu")}
        return {**held_to, "normalized": linear, "out": total, **of_residual}

    return by_rows(expected)


def _masked(dout: Array, out: Array) -> Array:
    return np.where(out > 0, dout, dout.dtype.type(0))


# --- All of them ----------------------------------------------------------------------------------

OPERATIONS = (
    Operation(
        "batchnorm-relu",
        shapes=PLANES,
        dtypes=DTYPES,
        arguments=spatial_arguments,
        run=_batchnorm_relu("train"),
        reference=_with_relu(batchnorm_reference),
        given=("out",),
    ),
    Operation(
        "batchnorm-relu-test",
        shapes=FEW_PLANES,
        dtypes=DTYPES,
        arguments=batchnorm_arguments,
        run=_batchnorm_relu("test"),
        reference=_with_relu(batchnorm_test_reference),
        given=("out",),
    ),
    Operation(
        "batchnorm-add-relu",
        shapes=PLANES,
        dtypes=DTYPES,
        arguments=lambda draw: _with_residual(draw, spatial_arguments(draw)),
        run=_batchnorm_add_relu("train"),
        reference=_with_add_relu(batchnorm_reference),
        given=("out", "normalized"),
    ),
    Operation(
        "batchnorm-add-relu-test",
        shapes=FEW_PLANES,
        dtypes=DTYPES,
        arguments=lambda draw: _with_residual(draw, batchnorm_arguments(draw)),
        run=_batchnorm_add_relu("test"),
        reference=_with_add_relu(batchnorm_test_reference),
        given=("out", "normalized"),
    ),
)
