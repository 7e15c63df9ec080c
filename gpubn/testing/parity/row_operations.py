"""Parity's operations on rows: layer norm, RMS norm, and the losses of scores."""

from __future__ import annotations

from collections.abc import Callable

from gpubn import layers
from gpubn.backend import Array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import Arrays, Held, Operation, Reference, also, held
from gpubn.testing.parity.shapes import DTYPES, KINDS, ROWS

# --- Layer norm and RMS norm ----------------------------------------------------------------------


def _layernorm_arguments(draw: Draw) -> Arrays:
    features = draw.shape[1]
    return {**_rmsnorm_arguments(draw), "beta": draw.visible(features)}


def _layernorm(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
    def of(x: Array, gamma: Array, beta: Array, dout: Array) -> Arrays:
        out, cache = layers.layernorm_forward(x, gamma, beta, {})
        dx, dgamma, dbeta = layers.layernorm_backward(dout, cache)
        return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    return _over_one_axis_and_two(of, x=x, gamma=gamma, beta=beta, dout=dout)


def _over_one_axis_and_two(run: Callable[..., Arrays], **arrays: Array) -> Arrays:
    """Return the results for (N, D), and for (1, N, a, b) normalized over the last two axes."""
    rows, features = arrays["x"].shape
    length = next((n for n in range(2, features) if features % n == 0), features)
    axes = features // length, length
    folded = {
        name: array.reshape(*((1, rows) if array.ndim == 2 else ()), *axes)
        for name, array in arrays.items()
    }
    results = run(**arrays)
    over_two = run(**folded)
    flat = {name: value.reshape(results[name].shape) for name, value in over_two.items()}
    return results | also("two axes", flat)


def _layernorm_reference(x: Array, gamma: Array, beta: Array, dout: Array) -> Reference:
    # Backwards, as batch norm's upside down.
    backwards = x[:, ::-1], gamma[::-1]
    dx, dgamma, dbeta = reference.layernorm_backward(dout[:, ::-1], *backwards)
    expected = {
        "out": reference.layernorm_forward(*backwards, beta[::-1])[:, ::-1],
        **{"dx": dx[:, ::-1], "dgamma": dgamma[::-1], "dbeta": dbeta[::-1]},
    }
    return held("layernorm", expected, tolerance.layernorm_scales(x, gamma, beta, dout))


def _rmsnorm_arguments(draw: Draw) -> Arrays:
    return {
        "x": draw.hard(*draw.shape),
        "gamma": draw.weights(draw.shape[1]),
        "dout": draw.upstream(*draw.shape),
    }


def _rmsnorm(x: Array, gamma: Array, dout: Array) -> Arrays:
    def of(x: Array, gamma: Array, dout: Array) -> Arrays:
        out, cache = layers.rmsnorm_forward(x, gamma, {})
        dx, dgamma = layers.rmsnorm_backward(dout, cache)
        return {"out": out, "dx": dx, "dgamma": dgamma}

    return _over_one_axis_and_two(of, x=x, gamma=gamma, dout=dout)


def _rmsnorm_reference(x: Array, gamma: Array, dout: Array) -> Reference:
    dx, dgamma = reference.rmsnorm_backward(dout, x, gamma, 1e-5)
    out = reference.rmsnorm_forward(x, gamma, 1e-5)
    expected = {"out": out, "dx": dx, "dgamma": dgamma}
    return held("rmsnorm", expected, tolerance.rmsnorm_scales(x, gamma, dout))


# --- Losses ---------------------------------------------------------------------------------------


def _loss_arguments(draw: Draw) -> Arrays:
    rows, classes = draw.shape
    return {"x": draw.hard(rows, classes), "y": draw.rng.integers(classes, size=rows)}


def _softmax_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.softmax_loss(x, y), strict=True))


def _softmax_loss_reference(x: Array, y: Array) -> Reference:
    expected = dict(zip(("loss", "dx"), reference.softmax_loss(x, y), strict=True))
    return held("softmax_loss", expected, tolerance.softmax_loss_scales(x, y))


def _svm_loss(x: Array, y: Array) -> Arrays:
    return dict(zip(("loss", "dx"), layers.svm_loss(x, y), strict=True))


def _svm_loss_reference(x: Array, y: Array) -> Reference:
    expected = dict(zip(("loss", "dx"), reference.svm_loss(x, y), strict=True))
    return held("svm_loss", expected, tolerance.svm_loss_scales(x, y))


def _count_correct(x: Array, y: Array) -> Arrays:
    return {"count": layers.count_correct(x, y)}


def _count_correct_reference(x: Array, y: Array) -> Reference:
    return {"count": Held(reference.count_correct(x, y), 1, "count_correct")}


# --- All of them ----------------------------------------------------------------------------------

OPERATIONS = (
    Operation(
        "layernorm",
        shapes=ROWS,
        dtypes=DTYPES,
        arguments=_layernorm_arguments,
        run=_layernorm,
        reference=_layernorm_reference,
    ),
    Operation(
        "rmsnorm",
        shapes=ROWS,
        dtypes=DTYPES,
        arguments=_rmsnorm_arguments,
        run=_rmsnorm,
        reference=_rmsnorm_reference,
    ),
    Operation(
        "softmax-loss",
        shapes=ROWS,
        arguments=_loss_arguments,
        run=_softmax_loss,
        reference=_softmax_loss_reference,
    ),
    Operation(
        "svm-loss",
        shapes=ROWS,
        arguments=_loss_arguments,
        run=_svm_loss,
        reference=_svm_loss_reference,
    ),
    Operation(
        "count-correct",
        shapes=ROWS,
        arguments=_loss_arguments,
        run=_count_correct,
        reference=_count_correct_reference,
        held=KINDS,
    ),
)
