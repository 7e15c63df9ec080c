"""The update rules, as functions and in place, against the float64 reference."""

from __future__ import annotations

import math
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gpubn
from gpubn.backend import Array, Device, to_host
from gpubn.testing import reference
from gpubn.train import optim

ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 1e-2},
    "sgd_momentum": {"learning_rate": 1e-2, "momentum": 0.9},
    "rmsprop": {"learning_rate": 1e-2, "decay_rate": 0.99, "epsilon": 1e-8},
    "adam": ADAM,
    "adamw": {**ADAM, "weight_decay": 1e-2},
}
OTHERS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.3},
    "sgd_momentum": {"learning_rate": 0.3, "momentum": 0.5},
    "rmsprop": {"learning_rate": 0.3, "decay_rate": 0.7, "epsilon": 0.2},
    "adam": {"learning_rate": 0.3, "beta1": 0.6, "beta2": 0.8, "epsilon": 0.2},
    "adamw": {"learning_rate": 0.3, "beta1": 0, "beta2": 0.8, "epsilon": 1, "weight_decay": 0.4},
}
STATE = {
    "sgd": (),
    "sgd_momentum": ("velocity",),
    "rmsprop": ("cache",),
    "adam": ("m", "v"),
    "adamw": ("m", "v"),
}
STEPS = 6
# A step rounds each of about ten operations, on values of order 1.
TOLERANCE = 10 * STEPS

