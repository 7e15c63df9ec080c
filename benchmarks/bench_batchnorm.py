"""Batch norm: training forward and backward, and test mode; with a ReLU after it or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import checks
from benchmarks.harness import Case, Setting
from benchmarks.layer import TEST, Layer, against, draw, parameters, passes
from benchmarks.peers import COMPILED, EAGER, NO_CUDNN, Torch
from benchmarks.shapes import MLP, Shape, images

RELU_MARGIN = 1e-4
"""What lies nearer to 0 may be rounded to either side of it, and gets no gradient."""


def cases(setting: Setting, relu: bool = False) -> Iterator[Case]:
    for shape in MLP[setting.size]:
        yield from _cases(setting, shape, "2-D", 1, relu)
    for shape, layout, axis in images(setting.size):
        yield from _cases(setting, shape, layout, axis, relu)


def _cases(setting: Setting, shape: Shape, layout: str, axis: int, relu: bool) -> Iterator[Case]:
    yield from training(setting.dtype, shape, layout, axis, relu).cases(setting)
    if not relu:
        yield from testing(setting.dtype, shape, layout, axis).cases(setting)


def training(dtype: str, shape: Shape, layout: str, axis: int, relu: bool = False) -> Layer:
    """Return batch norm by the batch's statistics.

    They are a pass over x before the pass that normalizes. Channels first, a channel is small
    enough to stay in a cache between the two; otherwise a channel's values lie all over x.
    """
    x, dout = draw(dtype, 0, shape, shape)
    gamma, beta = parameters(dtype, 1, *[(shape[axis],)] * 2)
    if relu:
        out = checks.batchnorm(x, gamma, beta, dout, axis)["out"]
        dout[np.abs(out) < RELU_MARGIN] = 0
    return Layer(
        op="batchnorm_relu" if relu else "batchnorm",
        layout=layout,
        name="batchnorm_relu" if relu else "batchnorm",
        inputs=(x, gamma, beta),
        dout=dout,
        arguments=({"mode": "train"}, axis),
        gradients=("dx", "dgamma", "dbeta"),
        passes=passes(2, 3) if layout == "NCHW" else passes(3, 5),
        peer=_peer(np.zeros_like(gamma), np.ones_like(gamma), relu, training=True),
        peers=(EAGER, COMPILED, NO_CUDNN),
        mixed=True,
        check=against(lambda: checks.batchnorm(x, gamma, beta, dout, axis, relu), dtype),
    )


def testing(dtype: str, shape: Shape, layout: str, axis: int) -> Layer:
    """Return batch norm by running statistics."""
    (x,) = draw(dtype, 0, shape)
    gamma, beta, mean, var = parameters(dtype, 1, *[(shape[axis],)] * 4)
    var = np.abs(var) + np.ones_like(var)
    return Layer(
        op="batchnorm",
        layout=layout,
        name="batchnorm",
        inputs=(x, gamma, beta),
        dout=x,
        arguments=({"mode": TEST, "running_mean": mean, "running_var": var}, axis),
        gradients=("dx", "dgamma", "dbeta"),
        passes={TEST: 2},
        peer=_peer(mean, var, training=False),
        peers=(EAGER, COMPILED, NO_CUDNN),
        mixed=True,
        check=against(lambda: checks.batchnorm_test(x, gamma, beta, mean, var, axis), dtype),
    )


def _peer(
    start_mean: Any, start_var: Any, relu: bool = False, *, training: bool
) -> Callable[[Torch], Callable[..., Any]]:
    """Return PyTorch's, with these running statistics; two calls where there is a ReLU."""

    def make(torch: Torch) -> Callable[..., Any]:
        functional = torch.module.nn.functional
        mean, var = torch.tensor(start_mean), torch.tensor(start_var)

        def run(x: Any, gamma: Any, beta: Any) -> Any:
            out = functional.batch_norm(x, mean, var, gamma, beta, training, 0.1, checks.EPS)
            return functional.relu(out) if relu else out

        return run

    return make
