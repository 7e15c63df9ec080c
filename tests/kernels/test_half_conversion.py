"""Half precision: every value is widened exactly, and rounded once, to nearest, ties to even."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import host_cuda
from numpy.typing import NDArray

import gpubn
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.real_numba import narrow, stored, widen

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
every_half = pytest.mark.parametrize("half", HALVES, ids=lambda dtype: dtype.name)
every_device = pytest.mark.parametrize("convert", ["cpu", "cuda"])


@compiled
def _widen_all(x: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = widen(x[i])


@compiled
def _narrow_all(x: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = narrow(x[i], out)


_TEXT = """
namespace gpubn {
template <class S> __global__ void widen_all(const raw_of<S>* x, float* out, long long n) {
    for (long long i = threadIdx.x; i < n; i += 32) out[i] = load<S>(x[i]).v;
}
template <class S> __global__ void narrow_all(const float* x, raw_of<S>* out, long long n) {
    for (long long i = threadIdx.x; i < n; i += 32) out[i] = store<S>(real<float>(x[i]));
}
}
"""


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> Any:
    """Return a scope with a CuPy: the real one with ``--device cuda``, else the stand-in."""
    real = "cuda" in (request.config.getoption("device") or [])
    return functools.partial(gpubn.use, "cuda") if real else host_cuda


def converted(x: NDArray[Any], dtype: np.dtype[Any], device: str, cuda: Any) -> NDArray[Any]:
    """Cast between float32 and half precision by the kernels' own arithmetic."""
    out = np.empty(x.shape, dtype)
    half = dtype if dtype.itemsize == 2 else x.dtype
    if device == "cpu":
        kernel = _widen_all if dtype.itemsize == 4 else _narrow_all
        kernel(*stored(x, out))
        return out
    with cuda():
        import cupy

        compile_cuda = importlib.import_module("gpubn.kernels.compile_cuda")
        text = compile_cuda.source("real") + _TEXT
        name = "widen_all" if dtype.itemsize == 4 else "narrow_all"
        there = cupy.asarray(out)
        kernel = compile_cuda.kernel(text, name, half)
        kernel((1,), (32,), (cupy.asarray(x), there, np.int64(x.size)))
        return cupy.asnumpy(there)


def all_of(half: np.dtype[Any]) -> NDArray[Any]:
    return np.arange(1 << 16, dtype=np.uint16).view(half)


def assert_equal_values(a: NDArray[Any], b: NDArray[Any]) -> None:
    """Require the same bits, but for NaN, which is a NaN whatever its payload."""
    bits = f"u{a.itemsize}"
    nan = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
    assert ((a.view(bits) == b.view(bits)) | nan).all()


@every_half
@every_device
def test_every_value_is_widened_exactly(half: np.dtype[Any], convert: str, cuda: Any) -> None:
    x = all_of(half)
    widened = converted(x, np.dtype(np.float32), convert, cuda)
    with np.errstate(invalid="ignore"):
        assert_equal_values(widened, x.astype(np.float32))


@every_half
@every_device
def test_values_are_rounded_once_to_nearest(half: np.dtype[Any], convert: str, cuda: Any) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        every = np.sort(all_of(half).astype(np.float32))
        finite = every[np.isfinite(every)]
        # Every value, every midpoint of two neighbours, and float32's next ones on either side.
        between = finite[:-1] + (finite[1:] - finite[:-1]) / 2
        far = np.float32([65519.996, 65520, 65536, 3.39e38, 3.4028235e38, np.inf, np.nan, 1e-45])
        near = np.concatenate([finite, between, far, -far])
        stride = np.arange(0, 1 << 32, 65_521, dtype=np.uint32).view(np.float32)
        x = np.concatenate(
            [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, -np.float32(np.inf))]
        )
        for values in (x, stride):
            assert_equal_values(converted(values, half, convert, cuda), values.astype(half))
