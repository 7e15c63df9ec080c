"""exp and log lie within one unit in the last place of the exact value, on every device.

Here on some values; ``exhaustive_exp_log.py`` takes every float32. The ways of measuring are its.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import exhaustive_exp_log
import numpy as np
import pytest
from exhaustive_exp_log import CPU, FUNCTIONS, compute, errors, float32s, main
from numpy.typing import NDArray

from gpubn.backend import Device, to_host
from gpubn.kernels import for_array

DTYPES = (np.float32, np.float64)
STRIDE = 997

every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def around(center: Any, dtype: Any, count: int = 3) -> NDArray[Any]:
    """Return each value and so many of its neighbours on either side."""
    integer = f"i{np.dtype(dtype).itemsize}"
    bits = np.ravel(np.asarray(center, dtype)).view(integer)
    return (bits[:, None] + np.arange(-count, count + 1, dtype=integer)).ravel().view(dtype)


def boundaries(dtype: Any) -> NDArray[Any]:
    """Return special values, and those where the formulas take another turn."""
    format_ = np.finfo(dtype)
    smallest = np.log(2.0) * (format_.minexp - format_.nmant)  # exp of it is the smallest number
    largest = np.log(2.0) * format_.maxexp
    exponents = np.arange(format_.minexp - format_.nmant + 3, format_.maxexp)
    rounded = np.log(2.0) * (np.arange(-200, 200) + 0.5)  # exp's whole number changes there
    with np.errstate(over="ignore"):
        found = np.concatenate(
            [
                around([largest, smallest, smallest - np.log(2.0)], dtype, 50),
                around(np.log(2.0) * format_.minexp, dtype, 50),  # exp's results become subnormal
                around(np.ldexp(dtype(1), exponents), dtype),
                around([*rounded, np.sqrt(0.5), np.sqrt(2.0)], dtype),
                around([1.0], dtype, 100),
                np.arange(1, 1000, dtype=f"i{np.dtype(dtype).itemsize}").view(dtype),
                np.array([0.0, np.inf, np.nan, format_.tiny, format_.max], dtype),
            ]
        )
    return np.concatenate([found, -found])


def assert_within_one_unit(device: Device, function: str, x: NDArray[Any]) -> None:
    off = errors(function, x, compute(device, function, x))
    worst = int(off.argmax())
    assert off[worst] < 1, f"{function}({x[worst]!r}) is {off[worst]:.4g} units away"


@every_function
def test_float32(device: Device, function: str) -> None:
    every_so_many = float32s(0, 2**32 // STRIDE, STRIDE)
    assert_within_one_unit(device, function, every_so_many)
    assert_within_one_unit(device, function, boundaries(np.float32))


@pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63,
    reason="this machine's long double has no more digits than float64 to compare it with",
)
@every_function
def test_float64(device: Device, function: str, rng: np.random.Generator) -> None:
    any_bits = np.frombuffer(rng.bytes(8 * 100_000), np.float64)
    ordinary = rng.uniform(-760, 720, 50_000), rng.uniform(0.5, 2, 50_000)
    assert_within_one_unit(device, function, np.concatenate([any_bits, *ordinary]))
    assert_within_one_unit(device, function, boundaries(np.float64))


@every_dtype
def test_exact_values(device: Device, dtype: Any) -> None:
    def bits(function: str, x: list[float]) -> list[bytes]:
        return [value.tobytes() for value in compute(device, function, np.array(x, dtype))]

    def expected(*values: float) -> list[bytes]:
        return [dtype(value).tobytes() for value in values]

    assert bits("exp", [0.0, -0.0, -np.inf, np.inf, -1e4]) == expected(1, 1, 0.0, np.inf, 0.0)
    assert bits("log", [1.0, 0.0, -0.0, np.inf]) == expected(0.0, -np.inf, -np.inf, np.inf)
    for function, x in (("exp", [np.nan]), ("log", [np.nan, -1.0, -1e-45, -np.inf])):
        assert np.isnan(compute(device, function, np.array(x, dtype))).all()


@every_dtype
def test_logarithms_of_powers_of_two(device: Device, dtype: Any) -> None:
    """Each is the number next to the exact value: an exponent times ln(2), in two parts."""
    format_ = np.finfo(dtype)
    powers = np.ldexp(dtype(1), np.arange(format_.minexp - format_.nmant, format_.maxexp))
    assert powers.all()
    assert errors("log", powers, compute(device, "log", powers)).max() <= 0.5


@every_function
@every_dtype
def test_a_larger_argument_gives_no_smaller_result(
    device: Device, function: str, dtype: Any
) -> None:
    for center in (1e-30, 0.1, 0.5 * np.log(2.0), np.sqrt(0.5), 1.0, np.sqrt(2.0), 3.7, 60.0, 88.0):
        assert (np.diff(compute(device, function, around(center, dtype, 2000))) >= 0).all()


@every_dtype
def test_any_shape_and_layout(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    there = device.asarray(rng.uniform(0.1, 9, (5, 6, 7)).astype(dtype))
    for function in FUNCTIONS:
        call = getattr(for_array("elementary", there), function)
        for view in (there.T, there[::-1, ::2], there[2, 3, 4], there[:, :0]):
            result = to_host(call(view))
            assert result.dtype == dtype
            # array_equal, not assert_array_equal: that one takes a number for an array of it.
            assert np.array_equal(result, compute(device, function, to_host(view)))


# --- The measuring, and the script ---------------------------------------------------------------


def test_an_error_is_measured_in_units_of_the_exact_results_last_place() -> None:
    one, up, inf, nan = np.float32(1), np.float32(2), np.float32(np.inf), np.float32(np.nan)
    largest = np.finfo(np.float32).max

    def error(function: str, x: Any, result: Any) -> float:
        return float(errors(function, np.float32([x]), np.float32([result]))[0])

    assert error("exp", 0, one) == 0
    assert error("exp", 0, np.nextafter(one, up)) == 1
    assert error("exp", 0, np.nextafter(one, -up)) == 0.5
    assert error("exp", 1, np.float32(np.e)) == pytest.approx(0.3462, abs=1e-4)
    assert error("exp", 89, inf) == 0
    assert error("exp", 89, largest) == 1
    assert error("exp", 88.72283, inf) > 1  # it would still fit
    assert error("exp", -200, 0.0) == pytest.approx(0, abs=1e-40)
    assert error("exp", -200, 1e-45) == pytest.approx(1)
    assert error("exp", -200, -0.0) == np.inf
    assert error("exp", nan, nan) == error("log", -1, nan) == error("log", 0, -inf) == 0
    assert error("exp", nan, 1) == error("log", -1, 1) == error("exp", 0, nan) == np.inf
    assert error("log", 0, -largest) == 1
    assert error("log", 1, -0.0) == np.inf


def replaced(function: str, by: Callable[[Any], Any]) -> ModuleType:
    """Return the CPU's kernels with one function exchanged."""
    kernels, changed = for_array("elementary", np.ones(1)), ModuleType("elementary")
    vars(changed).update({name: getattr(kernels, name) for name in FUNCTIONS} | {function: by})
    return changed


