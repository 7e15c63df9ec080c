"""Batch norm, forward in training and in test mode, and backward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.harness import Case
from gpubn.backend import Device, to_host
from gpubn.layers import batchnorm_backward, batchnorm_forward
from gpubn.testing import reference


def cases(device: Device, shapes: tuple[tuple[int, int], ...], dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for shape in shapes:
        x, dout = (device.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(2))
        gamma, beta = (device.asarray(rng.standard_normal(shape[1]).astype(dtype)) for _ in "gb")
        train, test = {"mode": "train"}, {"mode": "test"}
        out, cache = batchnorm_forward(x, gamma, beta, train)
        host = [np.asarray(to_host(array), np.float64) for array in (x, gamma, beta, dout)]
        graph = reference.batchnorm_forward(*host[:3], 1e-5)
        np.testing.assert_allclose(to_host(out), graph.out, rtol=0, atol=1e-4)
        dx = batchnorm_backward(dout, cache)[0]
        expected = reference.batchnorm_backward_graph(host[3], graph)[0]
        np.testing.assert_allclose(to_host(dx), expected, rtol=0, atol=1e-3 * abs(expected).max())

        yield Case(
            "batchnorm forward", shape, dtype, 2,
            lambda x=x, g=gamma, b=beta, p=train: batchnorm_forward(x, g, b, p),
        )  # fmt: skip
        yield Case(
            "batchnorm test mode", shape, dtype, 2,
            lambda x=x, g=gamma, b=beta, p=test: batchnorm_forward(x, g, b, p),
        )  # fmt: skip
        yield Case(
            "batchnorm backward", shape, dtype, 3,
            lambda dout=dout, cache=cache: batchnorm_backward(dout, cache),
        )  # fmt: skip
