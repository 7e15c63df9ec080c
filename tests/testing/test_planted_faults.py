"""``gpubn parity`` must be able to fail: it finds faults that are planted, one at a time.

Each is a change that somebody could make in good faith: a faster instruction, another order of a
sum, a simpler formula. Those of the CUDA text are made in the text that the stand-in for CuPy
compiles, those of a Python module in a copy of it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import host_cuda
from host_cuda import cupy_stand_in

from gpubn import cli, kernels
from gpubn.testing.parity import contestants
from gpubn.testing.parity.operations import OPERATIONS
from gpubn.testing.parity.shapes import DTYPES

KERNELS = Path(kernels.__file__).parent


@dataclass(frozen=True)
class Fault:
    """A fault: where, what was written, what is written instead, and who must notice."""

    title: str
    file: str
    lines: dict[str, str]
    op: str
    dtype: str = "float32"
    found_in: str = "cuda:0"

    def planted(self) -> str:
        text = (KERNELS / self.file).read_text("utf-8")
        for right, wrong in self.lines.items():
            assert text.count(right) == 1, f"{self.file} has {text.count(right)} times: {right}"
            text = text.replace(right, wrong)
        return text


CUDA_FAULTS = (
    # --- Orders of sums, samples.cuh
    Fault(
        "equal moments merged by the general formula",
        "samples.cuh",
        {"if (left.rows == right.rows) {": "if (false) {"},
        "batchnorm-merged",
    ),
    Fault(
        "four leaves merged one after another",
        "samples.cuh",
        {
            "merge(merge(part(first), part(first + 1)), merge(part(": (
                "merge(merge(merge(part(first), part(first + 1)), part("
            ),
            "part(first + 2), part(first + 3)));": "part(first + 2)), part(first + 3));",
        },
        "groupnorm",
    ),
    Fault(
        "a thread's leaves merged one after another",
        "samples.cuh",
        {
            "return count & 1 ? above.add(merge(held, nodes), count >> 1) : held = nodes;": (
                "return held = count ? merge(held, nodes) : nodes;"
            ),
            "return above.total(count & 1 ? merge(held, nodes) : nodes, count >> 1);": (
                "return count ? merge(held, nodes) : nodes;"
            ),
        },
        "batchnorm",
    ),
    Fault(
        "a thread's last leaf lost, where it is not full",
        "samples.cuh",
        {"counter.total(rows ? next(rows) : Result{}, full)": "counter.total(Result{}, full)"},
        "channel-sum",
    ),
    Fault(
        "the nodes of tiles in the order of the blocks backwards",
        "samples.cuh",
        {
            "node[j].set(k, at(k, number * size, channel));": (
                "node[j].set(k, at(k, (s.tiles - 1 - number) * size, channel));"
            )
        },
        "channel-sum",
    ),
    Fault(
        "eight values summed one after another",
        "samples.cuh",
        {
            "return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));": (
                "return v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7];"
            )
        },
        "channel-sum",
    ),
    Fault(
        "samples counted along the batch from its end",
        "samples.cuh",
        {
            "b = sample / s.inner;": "b = s.batch - 1 - sample / s.inner;",
            "k = sample - b * s.inner;": "k = sample % s.inner;",
            "jump = (s.channels - 1) * s.inner;": "jump = -(s.channels + 1) * s.inner;",
        },
        "channel-sum",
    ),
    Fault(
        "a leaf that goes on in the next channel",
        "samples.cuh",
        {"            at += jump;\n": ""},
        "channel-sum",
    ),
    Fault(
        "threads that share channels merged from both ends",
        "samples.cuh",
        {
            "for (int step = 1; step < blockDim.y; step *= 2) {": (
                "for (int step = blockDim.y / 2; step > 0; step /= 2) {\n"
                "        mine = &others[(threadIdx.y - step) * blockDim.x + threadIdx.x];"
            ),
            "if (threadIdx.y % (2 * step) == step) *mine": "if (threadIdx.y / step == 1) *mine",
            "if (threadIdx.y % (2 * step) == 0)\n            nodes": (
                "if (threadIdx.y < step)\n            nodes"
            ),
            "others[(threadIdx.y + step) / 2 * blockDim.x + threadIdx.x]": (
                "others[threadIdx.y * blockDim.x + threadIdx.x]"
            ),
        },
        "channel-sum",
    ),
    Fault(
        "eight squares divided after they were summed",
        "samples.cuh",
        {
            "square[i] = (e * eighth) * e;": "square[i] = e * e;",
            "node.var = rows == 8 ? sum : sum / (n * eighth);": (
                "node.var = rows == 8 ? sum * eighth : sum / n;"
            ),
        },
        "batchnorm-merged",
    ),
    Fault(
        "squares summed by fused multiply-adds",
        "samples.cuh",
        {
            "real<T> v[8];": "real<T> v[8] = {};",
            "v[i] = value(load<S>(values.of[c][i]));": (
                "v[0] = fma(load<S>(values.of[c][i]), load<S>(values.of[c][i]), v[0]);"
            ),
        },
        "sum-of-squares",
    ),
    # --- Sums along rows and of rows, rows.cuh
    Fault(
        "lanes of a row merged from both ends",
        "rows.cuh",
        {
            "for (int step = 1; step < LANES; step *= 2)": (
                "for (int step = LANES / 2; step > 0; step /= 2)"
            )
        },
        "rmsnorm",
    ),
    Fault(
        "a row's last chunk lost",
        "rows.cuh",
        {"if (L::place(t) < count) chunk[t]": "if (L::place(t) + L::V < count) chunk[t]"},
        "rmsnorm",
    ),
    Fault(
        "no barrier before a row's warps are merged",
        "rows.cuh",
        {
            "nodes[k][team + L::warp()] = total.sum[k].v;\n        __syncthreads();": (
                "nodes[k][team + L::warp()] = total.sum[k].v;"
            )
        },
        "rmsnorm",
    ),
    Fault(
        "a warp's stretch that ends with the row merged as if it were whole",
        "rows.cuh",
        {"if (L::stretch(t) + STRETCH <= count) {": "if (L::stretch(t) < count) {"},
        "layernorm",
    ),
    Fault(
        "the variance as the mean of squares less the square of the mean",
        "rows.cuh",
        {
            "R e = d[i] - mean;": "R e = d[i];",
            "Moments<T> leaf = {mean, rows(0, 8) == 8 ? sum : sum / (n * eighth), rows(0, 8)};": (
                "sum = (rows(0, 8) == 8 ? sum : sum / (n * eighth)) - mean * mean;"
                "Moments<T> leaf = {mean, sum, rows(0, 8)};"
            ),
        },
        "layernorm",
    ),
    Fault(
        "a leaf's rows summed one after another",
        "rows.cuh",
        {
            "if (i % 2 == 0) {": "if (i == 0) {",
            "sum = one[k][j] + sum;": "one[k][j] = four[k][j] = one[k][j] + sum; continue;",
        },
        "rmsnorm",
    ),
    Fault(
        "a division as a multiplication by the reciprocal",
        "rows.cuh",
        {"of.sum[k] / real<T>(columns)": "of.sum[k] * (real<T>((T)1) / real<T>(columns))"},
        "layernorm",
    ),
    # --- Half precision, real.cuh
    Fault(
        "float16 rounded towards zero",
        "real.cuh",
        {"+ 0xfffu + (magnitude >> 13 & 1u)": ""},
        "dropout",
        "float16",
    ),
    Fault(
        "float16 rounded away from zero where two are as near",
        "real.cuh",
        {"+ 0xfffu + (magnitude >> 13 & 1u)": "+ 0x1000u"},
        "dropout",
        "float16",
    ),
    Fault(
        "subnormal float16 written as zero",
        "real.cuh",
        {
            "half = float_bits((real<float>(bits_float(magnitude)) + real<float>(0.5f)).v)"
            " - 0x3f000000u;": "half = 0;"
        },
        "dropout",
        "float16",
    ),
    Fault(
        "subnormal float16 read as zero",
        "real.cuh",
        {"bits_float(sign | float_bits(tiny.v))": "bits_float(sign)"},
        "relu",
        "float16",
    ),
    Fault(
        "bfloat16 cut off",
        "real.cuh",
        {"return (raw)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);": "return (raw)(bits >> 16);"},
        "dropout",
        "bfloat16",
    ),
    Fault(
        "bfloat16 rounded up where two are as near",
        "real.cuh",
        {"bits + 0x7fffu + (bits >> 16 & 1u)": "bits + 0x8000u"},
        "dropout",
        "bfloat16",
    ),
    Fault(
        "a NaN lost",
        "real.cuh",
        {"return x > zero || is_nan(x) ? x : zero;": "return x > zero ? x : zero;"},
        "relu",
    ),
    Fault(
        "minus zero passed on",
        "real.cuh",
        {"return x > zero || is_nan(x) ? x : zero;": "return zero > x ? zero : x;"},
        "relu",
    ),
    # --- Batch norm and what follows it
    Fault(
        "normalize with a fused multiply-add",
        "batchnorm.cuh",
        {
            "store<S>(((load<S>(x) - R(shift)) - R(mean)) * R(scale) + R(beta));": (
                "store<S>(fma((load<S>(x) - R(shift)) - R(mean), R(scale), R(beta)));"
            )
        },
        "batchnorm-test",
    ),
    Fault(
        "1 / sqrt in one rounding",
        "batchnorm.cuh",
        {
            "return (R((T)1) / sqrt(R(var) + R(eps))).v;": (
                "return (T)(1 / __builtin_sqrt((double)(R(var) + R(eps)).v));"
            )
        },
        "batchnorm-test",
    ),
    Fault(
        "running averages moved by a share of the difference",
        "batchnorm.cuh",
        {
            "return (R(momentum) * R(running) + R(complement) * sample).v;": (
                "return (R(running) + R(complement) * (sample - R(running))).v;"
            )
        },
        "batchnorm",
    ),
    Fault(
        "what the gradient loses taken away at once",
        "batchnorm.cuh",
        {
            "(R(scale) * g - R(constant)) - xhat * R(slope)": (
                "R(scale) * g - (R(constant) + xhat * R(slope))"
            )
        },
        "batchnorm",
    ),
    Fault(
        "ReLU's gradient chosen by its input's input",
        "batchnorm.cuh",
        {
            "relu_gradient<S>(dout, batchnorm_normalize<S>(x, shift, mean, scale, beta))": (
                "relu_gradient<S>(dout, x)"
            )
        },
        "batchnorm-relu-test",
    ),
    Fault(
        "ReLU's gradient chosen before the output was rounded",
        "batchnorm.cuh",
        {
            "return relu_gradient<S>(dout, batchnorm_normalize<S>(x, shift, mean, scale, beta));": (
                "using R = real<T>;\n"
                "R y = ((load<S>(x) - R(shift)) - R(mean)) * R(scale) + R(beta), zero((T)0);\n"
                "return y > zero ? load<S>(dout) : zero;"
            )
        },
        "batchnorm-relu-test",
        "bfloat16",
    ),
    Fault(
        "a residual added before the rounding to half precision",
        "batchnorm.cuh",
        {
            "real_of<S> y = load<S>(batchnorm_normalize<S>(x, shift, mean, scale, beta));": (
                "using R = real<T>;\n"
                "R y = ((load<S>(x) - R(shift)) - R(mean)) * R(scale) + R(beta);"
            )
        },
        "batchnorm-add-relu-test",
        "float16",
    ),
    Fault(
        "a residual's gradient that ReLU did not stop",
        "batchnorm.cuh",
        {
            "write_leaf<S, L>(dresidual, leaf, g);": (
                "write_leaf<S, L>(dresidual, leaf, read_leaf<S, L>(dout, leaf));"
            )
        },
        "batchnorm-add-relu-test",
    ),
    Fault(
        "an unbiased variance that is not",
        "batchnorm.cuh",
        {"var = node.var * R(correction);": "var = node.var;"},
        "spatial-batchnorm",
    ),
    Fault(
        "statistics of the first sample's channels for those of all samples",
        "batchnorm.cuh",
        {"plane / instance * channels + plane % channels": "plane % channels"},
        "instancenorm",
    ),
    # --- Group, layer and RMS norm
    Fault(
        "a group's sum divided last",
        "groupnorm.cuh",
        {
            "real<T>(invstd) * (real<T>(sum) / real<T>(values))": (
                "real<T>(invstd) * real<T>(sum) / real<T>(values)"
            )
        },
        "instancenorm",
    ),
    Fault(
        "no epsilon",
        "rmsnorm.cuh",
        {"sqrt(sum / (d * scale) + R(eps))": "sqrt(sum / (d * scale))"},
        "rmsnorm",
    ),
    Fault(
        "squares summed as they are",
        "rmsnorm.cuh",
        {
            "(value[j] * scale) * value[j]": "value[j] * value[j]",
            "sqrt(sum / (d * scale) + R(eps))": "sqrt(sum / d + R(eps))",
        },
        "rmsnorm",
    ),
    # --- Dropout
    Fault(
        "Philox with nine rounds",
        "dropout.cuh",
        {"round < 10": "round < 9"},
        "dropout",
    ),
    Fault(
        "subnormal values flushed to zero",
        "dropout.cuh",
        {"store<S>(kept ?": "store<S>(kept && __builtin_fabs(load<S>(x).v) >= 0x1p-126 ?"},
        "dropout",
    ),
    # --- Update rules, exp and log, products, losses
    Fault(
        "adam's epsilon inside the root",
        "optimizer.cuh",
        {
            "(sqrt(v / R(correction2)) + R(epsilon))": "sqrt(v / R(correction2) + R(epsilon))",
        },
        "adam",
    ),
    Fault(
        "a step with a fused multiply-add",
        "optimizer.cuh",
        {"return (R(w) - R(lr) * R(dw)).v;": "return __builtin_fmaf(-lr, dw, w);"},
        "sgd",
    ),
    Fault(
        "exp of the platform",
        "elementary.cuh",
        {"return is_nan(x) ? x_ : y.v;": "return ::exp(x_);"},
        "exp",
    ),
    Fault(
        "a polynomial without fused multiply-adds",
        "elementary.cuh",
        {"p = fma(p, x, real<T>(terms[i]));": "p = p * x + real<T>(terms[i]);"},
        "exp",
    ),
    Fault(
        "subnormal values not scaled",
        "elementary.cuh",
        {"bool subnormal = R(f.smallest_normal) > x;": "bool subnormal = false;"},
        "log",
    ),
    Fault(
        "a product and a sum instead of a fused multiply-add",
        "gemm.cuh",
        {"sum[i][j] = fma(u[i], v[j], sum[i][j]);": "sum[i][j] = u[i] * v[j] + sum[i][j];"},
        "matmul",
    ),
    Fault(
        "the chain's last value lost",
        "gemm.cuh",
        {"k < depth - slab; k++": "k < depth - slab - 1; k++"},
        "matmul",
    ),
    Fault(
        "a slab's chain backwards",
        "gemm.cuh",
        {
            "for (int k = 0; k < SLAB; k++) multiply(buffer, k);": (
                "for (int k = 0; k < SLAB; k++) multiply(buffer, SLAB - 1 - k);"
            )
        },
        "matmul",
    ),
    Fault(
        "two chains, of even and of odd k, added at the end",
        "gemm.cuh",
        {
            "R sum[PER][PER] = {};": "R sum[PER][PER] = {}, odd[PER][PER] = {};",
            "sum[i][j] = fma(u[i], v[j], sum[i][j]);": (
                "(k % 2 ? odd : sum)[i][j] = fma(u[i], v[j], (k % 2 ? odd : sum)[i][j]);"
            ),
            "out[r * columns + c] = sum[i][j].v;": (
                "out[r * columns + c] = (sum[i][j] + odd[i][j]).v;"
            ),
        },
        "matmul",
    ),
    Fault(
        "the mean over samples as a multiplication by the reciprocal",
        "losses.cuh",
        {
            "dx[j] = ((R(dx[j]) / sum - R((T)(j == y))) / R(rows)).v;": (
                "dx[j] = ((R(dx[j]) / sum - R((T)(j == y))) * (R((T)1) / R(rows))).v;"
            )
        },
        "softmax-loss",
    ),
    Fault(
        "the row's largest score not taken away",
        "losses.cuh",
        {"R top(block_max(largest));": "R top((T)0);"},
        "softmax-loss",
    ),
    Fault(
        "the largest score found in one warp only",
        "losses.cuh",
        {"for (int step = THREADS / 2; step > 0": "for (int step = 16; step > 0"},
        "softmax-loss",
    ),
    Fault(
        "the last of equal scores taken for the first",
        "losses.cuh",
        {"bool larger = R(x[j]) > R(x[best])": "bool larger = !(R(x[best]) > R(x[j]))"},
        "count-correct",
    ),
    Fault(
        "no barrier before values of other threads are summed",
        "losses.cuh",
        {"__syncthreads();  // the sum's leaves are other threads' values": ""},
        "softmax-loss",
    ),
    Fault(
        "a logarithm of doubles in single precision",
        "elementary.cuh",
        {"R s = g / (R((T)2) + g), z": "R s = R((T)(float)(g / (R((T)2) + g)).v), z"},
        "log",
        "float64",
    ),
    Fault(
        "a step of doubles with a fused multiply-add",
        "optimizer.cuh",
        {"return (R(w) - R(lr) * R(dw)).v;": "return __builtin_fma(-lr, dw, w);"},
        "sgd",
        "float64",
    ),
)

PYTHON_FAULTS = (
    Fault(
        "a shift for each channel instead of its group",
        "groupnorm_cuda.py",
        {"(&x[0], i / size * size, size, shape)": "(&x[0], i, 1, shape)"},
        "groupnorm",
    ),
    Fault(
        "a group's channels summed backwards",
        "groupnorm_cuda.py",
        {"weighted.reshape(1, 1, -1, size)": "weighted.reshape(1, 1, -1, size)[..., ::-1]"},
        "groupnorm",
    ),
    Fault(
        "a group's channels summed in the array library's order",
        "groupnorm_cuda.py",
        {"channel_sum(weighted.reshape(1, 1, -1, size))": "weighted.reshape(-1, size).sum(axis=1)"},
        "groupnorm",
    ),
    Fault(
        "tiles that are no subtrees",
        "samples_numba.py",
        {"1 << (-(-rows // pieces) - 1).bit_length()": "-(-rows // pieces)"},
        "channel-sum",
        found_in="cpu, 2 threads",
    ),
    Fault(
        "a group's sum divided last",
        "groupnorm_numba.py",
        {"invstd * (sums / count)": "invstd * sums / count"},
        "instancenorm",
    ),
    Fault(
        "a NaN lost",
        "relu_numba.py",
        {"v > 0 or v != v": "v > 0"},
        "relu",
    ),
    Fault(
        "Philox with nine rounds",
        "dropout_numba.py",
        {"for _ in range(10):": "for _ in range(9):"},
        "dropout",
    ),
    Fault(
        "the rate taken out of the difference",
        "optimizer_numba.py",
        {
            "read(w, i, part) - lr * read(dw, i, part)": (
                "lr * (read(w, i, part) / lr - read(dw, i, part))"
            )
        },
        "sgd",
    ),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU and stand-in, whose kernels need not be fast: compiling them takes longer here."""
    monkeypatch.setattr(contestants, "other_instruction_sets", dict)
    flags = tuple("-O0" if flag == "-O2" else flag for flag in cupy_stand_in.FLAGS)
    monkeypatch.setattr(cupy_stand_in, "FLAGS", flags)
    with host_cuda():
        yield


