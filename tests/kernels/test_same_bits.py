"""The numerics contract: the CUDA kernels give the bits of their Numba pairs.

They run on the host, or with ``--device cuda`` on a GPU.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import host_cuda
from host_cuda import cupy_stand_in
from numpy.typing import NDArray

import gpubn
from gpubn.backend import namespace
from gpubn.kernels.statistics import Statistics
from gpubn.kernels.threads import get_num_threads, set_num_threads
from gpubn.layers import _view

DTYPES = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)
# Around the edges of a leaf (8), a lane (256), a block's columns (32), a tile (256 and 1,024).
SHAPES = (
    *((1, 1), (2, 1), (1, 7), (7, 3), (8, 32), (9, 33), (31, 31), (64, 5), (17, 256)),
    *((255, 4), (256, 3), (257, 2), (1025, 3), (2049, 1), (9001, 2)),
    *((5, 257), (3, 2047), (2, 2049), (2, 9001)),
)
# (I, B, C, S): samples over the edge of a leaf, of a batch, of the buffer of 1,024, of CUDA's tile
# of 2,048; instances with rows of channels (S = 1) and with planes.
VIEWS = (
    *((1, 1, 1, 9), (1, 3, 2, 5), (1, 4, 3, 49), (1, 7, 1, 3), (1, 2, 3, 1025), (1, 1, 2, 9001)),
    *((1, 1, 5, 2049), (3, 1, 2, 7), (2, 3, 2, 683), (3, 5, 4, 1), (2, 257, 33, 1), (5, 1, 300, 1)),
)
# The host runs the threads of a row one after another: fewer rows.
ROW_SHAPES = tuple(shape for shape in SHAPES if shape[0] <= 257)
VALUES = (
    "ordinary",
    "mean 1e6",
    "constant",
    "near 1e18",
    "near 1e30",
    "subnormal",
    "special",
    "outlier",
)


@pytest.fixture(autouse=True)
def cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """A CuPy: the real one with ``--device cuda``, else the stand-in."""
    if "cuda" in (request.config.getoption("device") or []):
        with gpubn.use("cuda"):
            yield
    else:
        with host_cuda():
            yield


def values(kind: str, shape: tuple[int, ...], dtype: type, rng: np.random.Generator) -> Any:
    x = rng.standard_normal(shape)
    if kind == "mean 1e6":
        x = 1e6 + 0.5 * x
    elif kind == "constant":
        x = np.full(shape, 0.1)
    elif kind == "near 1e18":
        x = 1e18 * (1 + 0.1 * x)
    elif kind == "near 1e30":
        x = 1e30 * x
    elif kind == "outlier":  # in float32 its square overflows, and the variance of a row does not
        x.flat[x.size // 3] = 3e19
    elif kind == "subnormal":
        x = x * (1e-40 if dtype is np.float32 else 1e-310)
    elif kind == "special":
        x.flat[:: max(1, x.size // 7)] = rng.choice(
            [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45], len(x.flat[:: max(1, x.size // 7)])
        )
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def both(op: str, call: Callable[..., tuple[Any, ...]], *arrays: NDArray[Any]) -> None:
    """Run ``call(kernels, *arrays)`` on either half of a pair and compare every result's bits."""
    import cupy

    there = [cupy.asarray(array) for array in arrays]
    cuda = call(importlib.import_module(f"gpubn.kernels.{op}_cuda"), *there)
    numba = call(importlib.import_module(f"gpubn.kernels.{op}_numba"), *arrays)
    for i, (a, b) in enumerate(zip(cuda, numba, strict=True)):
        assert_same_bits(cupy.asnumpy(a), b, f"{op} result {i}")


def assert_same_bits(a: NDArray[Any], b: NDArray[Any], what: str) -> None:
    assert a.shape == b.shape, what
    assert a.dtype == b.dtype, what
    integer = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    differ = (a.view(integer) != b.view(integer)) & ~(np.isnan(a) & np.isnan(b))
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        pytest.fail(
            f"{what}: {differ.sum()} of {a.size} differ, first at {at}: {a[at]!r} and {b[at]!r}"
        )


