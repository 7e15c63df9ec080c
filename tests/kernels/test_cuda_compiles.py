"""Every CUDA kernel compiles for every supported architecture, and its arithmetic is IEEE's."""

from __future__ import annotations

import functools
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import host_cuda
from host_cuda import cupy_stand_in, nvrtc

from gpubn.kernels.statistics import Statistics
from gpubn.kernels.threads import get_num_threads

KERNELS = Path(importlib.import_module("gpubn.kernels").__file__ or "").parent
OPS = sorted(path.name.removesuffix("_cuda.py") for path in KERNELS.glob("*_cuda.py"))
ARCHES = nvrtc.ARCHES
# Instructions that flush subnormals, or round otherwise than IEEE 754.
BAD = r"\b(?:\w+\.)*ftz\.\w+|approx\.\w+|div\.full\.\w+"
# Two roundings made one, where the contract does not say so.
FUSED = r"\b(?:fma|mad)\.(?:rn\.)?f\d+"
# Kernels that read several values at once.
VECTORS = re.compile(r"(Planes|Columns)<[48]>|SAME|NEIGHBOURS")
MAY_FUSE = {"matmul", "softmax_loss", "gpubn_exp", "gpubn_log"}
ALL_DTYPES = ("float32", "float64", "float16", "bfloat16")


@functools.cache
def used_sources() -> tuple[cupy_stand_in.Source, ...]:
    """Call every kernel for every dtype, and return what it would have had CuPy compile."""
    first = len(cupy_stand_in.sources)
    with host_cuda():
        import cupy

        modules = {op: importlib.import_module(f"gpubn.kernels.{op}_cuda") for op in OPS}
        for dtype in (np.float16, ml_dtypes.bfloat16):
            use_norms(modules, cupy, dtype)
        for dtype in (np.float32, np.float64):
            use_norms(modules, cupy, dtype)
            x = cupy.asarray(np.random.default_rng(0).standard_normal((300, 5)).astype(dtype))
            gamma = x[0]
            for columns in (x[None, :, :, None], x[None, None], x[None, :, :4, None]):
                modules["samples"].channel_sum(columns)
                modules["samples"].square_sum(columns)
            modules["elementary"].exp(x)
            modules["elementary"].log(x)
            gemm, losses, l2 = modules["gemm"], modules["losses"], modules["l2"]
            with pytest.MonkeyPatch.context() as patch:
                for tile in gemm._tiles_for(x.dtype):
                    patch.setattr(gemm, "_tile", lambda *_, tile=tile: tile)
                    for a, b in ((x, x[:5]), (x.T, x), (x, x.T)):
                        gemm.matmul(a, b)
            gemm.add_bias(x, gamma)
            labels = cupy.zeros(300, np.int64)
            losses.softmax_loss(x, labels)
            losses.svm_loss(x, labels)
            losses.count_correct(x, labels)
            l2.sum_of_squares(x)
            l2.add_scaled(x, x, 0.5)
            optimizer = modules["optimizer"]
            w, state = x.ravel(), abs(x).ravel()
            optimizer.sgd(w, w, 0.1, w)
            optimizer.sgd_momentum(w, w, state, 0.1, 0.9, w, state)
            optimizer.rmsprop(w, w, state, 0.1, 0.9, 1e-8, w, state)
            optimizer.adam(
                w, w, state, state, 0.1, 0.9, 0.9, 0.1, 0.1, 1e-8, 0.0, 0, w, state, state
            )
    return tuple(cupy_stand_in.sources[first:])


def use_norms(modules: dict[str, Any], cupy: Any, dtype: Any) -> None:
    """Call what takes half precision too: channels last and first, plain and fused."""
    rng = np.random.default_rng(0)
    real = np.float64 if dtype is np.float64 else np.float32
    batchnorm, group = modules["batchnorm"], modules["groupnorm"]
    # Vectors along rows and planes, and values one by one; the last array has no vectors at all.
    for shape in ((1, 300, 8, 1), (1, 3, 5, 104), (1, 300, 5, 1)):
        x = cupy.asarray(rng.standard_normal(shape).astype(dtype))
        gamma = cupy.asarray(rng.standard_normal(shape[2]).astype(real))
        use_batchnorm(batchnorm, x, gamma)
        for device in ((1, 0), (1, 1 << 20)):  # one keeps nothing on chip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(modules["samples"], "_device", lambda _, device=device: device)
                _, channels, *_ = batchnorm.train(x, gamma, gamma, gamma, gamma, 1e-5, 0.9)
                batchnorm.backward(x, x, channels)
    misaligned = cupy.empty(x.size + 1, dtype)[1:].reshape(x.shape)
    misaligned[...] = x
    use_batchnorm(batchnorm, misaligned, gamma)
    group.shift(x, 5)
    group.merge_channels(channels.mean, channels.invstd, 5, 300)
    group.gradients(gamma, channels.invstd, gamma, gamma, 5, 300)
    # A value at a time and 16 bytes at a time; a warp, several, and more values than they hold.
    for rows in ((300, 5), (9, 256), (2, 4104)) if dtype is np.float32 else ((300, 5), (2, 4104)):
        x = cupy.asarray(rng.standard_normal(rows).astype(dtype))
        gamma = cupy.asarray(rng.standard_normal(rows[1]).astype(real))
        _, *stats = modules["layernorm"].forward(x, gamma, gamma, 1e-5)
        modules["layernorm"].backward(x, x, gamma, *stats)
        _, invrms = modules["rmsnorm"].forward(x, gamma, 1e-5)
        modules["rmsnorm"].backward(x, x, gamma, invrms)
    modules["relu"].forward(x)
    modules["relu"].backward(x, x)
    modules["dropout"].apply(x, 0.5, 1, 2, 3)


