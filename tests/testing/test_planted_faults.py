"""``gpubn parity`` must be able to fail: it finds faults that are planted, one at a time.

Each is a change that somebody could make in good faith: a faster instruction, another order of a
sum, a simpler formula. Those of the CUDA text are made in the text that the stand-in for CuPy
compiles, those of a Python module in a copy of it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import host_cuda
from host_cuda import cupy_stand_in

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
    dtype: str = "float32"

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
        {"R top(max_lanes(largest));": "R top((T)0);"},
        "softmax-loss",
    ),
    Fault(
        "the largest score found in one warp only",
        "losses.cuh",
        {"for (int step = LANES / 2; step > 0": "for (int step = 16; step > 0"},
        "softmax-loss",
    ),
    Fault(
        "the last of equal scores taken for the first",
        "losses.cuh",
        {"bool larger = R(x[j]) > R(x[best])": "bool larger = !(R(x[best]) > R(x[j]))"},
        "count-correct",
    ),
    Fault(
        "the lanes of a sum of squares added up one after another",
        "l2.cuh",
        {
            "real<T> total = sum_lanes(real<T>(lanes[threadIdx.x]));": (
                "real<T> total((T)0);\nfor (int j = 0; j < LANES; j++) "
                "total = total + real<T>(lanes[j]);"
            )
        },
        "sum-of-squares",
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
        "squares by fused multiply-adds into a lane's sum",
        "l2_cuda.py",
        {
            "total = cupy.empty((), x.dtype)": (
                "lanes = cupy.ElementwiseKernel('raw T x, int64 size', 'T sum', 'sum = 0;"
                " for (long long j = i; j < size; j += 256) sum = __builtin_fmaf(x[j], x[j], sum)',"
                " 'fused')(x.reshape(-1), x.size, cupy.empty(256, x.dtype))\n"
                "    total = cupy.empty((), x.dtype)"
            ),
        },
        "sum-of-squares",
    ),
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


@pytest.fixture(autouse=True, scope="module")
def compiled_in_a_hurry() -> Iterator[None]:
    """Compiling takes longer here than running: the stand-in's kernels need not be fast."""
    with pytest.MonkeyPatch.context() as patch:
        flags = tuple("-O0" if flag == "-O2" else flag for flag in cupy_stand_in.FLAGS)
        patch.setattr(cupy_stand_in, "FLAGS", flags)
        yield
    cupy_stand_in._compile.cache_clear()  # other tests' kernels need to be


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU and stand-in: the compiler's time is what these tests take."""
    monkeypatch.setattr(contestants, "other_instruction_sets", dict)
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
    """Return a function that runs half of the quick grid: the cases of one dtype."""

    def parity(dtype: str, *ops: str) -> tuple[int, str]:
        monkeypatch.setattr(cases, "DTYPES", (dtype,))
        code = cli.main(["parity", "--quick", *(f"--op={op}" for op in ops)])
        out, err = capsys.readouterr()
        assert "ERROR" not in out + err  # a fault that does not compile is not found but refused
        return code, out

    return parity


def assert_found(parity: Callable[..., tuple[int, str]], fault: Fault) -> None:
    code, out = parity(fault.dtype, fault.op)
    assert code == 1, f"parity does not see: {fault.title}\n{out}"
    assert f"the contract is BROKEN by {fault.op}." in out
    assert "of cuda:0" in out
    assert f"gpubn parity --op {fault.op} --seed " in out


@pytest.mark.parametrize("dtype", cases.DTYPES)
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
