"""Layer objects give the functions' bits; and what objects add: modes, gradients, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpubn import backend, layers, nn
from gpubn.backend import Array, Device, to_host
from gpubn.testing import check_gradients


class Case:
    """A layer, the functions that it calls, and a shape of input."""

    def __init__(
        self,
        make: Callable[..., nn.Layer],
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        shape: tuple[int, ...],
    ) -> None:
        self.make, self.forward, self.backward, self.shape = make, forward, backward, shape


def bn_param(**options: Any) -> dict[str, Any]:
    """What a new BatchNorm of five channels hands to its function."""
    return {"mode": "train", "running_var": np.ones(5), **options}


def batchnorm(fused: bool = False, axis: int = 1, **options: Any) -> Callable[..., Any]:
    def forward(x: Array, gamma: Array, beta: Array) -> Any:
        function = layers.batchnorm_relu_forward if fused else layers.batchnorm_forward
        xp = backend.namespace(x)
        param = {
            key: xp.asarray(value, gamma.dtype) if isinstance(value, np.ndarray) else value
            for key, value in bn_param(**options).items()
        }
        return function(x, gamma, beta, param, axis)

    return forward


CASES = {
    "affine": Case(
        lambda **k: nn.Affine(6, 5, seed=1, **k),
        layers.affine_forward,
        layers.affine_backward,
        (4, 2, 3),
    ),
    "affine reproducible": Case(
        lambda **k: nn.Affine(6, 5, seed=1, reproducible=True, **k),
        lambda x, w, b: layers.affine_forward(x, w, b, True),
        layers.affine_backward,
        (4, 6),
    ),
    "batchnorm": Case(
        lambda **k: nn.BatchNorm(5, **k), batchnorm(), layers.batchnorm_backward, (7, 5)
    ),
    "batchnorm options": Case(
        lambda **k: nn.BatchNorm(5, axis=-1, eps=1e-3, momentum=0.5, unbiased=True, **k),
        batchnorm(axis=-1, eps=1e-3, momentum=0.5, unbiased=True),
        layers.batchnorm_backward,
        (3, 2, 2, 5),
    ),
    "batchnorm relu": Case(
        lambda **k: nn.BatchNorm(5, relu=True, **k),
        batchnorm(fused=True),
        layers.batchnorm_relu_backward,
        (3, 5, 2, 2),
    ),
    "batchnorm frozen": Case(
        lambda **k: nn.BatchNorm(5, frozen=True, **k),
        batchnorm(mode="test"),
        layers.batchnorm_backward,
        (7, 5),
    ),
    "layernorm": Case(
        lambda **k: nn.LayerNorm(6, eps=1e-3, **k),
        lambda x, gamma, beta: layers.layernorm_forward(x, gamma, beta, {"eps": 1e-3}),
        layers.layernorm_backward,
        (4, 6),
    ),
    "layernorm of two axes": Case(
        lambda **k: nn.LayerNorm((2, 3), **k),
        lambda x, gamma, beta: layers.layernorm_forward(x, gamma, beta, {}),
        layers.layernorm_backward,
        (4, 2, 3),
    ),
    "rmsnorm": Case(
        lambda **k: nn.RMSNorm(6, eps=1e-3, **k),
        lambda x, gamma: layers.rmsnorm_forward(x, gamma, {"eps": 1e-3}),
        layers.rmsnorm_backward,
        (4, 6),
    ),
    "groupnorm": Case(
        lambda **k: nn.GroupNorm(2, 6, eps=1e-3, **k),
        lambda x, gamma, beta: layers.groupnorm_forward(x, gamma, beta, 2, {"eps": 1e-3}, 1),
        layers.groupnorm_backward,
        (3, 6, 2, 2),
    ),
    "groupnorm last axis": Case(
        lambda **k: nn.GroupNorm(2, 6, axis=-1, **k),
        lambda x, gamma, beta: layers.groupnorm_forward(x, gamma, beta, 2, {}, -1),
        layers.groupnorm_backward,
        (3, 2, 2, 6),
    ),
    "instancenorm": Case(
        lambda **k: nn.InstanceNorm(4, eps=1e-3, **k),
        lambda x, gamma, beta: layers.instancenorm_forward(x, gamma, beta, {"eps": 1e-3}, 1),
        layers.instancenorm_backward,
        (3, 4, 2, 2),
    ),
    "relu": Case(lambda **k: nn.ReLU(), layers.relu_forward, layers.relu_backward, (4, 3)),
    "dropout": Case(
        lambda **k: nn.Dropout(0.5, seed=3, stream=2),
        lambda x: layers.dropout_forward(x, {"p": 0.5, "mode": "train", "seed": 3, "stream": 2}),
        layers.dropout_backward,
        (4, 30),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def randomize(layer: nn.Layer, rng: np.random.Generator) -> None:
    """Let parameters be general, not 0 and 1."""
    for array in layer.params.values():
        array += backend.namespace(array).asarray(rng.standard_normal(array.shape), array.dtype)


def draw(
    device: Device, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32
) -> Array:
    return device.asarray(rng.standard_normal(shape).astype(dtype))


def assert_same(array: Array, expected: Array) -> None:
    assert type(array) is type(expected)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert to_host(array).tobytes() == to_host(expected).tobytes()


def running(layer: nn.Layer) -> dict[str, NDArray[Any]]:
    return {name: to_host(array).copy() for name, array in layer.buffers.items()}


# --- The functions' bits --------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_functions_bits(
    device: Device, case: Case, dtype: Any, rng: np.random.Generator
) -> None:
    layer = case.make(dtype=dtype)
    randomize(layer, rng)
    x = draw(device, rng, case.shape, dtype)
    expected, cache = case.forward(x, *layer.params.values())
    out = layer(x)
    assert_same(out, expected)
    dout = draw(device, rng, out.shape, dtype)
    gradients = case.backward(dout, cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert_same(layer.backward(dout), gradients[0])
    assert list(layer.grads) == list(layer.params)
    for gradient, theirs in zip(layer.grads.values(), gradients[1:], strict=True):
        assert_same(gradient, theirs)
    for array in (*layer.params.values(), *layer.grads.values()):
        assert array.dtype == dtype
        assert backend.place(array) == device.name


NUMERIC = ("affine", "batchnorm", "batchnorm relu", "batchnorm frozen", "groupnorm", "rmsnorm")


@pytest.mark.parametrize("name", NUMERIC)
def test_gradients_are_the_slopes(name: str, rng: np.random.Generator) -> None:
    case = CASES[name]
    with backend.use("cpu"):
        layer = case.make(dtype=np.float64)
    names = list(layer.params)

    def forward(x: Array, *params: Array) -> tuple[Array, Any]:
        layer.params.update(zip(names, params, strict=True))
        return layer(x), None

    def backward(dout: Array, _: Any) -> tuple[Array, ...]:
        dx = layer.backward(dout)
        return (dx, *layer.grads.values())

    x, *params = (
        rng.standard_normal(s) for s in (case.shape, *(a.shape for a in layer.params.values()))
    )
    check_gradients(forward, backward, x, *params)


def test_half_precision(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (6, 5)).astype(np.float16)
    for layer in (nn.BatchNorm(5), nn.LayerNorm(5), nn.RMSNorm(5), nn.ReLU(), nn.Dropout(0.5, 0)):
        assert layer(x).dtype == np.float16
        assert layer.backward(x).dtype == np.float16
        assert all(gradient.dtype == np.float32 for gradient in layer.grads.values())


# --- Affine ---------------------------------------------------------------------------------------


def test_weights_are_drawn_on_the_host(device: Device) -> None:
    expected = np.random.default_rng(7).standard_normal((200, 30))
    for dtype in (np.float32, np.float64):
        for scale in (None, 0.5):
            layer = nn.Affine(200, 30, scale, seed=7, dtype=dtype)
            factor = math.sqrt(2 / 200) if scale is None else scale
            w = layer.params["w"]
            assert (w.dtype, backend.place(w)) == (dtype, device.name)
            np.testing.assert_array_equal(to_host(w), (factor * expected).astype(np.float32))
            assert not to_host(layer.params["b"]).any()
    assert not to_host(nn.Affine(3, 2, 0).params["w"]).any()
    first, second = (to_host(nn.Affine(3, 2).params["w"]) for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_device_of_its_own(device: Device) -> None:
    for layer in (nn.Affine(3, 2, device="cpu"), nn.BatchNorm(2, device="cpu")):
        assert all(
            isinstance(array, np.ndarray)
            for array in (*layer.params.values(), *layer.buffers.values())
        )


def test_the_environment_makes_products_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.REPRODUCIBLE_VARIABLE, "1")
    assert nn.Affine(3, 2, device="cpu").reproducible
    assert not nn.Affine(3, 2, device="cpu", reproducible=False).reproducible


def test_parameters_may_be_views(device: Device, rng: np.random.Generator) -> None:
    flat = draw(device, rng, (8,))
    layer = nn.Affine(3, 2)
    layer.params["w"], layer.params["b"] = flat[:6].reshape(3, 2), flat[6:]
    x = draw(device, rng, (4, 3))
    expected = to_host(layer(x))
    flat *= 2
    np.testing.assert_allclose(to_host(layer(x)), 2 * expected, rtol=1e-6)
    state = {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}
    layer.load_state_dict(state)
    assert to_host(flat).tolist() == [1] * 6 + [0] * 2


# --- BatchNorm ------------------------------------------------------------------------------------


def test_evaluation_before_training_is_the_identity(device: Device) -> None:
    x = device.asarray(np.linspace(-3, 3, 10, dtype=np.float64).reshape(2, 5))
    out = to_host(nn.BatchNorm(5, dtype=np.float64).eval()(x))
    np.testing.assert_allclose(out, to_host(x) / math.sqrt(1 + 1e-5), rtol=1e-15)
    zeros = nn.BatchNorm(5, initial_var=0, dtype=np.float64)
    assert not running(zeros)["running_var"].any()


def test_running_statistics(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (9, 5), np.float64)
    mean, var = to_host(x).mean(axis=0), to_host(x).var(axis=0)
    layer = nn.BatchNorm(5, dtype=np.float64)
    layer(x)
    np.testing.assert_allclose(running(layer)["running_mean"], 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(running(layer)["running_var"], 0.9 + 0.1 * var, rtol=1e-12)
    layer = nn.BatchNorm(5, momentum=0.0, unbiased=True, dtype=np.float64)
    layer(x)
    np.testing.assert_allclose(running(layer)["running_var"], 9 / 8 * var, rtol=1e-12)


def test_a_mean_over_all_batches(device: Device, rng: np.random.Generator) -> None:
    layer = nn.BatchNorm(5, momentum=None, dtype=np.float64)
    assert running(layer)["num_batches"] == 0
    batches = [draw(device, rng, (6, 5), np.float64) for _ in range(3)]
    for batch in batches:
        layer(batch)
    values = running(layer)
    assert (values["num_batches"], values["num_batches"].dtype) == (3, np.int64)
    expected = np.mean([to_host(batch).mean(axis=0) for batch in batches], axis=0)
    np.testing.assert_allclose(values["running_mean"], expected, rtol=1e-12, atol=1e-15)
    other = nn.BatchNorm(5, momentum=None, dtype=np.float64)
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        each(batches[0])
    assert other.bn_param["num_batches"] == 4
    for name, value in running(layer).items():
        np.testing.assert_array_equal(running(other)[name], value)


def test_evaluation_and_frozen_statistics(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (6, 5))
    layer = nn.BatchNorm(5)
    layer(x)
    before = running(layer)
    evaluated = layer.eval()(x)
    dout = draw(device, rng, (6, 5))
    slope = layer.backward(dout)
    layer.train().frozen = True
    assert layer.training
    assert_same(layer(x), evaluated)
    assert_same(layer.backward(dout), slope)
    invstd = 1 / np.sqrt(before["running_var"] + 1e-5)
    np.testing.assert_allclose(to_host(slope), to_host(dout) * invstd, rtol=1e-6)
    for name, value in running(layer).items():
        np.testing.assert_array_equal(value, before[name])
    layer.frozen = False
    layer(x)
    assert not np.array_equal(running(layer)["running_mean"], before["running_mean"])


def test_assigned_statistics(device: Device) -> None:
    layer = nn.BatchNorm(2, dtype=np.float64)
    layer.buffers["running_mean"] = device.asarray(np.array([1.0, 2.0]))
    out = layer.eval()(device.asarray(np.array([[1.0, 2.0]])))
    assert not to_host(out).any()
    assert set(layer.buffers) == {"running_mean", "running_var"}
    assert len(layer.buffers) == 2
    with pytest.raises(KeyError, match="there is no buffer 'mean'; there are running_mean"):
        layer.buffers["mean"] = device.asarray(np.zeros(2))
    with pytest.raises(KeyError):
        layer.buffers["eps"]
    with pytest.raises(TypeError, match="fixed"):
        del layer.buffers["running_mean"]


def test_absent_statistics_are_zeros_that_stay(device: Device) -> None:
    layer = nn.BatchNorm(2)
    layer.bn_param = {"mode": "train"}
    layer.buffers["running_mean"][...] = 3
    assert running(layer)["running_mean"].tolist() == [3, 3]
    assert to_host(layer.bn_param["running_mean"]).tolist() == [3, 3]
    assert running(layer)["running_var"].tolist() == [0, 0]
    assert backend.place(layer.buffers["running_var"]) == device.name


def test_wrong_statistics_are_refused(device: Device) -> None:
    layer = nn.BatchNorm(2, momentum=None)
    for name, value, text in (
        ("running_mean", np.zeros(3, "f4"), r"running_mean has shape \(3,\), expected \(2,\)"),
        ("running_var", np.zeros(2), "running_var has dtype float64, expected float32 as gamma"),
        ("running_var", [0.0, 0.0], "running_var is a list, expected"),
        ("num_batches", np.array(-1), "num_batches is .*, expected a whole number of at least 0"),
        ("num_batches", 1.5, "num_batches is 1.5, expected a whole number"),
    ):
        array = device.asarray(value) if isinstance(value, np.ndarray) else value
        with pytest.raises((ValueError, TypeError), match=text):
            layer.buffers[name] = array
    assert not running(layer)["running_mean"].any()
    layer.buffers["num_batches"] = device.asarray(np.array(3))
    assert layer.bn_param["num_batches"] == 3
    if device.kind == "cuda":
        with pytest.raises(ValueError, match="running_mean is on cpu and gamma on cuda:0"):
            layer.buffers["running_mean"] = np.zeros(2, np.float32)


# --- Dropout and Flatten --------------------------------------------------------------------------


def test_masks_go_on_from_step_to_step(device: Device) -> None:
    x = device.asarray(np.ones((4, 50), np.float32))
    layer, other = nn.Dropout(0.5, seed=1), nn.Dropout(0.5, seed=1)
    masks = [to_host(layer(x)) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert layer.step == 3
    layer.eval()(x)
    assert layer.step == 3
    for mask in masks:
        np.testing.assert_array_equal(to_host(other(x)), mask)
    other.step = 1
    np.testing.assert_array_equal(to_host(other(x)), masks[1])
    other.step = 2**32 + 1  # the counter has 32 bits
    np.testing.assert_array_equal(to_host(other(x)), masks[1])
    unseeded = [to_host(nn.Dropout(0.5)(x)) for _ in range(2)]
    assert not np.array_equal(*unseeded)


def test_evaluation_drops_nothing(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (4, 5))
    layer = nn.Dropout(0.5, seed=1).eval()
    assert_same(layer(x), x)
    assert_same(layer.backward(x), x)
    with pytest.raises(ValueError, match=r"dout has shape \(4, 4\), expected \(4, 5\)"):
        layer.backward(x[:, :4])


def test_flatten(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (4, 2, 3))
    layer = nn.Flatten()
    assert_same(layer(x), x.reshape(4, 6))
    assert_same(layer.backward(x.reshape(4, 6)), x)
    for wrong, text in (
        (x, r"dout has shape \(4, 2, 3\), expected \(4, 6\)"),
        (x.reshape(4, 6).astype(np.float64), "dout has dtype float64, expected float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            layer.backward(wrong)
    for wrong in (x[:, 0, 0], x[:0]):
        with pytest.raises(ValueError, match=r"x has shape .*, expected \(N, d1, ...\)"):
            layer(wrong)
    with pytest.raises(TypeError, match="x is a list, expected a NumPy or CuPy array"):
        layer([1.0])


# --- Passes, copies -------------------------------------------------------------------------------


@cases
def test_backward_before_forward(device: Device, case: Case, rng: np.random.Generator) -> None:
    layer = case.make()
    x = draw(device, rng, case.shape)
    text = f"{type(layer).__name__}.backward was called before forward"
    with pytest.raises(RuntimeError, match=text):
        layer.backward(x)
    out = layer(x)
    layer.backward(out)
    layer.backward(out)  # as often as one likes
    layer.release()
    with pytest.raises(RuntimeError, match=text):
        layer.backward(out)
    layer(x)
    layer.predict(x)
    with pytest.raises(RuntimeError, match=text):
        layer.backward(out)
    layer(x)
    with pytest.raises((TypeError, ValueError)):
        layer(np.full(case.shape, "text"))
    with pytest.raises(RuntimeError, match=text):
        layer.backward(out)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_duplicates(duplicate: Callable[[Any], Any], rng: np.random.Generator) -> None:
    with backend.use("cpu"):
        layer = nn.BatchNorm(5, momentum=0.5)
    x = rng.standard_normal((6, 5)).astype(np.float32)
    layer(x)
    other = duplicate(layer)
    with pytest.raises(RuntimeError):
        other.backward(x)
    before = running(layer)
    other(2 * x)
    other.params["gamma"][...] = 3
    assert set(layer.params["gamma"].tolist()) == {1.0}
    for name, value in running(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_layer_of_ones_own(device: Device, rng: np.random.Generator) -> None:
    class Scale(nn.Layer):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.params["factor"] = device.asarray(np.array(factor, np.float32))

        def _forward(self, x: Array) -> tuple[Array, Any]:
            return x * self.params["factor"], x

        def _backward(self, dout: Array, cache: Any) -> Array:
            self.grads["factor"] = (dout * cache).sum()
            return dout * self.params["factor"]

    net = nn.Sequential(Scale(2), nn.ReLU(), Scale(3))
    x = draw(device, rng, (3, 4))
    np.testing.assert_allclose(to_host(net(x)), 6 * np.maximum(to_host(x), 0), rtol=1e-6)
    net.backward(x)
    assert list(net.grads) == ["0.factor", "2.factor"]
    assert "Scale()" in str(net)


# --- Text -----------------------------------------------------------------------------------------

REPRS = [
    (lambda: nn.Affine(3, 2), "Affine(3, 2)"),
    (
        lambda: nn.Affine(3, 2, dtype=np.float64, reproducible=True),
        "Affine(3, 2, dtype=float64, reproducible=True)",
    ),
    (lambda: nn.Affine(3, 2, 0.5, seed=1), "Affine(3, 2, weight_scale=0.5, seed=1)"),
    (lambda: nn.Affine(3, 2, 0, seed=0), "Affine(3, 2, weight_scale=0.0, seed=0)"),
    (lambda: nn.BatchNorm(5), "BatchNorm(5)"),
    (lambda: nn.BatchNorm(5, initial_var=0), "BatchNorm(5, initial_var=0.0)"),
    (
        lambda: nn.BatchNorm(5, -1, eps=0.1, momentum=None, unbiased=True, frozen=True, relu=True),
        "BatchNorm(5, axis=-1, eps=0.1, momentum=None, unbiased=True, frozen=True, relu=True)",
    ),
    (lambda: nn.LayerNorm(5), "LayerNorm(5)"),
    (lambda: nn.LayerNorm((2, 3), eps=0.1), "LayerNorm((2, 3), eps=0.1)"),
    (lambda: nn.RMSNorm((5,)), "RMSNorm(5)"),
    (lambda: nn.GroupNorm(2, 6, axis=-1), "GroupNorm(2, 6, axis=-1)"),
    (lambda: nn.InstanceNorm(6), "InstanceNorm(6)"),
    (lambda: nn.ReLU(), "ReLU()"),
    (lambda: nn.Dropout(0.5), "Dropout(0.5)"),
    (lambda: nn.Dropout(0.5, 1, 2), "Dropout(0.5, seed=1, stream=2)"),
    (lambda: nn.Flatten(), "Flatten()"),
]


@pytest.mark.parametrize(("make", "text"), REPRS, ids=[text for _, text in REPRS])
def test_repr(make: Callable[[], nn.Layer], text: str) -> None:
    with backend.use("cpu"):
        assert repr(make()) == str(make()) == text


def test_repr_names_another_device(device: Device) -> None:
    if device.kind == "cuda":
        assert repr(nn.BatchNorm(5)) == f"BatchNorm(5, device={device.name!r})"


# --- Bad arguments --------------------------------------------------------------------------------

BAD = [
    (lambda: nn.Affine(0, 2), ValueError, "in_features is 0, expected"),
    (lambda: nn.Affine(2, 2.0), TypeError, "out_features is 2.0, expected a whole number"),
    (lambda: nn.Affine(2, 2, -1), ValueError, "weight_scale is -1, expected"),
    (lambda: nn.Affine(2, 2, "x"), TypeError, "weight_scale is 'x', expected a number"),
    (lambda: nn.Affine(2, 2, seed=-1), ValueError, "seed is -1, expected"),
    (lambda: nn.Affine(2, 2, dtype=np.float16), TypeError, "dtype is float16, expected float32"),
    (lambda: nn.Affine(2, 2, device="gpu"), ValueError, "device is 'gpu', expected"),
    (lambda: nn.Affine(2, 2, reproducible=1), TypeError, "reproducible is 1, expected"),
    (lambda: nn.BatchNorm(0), ValueError, "num_channels is 0, expected"),
    (lambda: nn.BatchNorm(2, axis="1"), TypeError, "axis is '1', expected a whole number"),
    (lambda: nn.BatchNorm(2, axis=True), TypeError, "axis is True, expected"),
    (lambda: nn.BatchNorm(2, eps=0), ValueError, "eps is 0, expected"),
    (lambda: nn.BatchNorm(2, momentum=1.1), ValueError, "momentum is 1.1, expected None or"),
    (lambda: nn.BatchNorm(2, momentum="x"), TypeError, "momentum is 'x', expected"),
    (lambda: nn.BatchNorm(2, unbiased=1), TypeError, "unbiased is 1, expected True or False"),
    (lambda: nn.BatchNorm(2, frozen=None), TypeError, "frozen is None, expected True or False"),
    (lambda: nn.BatchNorm(2, relu="yes"), TypeError, "relu is 'yes', expected True or False"),
    (lambda: nn.BatchNorm(2, initial_var=-1), ValueError, "initial_var is -1, expected"),
    (lambda: nn.LayerNorm(()), ValueError, r"shape is \(\), expected at least one axis"),
    (lambda: nn.LayerNorm((2, 0)), ValueError, r"shape\[1\] is 0, expected"),
    (lambda: nn.RMSNorm("5"), TypeError, "shape is '5', expected a whole number"),
    (lambda: nn.RMSNorm(5, eps=-1), ValueError, "eps is -1, expected"),
    (lambda: nn.GroupNorm(4, 6), ValueError, "num_groups is 4, expected a divisor of the 6"),
    (lambda: nn.InstanceNorm(6, dtype=int), TypeError, "dtype is int64, expected float32"),
    (lambda: nn.Dropout(0), ValueError, "p is 0, expected a probability of keeping"),
    (lambda: nn.Dropout(1.5), ValueError, "p is 1.5, expected"),
    (lambda: nn.Dropout(0.5, stream=-1), ValueError, "stream is -1, expected"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD, ids=[case[2] for case in BAD])
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with backend.use("cpu"), pytest.raises(error, match=text):
        make()


def test_bad_inputs(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (4, 5))
    wide = x.astype(np.float64)
    images = draw(device, rng, (4, 5, 2, 2))
    halves = "expected float32, float16 or bfloat16, as a layer of float32 takes"
    for layer, value, text in (
        (nn.Affine(4, 3), x, r"x has shape \(4, 5\), expected \(N, d1, ...\) with 4 values"),
        (nn.Affine(5, 3), x[0], "x has shape"),
        (nn.Affine(5, 3), wide, "x has dtype float64, expected float32, as a layer of float32"),
        (nn.Affine(5, 3), x.astype(np.float16), "x has dtype float16, expected float32, as"),
        (nn.BatchNorm(5), x[:1], "at least 2"),
        (nn.BatchNorm(5), x[0], "x has shape"),
        (nn.BatchNorm(5), wide, f"x has dtype float64, {halves}"),
        (nn.BatchNorm(5, dtype=np.float64), x, "x has dtype float32, expected float64, as a"),
        (nn.BatchNorm(3), x, "x has 5 channels on axis 1, expected 3"),
        (nn.BatchNorm(3, axis=-1), x, "x has 5 channels on axis -1, expected 3"),
        (nn.GroupNorm(1, 3), images, "x has 5 channels on axis 1, expected 3"),
        (nn.GroupNorm(1, 5), images.astype(np.float64), halves),
        (nn.InstanceNorm(3), images, "x has 5 channels on axis 1, expected 3"),
        (nn.InstanceNorm(5), images.astype(np.float64), halves),
        (nn.LayerNorm(3), x, r"x has shape \(4, 5\), expected its last axes to be \(3,\)"),
        (nn.LayerNorm(5), wide, halves),
        (nn.RMSNorm((4, 3)), x, r"x has shape \(4, 5\), expected its last axes to be \(4, 3\)"),
        (nn.RMSNorm(5), wide, halves),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            layer(value)
    with pytest.raises(TypeError, match="x is a list, expected"):
        nn.Affine(5, 3)([[1.0]])


def test_a_first_layer_spares_its_inputs_gradient(device: Device, rng: np.random.Generator) -> None:
    x, dout = (device.asarray(rng.standard_normal(shape)) for shape in ((4, 6), (4, 5)))
    layer = nn.Affine(6, 5, seed=1, dtype=np.float64, device=device.name)
    with pytest.raises(
        RuntimeError, match=r"Affine\.backward_parameters was called before forward"
    ):
        layer.backward_parameters(dout)
    layer.forward(x)
    layer.backward(dout)
    expected = {name: to_host(array) for name, array in layer.grads.items()}
    layer.grads.clear()
    layer.backward_parameters(dout)
    assert sorted(layer.grads) == ["b", "w"]
    for name, array in layer.grads.items():
        assert to_host(array).tobytes() == expected[name].tobytes()