@pytest.fixture(params=VALUES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which the host runs threads: a missing barrier shows in one of the two."""
    monkeypatch.setattr(cupy_stand_in, "thread_order", request.param)


in_either_order = pytest.mark.parametrize(
    ("kind", "thread_order"),
    [*((kind, "ascending") for kind in VALUES), ("ordinary", "reversed")],
    indirect=True,
)


def channels(count: int, dtype: type, rng: np.random.Generator) -> tuple[Any, Any]:
    return rng.standard_normal(count).astype(dtype), rng.standard_normal(count).astype(dtype)


def batchnorm(
    kernels: Any, x: Any, dout: Any, gamma: Any, beta: Any, mean: Any, var: Any
) -> tuple[Any, ...]:
    """Return what every function gives; ``x`` is (I, B, C, S)."""
    k = kernels.shift(x)
    running = (mean, var)
    mean, var = kernels.moments(x, k)
    invstd, scale = kernels.statistics(var, gamma, 1e-5)
    channels = Statistics(k, mean, invstd, scale, beta)
    out = [kernels.normalize(x, channels, *extra) for extra in ((), (None, True), (dout, True))]
    results = [k, mean, var, invstd, scale, *out]
    for relu in (False, True):
        sums = kernels.backward_sums(dout, x, channels, relu)
        gradients = kernels.gradients(scale, *sums, x.shape[1] * x.shape[3])
        dx = kernels.backward_dx(dout, x, channels, gradients, relu)
        results += [*sums, *gradients, dx, kernels.backward_dx_fixed(dout, x, channels, relu)]
    results += kernels.backward_sums_add_relu(dout, out[-1], x, channels)
    for correction in (1.0, 1.5):
        results += kernels.running_update(*running, k, mean, var, 0.9, correction)
    return tuple(results)


@in_either_order
def test_batchnorm(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    views = [(1, rows, columns, 1) for rows, columns in SHAPES]
    for shape in (*views, *VIEWS):
        x, dout = values(kind, shape, dtype, rng), values("ordinary", shape, dtype, rng)
        count = shape[0] * shape[2]
        affine, running = channels(count, dtype, rng), channels(count, dtype, rng)
        both("batchnorm", batchnorm, x, dout, *affine, *running)


@pytest.mark.parametrize("half", HALVES, ids=lambda dtype: np.dtype(dtype).name)
def test_batchnorm_of_half_precision(half: Any, kind: str, rng: np.random.Generator) -> None:
    for shape in ((1, 257, 33, 1), *VIEWS):
        x, dout = values(kind, shape, half, rng), values("ordinary", shape, half, rng)
        count = shape[0] * shape[2]
        affine, running = channels(count, np.float32, rng), channels(count, np.float32, rng)
        both("batchnorm", batchnorm, x, dout, *affine, *running)


def groupnorm(kernels: Any, x: Any, gamma: Any, mean: Any, var: Any) -> tuple[Any, ...]:
    """Return what every function gives, for groups of every size; ``x`` is (I, B, C, S)."""
    samples = x.shape[1] * x.shape[3]
    results = []
    for size in (n for n in (1, 2, 3, x.shape[2]) if x.shape[2] % n == 0):
        results.append(kernels.shift(x, size))
        results += kernels.merge_channels(mean, abs(var), size, samples)
        results += kernels.gradients(gamma, abs(var), mean, var, size, samples)
    return tuple(results)


@in_either_order
def test_groupnorm(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    for shape in (*VIEWS, (2, 1, 2049, 1), (1, 1, 60, 5)):
        count = shape[0] * shape[2]
        mean, var = (values(kind, (1, count), dtype, rng)[0] for _ in range(2))
        x = values(kind, shape, dtype, rng)
        both("groupnorm", groupnorm, x, channels(count, dtype, rng)[0], mean, var)


def layernorm(kernels: Any, x: Any, dout: Any, gamma: Any, beta: Any) -> tuple[Any, ...]:
    out, *stats = kernels.forward(x, gamma, beta, 1e-5)
    return (out, *stats, *kernels.backward(dout, x, gamma, *stats))


@in_either_order
def test_layernorm(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    for shape in ROW_SHAPES:
        x, dout = values(kind, shape, dtype, rng), values("ordinary", shape, dtype, rng)
        both("layernorm", layernorm, x, dout, *channels(shape[1], dtype, rng))


@pytest.mark.parametrize("half", HALVES, ids=lambda dtype: np.dtype(dtype).name)
def test_rows_of_half_precision(half: Any, kind: str, rng: np.random.Generator) -> None:
    for shape in ((7, 3), (17, 256), (3, 2047)):
        x, dout = values(kind, shape, half, rng), values("ordinary", shape, half, rng)
        gamma, beta = channels(shape[1], np.float32, rng)
        both("layernorm", layernorm, x, dout, gamma, beta)
        both("rmsnorm", rmsnorm, x, dout, gamma)
        both("relu", relu, x, dout)
        both("dropout", dropout, x)


def rmsnorm(kernels: Any, x: Any, dout: Any, gamma: Any) -> tuple[Any, ...]:
    out, invrms = kernels.forward(x, gamma, 1e-5)
    return (out, invrms, *kernels.backward(dout, x, gamma, invrms))


@in_either_order
def test_rmsnorm(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    for shape in ROW_SHAPES:
        x, dout = values(kind, shape, dtype, rng), values("ordinary", shape, dtype, rng)
        both("rmsnorm", rmsnorm, x, dout, channels(shape[1], dtype, rng)[0])


# Around the edges of a leaf, of what 8 lanes, a warp and 16 warps hold of a row, and of what they
# hold in backward; where a chunk is 16 bytes, less, and a single value.
ROW_LENGTHS = (
    *(1, 7, 8, 9, 31, 64, 65, 100, 256, 257, 512, 516, 768, 1000, 1023, 1024, 1025),
    *(4096, 4097, 5000, 8192, 8200, 20_000),
)
STORED = (*DTYPES, *HALVES)


@pytest.fixture(params=[256, 1, 1 << 30], ids=lambda blocks: f"{blocks} blocks")
def enough_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """For how many blocks a gradient's rows are shared out: so rows of a block, and parts."""
    cuda = importlib.import_module("gpubn.kernels.layernorm_cuda")
    monkeypatch.setattr(cuda, "_ENOUGH_BLOCKS", request.param)
    return int(request.param)


@pytest.mark.parametrize("stored", STORED, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("thread_order", ["ascending", "reversed"], indirect=True)
def test_rows_of_every_length(stored: Any, rng: np.random.Generator, thread_order: None) -> None:
    for columns in ROW_LENGTHS:
        for rows in (3, 19):
            x, dout = (values("ordinary", (rows, columns), stored, rng) for _ in range(2))
            gamma, beta = channels(columns, parameter_of(stored), rng)
            both("layernorm", layernorm, x, dout, gamma, beta)
            both("rmsnorm", rmsnorm, x, dout, gamma)


@pytest.mark.parametrize("thread_order", ["ascending", "reversed"], indirect=True)
def test_many_rows(enough_blocks: int, rng: np.random.Generator, thread_order: None) -> None:
    for shape in ((8193, 3), (33_000, 2), (1000, 64), (700, 100), (130, 768), (130, 4100)):
        x, dout = (values("ordinary", shape, np.float32, rng) for _ in range(2))
        gamma, beta = channels(shape[1], np.float32, rng)
        both("layernorm", layernorm, x, dout, gamma, beta)
        both("rmsnorm", rmsnorm, x, dout, gamma)


def parameter_of(stored: Any) -> Any:
    return stored if stored in DTYPES else np.float32


@pytest.mark.parametrize("stored", STORED, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("skipped", [1, 2, 4])
def test_rows_that_begin_anywhere(stored: Any, skipped: int, rng: np.random.Generator) -> None:
    """Arrays that are views may lie at addresses that are no multiple of 16 bytes."""

    def moved(array: Any, by: int = skipped) -> Any:
        if isinstance(array, np.ndarray):
            return array
        whole = namespace(array).empty(array.size + by, array.dtype)
        whole[by:] = array.ravel()
        return whole[by:].reshape(array.shape)

    def run(kernels: Any, x: Any, dout: Any, gamma: Any, beta: Any) -> tuple[Any, ...]:
        empty_like = namespace(x).empty_like
        results = [*layernorm(kernels, moved(x), dout, gamma, beta)]
        results += layernorm(kernels, x, moved(dout), moved(gamma), beta)
        results += layernorm(kernels, x, dout, gamma, moved(beta, 1))
        out, *stats = kernels.forward(x, gamma, beta, 1e-5, moved(empty_like(x)))
        dx = moved(empty_like(x))
        return (*results, out, *kernels.backward(dout, x, gamma, *stats, dx))

    for shape in ((5, 64), (3, 768), (2, 4104)):
        x, dout = (values("ordinary", shape, stored, rng) for _ in range(2))
        both("layernorm", run, x, dout, *channels(shape[1], parameter_of(stored), rng))


def test_rows_of_minus_zero(dtype: Any, rng: np.random.Generator) -> None:
    """Leaves that a row or a block has not add nothing, not even +0; values of a leaf add +0."""
    for rows in (1, 8, 9, 16, 24, 40):
        for columns in (1, 8, 9, 24, 100, 264, 768):
            x = values("ordinary", (rows, columns), dtype, rng)
            dout, gamma = np.full_like(x, -0.0), np.ones(columns, dtype)
            both("layernorm", layernorm, x, dout, gamma, gamma)
            both("layernorm", layernorm, np.zeros_like(x), dout, gamma, -gamma * 0)
            both("rmsnorm", rmsnorm, abs(x), dout, gamma)


@pytest.mark.parametrize(
    ("columns", "dtype", "skipped", "chunk"),
    [
        *((768, np.float32, 0, 4), (768, np.float32, 1, 1), (768, np.float32, 2, 2)),
        *((766, np.float32, 0, 2), (765, np.float32, 0, 1), (766, np.float64, 0, 2)),
        *((768, np.float16, 0, 8), (772, np.float16, 0, 4), (768, np.float16, 4, 4)),
    ],
)
def test_what_is_read_at_once(columns: int, dtype: Any, skipped: int, chunk: int) -> None:
    import cupy

    cuda = importlib.import_module("gpubn.kernels.layernorm_cuda")
    x = cupy.empty(2 * columns + skipped, dtype)[skipped:].reshape(2, columns)
    assert cuda._chunk(columns, x, cupy.empty(columns, parameter_of(dtype))) == chunk


def relu(kernels: Any, x: Any, dout: Any) -> tuple[Any, ...]:
    return kernels.forward(x), kernels.backward(dout, x)


def dropout(kernels: Any, x: Any) -> tuple[Any, ...]:
    seed = 2**64 - 12345
    return kernels.apply(x, 0.7, seed, 3, 2**32 - 1), kernels.apply(x, 1.0, seed, 0, 0)


def test_relu_and_dropout(kind: str, dtype: Any, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        x, dout = values(kind, shape, dtype, rng), values("special", shape, dtype, rng)
        both("relu", relu, x, dout)
        both("dropout", dropout, x)


def sums(kernels: Any, x: Any) -> tuple[Any, ...]:
    return kernels.channel_sum(x), kernels.square_sum(x)


@in_either_order
def test_sums(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    views = [(1, rows, columns, 1) for rows, columns in SHAPES]
    for shape in (*views, *VIEWS):
        both("samples", sums, values(kind, shape, dtype, rng))


def test_samples_have_one_order_in_every_layout(
    kind: str, dtype: Any, rng: np.random.Generator
) -> None:
    """Channels at their place in memory, last, and first: the same samples, the same bits."""
    kernels = importlib.import_module("gpubn.kernels.batchnorm_numba")
    for shape in ((4, 3, 49), (2, 3, 1025), (31, 5, 8), (3, 2, 9001)):
        x, dout = values(kind, shape, dtype, rng), values("ordinary", shape, dtype, rng)
        affine, running = channels(shape[1], dtype, rng), channels(shape[1], dtype, rng)
        expected = None
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2)):
            x, dout = (in_memory(array, order) for array in (x, dout))
            view = _view.of_batch(x, 1)
            assert view.order == order
            results = batchnorm(kernels, view.take(x), view.take(dout), *affine, *running)
            results = tuple(view.give(a).copy() if a.ndim == 4 else a for a in results)
            expected = expected or results
            for i, (a, b) in enumerate(zip(results, expected, strict=True)):
                assert_same_bits(a.copy("C"), b.copy("C"), f"{order} result {i}")


def in_memory(array: NDArray[Any], order: tuple[int, ...]) -> NDArray[Any]:
    """Return the same array with its axes in this order in memory."""
    inverse = tuple(order.index(i) for i in range(array.ndim))
    return np.ascontiguousarray(array.transpose(order)).transpose(inverse)


def update_rules(kernels: Any, w: Any, dw: Any, state: Any) -> tuple[Any, ...]:
    out = [namespace(w).empty_like(w) for _ in range(11)]
    betas = (0.9, 0.999, 0.271, 0.002997, 1e-8)
    kernels.sgd(w, dw, 1e-2, out[0])
    kernels.sgd_momentum(w, dw, state, 1e-2, 0.9, out[1], out[2])
    kernels.rmsprop(w, dw, state, 1e-2, 0.99, 1e-8, out[3], out[4])
    kernels.adam(w, dw, state, state, 1e-3, *betas, 1e-2, 500, *out[5:8])
    kernels.adam(w, dw, state, state, 1e-3, *betas, 0.0, 0, *out[8:11])
    return tuple(out)


def test_update_rules(kind: str, dtype: Any, rng: np.random.Generator) -> None:
    w, dw, state = (values(kind, (3, 333), dtype, rng) for _ in range(3))
    both("optimizer", update_rules, w, dw, np.abs(state))


def elementary(kernels: Any, x: Any) -> tuple[Any, ...]:
    return kernels.exp(x), kernels.log(x)


def test_exp_and_log(kind: str, dtype: Any, rng: np.random.Generator) -> None:
    for scale in (1, 30, 300):
        both("elementary", elementary, values(kind, (3, 1001), dtype, rng) * dtype(scale))


def losses(kernels: Any, x: Any, y: Any) -> tuple[Any, ...]:
    return (*kernels.softmax_loss(x, y), *kernels.svm_loss(x, y), kernels.count_correct(x, y))


@in_either_order
def test_losses(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    for shape in ROW_SHAPES:
        x, y = values(kind, shape, dtype, rng), rng.integers(0, shape[1], shape[0])
        if kind == "ordinary":
            x = np.round(x)  # so that several scores are the largest
        both("losses", losses, x, y)


def l2(kernels: Any, x: Any, y: Any) -> tuple[Any, ...]:
    kernels.add_scaled(y, x, 0.3)
    return kernels.sum_of_squares(x), y


@in_either_order
def test_l2(kind: str, dtype: Any, rng: np.random.Generator, thread_order: None) -> None:
    for shape in SHAPES:
        x, y = values(kind, shape, dtype, rng), values("special", shape, dtype, rng)
        both("l2", l2, x, y)


# (M, K, N) around the edges of tiles (16 to 128 on CUDA, 6 x 8 or 6 x 16 on the CPU), of a block of
# rows (576), of a slab of k (16) and of a panel (256).
PRODUCTS = (
    *((1, 1, 1), (2, 3, 1), (7, 15, 17), (6, 16, 16), (16, 17, 8), (33, 31, 15), (64, 33, 65)),
    *((129, 5, 9), (5, 255, 3), (13, 257, 33), (3, 769, 130), (1, 1000, 1), (581, 259, 35)),
)


def products(kernels: Any, a: Any, b: Any, bias: Any) -> tuple[Any, ...]:
    """Return a @ b, from arrays and from transposed arrays, and its sum with a bias."""
    xp = namespace(a)
    a_lying, b_lying = (xp.ascontiguousarray(array.T).T for array in (a, b))
    out = kernels.matmul(a, b)
    with_bias = out.copy()
    kernels.add_bias(with_bias, bias)
    others = [kernels.matmul(*pair) for pair in ((a_lying, b), (a, b_lying), (a_lying, b_lying))]
    return (out, *others, with_bias)


TILES = [
    *((np.float32, tile) for tile in (128, 64, 32, 16)),
    *((np.float64, t) for t in (64, 32, 16)),
]


@pytest.mark.parametrize(("dtype", "tile"), TILES)
@in_either_order
def test_products(
    kind: str,
    dtype: Any,
    tile: int,
    rng: np.random.Generator,
    thread_order: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = importlib.import_module("gpubn.kernels.gemm_cuda")
    sizes = dict(cuda._tiles_for(np.dtype(dtype)))
    assert set(sizes) == {size for kind_of, size in TILES if kind_of is dtype}
    monkeypatch.setattr(cuda, "_tile", lambda *_: (tile, sizes[tile]))
    for m, k, n in PRODUCTS if kind == "ordinary" else PRODUCTS[3:7]:
        a, b = values(kind, (m, k), dtype, rng), values(kind, (k, n), dtype, rng)
        both("gemm", products, a, b, channels(n, dtype, rng)[0])


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is double here")
@pytest.mark.parametrize("shape", PRODUCTS)
def test_product_is_one_chain_of_fused_multiply_adds(
    shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    m, k, n = shape
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n)))
    chain = np.zeros((m, n), np.float32)
    for i in range(k):
        # In long double (64 bits or more) a product of floats is exact, and so is the sum unless
        # the two are far apart; rounding twice then differs from rounding once in a case of 2^40.
        exact = np.multiply.outer(a[:, i].astype(np.longdouble), b[i].astype(np.longdouble))
        chain = (exact + chain).astype(np.float32)
    kernels = importlib.import_module("gpubn.kernels.gemm_numba")
    assert_same_bits(kernels.matmul(a, b), chain, "matmul")


def test_a_chain_may_end_at_minus_zero() -> None:
    """What lies beyond the last k adds nothing, not even +0."""
    tiny = np.full((1, 1), 1e-30, np.float32)
    both("gemm", lambda kernels, a, b: (kernels.matmul(a, b),), tiny, -tiny)
    kernels = importlib.import_module("gpubn.kernels.gemm_numba")
    assert np.signbit(kernels.matmul(tiny, -tiny)).all()


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX's")
@pytest.mark.parametrize("form", ["array", "transposed"])
def test_products_read_nothing_beyond_their_operands(form: str) -> None:
    """Rows that a tile has and the matrix has not are not read: behind it there may be nothing."""
    code = f"""
import ctypes, mmap, os
import numpy as np
from gpubn.kernels import gemm_numba
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
# One row more than whole tiles have, 7 or 31, and no more columns than one vector has.
a = np.frombuffer(memory, np.float32, 7 * 31, page - 4 * 7 * 31).reshape(7, 31)
a[:] = 1
a = a.T if {form == "transposed"} else a
out = gemm_numba.matmul(a, np.ones((a.shape[1], 16), np.float32))
assert (out == a.shape[1]).all()
os._exit(0)  # the mapping is still lent
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("shape", "processors", "tile"),
    [
        ((1024, 1024), 132, 64),
        ((2048, 2048), 132, 128),
        ((1408, 1536), 132, 128),  # 11 by 12 blocks: just enough
        ((1408, 1408), 132, 64),
        ((200, 100), 132, 16),
        ((1, 1), 1, 128),
    ],
)
def test_a_tile_gives_every_multiprocessor_a_block(
    shape: tuple[int, int], processors: int, tile: int
) -> None:
    cuda = importlib.import_module("gpubn.kernels.gemm_cuda")
    assert cuda._tile(*shape, np.dtype(np.float32), processors)[0] == tile
    assert cuda._tile(*shape, np.dtype(np.float64), processors)[0] == min(tile, 64)


def merged_and_together(kernels: Any, x: Any) -> tuple[Any, ...]:
    x = x[None, :, :, None]
    k = kernels.shift(x)
    rows = x.shape[1]
    parts = [kernels.moments(x[:, i : i + 256], k) for i in range(0, rows, 256)]
    mean, var = (namespace(x).stack([part[i] for part in parts]) for i in range(2))
    return (*kernels.merge_moments(mean, var, 256, rows), *kernels.moments(x, k))


def test_moments_merge_as_if_taken_together(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1000, 5)).astype(np.float32)
    both("batchnorm", merged_and_together, x)
    kernels = importlib.import_module("gpubn.kernels.batchnorm_numba")
    mean, var, mean_together, var_together = merged_and_together(kernels, x)
    assert_same_bits(mean, mean_together, "mean")
    assert_same_bits(var, var_together, "var")


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_do_not_show(
    threads: int, dtype: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpubn.kernels.threads.WORTH_SPLITTING", 1)
    monkeypatch.setattr("gpubn.kernels.threads.PIECE", 1)
    names = ("batchnorm", "groupnorm", "layernorm", "rmsnorm", "samples", "dropout", "gemm")
    norm, group, rows, rms, samples, masks, gemm, scores, norms = (
        importlib.import_module(f"gpubn.kernels.{op}_numba") for op in (*names, "losses", "l2")
    )

    def run(x: Any, dout: Any) -> list[Any]:
        gamma, beta = x[0], x[1]
        out, *stats = rows.forward(x, gamma, beta, 1e-5)
        results = [
            *(out, *rows.backward(dout, x, gamma, *stats)),
            *rms.forward(x, gamma, 1e-5),
            *(masks.apply(x, 0.5, 1, 2, 3), norms.sum_of_squares(x)),
            *(gemm.matmul(x, dout[:20].T), gemm.matmul(x.T, dout[:, :9].copy())),
            *(*scores.softmax_loss(x, labels), *scores.svm_loss(x, labels)),
        ]
        count, width = x.shape
        # Rows of channels, planes of samples, one long channel, and instances of rows.
        for view in ((1, count, width, 1), (1, 1, count, width), (1, 1, 1, -1), (count, 1, -1, 1)):
            y, g = x.reshape(view), dout.reshape(view)
            affine = [np.resize(a, y.shape[0] * y.shape[2]) for a in (gamma, beta)]
            results += batchnorm(norm, y, g, *affine, *affine)
            results += (*sums(samples, y), group.shift(y, 1))
        return results

    before = get_num_threads()
    try:
        for shape in ((70_001, 7), (1031, 300), (5, 40_001)):
            x = rng.standard_normal(shape).astype(dtype)
            dout = rng.standard_normal(shape).astype(dtype)
            labels = rng.integers(0, shape[1], shape[0])
            set_num_threads(1)
            expected = run(x, dout)
            set_num_threads(threads)
            for i, (a, b) in enumerate(zip(run(x, dout), expected, strict=True)):
                assert_same_bits(a, b, f"{shape} result {i}")
    finally:
        set_num_threads(before)