def test_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    stride = 100_003
    assert main(["--stride", str(stride)]) == 0
    out = capsys.readouterr().out
    assert f"exp: {-(-(2**32) // stride):,} values, largest error 0." in out
    assert out.endswith("on cpu: exp and log are within one unit in the last place\n")


@pytest.mark.parametrize(
    ("function", "wrong", "text"),
    [
        ("exp", lambda x: np.exp(x) * np.float32(1 + 2e-7), "\nlog: "),
        (
            "log",
            lambda x: np.nan_to_num(np.log(x)),
            "NaN, infinities and signs are WRONG, first at ",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_script_tells_of_a_wrong_function(
    function: str,
    wrong: Callable[[Any], Any],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = replaced(function, wrong)
    monkeypatch.setattr(exhaustive_exp_log, "for_array", lambda op, x: changed)
    assert main(["--stride", "100003"]) == 1
    out = capsys.readouterr().out
    assert text in out
    assert out.endswith("\non cpu: exp or log is WRONG\n")


def test_the_script_compares_bits_with_the_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = Device("cuda", 0, "the CPU under another name")
    ordinary = compute

    def one_off(device: Device, function: str, x: Any) -> Any:
        result = ordinary(CPU, function, x)
        return np.nextafter(result, result + 1) if device is elsewhere else result

    monkeypatch.setattr(exhaustive_exp_log, "compute", one_off)
    x = np.float32([0.1, 0.2, 0.3, 0.4])
    seen = exhaustive_exp_log.check(elsewhere, "exp", x)
    assert seen.differ == x[:3].tolist()
    assert not seen.good
    assert exhaustive_exp_log.check(CPU, "exp", x).good


@pytest.mark.parametrize("stride", ["2", "0", "-3", "x"])
def test_strides_that_would_miss_odd_bits(stride: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"--stride={stride}"])
    assert "--stride" in capsys.readouterr().err
