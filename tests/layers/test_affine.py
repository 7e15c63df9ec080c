from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layer_cases import affine, assert_all_within, assert_gradients, both_dtypes, run

from gpubn.backend import Device
from gpubn.testing import reference
from gpubn.testing.tolerance import affine_scales

# x's shape and the number of outputs.
SHAPES = (((1, 1), 1), ((2, 3), 1), ((9, 4, 5), 7), ((33, 2, 3, 4), 10), ((100, 512), 17))


def draw(shape: tuple[int, ...], outputs: int, dtype: Any, rng: np.random.Generator) -> Any:
    features = int(np.prod(shape[1:]))
    shapes = {"x": shape, "w": (features, outputs), "b": outputs, "dout": (shape[0], outputs)}
    return {name: rng.standard_normal(shapes[name]).astype(dtype) for name in shapes}


@both_dtypes
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_values(
    device: Device, dtype: Any, shape: tuple[int, ...], outputs: int, rng: np.random.Generator
) -> None:
    arrays = draw(shape, outputs, dtype, rng)
    expected = {"out": reference.affine_forward(arrays["x"], arrays["w"], arrays["b"])}
    gradients = reference.affine_backward(arrays["dout"], arrays["x"], arrays["w"])
    expected |= zip(("dx", "dw", "db"), gradients, strict=True)
    assert_all_within("affine", run(affine, device, **arrays), expected, affine_scales(**arrays))


def test_gradients(device: Device, rng: np.random.Generator) -> None:
    assert_gradients(affine, device, **draw((3, 2, 2), 3, np.float64, rng))