rules = pytest.mark.parametrize("rule", DEFAULTS)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def draw(
    rng: np.random.Generator, shape: tuple[int, ...] = (3, 4, 2), dtype: Any = np.float64
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Return parameters and a gradient for each step."""
    w, *dws = rng.standard_normal((1 + STEPS, *shape)).astype(dtype)
    return np.asarray(w), [np.asarray(dw) for dw in dws]


def run(
    rule: str,
    device: Device,
    w: NDArray[Any],
    dws: list[NDArray[Any]],
    config: dict[str, Any] | None = None,
) -> dict[str, NDArray[Any]]:
    """Take the steps with the function; return the parameters and state, on the host."""
    with device.scope():
        w, config = device.asarray(w), dict(config or {})
        for dw in dws:
            w, config = optim.get(rule)(w, device.asarray(dw), config)
    return {"w": to_host(w), **{name: to_host(config[name]) for name in STATE[rule]}}


def run_in_place(
    rule: str,
    device: Device,
    w: NDArray[Any],
    dws: list[NDArray[Any]],
    config: dict[str, Any] | None = None,
    decayed: int | None = None,
) -> dict[str, NDArray[Any]]:
    buffer, full = device.xp.array(w), optim.complete(rule, config)
    for dw in dws:
        optim.update_in_place(rule, buffer, device.asarray(dw), full, decayed)
    return {"w": to_host(buffer), **{name: to_host(full[name]) for name in STATE[rule]}}


def expect(
    rule: str, w: NDArray[Any], dws: list[NDArray[Any]], scalars: dict[str, float]
) -> dict[str, NDArray[Any]]:
    counts = [0] if rule.startswith("adam") else []
    state: list[Any] = [*(np.zeros(w.shape) for _ in STATE[rule]), *counts]
    for dw in dws:
        results = getattr(reference, rule)(w, dw, *state, **scalars)
        w, *state = results if isinstance(results, tuple) else (results,)
    return {"w": w, **dict(zip(STATE[rule], state, strict=False))}


def assert_close(results: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        tolerance = TOLERANCE * np.finfo(result.dtype).eps
        np.testing.assert_allclose(
            result, expected[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


def assert_same_bits(results: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.dtype == expected[name].dtype
        # array_equal takes NaN for NaN whatever its payload; a sign of zero is a bit as well.
        np.testing.assert_array_equal(result, expected[name], err_msg=name)
        numbers = ~np.isnan(result)
        np.testing.assert_array_equal(
            np.signbit(result[numbers]), np.signbit(expected[name][numbers]), err_msg=name
        )


# --- What the rules compute -----------------------------------------------------------------------


@rules
@dtypes
@pytest.mark.parametrize("scalars", [DEFAULTS, OTHERS], ids=["defaults", "others"])
def test_several_steps(
    device: Device,
    rule: str,
    dtype: Any,
    scalars: dict[str, dict[str, float]],
    rng: np.random.Generator,
) -> None:
    w, dws = draw(rng, dtype=dtype)
    given = {} if scalars is DEFAULTS else scalars[rule]
    results = run(rule, device, w, dws, given)
    assert {array.dtype for array in results.values()} == {np.dtype(dtype)}
    assert_close(results, expect(rule, w, dws, scalars[rule]))


@rules
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1, 3), (33, 65)], ids=str)
def test_any_shape(
    device: Device, rule: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    w, dws = draw(rng, shape)
    results = run(rule, device, w, dws)
    assert {array.shape for array in results.values()} == {shape}
    assert_close(results, expect(rule, w, dws, DEFAULTS[rule]))


@rules
def test_config_is_completed_in_place(device: Device, rule: str) -> None:
    w = device.xp.ones((2, 3))
    config: dict[str, Any] = {"learning_rate": 0.5}
    for step in (1, 2):
        _, returned = optim.get(rule)(w, w, config)
        assert returned is config
        scalars = {key: value for key, value in config.items() if key not in (*STATE[rule], "t")}
        assert scalars == {**DEFAULTS[rule], "learning_rate": 0.5}
        assert config.get("t") == (step if rule.startswith("adam") else None)
        for name in STATE[rule]:
            assert (type(config[name]), config[name].shape) == (type(w), w.shape)


@rules
def test_without_a_config(device: Device, rule: str) -> None:
    w = device.xp.ones(2)
    next_w, config = optim.get(rule)(w, w)
    assert set(config) - {"t"} == {*DEFAULTS[rule], *STATE[rule]}
    again, other = optim.get(rule)(w, w)
    assert other is not config
    assert to_host(again).tolist() == to_host(next_w).tolist()


@rules
def test_inputs_and_old_state_are_left_alone(
    device: Device, rule: str, rng: np.random.Generator
) -> None:
    host, (host_dw, *_) = draw(rng)
    w, dw = device.xp.array(host), device.xp.array(host_dw)
    first, config = optim.get(rule)(w, dw)
    state = {name: config[name] for name in STATE[rule]}
    before = {name: to_host(array).copy() for name, array in (state | {"w": first}).items()}
    second, _ = optim.get(rule)(first, dw, config)
    np.testing.assert_array_equal(to_host(w), host)
    np.testing.assert_array_equal(to_host(dw), host_dw)
    for name, array in (state | {"w": first}).items():
        np.testing.assert_array_equal(to_host(array), before[name])
    assert second is not first
    assert all(config[name] is not array for name, array in state.items())


@rules
def test_memory_order_changes_no_bits(device: Device, rule: str, rng: np.random.Generator) -> None:
    w, dws = draw(rng, (6, 10))
    state = {name: np.abs(rng.standard_normal((6, 10))) for name in STATE[rule]}

    def step(arrange: Any) -> dict[str, NDArray[Any]]:
        config = {name: arrange(array) for name, array in state.items()}
        next_w, config = optim.get(rule)(arrange(w), arrange(dws[0]), config)
        return {"w": to_host(next_w), **{name: to_host(config[name]) for name in state}}

    def strided(array: NDArray[Any]) -> Array:
        return device.xp.asarray(np.repeat(array, 2, axis=1))[:, ::2]

    def read_only(array: NDArray[Any]) -> Array:
        frozen = array.copy()
        frozen.flags.writeable = False
        return device.asarray(frozen)

    expected = step(device.asarray)
    for arrange in (
        lambda array: device.asarray(array.T.copy()).T,
        lambda array: device.asarray(array[::-1, ::-1].copy())[::-1, ::-1],
        strided,
        read_only,
    ):
        assert_same_bits(step(arrange), expected)


@rules
@pytest.mark.parametrize("kind", [int, np.float32, np.float64])
def test_scalars_of_any_real_type(device: Device, rule: str, kind: type) -> None:
    w, dws = np.ones(3), [np.full(3, 0.5)] * 2
    results = run(rule, device, w, dws, {"learning_rate": kind(1)})
    assert_close(results, expect(rule, w, dws, {**DEFAULTS[rule], "learning_rate": 1}))


# --- In place, and on another device --------------------------------------------------------------


@rules
@dtypes
def test_in_place_gives_the_same_bits(
    device: Device, rule: str, dtype: Any, rng: np.random.Generator
) -> None:
    w, dws = draw(rng, (5, 7), dtype)
    for config in ({}, OTHERS[rule]):
        assert_same_bits(
            run_in_place(rule, device, w, dws, config), run(rule, device, w, dws, config)
        )


@rules
def test_in_place_takes_no_new_memory(device: Device, rule: str) -> None:
    w, config = device.xp.ones(5), optim.complete(rule, None)
    state: dict[str, Array] = {}
    for step in range(3):
        optim.update_in_place(rule, w, device.xp.ones(5), config)
        assert step == 0 or all(config[name] is array for name, array in state.items())
        state = {name: config[name] for name in STATE[rule]}
    assert len({id(array) for array in state.values()}) == len(STATE[rule])
    assert to_host(w).max() < 1


def test_only_the_first_elements_decay(device: Device, rng: np.random.Generator) -> None:
    w, dws = draw(rng, (9,))
    results = run_in_place("adamw", device, w, dws, OTHERS["adamw"], decayed=4)
    with_decay = expect("adamw", w, dws, OTHERS["adamw"])
    without = expect("adamw", w, dws, OTHERS["adamw"] | {"weight_decay": 0})
    with_decay["w"][4:] = without["w"][4:]
    assert_close(results, with_decay)
    assert not np.allclose(expect("adamw", w, dws, OTHERS["adamw"])["w"][4:], without["w"][4:])


@rules
@dtypes
def test_bits_are_those_of_the_cpu(
    device: Device, rule: str, dtype: Any, rng: np.random.Generator
) -> None:
    w, dws = draw(rng, (1, 1027), dtype)
    tiny = np.finfo(dtype).tiny
    hard = [0.0, -0.0, tiny / 8, -tiny, 1e18, -1e30, np.inf, np.nan]
    dws[0][0, : len(hard)] = np.array(hard, dtype)
    w[0, 100 : 100 + len(hard)] = np.array(hard, dtype)
    cpu = gpubn.backend.resolve("cpu")
    with np.errstate(all="ignore"):
        for config in ({}, OTHERS[rule]):
            assert_same_bits(run(rule, device, w, dws, config), run(rule, cpu, w, dws, config))


# --- Bad input ------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    assert tuple(DEFAULTS) == optim.RULES
    for rule in optim.RULES:
        assert optim.get(rule) is getattr(optim, rule)
        assert optim.state_names(rule) == STATE[rule]
        assert optim.complete(rule, None).items() >= DEFAULTS[rule].items()


@pytest.mark.parametrize(
    "function", [optim.get, optim.state_names, lambda r: optim.complete(r, {})]
)
def test_unknown_rule(function: Any) -> None:
    with pytest.raises(ValueError, match="update_rule is 'sdg', expected one of sgd, sgd_momentum"):
        function("sdg")


BAD_SCALARS = [
    ("sgd", {"learning_rate": -1e-3}, ValueError, "learning_rate is -0.001, expected"),
    ("sgd", {"learning_rate": math.nan}, ValueError, "learning_rate is nan, expected a finite"),
    ("adam", {"learning_rate": math.inf}, ValueError, "learning_rate is inf, expected a finite"),
    ("sgd", {"learning_rate": "0.1"}, TypeError, "learning_rate is '0.1', expected a number"),
    ("sgd", {"learning_rate": True}, TypeError, "learning_rate is True, expected a number"),
    ("sgd", {"learning_rate": 1j}, TypeError, "learning_rate is 1j, expected a number"),
    ("sgd", {"learning_rate": None}, TypeError, "learning_rate is None, expected a number"),
    ("sgd", {"momentum": 0.9}, ValueError, "config has a key 'momentum', expected for sgd"),
    ("sgd", {"t": 0}, ValueError, "config has a key 't'"),
    ("adam", {"lr": 1}, ValueError, "config has a key 'lr', expected for adam: learning_rate"),
    ("adam", {"weight_decay": 1}, ValueError, "config has a key 'weight_decay'"),
    ("sgd_momentum", {"momentum": 1}, ValueError, "momentum is 1, expected .* 0 to below 1"),
    ("sgd_momentum", {"momentum": -0.1}, ValueError, "momentum is -0.1, expected"),
    ("rmsprop", {"decay_rate": 1.0}, ValueError, "decay_rate is 1.0, expected"),
    ("rmsprop", {"epsilon": 0}, ValueError, "epsilon is 0, expected a number above 0"),
    ("rmsprop", {"epsilon": -1e-8}, ValueError, "epsilon is -1e-08, expected"),
    ("adam", {"beta1": 1.5}, ValueError, "beta1 is 1.5, expected"),
    ("adam", {"beta2": 1}, ValueError, "beta2 is 1, expected"),
    ("adam", {"t": -1}, ValueError, "t is -1, expected"),
    ("adam", {"t": 1.5}, TypeError, "t is 1.5, expected"),
    ("adamw", {"weight_decay": -1}, ValueError, "weight_decay is -1, expected"),
    ("adam", [("learning_rate", 1)], TypeError, "config is a list, expected a dict"),
    ("sgd", types.MappingProxyType({}), TypeError, "config is a mappingproxy, expected a dict"),
]


@pytest.mark.parametrize(
    ("rule", "config", "error", "text"),
    BAD_SCALARS,
    ids=[f"{rule} {config}" for rule, config, _, _ in BAD_SCALARS],
)
def test_bad_scalars(
    device: Device, rule: str, config: Any, error: type[Exception], text: str
) -> None:
    w = device.xp.ones(3)
    before = repr(config)
    with pytest.raises(error, match=text):
        optim.get(rule)(w, w, config)
    assert repr(config) == before


BAD_ARRAYS = [
    ({"w": [1.0, 2.0, 3.0]}, TypeError, "w is a list, expected a NumPy or CuPy array"),
    ({"w": np.ones(3, int)}, TypeError, "w has dtype int64, expected float32 or float64"),
    ({"w": np.ones(3, complex)}, TypeError, "w has dtype complex128, expected"),
    ({"w": np.ones(3, np.float16)}, TypeError, "w has dtype float16, expected"),
    ({"w": np.ones(0)}, ValueError, r"w has shape \(0,\), expected at least one value"),
    ({"dw": np.ones(4)}, ValueError, r"dw has shape \(4,\), expected \(3,\)"),
    ({"dw": np.ones((1, 3))}, ValueError, r"dw has shape \(1, 3\), expected \(3,\)"),
    ({"dw": np.ones(3, np.float32)}, TypeError, "dw has dtype float32, expected float64 as w has"),
    ({"dw": 1.0}, TypeError, "dw is a float, expected"),
    ({"m": np.ones(4)}, ValueError, r"m has shape \(4,\), expected \(3,\)"),
    ({"v": np.ones(3, np.float32)}, TypeError, "v has dtype float32, expected float64 as w has"),
    ({"v": 0.0}, TypeError, "v is a float, expected"),
]


@pytest.mark.parametrize(("changed", "error", "text"), BAD_ARRAYS)
def test_bad_arrays(
    device: Device, changed: dict[str, Any], error: type[Exception], text: str
) -> None:
    arrays = {name: np.ones(3) for name in ("w", "dw", "m", "v")} | changed
    w, dw, m, v = (
        device.asarray(array) if isinstance(array, np.ndarray) else array
        for array in arrays.values()
    )
    config = {"m": m, "v": v, "t": 2}
    with pytest.raises(error, match=text):
        optim.adam(w, dw, config)
    assert config == {"m": m, "v": v, "t": 2}


def test_arrays_on_two_devices(device: Device) -> None:
    if device.kind == "cpu":
        pytest.skip("one device only")
    here, there = device.xp.ones(3), np.ones(3)
    for arguments, text in (
        ((here, there), "dw is on cpu and w on cuda:0"),
        ((there, here), "dw is on cuda:0 and w on cpu"),
        ((here, here, {"velocity": there}), "velocity is on cpu and w on cuda:0"),
    ):
        with pytest.raises(ValueError, match=text):
            optim.sgd_momentum(*arguments)


def test_scalars_of_any_type_count_as_python_floats(device: Device) -> None:
    w = device.xp.linspace(-1, 1, 50, dtype=np.float32)
    plain, _ = optim.adam(w, w, {"beta1": 0.5, "learning_rate": 0.125})
    odd, config = optim.adam(w, w, {"beta1": Fraction(1, 2), "learning_rate": np.float32(0.125)})
    assert to_host(odd).tobytes() == to_host(plain).tobytes()
    assert type(config["beta1"]) is float


def test_gradient_norm(device: Device, rng: np.random.Generator) -> None:
    host = {name: rng.standard_normal(n).astype(np.float32) for name, n in (("W", 3001), ("b", 7))}
    grads = {name: device.asarray(array) for name, array in host.items()}
    expected = np.linalg.norm(np.concatenate(list(host.values())).astype(np.float64))
    assert optim.gradient_norm(grads) == pytest.approx(expected, rel=1e-6)
    assert optim.gradient_norm({}) == 0.0
    with pytest.raises(TypeError, match=r"grads\['W'\] has dtype int64, expected float32"):
        optim.gradient_norm({"W": device.asarray(np.arange(3))})
    with pytest.raises(TypeError, match="grads is a ndarray, expected a dict"):
        optim.gradient_norm(np.ones(3))


@pytest.mark.parametrize("base", [0.9, 0.999, 0.9995])
def test_powers_are_correctly_rounded(base: float) -> None:
    """The C library's are not, and differ from one machine to the next."""
    exact = Fraction(1)
    for t in range(1, 800):
        exact *= Fraction(base)
        assert optim._power(base, t) == float(exact)
    assert optim._power(base, 10**9) == 0.0