@pytest.fixture(autouse=True)
def few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape: on CUDA each takes kernels of its own, which take the compiler seconds."""
    matmul = OPERATIONS["matmul"]
    shapes = replace(matmul.shapes, quick=((9, 33, 17),))
    monkeypatch.setitem(OPERATIONS, "matmul", replace(matmul, shapes=shapes))


@pytest.fixture
def parity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a part of the quick grid: the cases of one dtype."""

    def parity(dtype: str, *ops: str) -> tuple[int, str]:
        for op in ops:
            monkeypatch.setitem(OPERATIONS, op, replace(OPERATIONS[op], dtypes=(dtype,)))
        code, out, err = in_a_child(run, *ops)
        assert "ERROR" not in out + err  # a fault that does not compile is not found but refused
        return code, out

    def run(*ops: str) -> tuple[int, str, str]:
        code = cli.main(["parity", "--quick", *(f"--op={op}" for op in ops)])
        return code, *capsys.readouterr()

    return parity


def in_a_child(run: Callable[..., Any], *arguments: str) -> Any:
    """Return what ``run`` does in a fork of this process.

    The stand-in's kernels stay loaded, and keep the stacks of their threads: of all faults together
    they would be more than a process may map.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send() -> None:
        try:
            sender.send(run(*arguments))
        except Exception as error:
            sender.send(error)

    child = context.Process(target=send)
    with warnings.catch_warnings(), receiver:
        warnings.simplefilter("ignore", DeprecationWarning)  # our threads are ready for a fork
        child.start()
        sender.close()
        try:
            result = receiver.recv()
        finally:
            child.join()
    if isinstance(result, Exception):
        raise result
    return result


def assert_found(parity: Callable[..., tuple[int, str]], fault: Fault) -> None:
    code, out = parity(fault.dtype, fault.op)
    assert code == 1, f"parity does not see: {fault.title}\n{out}"
    assert f"the contract is BROKEN by {fault.op}." in out
    assert f" of {fault.found_in}" in out
    assert f"gpubn parity --op {fault.op} --seed " in out


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_without_a_fault(dtype: str, parity: Callable[..., tuple[int, str]]) -> None:
    faults = [fault for fault in CUDA_FAULTS + PYTHON_FAULTS if fault.dtype == dtype]
    code, out = parity(dtype, *dict.fromkeys(fault.op for fault in faults))
    assert code == 0, out


@pytest.mark.parametrize("fault", CUDA_FAULTS, ids=lambda fault: fault.title)
def test_in_the_cuda_half(
    fault: Fault, parity: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported afresh for this stand-in, and before any kernel reads its text.
    compile_cuda = importlib.import_module("gpubn.kernels.compile_cuda")
    source, planted = compile_cuda.source, fault.planted()

    def changed(*names: str) -> str:
        return "\n".join(planted if f"{name}.cuh" == fault.file else source(name) for name in names)

    monkeypatch.setattr(compile_cuda, "source", changed)
    assert_found(parity, fault)


@pytest.mark.parametrize("fault", PYTHON_FAULTS, ids=lambda fault: fault.title)
def test_in_a_python_module(
    fault: Fault,
    parity: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    copy = tmp_path / fault.file
    copy.write_text(fault.planted(), "utf-8")
    name = f"gpubn.kernels.{copy.stem}"
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert_found(parity, fault)
