from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    Layer,
    affine,
    affine_reproducible,
    assert_all_within,
    assert_gradients,
    assert_same_bits,
    both_dtypes,
    on_device,
    on_host,
    run,
)
from numpy.typing import NDArray

from gpubn import backend, layers
from gpubn.backend import Array, Device, namespace, to_host
from gpubn.kernels import for_array
from gpubn.testing import reference
from gpubn.testing.tolerance import affine_scales

# x's shape and the number of outputs; the last one's sums are long.
SHAPES = (
    *(((1, 1), 1), ((2, 3), 1), ((9, 4, 5), 7), ((33, 2, 3, 4), 10), ((100, 512), 17)),
    ((2, 100_003), 3),
)
KINDS = ("ordinary", "of one sign", "near 1e18", "subnormal")

either_order = pytest.mark.parametrize("layer", [affine, affine_reproducible])


def draw(
    shape: tuple[int, ...], outputs: int, dtype: Any, rng: np.random.Generator, kind: str
) -> dict[str, NDArray[Any]]:
    """Return arguments; out is of x's kind, dx and dw are of dout's."""
    features = int(np.prod(shape[1:]))
    shapes = {"x": shape, "w": (features, outputs), "b": (outputs,), "dout": (shape[0], outputs)}
    arrays = {name: rng.standard_normal(shapes[name]) for name in shapes}
    if kind == "of one sign":  # a long chain's error is largest there
        arrays = {name: np.abs(array) for name, array in arrays.items()}
    elif kind == "near 1e18":
        arrays["x"] *= 1e18
    elif kind == "subnormal":
        for name in ("x", "dout"):
            arrays[name] *= 1e-40 if dtype is np.float32 else 1e-310
        arrays["b"][:] = 0  # or nothing of them is seen
    return {name: array.astype(dtype) for name, array in arrays.items()}


@either_order
@both_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_values(
    device: Device, layer: Layer, dtype: Any, kind: str, rng: np.random.Generator
) -> None:
    for shape, outputs in SHAPES:
        arrays = draw(shape, outputs, dtype, rng, kind)
        expected = {"out": reference.affine_forward(arrays["x"], arrays["w"], arrays["b"])}
        gradients = reference.affine_backward(arrays["dout"], arrays["x"], arrays["w"])
        expected |= zip(("dx", "dw", "db"), gradients, strict=True)
        results = run(layer, device, **arrays)
        assert_all_within("affine", results, expected, affine_scales(**arrays), f"{shape}")


@either_order
def test_gradients(device: Device, layer: Layer, rng: np.random.Generator) -> None:
    assert_gradients(layer, device, **draw((3, 2, 2), 3, np.float64, rng, "ordinary"))


@both_dtypes
@pytest.mark.parametrize("reproducible", [False, True])
def test_parameter_gradients_alone(
    device: Device, dtype: Any, reproducible: bool, rng: np.random.Generator
) -> None:
    arrays = draw((5, 2, 3), 4, dtype, rng, "ordinary")
    x, w, b, dout = (device.asarray(arrays[name]) for name in ("x", "w", "b", "dout"))
    _, cache = layers.affine_forward(x, w, b, reproducible)
    _, dw, db = layers.affine_backward(dout, cache)
    found = layers.affine_parameter_gradients(dout, cache)
    expected = {"dw": to_host(dw), "db": to_host(db)}
    assert_same_bits(dict(zip(("dw", "db"), map(to_host, found), strict=True)), expected)
    with pytest.raises(ValueError, match="dout has shape"):
        layers.affine_parameter_gradients(dout[:, :2], cache)


# --- Reproducible products -----------------------------------------------------------------------


def fortran(a: Array) -> Array:
    return namespace(a).asfortranarray(a)


def strided(a: Array) -> Array:
    """Every second element along every axis."""
    larger = namespace(a).full([2 * n for n in a.shape], np.nan, a.dtype)
    larger[(slice(None, None, 2),) * a.ndim] = a
    return larger[(slice(None, None, 2),) * a.ndim]


def reversed_(a: Array) -> Array:
    every_axis = (slice(None, None, -1),) * a.ndim
    return a[every_axis].copy()[every_axis]


@both_dtypes
@pytest.mark.parametrize("layout", [fortran, strided, reversed_])
def test_layouts_of_reproducible_products(
    device: Device, dtype: Any, layout: Any, rng: np.random.Generator
) -> None:
    """On every device the CPU's bits; test_layouts.py has more layouts, of smaller products."""
    arrays = draw((40, 129), 65, dtype, rng, "ordinary")
    expected = run(affine_reproducible, CPU, **arrays)
    there = on_device(device, arrays)
    for names in (("x",), ("w",), ("dout",), ("x", "w", "dout")):
        views = there | {name: layout(there[name]) for name in names}
        assert_same_bits(on_host(affine_reproducible(**views)), expected, f"{names}")


@pytest.fixture
def products(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Return a list that grows by the shapes of every reproducible product."""
    kernels, seen = for_array("gemm", device.xp.ones(1)), []
    matmul = kernels.matmul

    def spied(a: Array, b: Array) -> Array:
        seen.append((a.shape, b.shape))
        return matmul(a, b)

    monkeypatch.setattr(kernels, "matmul", spied)
    return seen


OUT, DX, DW = ((4, 3), (3, 2)), ((4, 2), (2, 3)), ((3, 4), (4, 2))


@pytest.fixture
def forward(device: Device) -> Callable[..., Any]:
    arguments = {"x": np.ones((4, 3)), "w": np.ones((3, 2)), "b": np.ones(2)}

    def forward(**choice: Any) -> Any:
        return layers.affine_forward(**on_device(device, arguments), **choice)

    return forward


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_the_environment_asks_for_reproducible_products(
    value: str,
    products: list[Any],
    forward: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, value)
    out, cache = forward()
    assert products == [OUT]
    forward(reproducible=False)
    assert products == [OUT]
    # The backward pass is as the forward pass was, whatever the environment says by then.
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, "0")
    layers.affine_backward(out, cache)
    assert products == [OUT, DW, DX]


@pytest.mark.parametrize("value", ["0", "", "false", "No", "off", None])
def test_the_environment_asks_for_the_fastest_products(
    value: str | None,
    products: list[Any],
    forward: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(backend.REPRODUCIBLE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, value)
    out, cache = forward()
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, "1")
    layers.affine_backward(out, cache)
    assert products == []
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, value or "")
    out, cache = forward(reproducible=np.True_)
    layers.affine_backward(out, cache)
    assert products == [OUT, DW, DX]


@pytest.mark.parametrize("value", ["2", "yes please", " ", "None"])
def test_the_environment_asks_for_nonsense(
    value: str, forward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, value)
    with pytest.raises(ValueError, match=f"^GPUBN_REPRODUCIBLE is '{value}', expected 1 or 0$"):
        forward()
    forward(reproducible=False)  # it is not asked then


@pytest.mark.parametrize("choice", [1, 0, "yes", 1.0, [True]])
def test_a_choice_that_is_no_bool(choice: Any, forward: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^reproducible is .*, expected True or False$"):
        forward(reproducible=choice)
