"""ReLU."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import checks
from benchmarks.harness import Case, Setting
from benchmarks.layer import Layer, against, draw, passes
from benchmarks.shapes import ELEMENTS, Shape
from gpubn.testing import reference


def cases(setting: Setting) -> Iterator[Case]:
    for shape in ELEMENTS[setting.size]:
        yield from layer(setting.dtype, shape).cases(setting)


def layer(dtype: str, shape: Shape) -> Layer:
    x, dout = draw(dtype, 0, shape, shape)
    return Layer(
        op="relu",
        layout="any",
        name="relu",
        inputs=(x,),
        dout=dout,
        arguments=(),
        gradients=("dx",),
        passes=passes(2, 3),
        peer=lambda torch: torch.module.nn.functional.relu,
        check=against(
            lambda: checks.by_sample(
                x,
                dout,
                reference.relu_forward,
                lambda dout, x: (reference.relu_backward(dout, x),),
            ),
            dtype,
        ),
    )
