"""``gpubn parity`` must be able to fail: it finds faults that are planted, one at a time.

Each is a change that somebody could make in good faith: a faster instruction, another order of a
sum, a simpler formula. Those of the CUDA half are made in the text that the stand-in for CuPy
compiles, those of the CPU half in a copy of the module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import host_cuda

from gpubn import cli, kernels
from gpubn.testing.parity import cases, contestants
from gpubn.testing.parity.operations import OPERATIONS

KERNELS = Path(kernels.__file__).parent


@dataclass(frozen=True)
class Fault:
    """A fault: where, what was written, what is written instead, and who must notice."""

    title: str
    file: str
    lines: dict[str, str]
    op: str

    def planted(self) -> str:
        text = (KERNELS / self.file).read_text("utf-8")
        for right, wrong in self.lines.items():
            assert text.count(right) == 1, f"{self.file} has {text.count(right)} times: {right}"
            text = text.replace(right, wrong)
        return text


CUDA_FAULTS = (
    Fault(
        "normalize with a fused multiply-add",
        "batchnorm.cuh",
        {
            "return (((R(x) - R(shift)) - R(mean)) * R(scale) + R(beta)).v;": (
                "return __builtin_fmaf(((R(x) - R(shift)) - R(mean)).v, scale, beta);"
            )
        },
        "batchnorm",
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
            "return (R(momentum) * R(running) + R(complement) * R(sample)).v;": (
                "return (R(running) + R(complement) * (R(sample) - R(running))).v;"
            )
        },
        "batchnorm",
    ),
    Fault(
        "equal moments merged by the general formula",
        "columns.cuh",
        {"if (left.rows == right.rows) {": "if (false) {"},
        "batchnorm-merged",
    ),
    Fault(
        "four leaves merged one after another",
        "columns.cuh",
        {
            "node = merge(merge(leaf(first, tile.column), leaf(first + 1, tile.column)),": (
                "node = merge(merge(merge(leaf(first, tile.column), leaf(first + 1, tile.column)),"
            ),
            "merge(leaf(first + 2, tile.column), leaf(first + 3, tile.column)));": (
                "leaf(first + 2, tile.column)), leaf(first + 3, tile.column));"
            ),
        },
        "column-sum",
    ),
    Fault(
        "eight values summed one after another",
        "columns.cuh",
        {
            "return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));": (
                "return v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7];"
            )
        },
        "column-sum",
    ),
    Fault(
        "the variance as the mean of squares less the square of the mean",
        "layernorm.cuh",
        {
            "R e = (R(x[j]) - k) - m;": "R e = R(x[j]) - k;",
            "}) / (d * scale);": "}) / (d * scale) - m * m;",
        },
        "layernorm",
    ),
    Fault(
        "a division as a multiplication by the reciprocal",
        "layernorm.cuh",
        {
            "R mean_g = row_sum<T>(columns, g) / d;": (
                "R mean_g = row_sum<T>(columns, g) * (R((T)1) / d);"
            )
        },
        "layernorm",
    ),
    Fault(
        "lanes halved by their mirror image",
        "rows.cuh",
        {
            "lanes[j] = lanes[j] + lanes[j + step];": (
                "lanes[j] = lanes[j] + lanes[2 * step - 1 - j];"
            )
        },
        "layernorm",
    ),
    Fault(
        "a row's last leaf lost",
        "rows.cuh",
        {"long long leaves = (steps + 7) / 8;": "long long leaves = steps < 8 ? 1 : steps / 8;"},
        "layernorm",
    ),
    Fault(
        "Philox with nine rounds",
        "dropout.cuh",
        {"round < 10": "round < 9"},
        "dropout",
    ),
    Fault(
        "subnormal values flushed to zero",
        "dropout.cuh",
        {"return kept ?": "return kept && __builtin_fabs(x) >= 0x1p-126 ?"},
        "dropout",
    ),
    Fault(
        "a NaN lost",
        "relu.cuh",
        {" || is_nan(real<T>(x))": ""},
        "relu",
    ),
    Fault(
        "minus zero passed on",
        "relu.cuh",
        {"real<T>(x) > real<T>((T)0) || is_nan": "x >= 0 || is_nan"},
        "relu",
    ),
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
)

CPU_FAULTS = (
    Fault(
        "a NaN lost",
        "relu_numba.py",
        {"v > zero or v != v": "v > zero"},
        "relu",
    ),
    Fault(
        "Philox with nine rounds",
        "dropout_numba.py",
        {"for _ in range(10):": "for _ in range(9):"},
        "dropout",
    ),
    Fault(
        "a step in double precision, rounded once",
        "optimizer_numba.py",
        {"next_w[i] = w[i] - lr * dw[i]": "next_w[i] = w[i] - np.float64(lr) * dw[i]"},
        "sgd",
    ),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half of the quick grid, CPU and stand-in: the compiler's time is what these tests take."""
    monkeypatch.setattr(cases, "DTYPES", ("float32",))
    monkeypatch.setattr(contestants, "other_instruction_sets", dict)
    with host_cuda():
        yield


@pytest.fixture(autouse=True)
def few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape: on CUDA each takes kernels of its own, which take the compiler seconds."""
    matmul = OPERATIONS["matmul"]
    shapes = replace(matmul.shapes, quick=((9, 33, 17),))
    monkeypatch.setitem(OPERATIONS, "matmul", replace(matmul, shapes=shapes))


def parity(capsys: pytest.CaptureFixture[str], *ops: str) -> tuple[int, str]:
    code = cli.main(["parity", "--quick", *(f"--op={op}" for op in ops)])
    out, err = capsys.readouterr()
    assert "ERROR" not in out + err  # a fault that does not compile is not found but refused
    return code, out


def assert_found(capsys: pytest.CaptureFixture[str], fault: Fault) -> None:
    code, out = parity(capsys, fault.op)
    assert code == 1, f"parity does not see: {fault.title}\n{out}"
    assert f"the contract is BROKEN by {fault.op}." in out
    assert "of cuda:0" in out
    assert f"gpubn parity --op {fault.op} --seed " in out


def test_kernels_without_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = parity(capsys, *dict.fromkeys(fault.op for fault in CUDA_FAULTS + CPU_FAULTS))
    assert code == 0, out


@pytest.mark.parametrize("fault", CUDA_FAULTS, ids=lambda fault: fault.title)
def test_in_the_cuda_half(
    fault: Fault, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported afresh for this stand-in, and before any kernel reads its text.
    compile_cuda = importlib.import_module("gpubn.kernels.compile_cuda")
    source, planted = compile_cuda.source, fault.planted()

    def changed(*names: str) -> str:
        return "\n".join(planted if f"{name}.cuh" == fault.file else source(name) for name in names)

    monkeypatch.setattr(compile_cuda, "source", changed)
    assert_found(capsys, fault)


@pytest.mark.parametrize("fault", CPU_FAULTS, ids=lambda fault: fault.title)
def test_in_the_cpu_half(
    fault: Fault,
    capsys: pytest.CaptureFixture[str],
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
    assert_found(capsys, fault)
