"""What is timed is right: results beside the float64 reference.

The reference is made to be read, not to be fast, and is NumPy on one thread. Channels of a batch
norm and samples of the other norms are independent of each other, so they go through it in blocks
that fit a cache, several at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpubn.kernels.threads import get_num_threads
from gpubn.testing import reference

Float64: TypeAlias = NDArray[np.float64]
Results: TypeAlias = Mapping[str, Float64]

EPS = 1e-5
BLOCK = 1 << 18  # elements

TOLERANCE = {"float64": 1e-11, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""The largest error, by the largest value expected: ``gpubn.testing.tolerance`` has exact bounds,
which the tests hold gpubn to; here a peer that adds up in another way has to pass too.
"""


class WrongResult(AssertionError):
    """A result is not what the reference says, so its time is of no interest."""


def close(results: Results, expected: Results, dtype: str) -> None:
    """Require every result to be near to what is expected under its name."""
    for name, result in results.items():
        right = expected[name]
        if result.shape != right.shape:
            raise WrongResult(f"{name} has shape {result.shape}, expected {right.shape}")
        error = float(np.abs(result - right).max(initial=0))
        allowed = TOLERANCE[dtype] * float(np.abs(right).max(initial=0))
        if not error <= allowed:  # a NaN is not
            raise WrongResult(f"{name} is off by {error:.3g}, at most {allowed:.3g} is accepted")


def batchnorm(
    x: Any, gamma: Any, beta: Any, dout: Any, axis: int, relu: bool = False
) -> dict[str, Float64]:
    """Return out, dx, dgamma and dbeta of batch norm in training, with a ReLU after it or not."""
    axis %= x.ndim
    expected = _like(x, "out", "dx") | _like(gamma, "dgamma", "dbeta")

    def block(channels: slice) -> None:
        at = (*(slice(None),) * axis, channels)
        x_rows, dout_rows = (reference.channels_to_rows(a[at], axis) for a in (x, dout))
        graph = reference.batchnorm_forward(x_rows, gamma[channels], beta[channels], EPS)
        out = graph.out
        if relu:
            dout_rows, out = reference.relu_backward(dout_rows, out), reference.relu_forward(out)
        dx, dgamma, dbeta = reference.batchnorm_backward_graph(dout_rows, graph)
        for name, rows in (("out", out), ("dx", dx)):
            expected[name][at] = reference.rows_to_channels(rows, x[at].shape, axis)
        expected["dgamma"][channels], expected["dbeta"][channels] = dgamma, dbeta

    _in_blocks(block, x.shape[axis], x.size)
    return expected


def batchnorm_test(
    x: Any, gamma: Any, beta: Any, mean: Any, var: Any, axis: int
) -> dict[str, Float64]:
    """Return out of batch norm in test mode."""
    axis %= x.ndim
    expected = _like(x, "out")

    def block(channels: slice) -> None:
        at = (*(slice(None),) * axis, channels)
        scale, shift, m, v = (array[channels] for array in (gamma, beta, mean, var))
        rows = reference.channels_to_rows(x[at], axis)
        out = reference.batchnorm_test(rows, scale, shift, m, v, EPS)
        expected["out"][at] = reference.rows_to_channels(out, x[at].shape, axis)

    _in_blocks(block, x.shape[axis], x.size)
    return expected


def by_sample(
    x: Any,
    dout: Any,
    forward: Callable[[Any], Float64],
    backward: Callable[[Any, Any], tuple[Float64, ...]],
    parameters: tuple[str, ...] = (),
) -> dict[str, Float64]:
    """Return out, dx and the parameters' gradients of a layer that leaves samples independent.

    ``forward(x)`` returns out, ``backward(dout, x)`` dx and the gradients, of some samples.
    """
    expected = _like(x, "out", "dx")
    sums: list[tuple[Float64, ...]] = []

    def block(samples: slice) -> None:
        expected["out"][samples] = forward(x[samples])
        expected["dx"][samples], *gradients = backward(dout[samples], x[samples])
        sums.append(tuple(gradients))

    _in_blocks(block, len(x), x.size)
    totals = (np.sum(parts, axis=0) for parts in zip(*sums, strict=True))
    return expected | dict(zip(parameters, totals, strict=True))


def _like(array: Any, *names: str) -> dict[str, Float64]:
    return {name: np.empty(array.shape, np.float64) for name in names}


def _in_blocks(run: Callable[[slice], None], count: int, elements: int) -> None:
    """Call ``run`` on slices that cover ``count`` independent units of ``elements`` in all."""
    step = max(1, BLOCK * count // elements)
    blocks = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    with ThreadPoolExecutor(get_num_threads()) as pool:
        list(pool.map(run, blocks))  # raises what a block raised
