"""Group norm, of the images of a ResNet-50 in 32 groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import checks
from benchmarks.harness import Case, Setting
from benchmarks.layer import Layer, against, draw, parameters, passes
from benchmarks.peers import Torch
from benchmarks.shapes import Shape, images
from gpubn.testing import reference

GROUPS = 32


def cases(setting: Setting) -> Iterator[Case]:
    for shape, layout, axis in images(setting.size):
        yield from layer(setting.dtype, shape, layout, axis).cases(setting)


def layer(dtype: str, shape: Shape, layout: str, axis: int) -> Layer:
    groups = math.gcd(GROUPS, shape[axis])
    x, dout = draw(dtype, 0, shape, shape)
    gamma, beta = parameters(dtype, 1, *[(shape[axis],)] * 2)
    return Layer(
        op="groupnorm",
        layout=layout,
        name="groupnorm",
        inputs=(x, gamma, beta),
        dout=dout,
        arguments=(groups, {}, axis),
        gradients=("dx", "dgamma", "dbeta"),
        passes=passes(2, 3),
        peer=lambda torch: _peer(torch, groups),
        check=against(
            lambda: checks.by_sample(
                x,
                dout,
                lambda x: reference.groupnorm_forward(x, gamma, beta, groups, checks.EPS, axis),
                lambda dout, x: reference.groupnorm_backward(
                    dout, x, gamma, groups, checks.EPS, axis
                ),
                ("dgamma", "dbeta"),
            ),
            dtype,
        ),
    )


def _peer(torch: Torch, groups: int) -> Callable[..., Any]:
    functional = torch.module.nn.functional

    def run(x: Any, gamma: Any, beta: Any) -> Any:
        return functional.group_norm(x, groups, gamma, beta, checks.EPS)

    return run
