"""Layers one after the other, and what they print."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from test_layer_objects import assert_same, draw

from gpubn import backend, nn
from gpubn.backend import Array, Device, to_host
from gpubn.testing import check_gradients


def make(**k: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Affine(6, 5, seed=1, **k),
        nn.Sequential(nn.BatchNorm(5, **k), nn.ReLU(), nn.Dropout(0.8, seed=2)),
        nn.Affine(5, 3, seed=3, **k),
    )


def test_one_layer_after_the_other(device: Device, rng: np.random.Generator) -> None:
    net, alone = make(), make()
    x = draw(device, rng, (4, 2, 3))
    out = x
    for _, layer in alone.leaves():
        out = layer(out)
    assert_same(net(x), out)
    dout = draw(device, rng, out.shape)
    dx = dout
    for _, layer in reversed(list(alone.leaves())):
        dx = layer.backward(dx)
    assert_same(net.backward(dout), dx)
    assert list(net.grads) == list(net.params)
    for name, gradient in net.grads.items():
        assert_same(gradient, alone.grads[name])


def test_gradients_are_the_slopes(rng: np.random.Generator) -> None:
    with backend.use("cpu"):
        net = make(dtype=np.float64)
    names = list(net.params)
    dropout = net[2][2]

    def forward(x: Array, *params: Array) -> tuple[Array, Any]:
        dropout.step = 0  # the same mask each time
        for name, array in zip(names, params, strict=True):
            net.params[name] = array
        return net(x), None

    def backward(dout: Array, _: Any) -> tuple[Array, ...]:
        return (net.backward(dout), *net.grads.values())

    shapes = [(4, 2, 3), *(array.shape for array in net.params.values())]
    check_gradients(forward, backward, *(rng.standard_normal(shape) for shape in shapes))


def test_names_reach_the_layers(device: Device) -> None:
    net = make()
    assert list(net.params) == ["1.w", "1.b", "2.0.gamma", "2.0.beta", "3.w", "3.b"]
    assert list(net.buffers) == ["2.0.running_mean", "2.0.running_var"]
    assert len(net.params) == 6
    assert list(net.grads) == []
    net.params["1.b"] = device.asarray(np.arange(5, dtype=np.float32))
    assert to_host(net[1].params["b"]).tolist() == [0, 1, 2, 3, 4]
    net.params["1.b"] += 1
    assert to_host(net[1].params["b"]).tolist() == [1, 2, 3, 4, 5]
    net.buffers["2.0.running_mean"] = device.asarray(np.ones(5, np.float32))
    assert to_host(net[2][0].buffers["running_mean"]).tolist() == [1] * 5
    for name in ("1.gamma", "w", "9.w", "2.gamma"):
        with pytest.raises(KeyError, match="there is no"):
            net.params[name] = net.params["1.b"]
    with pytest.raises(TypeError, match="fixed"):
        del net.params["1.b"]
    assert repr(net.buffers).startswith("{'2.0.running_mean': array([1.,")


def test_a_sequence_of_layers() -> None:
    with backend.use("cpu"):
        net = make()
    assert len(net) == 4
    assert list(net) == [net[0], net[1], net[2], net[3]]
    assert net[-1] is net[3]
    assert isinstance(net[1:3], nn.Sequential)
    assert net[1:3][0] is net[1]
    with pytest.raises(IndexError):
        net[4]
    empty = nn.Sequential()
    x = np.ones((2, 3), np.float32)
    assert empty(x) is x
    assert empty.backward(x) is x
    assert repr(net[1:3]) == (
        "Sequential(Affine(6, 5, seed=1), Sequential(BatchNorm(5), ReLU(), Dropout(0.8, seed=2)))"
    )


def test_modes() -> None:
    with backend.use("cpu"):
        net = make()
    layers = [net, *net, *net[2]]
    assert all(layer.training for layer in layers)
    assert net.eval() is net
    assert not any(layer.training for layer in layers)
    assert net.train() is net
    assert all(layer.training for layer in layers)


def test_evaluation(device: Device, rng: np.random.Generator) -> None:
    net = make().eval()
    x = draw(device, rng, (4, 2, 3))
    out = to_host(net(x))
    np.testing.assert_array_equal(to_host(net(x)), out)
    np.testing.assert_allclose(to_host(net(x[:1])), out[:1], rtol=1e-6)
    assert net.backward(net(x)).shape == x.shape


def test_prediction_keeps_nothing(device: Device, rng: np.random.Generator) -> None:
    x = draw(device, rng, (4, 2, 3))
    net = make()
    net[2].eval()
    modes = [layer.training for layer in (net, *net, *net[2])]
    expected = make().eval()(x)
    out = net(x)
    before = to_host(net[2][0].buffers["running_mean"])
    for _ in range(2):
        assert_same(net.predict(x), expected)
    assert [layer.training for layer in (net, *net, *net[2])] == modes
    assert net[2][2].step == 0
    np.testing.assert_array_equal(to_host(net[2][0].buffers["running_mean"]), before)
    for layer in (net, *(leaf for _, leaf in net.leaves())):
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}.backward was called"):
            layer.backward(out)
    with pytest.raises(ValueError, match="x has shape"):
        net.predict(x[:, :1])
    assert [layer.training for layer in (net, *net, *net[2])] == modes


def test_prediction_lets_go_as_it_goes(rng: np.random.Generator) -> None:
    class Look(nn.ReLU):
        def _forward(self, x: Array) -> tuple[Array, Any]:
            alive.append(sum(ref() is not None for ref in outs))
            out = super()._forward(x)[0]
            outs.append(weakref.ref(out))
            return out, x

    x = rng.standard_normal((4, 3)).astype(np.float32)
    net = nn.Sequential(Look(), Look(), nn.Sequential(Look(), Look()), Look())
    outs: list[weakref.ref[Array]] = []
    alive: list[int] = []
    with backend.use("cpu"):
        net.predict(x)
        assert max(alive) == 2  # a nested Sequential's caller holds its input
        outs.clear()
        alive.clear()
        net.eval()(x)
        assert max(alive) == 4


def test_a_pass_that_fails_has_no_backward(rng: np.random.Generator) -> None:
    with backend.use("cpu"):
        net = make()
    with pytest.raises(RuntimeError, match=r"Sequential\.backward was called before forward"):
        net.backward(np.ones((4, 3), np.float32))
    x = rng.standard_normal((4, 2, 3)).astype(np.float32)
    out = net(x)
    with pytest.raises(ValueError, match="x has shape"):
        net(x[:, :1])
    with pytest.raises(RuntimeError, match=r"Sequential\.backward was called before forward"):
        net.backward(out)
    net(x)
    net.release()
    for layer in (net, *(leaf for _, leaf in net.leaves())):
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}.backward was called"):
            layer.backward(out)


def test_bad_layers() -> None:
    with pytest.raises(TypeError, match=r"layers\[1\] is a list, expected a Layer"):
        nn.Sequential(nn.ReLU(), [nn.ReLU()])
    with pytest.raises(TypeError, match=r"layers\[0\] is <class .*ReLU'>, expected a Layer"):
        nn.Sequential(nn.ReLU)
    relu = nn.ReLU()
    with pytest.raises(ValueError, match=r"layer 1\.0 is layer 0 again"):
        nn.Sequential(relu, nn.Sequential(relu))


def test_the_table() -> None:
    with backend.use("cpu"):
        net = make()
        assert (
            str(net)
            == """\
     layer                 output  parameters             count
0    Flatten()                                                0
1    Affine(6, 5, seed=1)  (N, 5)  w (6, 5), b (5,)          35
2.0  BatchNorm(5)          (N, 5)  gamma (5,), beta (5,)     10
2.1  ReLU()                (N, 5)                             0
2.2  Dropout(0.8, seed=2)  (N, 5)                             0
3    Affine(5, 3, seed=3)  (N, 3)  w (5, 3), b (3,)          18
total: 63 parameters, float32 on cpu"""
        )
        assert (
            str(nn.Sequential(nn.ReLU()))
            == """\
   layer   output  parameters  count
0  ReLU()                          0
total: 0 parameters"""
        )
        assert str(nn.Sequential()).endswith("total: 0 parameters")
        large = str(nn.Sequential(nn.Affine(3072, 100, dtype=np.float64)))
        assert large.endswith("total: 307,300 parameters, float64 on cpu")


def test_train_takes_a_mode() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(0.5)))
    assert net.train(False) is net
    assert not any(layer.training for _, layer in net.leaves())
    assert all(layer.training for _, layer in net.train().leaves())
    with pytest.raises(TypeError, match="mode is 1, expected True or False"):
        net.train(1)
