"""More than 2**31 elements: every op's index arithmetic holds. Takes five minutes and 16 GB.

Run ``python tests/kernels/large_arrays.py [--device cuda]``. Arrays are float16, a pattern of prime
length over and over, so that an index that wraps around meets other values. Results are held to
float64 sums over pieces, and to the same layer on pieces: the ends and the places around 2**31 and
2**32 bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpubn
from gpubn import layers
from gpubn.backend import Array, to_host

PERIOD = 8191
ELEMENTS = (1 << 31) + 100_000
PIECE = 1 << 24


def pattern() -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal(PERIOD).astype(np.float16)


def large(*shape: int) -> Array:
    """Return the pattern over and over, on the device in force."""
    device = gpubn.current()
    flat = device.xp.empty(int(np.prod(shape)), np.float16)
    values = device.asarray(np.tile(pattern(), 1 + PIECE // PERIOD))
    step = len(values)
    for start in range(0, flat.size, step):  # whole periods, so that the pattern goes on
        end = min(start + step, flat.size)
        flat[start:end] = values[: end - start]
    return flat.reshape(shape)


def places(size: int) -> Iterator[slice]:
    """Yield stretches at the ends and around 2**30 and 2**31 elements."""
    for middle in (0, 1 << 30, 1 << 31, size):
        yield slice(max(0, middle - 500), min(size, middle + 500))


def pieces(x: Array) -> Iterator[NDArray[Any]]:
    """Yield pieces of the longest axis, in float64 on the host."""
    axis = int(np.argmax(x.shape))
    step = max(1, PIECE * x.shape[axis] // x.size)
    for start in range(0, x.shape[axis], step):
        piece = x[(slice(None),) * axis + (slice(start, start + step),)]
        yield np.asarray(to_host(piece), np.float64)


def moments(x: Array, axes: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return mean and variance over ``axes``, the longest one among them, in float64."""
    count = x.size // np.prod([x.shape[i] for i in range(x.ndim) if i not in axes])
    mean = sum(piece.sum(axes) for piece in pieces(x)) / count
    square = sum((piece**2).sum(axes) for piece in pieces(x)) / count
    return np.asarray(mean), np.asarray(square - mean**2)


def check(what: str, result: Any, expected: Any, tolerance: float) -> None:
    error = float(np.max(np.abs(np.asarray(result, np.float64) - expected)))
    print(f"  {what}: largest error {error:.2g}, bound {tolerance:g}", flush=True)
    assert error <= tolerance, what


def batchnorm(shape: tuple[int, ...], axis: int) -> None:
    x = large(*shape)
    channels, others = shape[axis], tuple(i for i in range(len(shape)) if i != axis)
    xp = gpubn.current().xp
    gamma, beta = xp.ones(channels, np.float32), xp.zeros(channels, np.float32)
    bn_param: dict[str, Any] = {"mode": "train", "momentum": 0.0}
    out, cache = layers.batchnorm_forward(x, gamma, beta, bn_param, axis)
    mean, var = moments(x, others)
    check("mean", to_host(bn_param["running_mean"]), mean, 1e-6)
    check("variance", to_host(bn_param["running_var"]), var, 1e-6)
    along = [1] * len(shape)
    along[axis] = channels
    mean, invstd = mean.reshape(along), 1 / np.sqrt(var.reshape(along) + 1e-5)

    def channel(of: slice) -> NDArray[Any]:
        """Return which channel the elements of a stretch belong to."""
        return np.unravel_index(np.arange(of.start, of.stop), shape)[axis]

    for of in places(x.size):
        values = np.asarray(to_host(x.reshape(-1)[of]), np.float64)
        c = channel(of)
        xhat = (values - mean.ravel()[c]) * invstd.ravel()[c]
        check(f"out {of}", to_host(out.reshape(-1)[of]), xhat, 4e-3)
    del out
    dx, dgamma, dbeta = layers.batchnorm_backward(x, cache)  # x for an upstream gradient too
    # With dout = x: dbeta = sum(x), dgamma = sum(x * xhat) = M * var * invstd.
    count = x.size // channels
    check("dbeta / M", to_host(dbeta) / count, mean.ravel(), 1e-6)
    check("dgamma / M", to_host(dgamma) / count, var * invstd.ravel(), 1e-6)
    for of in places(x.size):
        values = np.asarray(to_host(x.reshape(-1)[of]), np.float64)
        c = channel(of)
        m, s, v = mean.ravel()[c], invstd.ravel()[c], var[c]
        expected = s * ((values - m) - (values - m) * s * (v * s))
        check(f"dx {of}", to_host(dx.reshape(-1)[of]), expected, 1e-5)


