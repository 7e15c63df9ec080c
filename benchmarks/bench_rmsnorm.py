"""RMS norm."""

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
    (gamma,) = parameters(dtype, 1, shape[1:])
    return Layer(
        op="rmsnorm",
        layout="2-D",
        name="rmsnorm",
        inputs=(x, gamma),
        dout=dout,
        arguments=({},),
        gradients=("dx", "dgamma"),
        passes=passes(2, 3),
        peer=_peer,
        check=against(
            lambda: checks.by_sample(
                x,
                dout,
                lambda x: reference.rmsnorm_forward(x, gamma, checks.EPS),
                lambda dout, x: reference.rmsnorm_backward(dout, x, gamma, checks.EPS),
                ("dgamma",),
            ),
            dtype,
        ),
    )


def _peer(torch: Torch) -> Callable[..., Any]:
    functional = torch.module.nn.functional

    def run(x: Any, gamma: Any) -> Any:
        return functional.rms_norm(x, gamma.shape, gamma, checks.EPS)

    return run
