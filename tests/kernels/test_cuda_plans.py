"""How CUDA cuts up reductions shows in no bit: on chip or not, by large tiles or vectors or not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import host_cuda
from host_cuda import cupy_stand_in
from numpy.typing import NDArray

from gpubn.kernels.statistics import Statistics

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
# Multiprocessors, and bytes of shared memory of a block.
PLANS = {
    "on chip": (1, 227 << 10),
    "on chip, narrow": (1 << 20, 227 << 10),
    "large tiles": (1, 0),
    "small tiles": (1 << 20, 0),
}
# (I, B, C, S): every width of a vector in either layout, and around the edges of leaves and tiles.
SHAPES = (
    *((1, 513, 1, 1), (1, 1030, 3, 1), (1, 2051, 4, 1), (1, 777, 6, 1), (1, 2310, 64, 1)),
    *((1, 70, 1023, 1), (1, 256, 40, 1), (2, 300, 12, 1), (3, 67, 5, 1), (1, 9, 256, 1)),
    *((1, 43, 3, 49), (1, 11, 3, 801), (1, 5, 2, 1004), (1, 3, 2, 7000), (1, 70, 2, 6)),
    *((3, 1, 2, 2056), (2, 2, 3, 35), (1, 2, 1, 4100), (1, 1, 2, 17001)),
)


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with host_cuda():
        yield


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["ascending", "reversed"])
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_stand_in, "thread_order", request.param)


def module(op: str) -> Any:
    return importlib.import_module(f"gpubn.kernels.{op}_cuda")


def force(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("samples"), "_device", lambda number: PLANS[plan])


def arrays(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> Any:
    """Return x, dout and a residual, and five parameters of the channels."""
    real = np.float64 if dtype is np.float64 else np.float32
    tensors = [(rng.standard_normal(shape) * 2 + 3).astype(dtype) for _ in range(3)]
    count = shape[0] * shape[2]
    return tensors, [rng.standard_normal(count).astype(real) for _ in range(4)]


def expected(x: Any, dout: Any, residual: Any, relu: bool, parameters: Any) -> Any:
    """Return what the parts give on the CPU, one after the other."""
    cpu = importlib.import_module("gpubn.kernels.batchnorm_numba")
    gamma, beta, running_mean, running_var = parameters
    k = cpu.shift(x)
    mean, var = cpu.moments(x, k)
    invstd, scale = cpu.statistics(var, gamma, 1e-5)
    running = cpu.running_update(running_mean, running_var, k, mean, var, 0.9, 1.25)
    statistics = Statistics(k, mean, invstd, scale, beta)
    out = cpu.normalize(x, statistics, residual, relu)
    sums = cpu.backward_sums(dout, x, statistics, relu)
    gradients = cpu.gradients(scale, *sums, x.shape[1] * x.shape[3])
    dx = cpu.backward_dx(dout, x, statistics, gradients, relu)
    return out, *statistics, *running, dx, *sums


def found(x: Any, dout: Any, residual: Any, relu: bool, parameters: Any) -> Any:
    """Return what one call gives; of instances only what they may share."""
    kernels = module("batchnorm")
    *affine, running_mean, running_var = parameters
    out, statistics, *running = kernels.train(
        *(x, *affine, running_mean, running_var, 1e-5, 0.9, 1.25, residual, relu)
    )
    dx, *sums = kernels.backward(dout, x, statistics, relu)
    return out, *statistics, *running, dx, *sums


def assert_same(there: Any, here: Any, what: str) -> None:
    import cupy

    for i, (a, b) in enumerate(zip(there, here, strict=True)):
        a = cupy.asnumpy(a)
        assert a.shape == b.shape, what
        assert a.dtype == b.dtype, what
        differ = (bits(a) != bits(b)) & ~(np.isnan(a) & np.isnan(b))
        assert not differ.any(), f"{what}: result {i}: {differ.sum()} of {a.size} differ"


def bits(a: NDArray[Any]) -> Any:
    return a.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize])


def put(array: NDArray[Any], offset: int = 0) -> Any:
    """Return the array on the device, so many values off from where it would be aligned."""
    import cupy

    buffer = cupy.empty(array.size + offset + 16, array.dtype)
    first = -buffer.data.ptr % 16 // array.itemsize + offset
    view = buffer[first : first + array.size].reshape(array.shape)
    view[...] = cupy.asarray(array)
    return view


@pytest.mark.parametrize("plan", PLANS)
def test_training_has_the_bits_of_its_parts(
    plan: str, dtype: Any, thread_order: None, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    force(plan, monkeypatch)
    for number, shape in enumerate(SHAPES):
        if shape[0] > 1:
            continue
        tensors, parameters = arrays(shape, dtype, rng)
        relu, add = number % 2 == 0, number % 3 == 0
        for offset in (0, 1) if number % 4 == 0 else (0,):
            x, dout, residual = (put(a, offset) for a in tensors)
            there = found(x, dout, residual if add else None, relu, [put(a) for a in parameters])
            here = expected(*tensors[:2], tensors[2] if add else None, relu, parameters)
            assert_same(there, here, f"{shape}, offset {offset}")


def parts(kernels: Any, sums: Any, x: Any, dout: Any, residual: Any, parameters: Any) -> Any:
    """Return what the functions that groupnorm calls too give, of several instances."""
    gamma, beta, *_ = parameters
    k = kernels.shift(x)
    mean, var = kernels.moments(x, k)
    invstd, scale = kernels.statistics(var, gamma, 1e-5)
    statistics = Statistics(k, mean, invstd, scale, beta)
    results = [mean, var, sums.channel_sum(x), sums.square_sum(x)]
    out = kernels.normalize(x, statistics, residual)
    results += [out, *kernels.backward_sums_add_relu(dout, out, x, statistics)]
    for relu in (False, True):
        both = kernels.backward_sums(dout, x, statistics, relu)
        gradients = kernels.gradients(scale, *both, x.shape[1] * x.shape[3])
        results += [kernels.normalize(x, statistics, relu=relu), *both]
        results += [kernels.backward_dx(dout, x, statistics, gradients, relu)]
        results += [kernels.backward_dx_fixed(dout, x, statistics, relu)]
    return results


@pytest.mark.parametrize("plan", ["large tiles", "small tiles"])
def test_parts_have_one_result(
    plan: str, dtype: Any, thread_order: None, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    force(plan, monkeypatch)
    cpu = [importlib.import_module(f"gpubn.kernels.{op}_numba") for op in ("batchnorm", "samples")]
    for number, shape in enumerate(SHAPES):
        tensors, parameters = arrays(shape, dtype, rng)
        offset = number % 3  # 0 once in three times, else misaligned
        there = parts(
            *(module("batchnorm"), module("samples"), *(put(a, offset) for a in tensors)),
            [put(a, number % 2) for a in parameters],
        )
        assert_same(there, parts(*cpu, *tensors, parameters), f"{shape}, offset {offset}")


def test_every_way_is_taken() -> None:
    """The shapes above reach every layout, and every width of a vector that there is."""
    cut = module("samples")._plan
    for itemsize in (2, 4, 8):
        for widest in (8, 16):
            layouts = {
                cut(shape, itemsize, aligned, widest, 0, 4, 0).layout
                for shape in SHAPES
                for aligned in (16, itemsize)
            }
            width = widest // max(itemsize, 4)
            columns = {f"gpubn::Columns<{w}>" for w in (1, 2, 4) if w <= width}
            planes = {f"gpubn::Planes<{w}>" for w in (1, 2, 4, 8) if w * itemsize <= 16}
            assert layouts == columns | planes
    for plan, device in PLANS.items():
        plans = [cut(shape, 4, 16, 16, 1, *device) for shape in SHAPES]
        assert any(p.shared for p in plans) == plan.startswith("on chip")
        assert any(p.tiles > 1 and p.sizes[2] > 1 for p in plans) or plan != "large tiles"
        assert any(p.tiles > 8 for p in plans) or plan != "small tiles"


HOPPER = 132, 227 << 10


@pytest.mark.parametrize(
    ("shape", "itemsize", "kept", "layout", "on_chip"),
    [
        ((1, 32, 64, 112 * 112), 4, 1, "Planes<4>", False),
        ((1, 32, 1024, 14 * 14), 4, 1, "Planes<4>", True),
        ((1, 32, 1024, 14 * 14), 2, 2, "Planes<4>", True),
        ((1, 32, 2048, 7 * 7), 4, 2, "Planes<1>", True),
        ((1, 32 * 112 * 112, 64, 1), 2, 1, "Columns<4>", False),
        ((1, 256, 1024, 1), 4, 2, "Columns<4>", True),
        ((1, 10**6, 3, 1), 4, 1, "Columns<1>", False),
        ((1, 10**6, 64, 1), 4, 1, "Columns<4>", False),
        ((1, 64, 65536, 1), 4, 1, "Columns<4>", True),
        ((1, 10**9, 1, 1), 4, 1, "Planes<4>", False),
    ],
)
def test_plans_of_a_large_device(
    shape: tuple[int, ...], itemsize: int, kept: int, layout: str, on_chip: bool
) -> None:
    plan = module("samples")._plan(shape, itemsize, 16, 16, kept, *HOPPER)
    assert plan.layout == f"gpubn::{layout}"
    assert (plan.shared > 0) == on_chip
    assert (plan.tiles == 1) == on_chip
    # Enough blocks for all multiprocessors, and not more nodes than a fiftieth of the values.
    if not on_chip:
        assert plan.tiles * plan.groups >= 2 * HOPPER[0]
        assert plan.tiles * plan.sizes[0] * 50 < np.prod(shape)


@pytest.mark.parametrize(("plan", "launches"), [("on chip", 1), ("large tiles", 2)])
def test_launches(plan: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(plan, monkeypatch)
    rng = np.random.default_rng(0)
    for shape in ((1, 1030, 12, 1), (1, 3, 2, 700)):
        tensors, parameters = arrays(shape, np.float32, rng)
        (x, dout, _), parameters = map(put, tensors), [put(a) for a in parameters]
        start = cupy_stand_in.launches
        _, statistics, *_ = module("batchnorm").train(x, *parameters, 1e-5, 0.9)
        assert cupy_stand_in.launches - start == launches
        module("batchnorm").backward(dout, x, statistics)
        assert cupy_stand_in.launches - start == 2 * launches