def instancenorm(shape: tuple[int, int, int]) -> None:
    x = large(*shape)
    xp = gpubn.current().xp
    gamma, beta = xp.ones(shape[1], np.float32), xp.zeros(shape[1], np.float32)
    out, _ = layers.instancenorm_forward(x, gamma, beta, {})
    for n, c in np.ndindex(shape[:2]):
        mean, var = moments(x[n, c], (0,))
        for of in (slice(0, 1000), slice(shape[2] - 1000, shape[2])):
            values = np.asarray(to_host(x[n, c, of]), np.float64)
            expected = (values - mean) / np.sqrt(var + 1e-5)
            check(f"out {n}, {c}, {of}", to_host(out[n, c, of]), expected, 4e-3)


def rows(norm: str, shape: tuple[int, int]) -> None:
    x = large(*shape)
    xp = gpubn.current().xp
    parameters = [xp.ones(shape[1], np.float32), xp.zeros(shape[1], np.float32)]
    parameters = parameters[: 2 if norm == "layernorm" else 1]
    forward, backward = (getattr(layers, f"{norm}_{way}") for way in ("forward", "backward"))
    out, cache = forward(x, *parameters, {})
    for of in (slice(0, 3), slice(shape[0] - 3, shape[0])):  # a row for itself: the same bits
        alone, _ = forward(x[of].copy(), *parameters, {})
        assert (to_host(out[of]) == to_host(alone)).all(), of
    expected = sum(np.asarray(to_host(out[i : i + 8192]), np.float64).sum(0)
                   for i in range(0, shape[0], 8192))  # fmt: skip
    del out
    dout = xp.broadcast_to(xp.ones(1, np.float16), shape)
    gradients = backward(dout, cache)
    # With dout = 1, dgamma is the sum of xhat, whose values are rounded in out and not here.
    check(f"{norm} dgamma", to_host(gradients[1]), expected, 1e-3 * np.abs(expected).max() + 50)
    if norm == "layernorm":
        check("layernorm dbeta", to_host(gradients[2]), shape[0], 0)


def elementwise() -> None:
    x = large(ELEMENTS)
    out, _ = layers.relu_forward(x)
    for of in places(x.size):
        assert (to_host(out[of]) == np.maximum(to_host(x[of]), 0)).all(), of
    print("  relu: the same", flush=True)
    out, _ = layers.dropout_forward(x, {"mode": "train", "p": 0.5, "seed": 7})
    from gpubn.testing.reference import philox4x32

    for of in places(x.size):
        index = np.arange(of.start, of.stop, dtype=np.uint64)
        counter = np.zeros((len(index), 4), np.uint32)
        counter[:, 0], counter[:, 1] = index // 4 & 0xFFFFFFFF, index // 4 >> 32
        words = philox4x32(counter, np.array([7, 0], np.uint32))
        kept = words[np.arange(len(index)), index % 4] < 1 << 31
        assert (to_host(out[of]) == np.where(kept, 2 * to_host(x[of]), 0)).all(), of
    print("  dropout: the same", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    with gpubn.use(parser.parse_args().device):
        print(f"{ELEMENTS:,} elements and more on {gpubn.current().name}, {sys.platform}")
        for name, run in (
            ("batch norm, channels last", lambda: batchnorm((ELEMENTS // 3, 3), 1)),
            ("batch norm, channels first", lambda: batchnorm((2, 3, ELEMENTS // 6), 1)),
            ("instance norm", lambda: instancenorm((2, 3, ELEMENTS // 6))),
            ("layer norm", lambda: rows("layernorm", (ELEMENTS // 1025, 1025))),
            ("RMS norm", lambda: rows("rmsnorm", (ELEMENTS // 1025, 1025))),
            ("ReLU and dropout", elementwise),
        ):
            start = time.perf_counter()
            print(name, flush=True)
            run()
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print("index arithmetic holds")


if __name__ == "__main__":
    main()
