"""What the comparisons with PyTorch share: the tolerances, random cases, and one way to compare.

Without PyTorch this module skips whatever imports it, which is every test of this folder. (A
conftest.py that skips ends pytest where the folder is named on the command line.)

PyTorch in float64, on the values that gpubn is given, stands for the truth. A result may lie from
it by the sum of

- gpubn's bound, from the table in ``gpubn.testing.tolerance``: so many units of the last place of
  the dtype that it computes with (float32 for half precision), at the scale given there;
- ``TORCH`` units of float64's last place, at the scale of the terms that PyTorch adds up, which
  are not centred;
- half a unit of the result's own last place wherever half precision rounds once at the end.

In float64 both sides' first two shares are of one size; in float32 and below the second vanishes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpubn.testing.tolerance import BOUNDS

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[compare]'")
torch.set_num_threads(1)  # for cases this small, threads cost more than the arithmetic

Arrays = dict[str, Any]

# --- Tolerances ----------------------------------------------------------------------------------

TORCH = 4.0
"""PyTorch's bound, for all operations: about twice the worst seen, as in the library's table."""

HALF_UNIT = 0.5
"""What one rounding to half precision adds, in units of the last place of the result itself."""

# --- Cases ---------------------------------------------------------------------------------------

CASES = settings(max_examples=200, deadline=None, derandomize=True, database=None)
"""Of every operation: the same cases every time, and no time limit, for kernels compile once."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16")}
DTYPES["bfloat16"] = BFLOAT16
SINGLES = {name: DTYPES[name] for name in ("float64", "float32")}


def _for_each(dtypes: Iterable[np.dtype[Any]]) -> Callable[[Callable[..., None]], Any]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def of_all(*drawn: Any) -> None:
            for dtype in dtypes:
                test(dtype, *drawn)

        signature = inspect.signature(test)
        _, *rest = signature.parameters.values()
        vars(of_all)["__signature__"] = signature.replace(parameters=rest)
        return of_all

    return decorate


# Every case is drawn once for all dtypes: to draw it takes as long as to compare it.
every_dtype = _for_each(DTYPES.values())
both_singles = _for_each(SINGLES.values())

# One, primes, 49 positions, and sizes beside a leaf's (8), a warp's (32) and a tile's (256, 1024).
EDGES = (1, 2, 3, 5, 7, 8, 9, 13, 31, 32, 33, 37, 49, 101, 127, 255, 256, 257)
LONG_EDGES = (1021, 1023, 1024, 1025, 2047, 2048, 2049)
SIZES = (*range(1, 41), *EDGES, *EDGES, *LONG_EDGES)

KINDS = ("ordinary", "ordinary", "far mean", "constant", "far sample", "small")
"""How values to be normalized lie in each set that is normalized together."""

seeds = st.integers(0, 2**32 - 1)


@functools.cache  # to make a strategy takes longer than to draw from it
def _any_of(sizes: tuple[int, ...]) -> st.SearchStrategy[int]:
    return st.sampled_from(sizes)


def size(most: int) -> st.SearchStrategy[int]:
    return _any_of(tuple(n for n in SIZES if n <= most))


@st.composite
def shapes(draw: Any, ndim: int, values: int = 1 << 14) -> tuple[int, ...]:
    """Shapes of at most so many values, any axis of which may be the longest."""
    shape, left = [1] * ndim, values
    first = draw(st.integers(0, ndim - 1)) if ndim > 1 else 0
    for axis in (*range(first, ndim), *range(first)):
        shape[axis] = draw(size(left))
        left //= shape[axis]
    return tuple(shape)


