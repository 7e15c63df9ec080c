"""The table of kernels/README.md, layer by layout by dtype by device: every cell is run."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gpubn import layers
from gpubn.backend import Array, Device, to_host

README = Path(__file__).parent.parent / "kernels" / "README.md"
DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
# Shapes of each layout, and the channels' axis.
LAYOUTS = {
    "`(N, C)`": [((9, 12), 1)],
    "`(N, C, ...)`": [((4, 12, 5), 1), ((3, 12, 4, 5), 1), ((2, 12, 3, 2, 5), 1)],
    "`(N, ..., C)`": [((4, 5, 12), -1), ((3, 4, 5, 12), -1), ((2, 3, 2, 5, 12), -1)],
}
# One rounding of the result, beside which float32's roundings are small; and many of float64's.
BOUNDS = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-5, "float64": 1e-13}


def rows() -> list[dict[str, str]]:
    text = README.read_text("utf-8").split("### What takes what")[1].split("\n### ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head, _, *rest = ([cell.strip() for cell in line] for line in lines)
    return [dict(zip(head, line, strict=True)) for line in rest]


def cells() -> Iterator[Any]:
    """Yield layer, layout, dtype and whether the table says yes."""
    for row in rows():
        layer = row["layer"].strip("`")
        for layout in LAYOUTS:
            for dtype in DTYPES:
                answers = {row[layout], row[dtype]}
                assert answers <= {"yes", "no"}, row
                yield pytest.param(
                    layer, layout, dtype, "no" not in answers, id=f"{layer}-{layout}-{dtype}"
                )


def arguments(layer: str, shape: tuple[int, ...], axis: int, dtype: Any) -> dict[str, Any]:
    """Draw NumPy arguments by name."""
    rng = np.random.default_rng(0)
    real = np.float64 if dtype is np.float64 else np.float32

    def draw(shape: tuple[int, ...], of: Any = real) -> NDArray[Any]:
        return rng.standard_normal(shape).astype(of)

    arrays = {"x": draw(shape, dtype), "dout": draw(shape, dtype)}
    whole = shape[1:] if layer in ("layernorm", "rmsnorm") else (shape[axis],)
    if layer == "affine":
        features = int(np.prod(shape[1:]))
        arrays |= {"w": draw((features, 7), dtype), "b": draw((7,), dtype)}
        arrays["dout"] = draw((shape[0], 7), dtype)
    if "add" in layer:
        arrays["residual"] = draw(shape, dtype)
    if "norm" in layer:
        arrays["gamma"] = draw(whole)
    if "norm" in layer and layer != "rmsnorm":
        arrays["beta"] = draw(whole)
    if layer.endswith("_relu"):  # where rounding may turn ReLU on or off, nothing comes back
        exact = {name: array.astype(np.float64) for name, array in arrays.items()}
        residual = exact.pop("residual", 0.0)
        before = run("batchnorm", axis, exact)["out"] + residual
        arrays["dout"][np.abs(before) < 0.1] = 0
    return arrays


def run(layer: str, axis: int, arrays: dict[str, Array]) -> dict[str, Array]:
    """Run a layer forward and backward; return its results by name."""
    forward, backward = (getattr(layers, f"{layer}_{way}") for way in ("forward", "backward"))
    x, dout = arrays["x"], arrays["dout"]
    others = [arrays[name] for name in ("residual", "gamma", "w", "beta", "b") if name in arrays]
    settings: list[Any] = []
    if layer == "groupnorm":
        settings = [3, {}, axis]
    elif layer.startswith("batchnorm"):
        settings = [{"mode": "train"}, axis]
    elif layer == "instancenorm":
        settings = [{}, axis]
    elif layer in ("layernorm", "rmsnorm"):
        settings = [{}]
    elif layer == "dropout":
        settings = [{"mode": "train", "p": 0.6, "seed": 3}]
    out, cache = forward(x, *others, *settings)
    gradients = backward(dout, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    names = ("x", *(name for name in ("residual", "gamma", "w", "beta", "b") if name in arrays))
    return {"out": out} | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize(("layer", "layout", "dtype", "taken"), list(cells()))
def test_cell(device: Device, layer: str, layout: str, dtype: str, taken: bool) -> None:
    for shape, axis in LAYOUTS[layout]:
        arrays = arguments(layer, shape, axis, DTYPES[dtype])
        there = {name: device.asarray(array) for name, array in arrays.items()}
        if not taken:
            with pytest.raises((TypeError, ValueError), match="expected"):
                run(layer, axis, there)
            continue
        results = run(layer, axis, there)
        exact = run(layer, axis, {name: a.astype(np.float64) for name, a in arrays.items()})
        for name, result in results.items():
            like = arrays[name[1:]] if name.startswith("d") else arrays["x"]
            assert result.dtype == like.dtype, name  # parameters' gradients as the parameters
            assert type(result) is device.xp.ndarray, name
            error = np.abs(to_host(result).astype(np.float64) - exact[name]).max()
            assert error <= BOUNDS[dtype] * np.abs(exact[name]).max(), f"{name} {shape}"


@pytest.mark.parametrize("layer", [row["layer"].strip("`") for row in rows()])
def test_no_array_is_cast(layer: str) -> None:
    """A float32 copy of a float16 array would take twice the memory of what is returned."""
    if {row["layer"].strip("`"): row["float16"] for row in rows()}[layer] == "no":
        return
    shape = (64, 36, 1024)
    arrays = arguments(layer, shape, 1, np.float16)
    run(layer, 1, arrays)  # compiled now
    forward, backward = (getattr(layers, f"{layer}_{way}") for way in ("forward", "backward"))
    assert forward
    assert backward
    tracemalloc.start()
    results = run(layer, 1, arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    returned = sum(result.nbytes for result in results.values())
    assert peak < returned + arrays["x"].nbytes, f"{peak:,} bytes for {returned:,} of results"


def test_the_table_knows_every_layer() -> None:
    forwards = {name.removesuffix("_forward") for name in layers.__all__ if "_forward" in name}
    combined = {"affine_relu", "affine_bn_relu"}  # calls of these, one after the other
    named = {row["layer"].strip("`") for row in rows()}
    assert named == {n for n in forwards - combined if not re.match("spatial_", n)}
