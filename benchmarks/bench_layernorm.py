"""Layer norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import checks
from benchmarks.harness import Case, Setting
from benchmarks.layer import Layer, against, draw, parameters, passes
from benchmarks.peers import Torch
from benchmarks.shapes import ROWS, Shape
from gpubn.testing import reference


def cases(setting: Setting) -> Iterator[Case]:
    for shape in ROWS[setting.size]:
        yield from layer(setting.dtype, shape).cases(setting)


def layer(dtype: str, shape: Shape) -> Layer:
    x, dout = draw(dtype, 0, shape, shape)
    gamma, beta = parameters(dtype, 1, shape[1:], shape[1:])
    return Layer(
        op="layernorm",
        layout="2-D",
        name="layernorm",
        inputs=(x, gamma, beta),
        dout=dout,
        arguments=({},),
        gradients=("dx", "dgamma", "dbeta"),
        passes=passes(2, 3),
        peer=_peer,
        check=against(
            lambda: checks.by_sample(
                x,
                dout,
                lambda x: reference.layernorm_forward(x, gamma, beta, checks.EPS),
                lambda dout, x: reference.layernorm_backward(dout, x, gamma, checks.EPS),
                ("dgamma", "dbeta"),
            ),
            dtype,
        ),
    )


def _peer(torch: Torch) -> Callable[..., Any]:
    functional = torch.module.nn.functional

    def run(x: Any, gamma: Any, beta: Any) -> Any:
        return functional.layer_norm(x, gamma.shape, gamma, beta, checks.EPS)

    return run
