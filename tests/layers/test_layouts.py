"""What may not show in a result: how its inputs lie in memory, threads; and where results go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layer_cases import (
    CPU,
    LAYERS,
    SHAPES,
    Arrays,
    Layer,
    affine,
    assert_same_bits,
    both_dtypes,
    draw,
    dropout_test,
    groupnorm,
    on_device,
    on_host,
    run,
)

from gpubn import layers
from gpubn.backend import Array, Device, namespace, to_host
from gpubn.kernels import compile_numba
from gpubn.kernels.threads import get_num_threads, set_num_threads

every_layer = pytest.mark.parametrize("layer", LAYERS)

# --- Layouts: each returns the same values (but "broadcast") in other memory ---------------------


def fortran(a: Array) -> Array:
    return namespace(a).asfortranarray(a)


def strided(a: Array) -> Array:
    """Every third element along every axis, between NaN."""
    return _view_of_larger(a, 3, np.s_[1::3])


def reversed_(a: Array) -> Array:
    every_axis = (slice(None, None, -1),) * a.ndim
    return a[every_axis].copy()[every_axis]


def transposed(a: Array) -> Array:
    """A part of a transposed view."""
    return _view_of_larger(a.T, 2, np.s_[::2]).T


def broadcast(a: Array) -> Array:
    """The first row, or value, over and over: a stride of 0."""
    return namespace(a).broadcast_to(a[:1], a.shape)


def offset(a: Array) -> Array:
    """Contiguous, but beginning one element after what the allocator aligned."""
    memory = namespace(a).empty(a.size + 1, a.dtype)
    memory[1:] = a.reshape(-1)
    return memory[1:].reshape(a.shape)


def columns(a: Array) -> Array:
    """The middle columns of a wider array, as of a batch cut out of a larger one."""
    wider = namespace(a).empty((*a.shape[:-1], a.shape[-1] + 4), a.dtype)
    wider[..., 2:-2] = a
    return wider[..., 2:-2]


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a: Any) -> Any:
    """Begins in the middle of an element's usual place."""
    memory = np.empty(a.nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(a.tobytes(), np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    assert not view.flags.aligned
    return view


def _view_of_larger(a: Array, times: int, part: slice) -> Array:
    xp = namespace(a)
    filler = np.nan if a.dtype.kind == "f" else 0
    larger = xp.full([times * n for n in a.shape], filler, a.dtype)
    larger[(part,) * a.ndim] = a
    return larger[(part,) * a.ndim]


def channels_last(a: Array) -> Array:
    """As PyTorch's memory format of this name: axis 1 is contiguous."""
    return _in_order(a, (0, *range(2, a.ndim), 1)) if a.ndim > 2 else a


def channels_outermost(a: Array) -> Array:
    return _in_order(a, (1, 0, *range(2, a.ndim))) if a.ndim > 2 else a


def samples_innermost(a: Array) -> Array:
    return _in_order(a, (*range(1, a.ndim), 0)) if a.ndim > 2 else a


def _in_order(a: Array, axes: tuple[int, ...]) -> Array:
    """Lay the axes out in memory in this order."""
    back = [axes.index(i) for i in range(a.ndim)]
    return a.transpose(axes).copy().transpose(back)


LAYOUTS = (fortran, strided, reversed_, transposed, broadcast, offset, columns)
NUMPY_LAYOUTS = (read_only, unaligned)  # CuPy has neither


def rows_of(layer: Layer) -> int:
    """Return more than a warp's rows, or fewer samples where each is reduced by itself."""
    return 3 if layer in SHAPES or layer is groupnorm else 35


def check_layout(layer: Layer, layout: Any, arguments: Arrays) -> None:
    """Compare with contiguous copies: one argument at a time in this layout, then all of them."""
    for names in (*([name] for name in arguments), [*arguments]):
        views = arguments | {name: layout(arguments[name]) for name in names}
        contiguous = {name: view.copy(order="C") for name, view in views.items()}
        assert_same_bits(on_host(layer(**views)), on_host(layer(**contiguous)), f"{names}")


@every_layer
@both_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(
    device: Device, layer: Layer, dtype: Any, layout: Any, rng: np.random.Generator
) -> None:
    check_layout(layer, layout, on_device(device, draw(layer, rows_of(layer), 6, dtype, rng)))


@pytest.mark.parametrize("layer", SHAPES)
@both_dtypes
@pytest.mark.parametrize("layout", [channels_last, channels_outermost, samples_innermost])
def test_layouts_of_images(
    device: Device, layer: Layer, dtype: Any, layout: Any, rng: np.random.Generator
) -> None:
    check_layout(layer, layout, on_device(device, draw(layer, rows_of(layer), 6, dtype, rng)))


@every_layer
@both_dtypes
@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
def test_numpy_layouts(layer: Layer, dtype: Any, layout: Any, rng: np.random.Generator) -> None:
    check_layout(layer, layout, draw(layer, rows_of(layer), 6, dtype, rng))


@both_dtypes
@pytest.mark.parametrize("layout", [fortran, strided, transposed])
def test_layouts_of_a_large_product(
    device: Device, dtype: Any, layout: Any, rng: np.random.Generator
) -> None:
    # A BLAS has other kernels for small products.
    check_layout(affine, layout, on_device(device, draw(affine, 100, 301, dtype, rng)))


# --- Inputs and results --------------------------------------------------------------------------


@every_layer
@both_dtypes
def test_inputs_stay_as_they_are(
    device: Device, layer: Layer, dtype: Any, rng: np.random.Generator
) -> None:
    arrays = draw(layer, 9, 5, dtype, rng)
    before = {name: array.tobytes() for name, array in arrays.items()}
    arguments = on_device(device, arrays)
    results = layer(**arguments)
    for name, result in results.items():  # a result may not lie in an input's memory either
        if result.ndim and result is not arguments.get(name):  # test mode keeps running values
            result[...] = 0
    assert {name: to_host(array).tobytes() for name, array in arguments.items()} == before


@every_layer
@both_dtypes
def test_results_are_where_the_inputs_are(
    device: Device, layer: Layer, dtype: Any, rng: np.random.Generator
) -> None:
    for name, result in layer(**on_device(device, draw(layer, 9, 5, dtype, rng))).items():
        assert namespace(result) is device.xp, name
        assert result.dtype == dtype, name


# --- Threads -------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Split work however small it is."""
    monkeypatch.setattr("gpubn.kernels.threads.WORTH_SPLITTING", 1)
    monkeypatch.setattr("gpubn.kernels.threads.PIECE", 1)
    before = get_num_threads()
    yield
    set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layer", [a for a in LAYERS if a is not dropout_test])
@both_dtypes
def test_threads_do_not_show(layer: Layer, dtype: Any, rng: np.random.Generator) -> None:
    wide = [] if "w" in draw(layer, 1, 1, dtype, rng) else [(5, 40_001)]
    for rows, columns in ((70_001, 3), (1031, 200), *wide):  # enough to be split
        samples = max(2, rows // 5) if layer in SHAPES else rows
        arrays = draw(layer, samples, columns, dtype, rng)
        set_num_threads(1)
        expected = run(layer, CPU, **arrays)
        for count in (2, 4):
            set_num_threads(count)
            what = f"{count} threads, {rows} x {columns}"
            assert_same_bits(run(layer, CPU, **arrays), expected, what)


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
def test_a_strided_input_is_copied_once(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each kernel anew."""
    copied = []
    require = np.require

    def counting(array: Any, *args: Any, **kwargs: Any) -> Any:
        copied.append(array.shape)
        return require(array, *args, **kwargs)

    monkeypatch.setattr(compile_numba.np, "require", counting)
    x = np.random.default_rng(0).standard_normal((8, 12, 12))[::2, ::3, ::3]
    out, cache = layers.batchnorm_forward(x, *np.ones((2, 4)), {"mode": "train"}, axis)
    layers.batchnorm_backward(x, cache)
    assert copied == []
    assert out.shape == x.shape


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 2, 1, 3)])
def test_any_place_of_the_channels_in_memory_is_taken_as_it_is(order: tuple[int, ...]) -> None:
    inverse = tuple(order.index(i) for i in range(4))
    x = np.random.default_rng(0).standard_normal([(3, 5, 4, 6)[i] for i in order])
    x = x.transpose(inverse)
    out, cache = layers.batchnorm_forward(x, *np.ones((2, 5)), {"mode": "train"})
    assert np.shares_memory(cache.x, x)
    assert out.strides == x.strides
    relu, cache = layers.relu_forward(out)
    assert np.shares_memory(cache.x, out)
    assert relu.strides == out.strides == layers.relu_backward(out, cache).strides
