"""Layer norm, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.harness import Case
from gpubn.backend import Device, to_host
from gpubn.layers import layernorm_backward, layernorm_forward
from gpubn.testing import reference


def cases(device: Device, shapes: tuple[tuple[int, int], ...], dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for shape in shapes:
        x, dout = (device.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(2))
        gamma, beta = (device.asarray(rng.standard_normal(shape[1]).astype(dtype)) for _ in "gb")
        out, cache = layernorm_forward(x, gamma, beta, {})
        host = [np.asarray(to_host(array), np.float64) for array in (x, gamma, beta, dout)]
        expected = reference.layernorm_forward(*host[:3], 1e-5)
        np.testing.assert_allclose(to_host(out), expected, rtol=0, atol=1e-4)
        dx = layernorm_backward(dout, cache)[0]
        expected = reference.layernorm_backward(host[3], host[0], host[1], 1e-5)[0]
        np.testing.assert_allclose(to_host(dx), expected, rtol=0, atol=1e-3 * abs(expected).max())

        yield Case(
            "layernorm forward", shape, dtype, 2,
            lambda x=x, g=gamma, b=beta: layernorm_forward(x, g, b, {}),
        )  # fmt: skip
        yield Case(
            "layernorm backward", shape, dtype, 3,
            lambda dout=dout, cache=cache: layernorm_backward(dout, cache),
        )  # fmt: skip