def use_batchnorm(batchnorm: Any, x: Any, gamma: Any) -> None:
    """Call what has the parts of batch norm."""
    shift = batchnorm.shift(x)
    mean, var = batchnorm.moments(x, shift)
    invstd, scale = batchnorm.statistics(var, gamma, 1e-5)
    channels = Statistics(shift, mean, invstd, scale, gamma)
    batchnorm.running_update(mean, var, shift, mean, var, 0.9)
    batchnorm.normalize(x, channels, x)
    batchnorm.backward_sums_add_relu(x, x, x, channels)
    for relu in (False, True):
        batchnorm.normalize(x, channels, relu=relu)
        sums = batchnorm.backward_sums(x, x, channels, relu)
        gradients = batchnorm.gradients(scale, *sums, 300)
        batchnorm.backward_dx(x, x, channels, gradients, relu)
        batchnorm.backward_dx_fixed(x, x, channels, relu)


def test_nothing_is_left_out() -> None:
    """Every kernel of every .cuh file and every ElementwiseKernel was called above."""
    sources = used_sources()
    called = {
        re.sub(r"^gpubn::|<.*", "", instance)
        for source in sources
        if source.kind == "raw"
        for instance in source.instances
    }
    text = "\n".join(path.read_text("utf-8") for path in KERNELS.glob("*.cuh"))
    assert called == set(re.findall(r"__global__ void (\w+)\(", text))
    called = {}
    for source in sources:
        if source.kind == "elementwise":
            dtypes = {argument.dtype for i in source.instances for argument in i.arguments}
            # Those of arrays of any precision have a kernel for each, named after it.
            name, _, dtype = source.name.rpartition("_")
            split = dtype in ALL_DTYPES
            called.setdefault(name if split else source.name, set()).update(
                {dtype} if split else dtypes
            )
    for name, dtypes in called.items():
        assert {"float32", "float64"} <= dtypes, f"{name} was not called"
        assert not dtypes & {*ALL_DTYPES[2:]} or {*ALL_DTYPES} <= dtypes, name


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_to_ieee_arithmetic(arch: str) -> None:
    sources = used_sources()
    with ThreadPoolExecutor(get_num_threads()) as pool:
        compiled = pool.map(lambda source: nvrtc.compile_source(source, arch), sources)
    for source, results in zip(sources, compiled, strict=True):
        for ptx, cubin in results:
            assert cubin
            name = source.name or re.findall(r"gpubn::(\w+)<", source.instances[0])[0]
            if source.kind == "raw" and VECTORS.search(source.instances[0]):
                assert re.search(r"ld\.global\.v[24]\.", ptx), source.instances
            bad = re.findall(BAD if name in MAY_FUSE else f"{BAD}|{FUSED}", ptx)
            assert not bad, f"{source.name} {source.instances} for {arch}: {sorted(set(bad))}"


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
def test_rows_are_read_and_written_16_bytes_at_a_time() -> None:
    """Where V values are, as the second template argument has it: ``forward<float, 4, ...>``."""
    sizes = {"float": 4, "double": 8, "gpubn::f16": 2, "gpubn::bf16": 2}
    seen = set()
    for source in used_sources():
        name = source.instances[0] if source.kind == "raw" else ""
        match = re.match(r"gpubn::((?:layer|rms)norm_\w+)<([\w:]+), (\d+), ", str(name))
        if match is None or sizes[match[2]] * int(match[3]) != 16:
            continue
        seen.add(match[1])
        [(ptx, _)] = nvrtc.compile_source(source, "9.0")
        loads, stores = (re.findall(rf"{op}\.global\S*\.(v\d\.\w\d+)", ptx) for op in ("ld", "st"))
        assert loads, name
        assert stores, name
        for access in (*loads, *stores):
            count, bits = re.findall(r"\d+", access)
            assert int(count) * int(bits) == 128, f"{name}: {access}"
        # Else only a row's statistics, or the three values that the shift is chosen from.
        assert len(re.findall(r"\bld\.global(?!\S*\.v\d)", ptx)) <= 6, name
    kinds = ("forward", "gradients", "backward_dx")
    assert seen == {f"{op}norm_{kind}" for op in ("layer", "rms") for kind in kinds}