@st.composite
def image_shapes(draw: Any, ndim: int, positions: int = 1) -> tuple[int, ...]:
    """Shapes ``(N, C, ...)``, some of 49 positions, or of one where that is enough."""
    square = ndim == 4 and draw(st.integers(0, 2)) == 0
    if square:
        spatial: tuple[int, ...] = draw(st.sampled_from([(7, 7), (1, 49), (49, 1), (32, 32)]))
    else:
        spatial = draw(shapes(ndim - 2, 2100)) if draw(st.booleans()) else (1,) * (ndim - 2)
    if math.prod(spatial) < positions:
        spatial = (*spatial[:-1], positions)
    n, c = draw(shapes(2, max(2, (1 << 14) // math.prod(spatial))))
    return n, c, *spatial


def draw_values(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    kind: str,
    dtype: np.dtype[Any],
    rng: np.random.Generator,
) -> NDArray[Any]:
    """Return values of a kind, to be normalized over these axes."""
    x = rng.standard_normal(shape)
    first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(len(shape)))
    if kind == "far mean":  # half precision has no more digits
        x = 1e3 + 10 * x if dtype.itemsize == 2 else 1e4 + x
    elif kind == "constant":
        x = np.broadcast_to(x[first], shape)
    elif kind == "far sample":
        x[first] += 1e3
    elif kind == "small":  # its variance is below eps
        x *= 1e-3
    return x.astype(dtype)


def computes_with(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of parameters beside this one, which is computed with."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def wide(arrays: Mapping[str, Any]) -> Arrays:
    """Return the same values in float64; labels as they are."""
    return {
        name: array if array.dtype.kind in "iu" else array.astype(np.float64)
        for name, array in arrays.items()
    }


# --- PyTorch -------------------------------------------------------------------------------------


def tensor(array: NDArray[Any], grad: bool = False) -> Any:
    """Return a tensor of these values in memory of its own."""
    array = np.array(array, order="K")
    if array.dtype == BFLOAT16:
        result = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        result = torch.from_numpy(array)
    return result.requires_grad_(grad)


def numpy(value: Any) -> NDArray[Any]:
    """Return a tensor's values; bfloat16 as ml_dtypes has it."""
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(BFLOAT16)
    return value.numpy()


def differentiate(
    function: Callable[..., Any], arrays: Mapping[str, NDArray[Any]], dout: NDArray[Any] | None
) -> Arrays:
    """Return what PyTorch's function gives as ``out``, and the gradients of its arguments."""
    leaves = {name: tensor(array, grad=True) for name, array in arrays.items()}
    out = function(**leaves)
    out.backward(None if dout is None else tensor(dout))
    gradients = {f"d{name}": numpy(leaf.grad) for name, leaf in leaves.items()}
    return {"out": numpy(out), **gradients}


# --- Comparison ----------------------------------------------------------------------------------


class Scale(NamedTuple):
    """The magnitude of the terms that add up to a result, in gpubn and in PyTorch."""

    ours: Any
    torch: Any


_DIGITS = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}
_DIGITS["float64"] = (53, -1022)


def spacing(dtype: np.dtype[Any], magnitude: Any) -> NDArray[np.float64]:
    """Return the distance of neighbouring numbers of a dtype at a magnitude."""
    digits, lowest = _DIGITS[dtype.name]
    exponent = np.frexp(np.maximum(np.abs(magnitude), 2.0**lowest))[1]
    return np.ldexp(1.0, exponent - digits)


def margin(
    row: str, dtype: np.dtype[Any], scale: Scale, theirs: np.dtype[Any] | None = None
) -> NDArray[np.float64]:
    """Return how far a result may lie from PyTorch's before it is rounded to half precision.

    ``dtype`` is the one computed with, ``theirs`` the one that PyTorch computed with.
    """
    theirs = np.dtype(np.float64) if theirs is None else theirs
    return BOUNDS[row].units * spacing(dtype, scale.ours) + TORCH * spacing(theirs, scale.torch)


def assert_close(
    what: str,
    result: Any,
    expected: Any,
    allowed: Any,
    dtype: np.dtype[Any],
    roundings: int = 1,
) -> None:
    """Hold a result of this dtype to PyTorch's, with so many roundings to half precision."""
    result, expected = np.asarray(result), np.asarray(expected)
    assert result.dtype == dtype, what
    assert result.shape == expected.shape, what
    result, expected = result.astype(np.float64), expected.astype(np.float64)
    allowed = np.broadcast_to(allowed, expected.shape)
    if dtype.itemsize == 2:
        unit = spacing(dtype, np.abs(expected) + allowed)
        allowed = allowed + roundings * HALF_UNIT * unit
    errors = np.abs(result - expected)
    wrong = ~(errors <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        pytest.fail(
            f"{what} of {dtype.name} {expected.shape}: {wrong.sum()} of {wrong.size} are off, "
            f"first at {at}: {result[at]!r}, PyTorch's {expected[at]!r}, "
            f"apart {errors[at]:.3g}, allowed {allowed[at]:.3g}"
        )


ROUNDED = ("out", "dx")
"""Results of x's dtype; others are of the dtype computed with."""


def compare(
    op: str,
    dtype: np.dtype[Any],
    results: Mapping[str, Any],
    expected: Mapping[str, Any],
    scales: Mapping[str, Scale],
) -> None:
    """Hold every result to its row ``"<op> <result>"``, and to PyTorch's in float64."""
    assert results.keys() == expected.keys() == scales.keys()
    real = computes_with(dtype)
    for name, result in results.items():
        row = f"{op} {name}"
        allowed = margin(row, real, scales[name])
        assert_close(row, result, expected[name], allowed, dtype if name in ROUNDED else real)


def compare_mixed(
    op: str,
    dtype: np.dtype[Any],
    results: Mapping[str, Any],
    expected: Mapping[str, Any],
    scales: Mapping[str, Scale],
    *names: str,
) -> None:
    """Hold results beside half precision to PyTorch's for the same arrays.

    Then both sides have float32 parameters and compute with float32, and both round once.
    """
    real = computes_with(dtype)
    for name in names:
        row = f"{op} {name}"
        allowed = margin(row, real, scales[name], theirs=real)
        kind = dtype if name in ROUNDED else real
        assert_close(f"{row} (mixed)", results[name], expected[name], allowed, kind, roundings=2)


# --- The scale of PyTorch's terms in a normalization ----------------------------------------------


class View(NamedTuple):
    """How an operation sees x: in which shape, over which axes it normalizes, and gamma's shape."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parameter: tuple[int, ...]


def torch_scales(
    view: View,
    x: Any,
    gamma: Any,
    beta: Any,
    dout: Any,
    chain: float = 1.0,
    squared: bool = False,
    eps: float = 1e-5,
) -> dict[str, NDArray[np.float64]]:
    """Return the scales of what PyTorch adds up for out, dx, dgamma and dbeta of float64 arrays.

    It does not shift x before it takes moments: its distances from the mean have a rounding of the
    mean's own magnitude in them, and that ``chain`` times where it adds up one value after the
    other (see ``chain_growth``). With ``squared`` its dx comes from sums of products with x, not
    with the distances.
    """
    over: dict[str, Any] = {"axis": view.axes, "keepdims": True}
    sums: dict[str, Any] = {
        "axis": tuple(axis for axis, length in enumerate(view.parameter) if length == 1),
        "keepdims": True,
    }
    of_x, of_gamma = x.shape, gamma.shape
    x, g = x.reshape(view.shape), np.abs(dout).reshape(view.shape)
    gamma, beta = (np.abs(array).reshape(view.parameter) for array in (gamma, beta))
    distance = np.abs(x - x.mean(**over))
    invstd = 1 / np.sqrt((distance**2).mean(**over) + eps)
    xhat, far = distance * invstd, np.abs(x).max(**over) * invstd
    error, more = far * chain, 1 + far  # of the mean, and of the variance relatively
    largest = xhat.max(**over)
    h = g * gamma
    mean = h.mean(**over)
    dx = (h.max(**over) + mean) * more + (largest + error) * (h * xhat).mean(**over)
    dx += (largest * error + squared * far**2) * mean
    scales = {"out": gamma * (largest * more + error) + beta, "dx": invstd * dx}
    for name in scales:
        scales[name] = np.broadcast_to(scales[name], view.shape).reshape(of_x)
    scales["dgamma"] = (g * (largest * more + error)).sum(**sums).reshape(of_gamma)
    scales["dbeta"] = g.sum(**sums).reshape(of_gamma)
    return scales


def both(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None = None) -> dict[str, Scale]:
    """Return pairs of scales; the same ones where both sides add up the same terms."""
    return {name: Scale(scale, (theirs or ours)[name]) for name, scale in ours.items()}


def chain_growth(values: int, equal: bool = False) -> float:
    """Return how much more than a sum of few values one of many errs, added up in one chain.

    Its roundings add up as random ones do; those of equal values go all the same way.
    """
    return float(values) if equal else math.sqrt(values)
