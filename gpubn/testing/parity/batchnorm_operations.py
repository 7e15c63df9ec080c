"""Parity's batch norm: of features and of images, its moments in parts, and sums of channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpubn import layers
from gpubn.backend import Array, namespace
from gpubn.kernels import for_array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import Arrays, Held, Operation, Reference, also, held
from gpubn.testing.parity.shapes import COLUMNS, DTYPES, PLANES, Shape

# --- Batch norm of (N, D) -------------------------------------------------------------------------


def norm_arguments(draw: Draw, channels: int) -> Arrays:
    """Return x, gamma, beta and dout, in the order in which they are drawn."""
    return {
        "x": draw.hard(*draw.shape),
        "gamma": draw.weights(channels),
        "beta": draw.visible(channels),
        "dout": draw.upstream(*draw.shape),
    }


def batchnorm_arguments(draw: Draw) -> Arrays:
    """Return arguments with running statistics."""
    channels = draw.shape[1]
    return {
        **norm_arguments(draw, channels),
        "running_mean": draw.hard(channels).astype(draw.real),
        "running_var": np.abs(draw.weights(channels)),
    }


def _batchnorm(mode: str) -> Callable[..., Arrays]:
    def run(x: Array, gamma: Array, beta: Array, dout: Array, **running: Any) -> Arrays:
        bn_param = {"mode": mode, **running}
        out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param)
        dx, dgamma, dbeta = layers.batchnorm_backward(dout, cache)
        results = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        return results | (running_of(bn_param) if mode == "train" else {})

    return run


def running_of(bn_param: Arrays) -> Arrays:
    """Return the running statistics that a forward pass left, as results."""
    return {name: bn_param[name] for name in ("running_mean", "running_var")}


def batchnorm_reference(
    x: Array, gamma: Array, beta: Array, dout: Array, **running: Any
) -> Reference:
    """Return what batch norm of (N, C) in training is held to."""
    # The reference shifts by its first row: upside down, a far first row costs it no digits.
    graph = reference.batchnorm_forward(x[::-1], gamma, beta)
    dx, dgamma, dbeta = reference.batchnorm_backward_graph(dout[::-1], graph)
    expected = {"out": graph.out[::-1], "dx": dx[::-1], "dgamma": dgamma, "dbeta": dbeta}
    scales: Arrays = {**tolerance.batchnorm_scales(x, gamma, beta, dout)}
    running_values, running_scales = _running_reference(x, **running)
    return held("batchnorm", expected | running_values, scales | running_scales)


def _running_reference(
    x: Array,
    running_mean: Array,
    running_var: Array,
    momentum: float | None = 0.9,
    unbiased: bool = False,
    num_batches: int = 0,
) -> tuple[Arrays, Arrays]:
    if momentum is None:
        momentum = num_batches / (num_batches + 1)
    statistics = running_mean, running_var
    mean, var = reference.batchnorm_running(*statistics, x[::-1], momentum, unbiased)
    magnitude = np.abs(x.astype(np.float64)).mean(axis=0)
    scale = momentum * np.abs(running_mean) + (1 - momentum) * magnitude
    return {"running_mean": mean, "running_var": var}, {"running_mean": scale, "running_var": var}


def batchnorm_test_reference(
    x: Array, gamma: Array, beta: Array, dout: Array, running_mean: Array, running_var: Array
) -> Reference:
    """Return what batch norm of (N, C) in test mode is held to."""
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
    return held("batchnorm test", expected, scales)


# --- Batch norm of (N, C, S), channels first and last ---------------------------------------------


def in_both_layouts(run: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Let ``run``, which takes an ``axis``, compute all again with the channels last in memory."""

    def both(**arguments: Any) -> Arrays:
        last = {name: _moved(value, (0, 2, 1)) for name, value in arguments.items()}
        moved = run(**last, axis=-1)
        back = {name: value.transpose(0, 2, 1) for name, value in moved.items() if value.ndim == 3}
        return run(**arguments, axis=1) | also("channels last", moved | back)

    return both


def _moved(value: Any, order: tuple[int, ...]) -> Any:
    if getattr(value, "ndim", 0) != len(order):
        return value
    return namespace(value).ascontiguousarray(value.transpose(order))


def spatial_arguments(draw: Draw) -> Arrays:
    """Return arguments with running statistics, and with what moves them."""
    return {
        **batchnorm_arguments(draw),
        "momentum": (0.9, 0.5, None)[int(draw.rng.integers(3))],
        "unbiased": bool(draw.rng.integers(2)),
        "num_batches": int(draw.rng.integers(5)),
    }


def _spatial_batchnorm(
    x: Array, gamma: Array, beta: Array, dout: Array, axis: int, **running: Any
) -> Arrays:
    bn_param = {"mode": "train", **running}
    if axis == 1:
        images = (*x.shape[:2], *_height_and_width(x.shape[2]))
        out, cache = layers.spatial_batchnorm_forward(x.reshape(images), gamma, beta, bn_param)
        dx, *sums = layers.spatial_batchnorm_backward(dout.reshape(images), cache)
        out, dx = out.reshape(x.shape), dx.reshape(x.shape)
    else:
        out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param, axis)
        dx, *sums = layers.batchnorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": sums[0], "dbeta": sums[1], **running_of(bn_param)}


