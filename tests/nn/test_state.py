"""The state of layers: copied, moved between devices, written to files and read back."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_layer_objects import draw, randomize

from gpubn import backend, nn
from gpubn.backend import Device, to_host
from gpubn.nn import CheckpointError

NAMES = [
    "0.w",
    "0.b",
    "1.0.gamma",
    "1.0.beta",
    "1.0.running_mean",
    "1.0.running_var",
    "3.gamma",
    "3.beta",
]


def make(seed: int = 1, **k: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Affine(6, 4, seed=seed, **k),
        nn.Sequential(nn.BatchNorm(4, relu=True, **k)),
        nn.Dropout(0.5, seed=1),
        nn.LayerNorm(4, **k),
    )


def trained(device: Device, rng: np.random.Generator, **k: Any) -> nn.Sequential:
    net = make(**k)
    for layer in net:
        randomize(layer, rng)
    net(draw(device, rng, (5, 6), net[0].dtype))
    return net


def contents(net: nn.Layer) -> dict[str, bytes]:
    return {name: to_host(array).tobytes() for name, array in net.state_dict().items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(device: Device, dtype: Any, rng: np.random.Generator) -> None:
    net, other = trained(device, rng, dtype=dtype), make(seed=2, dtype=dtype)
    state = net.state_dict()
    assert list(state) == NAMES
    assert all(backend.place(array) == device.name for array in state.values())
    arrays = dict(other.params)
    other.load_state_dict(state)
    assert contents(other) == contents(net)
    for name, array in other.params.items():
        assert array is arrays[name]  # written in place: views of other buffers stay so
    x = draw(device, rng, (3, 6), dtype)
    expected = to_host(net.eval()(x))
    np.testing.assert_array_equal(to_host(other.eval()(x)), expected)
    # Both sides are copies.
    before = contents(net)
    for array in state.values():
        array += 1
    for array in other.params.values():
        array += 1
    other.train()(x)
    assert contents(net) == before


def test_a_state_of_views_of_what_is_written(device: Device, rng: np.random.Generator) -> None:
    layer = nn.GroupNorm(1, 4)
    randomize(layer, rng)
    gamma, beta = (to_host(array).copy() for array in layer.params.values())
    layer.load_state_dict({"gamma": layer.params["beta"], "beta": layer.params["gamma"]})
    np.testing.assert_array_equal(to_host(layer.params["gamma"]), beta)
    np.testing.assert_array_equal(to_host(layer.params["beta"]), gamma)


def test_between_devices(device: Device, rng: np.random.Generator) -> None:
    net, there = trained(device, rng), make(seed=2, device="cpu")
    there.load_state_dict(net.state_dict())
    assert contents(there) == contents(net)
    assert all(isinstance(array, np.ndarray) for array in there.state_dict().values())
    back = make(seed=3)
    back.load_state_dict(there.state_dict())
    assert contents(back) == contents(net)
    assert all(backend.place(array) == device.name for array in back.state_dict().values())


WRONG = [
    ({"0.b": None}, ValueError, "state has no 0.b, expected 0.w, 0.b, 1.0.gamma,"),
    ({"0.weight": 1, "9": 2}, ValueError, "state has 0.weight, 9, expected 0.w,"),
    ({"3.beta": None, "bias": 1}, ValueError, "state has no 3.beta and has bias, expected"),
    ({"3.beta": np.zeros(5, "f4")}, ValueError, r"3.beta has shape \(5,\), expected \(4,\)"),
    (
        {"1.0.running_var": np.zeros((1, 4), "f4")},
        ValueError,
        r"1.0.running_var has shape \(1, 4\), expected \(4,\)",
    ),
    ({"3.beta": np.zeros(4)}, TypeError, "3.beta has dtype float64, expected float32"),
    ({"3.beta": [0.0] * 4}, TypeError, "3.beta is a list, expected"),
]


@pytest.mark.parametrize(("changes", "error", "text"), WRONG, ids=[case[2] for case in WRONG])
def test_a_wrong_state_changes_nothing(
    device: Device,
    changes: dict[str, Any],
    error: type[Exception],
    text: str,
    rng: np.random.Generator,
) -> None:
    net = trained(device, rng)
    state = make(seed=2).state_dict() | changes
    state = {name: array for name, array in state.items() if array is not None}
    before = contents(net)
    with pytest.raises(error, match=text):
        net.load_state_dict(state)
    assert contents(net) == before


def test_no_state_at_all() -> None:
    nn.ReLU().load_state_dict({})
    assert nn.ReLU().state_dict() == {}
    with pytest.raises(ValueError, match="state has w, expected none"):
        nn.ReLU().load_state_dict({"w": 1})
    with pytest.raises(TypeError, match="state is a list, expected a dict"):
        nn.ReLU().load_state_dict([])


# --- Files ----------------------------------------------------------------------------------------


def test_a_file(device: Device, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "net.safetensors"
    net, other = trained(device, rng), make(seed=2)
    net.save(path)
    assert os.listdir(tmp_path) == [path.name]
    assert list(load_file(path)) == sorted(NAMES)
    other.load(str(path))
    assert contents(other) == contents(net)
    data = path.read_bytes()
    other.save(path)
    assert path.read_bytes() == data  # equal states make equal files
    counted = nn.BatchNorm(3, momentum=None)
    counted.bn_param["num_batches"] = 7
    counted.save(path)
    again = nn.BatchNorm(3, momentum=None)
    again.load(path)
    assert again.bn_param["num_batches"] == 7


def test_damaged_files(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "net"
    with backend.use("cpu"):
        net = trained(backend.current(), rng)
        other = make(seed=2)
    net.save(path)
    good, before = path.read_bytes(), contents(other)
    for position in range(0, len(good), 7):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="net"):
            other.load(path)
    for length in range(0, len(good), 31):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="net"):
            other.load(path)
    assert contents(other) == before


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "net"
    with backend.use("cpu"):
        net = make()
        nn.Affine(6, 4).save(path)
        with pytest.raises(
            CheckpointError, match=r"net cannot be used: state has no 0\.w, .* and has (b, w|w, b)"
        ):
            net.load(path)
        from gpubn import FullyConnectedNet
        from gpubn.train import checkpoint

        checkpoint.save_model(path, FullyConnectedNet([3], input_dim=2))
        with pytest.raises(CheckpointError, match="net is a model, expected a state"):
            net.load(path)
        net.save(path)
        with pytest.raises(CheckpointError, match="net is a state, expected a model"):
            checkpoint.load_model(path)
        save_file(net.state_dict(), path)
        with pytest.raises(CheckpointError, match="net was not written by gpubn"):
            net.load(path)
        with pytest.raises(FileNotFoundError):
            net.load(tmp_path / "none")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with backend.use("cpu"):
        layer = nn.BatchNorm(3)
    layer.save(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="saving needs safetensors: pip install safetensors"):
        layer.save(tmp_path / "other")
    with pytest.raises(ImportError, match="loading needs safetensors: pip install safetensors"):
        layer.load(tmp_path / "net")


def test_a_refused_state_changes_nothing_at_all() -> None:
    net = nn.Sequential(nn.Affine(4, 3, seed=0), nn.BatchNorm(3, momentum=None), nn.Affine(3, 2))
    before = {name: array.tobytes() for name, array in net.state_dict().items()}
    state = {name: array + 1 for name, array in net.state_dict().items()}
    state["1.num_batches"] = np.array(-1)
    with pytest.raises(ValueError, match=r"1\.num_batches is -1, expected a whole number"):
        net.load_state_dict(state)
    state["1.num_batches"] = np.array(2)
    frozen = net.params["2.w"].copy()
    frozen.flags.writeable = False
    net.params["2.w"] = frozen
    with pytest.raises(ValueError, match=r"2\.w of the layer is read-only"):
        net.load_state_dict(state)
    assert {name: array.tobytes() for name, array in net.state_dict().items()} == before


@pytest.mark.parametrize("header", ["[]", "null", "{}", '{"format": 1}', "{bad"])
def test_a_header_of_another_program(tmp_path: Path, header: str) -> None:
    import safetensors.numpy

    from gpubn.nn.files import digest

    arrays = {"w": np.ones(2, np.float32)}
    text = digest(arrays, header).hexdigest() + header
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays, {"gpubn": text}))
    with pytest.raises(nn.CheckpointError, match="was not written by gpubn"):
        nn.Affine(1, 1).load(path)
