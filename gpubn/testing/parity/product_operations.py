"""Parity's matrix products, of their own and in a fully connected layer."""

from __future__ import annotations

import numpy as np

from gpubn import layers
from gpubn.backend import Array
from gpubn.kernels import for_array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import SQUARES_FIT, Arrays, Operation, Reference, held
from gpubn.testing.parity.shapes import PRODUCTS


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
    whole = _affine_reference(x, w, np.zeros(w.shape[1], x.dtype), dout)
    return {name: whole[name] for name in ("out", "dx", "dw")}


def _affine_arguments(draw: Draw) -> Arrays:
    return {**_product_arguments(draw), "b": draw.visible(draw.shape[2])}


def _affine(x: Array, w: Array, b: Array, dout: Array) -> Arrays:
    out, cache = layers.affine_forward(x, w, b, reproducible=True)
    dx, dw, db = layers.affine_backward(dout, cache)
    return {"out": out, "dx": dx, "dw": dw, "db": db}


def _affine_reference(x: Array, w: Array, b: Array, dout: Array) -> Reference:
    dx, dw, db = reference.affine_backward(dout, x, w)
    expected = {"out": reference.affine_forward(x, w, b), "dx": dx, "dw": dw, "db": db}
    return held("affine", expected, tolerance.affine_scales(x, w, b, dout))


_PRODUCTS_HELD = (*SQUARES_FIT, "signed zeros")  # where the scale's squares fit

OPERATIONS = (
    Operation(
        "matmul",
        shapes=PRODUCTS,
        arguments=_product_arguments,
        run=_matmul,
        reference=_matmul_reference,
        held=_PRODUCTS_HELD,
    ),
    Operation(
        "affine",
        shapes=PRODUCTS,
        arguments=_affine_arguments,
        run=_affine,
        reference=_affine_reference,
        held=_PRODUCTS_HELD,
    ),
)