def _height_and_width(size: int) -> tuple[int, int]:
    height = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return height, size // height


def by_rows(of_rows: Callable[..., Reference]) -> Callable[..., Reference]:
    """Hold results (N, C, S) to a reference for (N * S, C): a row is a position of a sample."""

    def expected(**arguments: Any) -> Reference:
        shape = arguments["x"].shape
        rows = {name: _rows(value) for name, value in arguments.items()}
        return {name: _planes(each, shape) for name, each in of_rows(**rows).items()}

    return expected


def _rows(value: Any) -> Any:
    if np.ndim(value) != 3:
        return value
    return reference.channels_to_rows(value, 1).astype(value.dtype)


def _planes(of_rows: Held, shape: Shape) -> Held:
    if np.ndim(of_rows.value) != 2:
        return of_rows
    scale = np.broadcast_to(of_rows.scale, of_rows.value.shape)
    value, scale = (reference.rows_to_channels(each, shape, 1) for each in (of_rows.value, scale))
    return Held(value, scale, of_rows.row)


# --- Moments of parts, sums -----------------------------------------------------------------------


def _only_x(draw: Draw) -> Arrays:
    return {"x": draw.hard(*draw.shape)}


def _merged_moments(x: Array) -> Arrays:
    """Return the moments of parts of 64 rows, merged as several processes would."""
    kernels = for_array("batchnorm", x)
    planes, rows = x[None, :, :, None], len(x)
    shift = kernels.shift(planes)
    parts = [kernels.moments(planes[:, start : start + 64], shift) for start in range(0, rows, 64)]
    means, variances = (namespace(x).stack(each) for each in zip(*parts, strict=True))
    mean, var = kernels.merge_moments(means, variances, 64, rows)
    whole = dict(zip(("mean", "var"), kernels.moments(planes, shift), strict=True))
    return {"mean": mean, "var": var, **also("of all at once", whole)}


def _merged_moments_reference(x: Array) -> Reference:
    # The middle one of three values is their median.
    shift = np.median(x[[0, len(x) // 2, -1]], axis=0)
    columns = np.ascontiguousarray((x.astype(np.float64) - shift).T)  # NumPy sums these in pairs
    expected = {"mean": columns.mean(axis=1), "var": columns.var(axis=1)}
    return held("batchnorm", expected, tolerance.batchnorm_moments_scales(x, shift))


def _channel_sum(x: Array) -> Arrays:
    """Return the sums of the channels, and of those of every sample apart."""
    channel_sum = for_array("samples", x).channel_sum
    last = namespace(x).ascontiguousarray(x.transpose(0, 2, 1))
    sums = {"sum": channel_sum(x[None]), "by_sample": channel_sum(x[:, None])}
    channels = x.shape[1]
    of_last = {
        "sum": channel_sum(last.reshape(1, -1, channels, 1)),
        "by_sample": channel_sum(last[:, :, :, None]),
    }
    return sums | also("channels last", of_last)


def _channel_sum_reference(x: Array) -> Reference:
    rows = x.reshape(-1, x.shape[2])
    expected = {
        "sum": np.array([math.fsum(row) for row in x.swapaxes(0, 1).reshape(x.shape[1], -1)]),
        "by_sample": np.array([math.fsum(row) for row in rows]),
    }
    magnitudes = np.abs(x.astype(np.float64))
    scales = {"sum": magnitudes.sum(axis=(0, 2)), "by_sample": magnitudes.sum(axis=2).reshape(-1)}
    return {name: Held(value, scales[name], "affine db") for name, value in expected.items()}


# --- All of them ----------------------------------------------------------------------------------

OPERATIONS = (
    Operation(
        "batchnorm",
        shapes=COLUMNS,
        dtypes=DTYPES,
        arguments=batchnorm_arguments,
        run=_batchnorm("train"),
        reference=batchnorm_reference,
    ),
    Operation(
        "batchnorm-test",
        shapes=COLUMNS,
        dtypes=DTYPES,
        arguments=batchnorm_arguments,
        run=_batchnorm("test"),
        reference=batchnorm_test_reference,
    ),
    Operation(
        "batchnorm-merged",
        shapes=COLUMNS,
        arguments=_only_x,
        run=_merged_moments,
        reference=_merged_moments_reference,
    ),
    Operation(
        "spatial-batchnorm",
        shapes=PLANES,
        dtypes=DTYPES,
        arguments=spatial_arguments,
        run=in_both_layouts(_spatial_batchnorm),
        reference=by_rows(batchnorm_reference),
    ),
    Operation(
        "channel-sum",
        shapes=PLANES,
        arguments=_only_x,
        run=_channel_sum,
        reference=_channel_sum_reference,
    ),
)
