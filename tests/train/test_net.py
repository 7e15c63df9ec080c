"""The fully connected network against a float64 composition of the reference, and by itself."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_cuda import cupy_stand_in
from numpy.typing import NDArray

from gpubn import FullyConnectedNet, backend
from gpubn.backend import Device, to_host
from gpubn.testing import eval_numerical_gradient, reference, rel_error
from gpubn.train import Parameters

Arrays = dict[str, NDArray[Any]]

NORMALIZATIONS = (None, "batchnorm", "layernorm")
VARIANTS = [
    dict(zip(("normalization", "dropout_keep_ratio", "reg"), values, strict=True))
    for values in itertools.product(NORMALIZATIONS, (1, 0.75), (0, 3.14))
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values()))
)
normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)

CPU = backend.resolve("cpu")


def make(**changes: Any) -> FullyConnectedNet:
    """Return a net for the samples of ``draw``."""
    config: dict[str, Any] = {
        "hidden_dims": [4, 3],
        "input_dim": 4,
        "num_classes": 3,
        "weight_scale": 0.7,
        "dtype": np.float64,
        "seed": 8,
    }
    return FullyConnectedNet(**config | changes)


def make_general(**changes: Any) -> FullyConnectedNet:
    """Return a net whose biases, gamma and beta are general too, not 0 and 1.

    With biases of 0, a sample whose units are all off meets the next layer's ReLU at its kink.
    """
    net = make(**changes)
    rng = np.random.default_rng(net.seed)
    net.params = {
        name: (array + 0.5 * rng.standard_normal(array.shape)).astype(net.dtype)
        for name, array in host(net.params).items()
    }
    return net


def draw(samples: int = 6, seed: int = 8) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.random.default_rng(seed).standard_normal((samples, 2, 2)), np.arange(samples) % 3


def host(arrays: Any) -> Arrays:
    return {name: to_host(array).copy() for name, array in arrays.items()}


def running(net: FullyConnectedNet) -> list[Arrays]:
    return [
        host({key: value for key, value in bn_param.items() if key != "mode"})
        for bn_param in net.bn_params
    ]


def assert_equal(arrays: Arrays, expected: Arrays) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


# --- The same network, composed of the reference --------------------------------------------------


def reference_loss(
    net: FullyConnectedNet, X: NDArray[Any], y: NDArray[Any]
) -> tuple[float, Arrays, list[Arrays]]:
    """Return loss, gradients and new running statistics, in float64."""
    params: Arrays = {name: array.astype(np.float64) for name, array in host(net.params).items()}
    out, graphs, grads, statistics = X.reshape(len(X), -1), [], {}, []
    before = running(net) or [{}] * (net.num_layers - 1)
    keep = net.dropout_keep_ratio
    for layer in range(1, net.num_layers):
        x = out
        W, b = params[f"W{layer}"], params[f"b{layer}"]
        affine = out = reference.affine_forward(x, W, b)
        if net.normalization == "batchnorm":
            out = reference.batchnorm_forward(
                affine, params[f"gamma{layer}"], params[f"beta{layer}"]
            ).out
            zeros = np.zeros(affine.shape[1])
            old = before[layer - 1]
            mean, var = reference.batchnorm_running(
                old.get("running_mean", zeros), old.get("running_var", zeros), affine, 0.9
            )
            statistics.append({"running_mean": mean, "running_var": var})
        elif net.normalization == "layernorm":
            out = reference.layernorm_forward(
                affine, params[f"gamma{layer}"], params[f"beta{layer}"]
            )
        normed, out = out, reference.relu_forward(out)
        mask = np.ones(out.shape, bool)
        if keep < 1:
            mask = reference.dropout_mask(out.shape, keep, net.seed, layer, net.step)
            out = reference.dropout_forward(out, mask, keep)
        graphs.append((x, affine, normed, mask))

    last = net.num_layers
    scores = reference.affine_forward(out, params[f"W{last}"], params[f"b{last}"])
    loss, dout = reference.softmax_loss(scores, y)
    dout, grads[f"W{last}"], grads[f"b{last}"] = reference.affine_backward(
        dout, out, params[f"W{last}"]
    )
    for layer in range(last - 1, 0, -1):
        x, affine, normed, mask = graphs.pop()
        dout = reference.relu_backward(reference.dropout_backward(dout, mask, keep), normed)
        if net.normalization is not None:
            backward = getattr(reference, f"{net.normalization}_backward")
            dout, grads[f"gamma{layer}"], grads[f"beta{layer}"] = backward(
                dout, affine, params[f"gamma{layer}"]
            )
        dout, grads[f"W{layer}"], grads[f"b{layer}"] = reference.affine_backward(
            dout, x, params[f"W{layer}"]
        )
    for layer in range(1, last + 1):
        W = params[f"W{layer}"]
        loss += 0.5 * net.reg * np.sum(W**2)
        grads[f"W{layer}"] = grads[f"W{layer}"] + net.reg * W
    return loss, grads, statistics


def reference_scores(net: FullyConnectedNet, X: NDArray[Any]) -> NDArray[Any]:
    params, out = host(net.params), X.reshape(len(X), -1)
    for layer in range(1, net.num_layers):
        out = reference.affine_forward(out, params[f"W{layer}"], params[f"b{layer}"])
        if net.normalization is not None:
            scale = params[f"gamma{layer}"], params[f"beta{layer}"]
            if net.normalization == "batchnorm":
                out = reference.batchnorm_test(out, *scale, **running(net)[layer - 1])
            else:
                out = reference.layernorm_forward(out, *scale)
        out = reference.relu_forward(out)
    last = net.num_layers
    return reference.affine_forward(out, params[f"W{last}"], params[f"b{last}"])


@variants
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_gradients_and_scores(device: Device, variant: dict[str, Any], dtype: Any) -> None:
    net = make_general(dtype=dtype, **variant)
    X, y = (a.astype(dtype) if a.dtype.kind == "f" else a for a in draw())
    tolerance = 1000 * float(np.finfo(dtype).eps)
    for step in (0, 5):  # the second time with running statistics, and with other masks
        net.step = step
        expected_loss, expected_grads, statistics = reference_loss(net, X, y)
        loss, grads = net.loss(X, y)
        assert loss.dtype == dtype
        assert float(loss) == pytest.approx(expected_loss, rel=tolerance)
        assert isinstance(grads, Parameters)
        assert list(grads) == list(net.params)
        scale = max(np.abs(gradient).max() for gradient in expected_grads.values())
        for name, gradient in host(grads).items():
            assert (gradient.dtype, gradient.shape) == (dtype, net.params[name].shape)
            np.testing.assert_allclose(
                gradient, expected_grads[name], rtol=0, atol=tolerance * scale, err_msg=name
            )
        for values, expected in zip(running(net), statistics, strict=True):
            assert values.keys() == expected.keys()
            for name, value in values.items():
                np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=tolerance)

        scores = net.loss(X)
        assert type(scores) is type(net.params.flat)
        assert scores.dtype == dtype
        np.testing.assert_allclose(to_host(scores), reference_scores(net, X), atol=tolerance * 10)


@variants
def test_gradients_are_the_slopes(device: Device, variant: dict[str, Any]) -> None:
    # Kernels run slowly on the host: one hidden layer there.
    net = make_general(hidden_dims=[4, 3] if device.kind == "cpu" else [3], **variant)
    hidden_biases = [f"b{layer}" for layer in range(1, net.num_layers)]
    X, y = draw()
    _, grads = net.loss(X, y)
    held = host(grads)
    f = lambda _: net.loss(X, y)[0]  # noqa: E731 - as the notebook has it
    for name in net.params:
        numerical = to_host(eval_numerical_gradient(f, net.params[name], verbose=False))
        if variant["normalization"] == "batchnorm" and name in hidden_biases:
            # The mean takes a bias out again: its gradient is 0, which has no relative error.
            assert abs(numerical).max() < 1e-9
            assert abs(held[name]).max() < 1e-12
            continue
        error = rel_error(numerical, held[name])
        assert error < 1e-6, f"{name}: relative error {error:.2g}"
    assert_equal(host(grads), held)  # through hundreds of calls of loss


# --- Initial parameters ---------------------------------------------------------------------------


@normalizations
def test_names_and_shapes(device: Device, normalization: str | None) -> None:
    net = make(hidden_dims=(7, 5), input_dim=6, num_classes=4, normalization=normalization)
    norm = normalization is not None
    shapes: dict[str, tuple[int, ...]] = {"W1": (6, 7), "b1": (7,)}
    shapes |= {"gamma1": (7,), "beta1": (7,)} if norm else {}
    shapes |= {"W2": (7, 5), "b2": (5,)} | ({"gamma2": (5,), "beta2": (5,)} if norm else {})
    shapes |= {"W3": (5, 4), "b3": (4,)}
    assert {name: array.shape for name, array in net.params.items()} == shapes
    assert list(net.params) == list(shapes)
    for name, array in host(net.params).items():
        if not name.startswith("W"):
            assert set(array.tolist()) == {1.0 if name.startswith("gamma") else 0.0}
    assert len(net.bn_params) == (2 if normalization == "batchnorm" else 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_are_drawn_in_order(device: Device, dtype: Any) -> None:
    net = make(dtype=dtype, seed=2**64 - 1, weight_scale=0.3, normalization="batchnorm")
    generator = np.random.default_rng(2**64 - 1)
    for layer, shape in enumerate([(4, 4), (4, 3), (3, 3)], 1):
        expected = (0.3 * generator.standard_normal(shape)).astype(np.float32)  # float64 nets too
        weights = net.params[f"W{layer}"]
        assert backend.place(weights) == device.name
        assert weights.dtype == dtype
        np.testing.assert_array_equal(to_host(weights), expected)


def test_defaults(device: Device) -> None:
    net = FullyConnectedNet([2])
    assert net.config == {
        "hidden_dims": [2],
        "input_dim": 3072,
        "num_classes": 10,
        "dropout_keep_ratio": 1.0,
        "normalization": None,
        "reg": 0.0,
        "weight_scale": 0.01,
        "dtype": "float32",
        "seed": None,
        "reproducible": False,
    }
    assert to_host(net.params["W1"]).std() == pytest.approx(0.01, rel=0.1)
    assert (net.device, net.step) == (device, 0)


def test_config_makes_the_same_network(device: Device) -> None:
    net = make(normalization="layernorm", dropout_keep_ratio=0.5, reg=0.25, dtype=np.float32)
    again = FullyConnectedNet(**net.config)
    assert_equal(host(again.params), host(net.params))
    assert again.config == net.config
    assert float(again.loss(*draw())[0]) == float(net.loss(*draw())[0])
    for text in ("reg=0.25", "seed=8", f"device={device.name!r}"):
        assert text in repr(net)


@pytest.mark.parametrize("hidden_dims", [[], [5], [5, 4, 3]])
@normalizations
def test_initial_loss(device: Device, hidden_dims: list[int], normalization: str | None) -> None:
    config = {"hidden_dims": hidden_dims, "num_classes": 10, "normalization": normalization}
    X, y = draw()
    loss = float(make(weight_scale=1e-6, **config).loss(X, y)[0])
    assert loss == pytest.approx(math.log(10), abs=1e-4)

    net = make(weight_scale=1e-6, reg=1e12, **config)
    squares = sum(np.sum(a**2) for name, a in host(net.params).items() if name.startswith("W"))
    assert squares > 0
    assert float(net.loss(X, y)[0]) - loss == pytest.approx(0.5e12 * squares)


def test_weight_scale_zero(device: Device) -> None:
    net = make(weight_scale=0)
    assert float(net.loss(*draw())[0]) == pytest.approx(math.log(3))


def test_device_argument(device: Device) -> None:
    net = make(device="cpu", normalization="batchnorm")
    loss, grads = net.loss(*draw())
    assert isinstance(net.loss(draw()[0]), np.ndarray)
    assert isinstance(loss, np.floating)
    assert isinstance(grads.flat, np.ndarray)
    assert isinstance(net.bn_params[0]["running_mean"], np.ndarray)


# --- Seeds ----------------------------------------------------------------------------------------


def test_a_seed_fixes_masks(device: Device) -> None:
    X, y = draw()
    net, other = (make_general(dropout_keep_ratio=0.5, device=d) for d in (None, "cpu"))
    losses = []
    for step in (0, 0, 1, 2, 2**32):  # the counter of steps has 32 bits
        net.step = other.step = step
        loss = float(net.loss(X, y)[0])
        assert loss == pytest.approx(float(other.loss(X, y)[0]), rel=1e-13)
        losses.append(loss)
        assert net.step == step
    assert losses[0] == losses[1] == losses[4]
    assert len(set(losses)) == 3


def test_without_a_seed_nets_and_masks_differ(device: Device) -> None:
    X, y = draw(64)
    config = {"seed": None, "hidden_dims": [20], "dropout_keep_ratio": 0.5}
    net, other = make(**config), make(**config)
    assert not np.array_equal(to_host(net.params.flat), to_host(other.params.flat))
    losses = [float(net.loss(X, y)[0]) for _ in range(4)]
    assert len(set(losses)) == 4
    assert net.step == 4
    other.params = net.params
    other.step = 4
    assert float(other.loss(X, y)[0]) != float(net.loss(X, y)[0])  # keys of their own


@normalizations
def test_scores_draw_and_change_nothing(device: Device, normalization: str | None) -> None:
    net = make_general(normalization=normalization, dropout_keep_ratio=0.5, seed=8)
    X, y = draw()
    net.loss(X, y)
    net.seed = None  # the case where a training call would count
    statistics, params, step = running(net), host(net.params), net.step
    first, again = (to_host(net.loss(X)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, reference_scores(net, X))
    assert net.step == step
    assert_equal(host(net.params), params)
    for values, before in zip(running(net), statistics, strict=True):
        assert_equal(values, before)
    # Scores of one sample do not depend on the others, and one sample is enough.
    np.testing.assert_allclose(to_host(net.loss(X[:1])), first[:1])


def test_running_statistics_need_training(device: Device) -> None:
    net = make(normalization="batchnorm")
    net.loss(draw()[0])
    for values in running(net):
        assert all(not value.any() for value in values.values())


# --- Inputs ---------------------------------------------------------------------------------------


def test_samples_of_any_shape(device: Device) -> None:
    net = make()
    X, y = draw()
    expected = to_host(net.loss(X))
    for shape in ((6, 4), (6, 1, 4), (6, 2, 1, 2, 1)):
        np.testing.assert_array_equal(to_host(net.loss(X.reshape(shape))), expected)
        assert float(net.loss(X.reshape(shape), y)[0]) == float(net.loss(X, y)[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_real_numbers_are_cast(device: Device, dtype: Any) -> None:
    net = make(dtype=np.float32, normalization="layernorm")
    X = np.arange(24).reshape(6, 2, 2).astype(dtype)
    scores = to_host(net.loss(X))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, to_host(net.loss(X.astype(np.float32))))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_arrays_of_host_and_device(device: Device, dtype: Any) -> None:
    net = make()
    X, y = draw()
    expected, gradients = net.loss(X, y)
    y = y.astype(dtype)
    for arguments in ((X, y), (device.asarray(X), y), (X, device.asarray(y))):
        loss, grads = net.loss(*arguments)
        assert float(loss) == float(expected)
        assert_equal(host(grads), host(gradients))


def test_inputs_are_left_alone(device: Device) -> None:
    net = make(normalization="batchnorm", dropout_keep_ratio=0.5)
    X, y = draw()
    copies = X.copy(), y.copy()
    for here in (lambda array: array, device.xp.array):
        arguments = here(X), here(y)
        net.loss(*arguments)
        for argument, expected in zip(arguments, copies, strict=True):
            np.testing.assert_array_equal(to_host(argument), expected)
    X.flags.writeable = y.flags.writeable = False
    net.loss(X[:, ::-1], y[::-1])


@variants
def test_gradients_outlive_later_calls(device: Device, variant: dict[str, Any]) -> None:
    net = make_general(**variant)
    X, y = draw()
    _, grads = net.loss(X, y)
    held = host(grads)
    net.params.flat[...] += 0.1
    _, others = net.loss(2 * X, y)
    net.loss(X)
    assert_equal(host(grads), held)
    assert others.flat is not grads.flat
    assert not np.array_equal(to_host(others.flat), to_host(grads.flat))


@variants
def test_loss_into_is_loss_without_a_copy_to_the_host(
    device: Device, variant: dict[str, Any]
) -> None:
    net, other = make_general(**variant), make_general(**variant)
    X, y = draw()
    grads = net.params.zeros_like()
    buffer, labels = grads.flat, device.asarray(y)
    copies = cupy_stand_in.device_to_host_copies
    for _ in range(2):  # what the buffer holds does not matter
        loss = net.loss_into(X, labels, grads)
    assert cupy_stand_in.device_to_host_copies == copies
    assert backend.place(loss) == device.name
    assert loss.shape == ()
    assert grads.flat is buffer
    other.loss(X, y)
    expected, gradients = other.loss(X, y)
    assert float(loss) == float(expected)
    assert_equal(host(grads), host(gradients))
    for values, others in zip(running(net), running(other), strict=True):
        assert_equal(values, others)


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_duplicates_are_networks_of_their_own(
    duplicate: Callable[[FullyConnectedNet], FullyConnectedNet],
) -> None:
    net = make_general(normalization="batchnorm", dropout_keep_ratio=0.5, device="cpu")
    X, y = draw()
    net.loss(X, y)
    net.layers[1].frozen = True
    other = duplicate(net)
    assert [layer.frozen for layer in (other.layers[1], other.layers[4])] == [True, False]
    before, statistics = host(net.params), running(net)
    expected = net.loss(X)
    np.testing.assert_array_equal(other.loss(X), expected)
    other.params.flat[...] = 0
    assert not any(array.any() for array in other.params.values())
    other.loss(X, y)
    assert_equal(host(net.params), before)
    for values, old in zip(running(net), statistics, strict=True):
        assert_equal(values, old)
    other.params = before
    assert_equal(host(other.params), before)


# --- Layers ---------------------------------------------------------------------------------------


@variants
def test_layers_and_parameters_are_the_same_arrays(device: Device, variant: dict[str, Any]) -> None:
    net = make_general(**variant)
    X, y = draw()
    net.loss(X, y)
    shapes = [array.shape for array in net.params.values()]
    assert [array.shape for array in net.layers.params.values()] == shapes
    before = to_host(net.loss(X))
    x = device.asarray(X)
    np.testing.assert_array_equal(to_host(net.layers.eval()(x)), before)
    for array in net.layers.params.values():
        array += 1
    flat = to_host(net.params.flat).copy()
    net.params.flat[...] -= 1
    for name, array in net.layers.params.items():
        net.layers.params[name] = array + 1
    np.testing.assert_array_equal(to_host(net.params.flat), flat)
    with pytest.raises(KeyError, match="there is no parameter 'weight'; there are w, b"):
        net.layers[0].params["weight"] = net.params["W1"]
    with pytest.raises(ValueError, match=r"b1 has shape \(3,\), expected \(4,\)"):
        net.layers[0].params["b"] = net.params["b2"]
    other = copy.deepcopy(net.layers)
    other[0].params["w"] = device.asarray(np.zeros((4, 4)))
    np.testing.assert_array_equal(to_host(net.params.flat), flat)
    for arguments in ((X,), (X, y)):  # loss keeps nothing of its passes
        net.loss(*arguments)
        assert not net.layers.grads
        for layer in net.layers:
            with pytest.raises(RuntimeError, match="before forward"):
                layer.backward(x)


def test_the_state_of_layers(device: Device) -> None:
    net, other = make_general(normalization="batchnorm"), make(normalization="batchnorm", seed=1)
    X, y = draw()
    net.loss(X, y)
    for each in (net.layers.state_dict(), {**net.layers.params, **net.layers.buffers}):
        other.layers.load_state_dict(each)
        assert other.sha256() == net.sha256()
        np.testing.assert_array_equal(to_host(other.loss(X)), to_host(net.loss(X)))


def test_absent_statistics_count_as_zeros(device: Device) -> None:
    net = make(normalization="batchnorm")
    before = net.sha256()
    net.layers.state_dict()
    assert net.sha256() == before


def test_scores_leave_modes_as_they_are(device: Device) -> None:
    net = make_general(normalization="batchnorm", dropout_keep_ratio=0.5)
    X, y = draw()
    net.loss(X, y)
    for layers in (net.layers.train(), net.layers.eval()):
        modes = [layer.training for layer in layers]
        net.loss(X)
        assert [layer.training for layer in layers] == modes


def test_a_frozen_batch_norm(device: Device) -> None:
    net = make_general(normalization="batchnorm")
    X, y = draw()
    net.loss(X, y)
    before = running(net)
    norm = net.layers[1]
    norm.frozen = True
    net.loss(X, y)
    assert_equal(running(net)[0], before[0])
    assert not np.array_equal(running(net)[1]["running_mean"], before[1]["running_mean"])


def test_batch_norms_take_what_is_assigned(device: Device) -> None:
    net, other = (make_general(normalization="batchnorm") for _ in range(2))
    X, y = draw()
    net.loss(X, y)
    other.bn_params = copy.deepcopy(net.bn_params)
    np.testing.assert_array_equal(to_host(other.loss(X)), to_host(net.loss(X)))
    with pytest.raises(TypeError, match="does not support item assignment"):
        other.bn_params[0] = {"mode": "train"}
    other.bn_params[0]["momentum"] = 1.0
    before = running(net)
    other.loss(X, y)
    mean = to_host(other.bn_params[0]["running_mean"])
    np.testing.assert_array_equal(mean, before[0]["running_mean"])
    with pytest.raises(ValueError, match="bn_params has 1 entries, expected 2"):
        other.bn_params = net.bn_params[:1]


def test_printing() -> None:
    net = make(normalization="batchnorm", dropout_keep_ratio=0.5, device="cpu", dtype=np.float32)
    lines = str(net).splitlines()
    assert lines[0] == "FullyConnectedNet"
    assert [" ".join(line.split()) for line in lines[2:5]] == [
        "0 Affine(4, 4) (N, 4) w (4, 4), b (4,) 20",
        "1 BatchNorm(4, relu=True) (N, 4) gamma (4,), beta (4,) 8",
        "2 Dropout(0.5, seed=8, stream=1) (N, 4) 0",
    ]
    assert lines[-1] == f"total: {net.params.flat.size} parameters, float32 on cpu"
    assert repr(net).startswith("FullyConnectedNet(hidden_dims=[4, 3], input_dim=4,")
    # Seeds that were drawn are none of the arguments.
    assert "Dropout(0.5, stream=1)" in str(make(dropout_keep_ratio=0.5, device="cpu", seed=None))


def test_pickles_of_before_there_were_layers() -> None:
    net = make_general(normalization="batchnorm", dropout_keep_ratio=0.5, device="cpu")
    X, y = draw()
    net.loss(X, y)
    state = net.__getstate__()
    assert "layers" not in state
    del state["reproducible"], state["frozen"]
    other = FullyConnectedNet.__new__(FullyConnectedNet)
    other.__setstate__(state)
    assert other.sha256() == net.sha256()
    assert not other.reproducible


# --- Bad input ------------------------------------------------------------------------------------

BAD_CONFIGS = [
    ({"hidden_dims": [0]}, ValueError, r"hidden_dims\[0\] is 0, expected"),
    ({"hidden_dims": [4, -1]}, ValueError, r"hidden_dims\[1\] is -1, expected"),
    ({"hidden_dims": [2.0]}, TypeError, r"hidden_dims\[0\] is 2.0, expected a whole number"),
    ({"hidden_dims": [True]}, ValueError, r"hidden_dims\[0\] is True, expected"),
    ({"hidden_dims": "45"}, TypeError, r"hidden_dims\[0\] is '4', expected"),
    ({"hidden_dims": 100}, TypeError, "hidden_dims is 100, expected"),
    ({"hidden_dims": None}, TypeError, "hidden_dims is None, expected"),
    ({"input_dim": 0}, ValueError, "input_dim is 0, expected"),
    ({"input_dim": (3, 32, 32)}, TypeError, r"input_dim is \(3, 32, 32\), expected"),
    ({"num_classes": 0}, ValueError, "num_classes is 0, expected"),
    ({"num_classes": "ten"}, TypeError, "num_classes is 'ten', expected"),
    ({"dropout_keep_ratio": 0}, ValueError, "dropout_keep_ratio is 0, expected"),
    ({"dropout_keep_ratio": -0.5}, ValueError, "dropout_keep_ratio is -0.5, expected"),
    ({"dropout_keep_ratio": 1.01}, ValueError, "dropout_keep_ratio is 1.01, expected"),
    ({"dropout_keep_ratio": math.nan}, ValueError, "dropout_keep_ratio is nan, expected"),
    ({"dropout_keep_ratio": None}, TypeError, "dropout_keep_ratio is None, expected"),
    ({"normalization": "bn"}, ValueError, "normalization is 'bn', expected None, 'batchnorm'"),
    ({"normalization": True}, ValueError, "normalization is True, expected"),
    ({"reg": -1e-9}, ValueError, "reg is -1e-09, expected a number of at least 0"),
    ({"reg": math.nan}, ValueError, "reg is nan, expected"),
    ({"reg": "1"}, TypeError, "reg is '1', expected"),
    ({"weight_scale": -1}, ValueError, "weight_scale is -1, expected"),
    ({"weight_scale": math.inf}, ValueError, "weight_scale is inf, expected"),
    ({"weight_scale": [1]}, TypeError, r"weight_scale is \[1\], expected"),
    ({"dtype": np.float16}, TypeError, "dtype is float16, expected float32 or float64"),
    ({"dtype": int}, TypeError, "dtype is int64, expected float32 or float64"),
    ({"seed": -1}, ValueError, r"seed is -1, expected a whole number from 0 to 2\*\*64 - 1"),
    ({"seed": 2**64}, ValueError, "seed is 18446744073709551616, expected"),
    ({"seed": 1.0}, TypeError, "seed is 1.0, expected a whole number"),
    ({"seed": True}, ValueError, "seed is True, expected"),
    ({"device": "gpu"}, ValueError, "device is 'gpu', expected 'auto', 'cpu', 'cuda'"),
    ({"hidden": [3]}, TypeError, "unexpected keyword argument 'hidden'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "text"), BAD_CONFIGS, ids=[str(case[0]) for case in BAD_CONFIGS]
)
def test_bad_configuration(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(**{"device": "cpu"} | changes)


X, Y = draw()
BAD_BATCHES = [
    (X.tolist(), Y, TypeError, "X is a list, expected a NumPy or CuPy array"),
    (X.astype(complex), Y, TypeError, "X has dtype complex128, expected real numbers"),
    (X > 0, Y, TypeError, "X has dtype bool, expected real numbers"),
    (X.astype(object), Y, TypeError, "X has dtype object, expected real numbers"),
    (np.ma.masked_less(X, 0), Y, TypeError, "X is a masked array"),
    (X[0].ravel(), Y, ValueError, r"X has shape \(4,\), expected \(N, d1, ...\) with 4 values"),
    (X[:, :, :1], Y, ValueError, r"X has shape \(6, 2, 1\), expected"),
    (X[:0], Y[:0], ValueError, r"X has shape \(0, 2, 2\), expected .* at least one sample"),
    (X, Y.tolist(), TypeError, "y is a list, expected"),
    (X, Y.astype(float), TypeError, "y has dtype float64, expected integers"),
    (X, Y > 0, TypeError, "y has dtype bool, expected integers"),
    (X, Y[:5], ValueError, r"y has shape \(5,\), expected \(6,\)"),
    (X, Y[:, np.newaxis], ValueError, r"y has shape \(6, 1\), expected \(6,\)"),
    (X, Y + 1, ValueError, "y has a label 3, expected 0 to 2"),
    (X, Y - 1, ValueError, "y has a label -1, expected 0 to 2"),
    (X, Y.astype(np.uint64) + 2**63, ValueError, "y has a label 922337203685477581., expected"),
    (X[:1], Y[:1], ValueError, "at least 2 samples in training"),
]


@pytest.mark.parametrize(
    ("bad_X", "bad_y", "error", "text"), BAD_BATCHES, ids=[case[3] for case in BAD_BATCHES]
)
def test_bad_batches(
    device: Device, bad_X: Any, bad_y: Any, error: type[Exception], text: str
) -> None:
    net = make_general(normalization="batchnorm", dropout_keep_ratio=0.5, seed=8)
    net.loss(X, Y)
    net.seed = None  # so that a call which went through would count
    params, statistics, step = host(net.params), running(net), net.step
    with pytest.raises(error, match=text):
        net.loss(bad_X, bad_y)
    assert_equal(host(net.params), params)
    for values, before in zip(running(net), statistics, strict=True):
        assert_equal(values, before)
    assert net.step == step


def test_arrays_on_another_device(device: Device) -> None:
    if device.kind == "cpu":
        pytest.skip("one device only")
    net = make(device="cpu")
    with pytest.raises(ValueError, match="X is on cuda:0 and the network on cpu"):
        net.loss(device.asarray(X))
    with pytest.raises(ValueError, match="y is on cuda:0 and the network on cpu"):
        net.loss(X, device.asarray(Y))
