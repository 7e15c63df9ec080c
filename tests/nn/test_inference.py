"""Folding batch norms into weights, and statistics of all the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_layer_objects import assert_same, draw

from gpubn import FullyConnectedNet, backend, nn
from gpubn.backend import Device, to_host
from gpubn.testing.tolerance import matmul_scale

UNITS = 8
"""What the docstring of ``fold_batchnorm`` states for one pair."""


def contents(net: Any) -> dict[str, bytes]:
    net = net if isinstance(net, nn.Layer) else net.layers
    return {name: to_host(array).tobytes() for name, array in net.state_dict().items()}


# --- Folding --------------------------------------------------------------------------------------


def random_pair(
    device: Device, rng: np.random.Generator, features: int, outputs: int, dtype: Any, **k: Any
) -> nn.Sequential:
    """Return an affine layer and a batch norm whose numbers have all sorts of sizes."""

    def numbers(low: float, high: float) -> Any:
        return draw(device, rng, (outputs,), dtype) * dtype(10 ** rng.uniform(low, high))

    affine, norm = (
        nn.Affine(features, outputs, seed=1, dtype=dtype),
        nn.BatchNorm(outputs, dtype=dtype, **k),
    )
    affine.params["b"] = numbers(-2, 2)
    norm.params["gamma"], norm.params["beta"] = numbers(0, 0), numbers(-2, 2)
    norm.buffers["running_mean"] = numbers(-2, 3)
    norm.buffers["running_var"] = device.asarray((10 ** rng.uniform(-6, 6, outputs)).astype(dtype))
    return nn.Sequential(affine, norm)


def pair_scale(net: nn.Sequential, x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the scale that the bound of a pair is stated at."""
    _, b, gamma, beta, mean, var = (
        to_host(a).astype(np.float64) for a in net.state_dict().values()
    )
    scale = np.abs(gamma / np.sqrt(var + 1e-5))
    product = matmul_scale(x, to_host(net[0].params["w"]))
    return scale * (product + np.abs(b) + np.abs(mean)) + np.abs(beta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(12))
def test_a_folded_pair(device: Device, seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    features, outputs, samples = (int(rng.choice(s)) for s in ((1, 3, 40, 300), (1, 30), (1, 20)))
    net = random_pair(device, rng, features, outputs, dtype)
    x = (rng.standard_normal((samples, features)) + rng.choice([0, 10])).astype(dtype)
    before = contents(net)
    folded = nn.fold_batchnorm(net)
    assert repr(folded) == f"Sequential({net[0]!r})"
    assert contents(net) == before
    out, expected = (to_host(each(device.asarray(x))) for each in (folded, net.eval()))
    assert out.dtype == dtype
    units = np.spacing(pair_scale(net, x).astype(dtype)).astype(np.float64)
    assert (np.abs(out.astype(np.float64) - expected) / units).max() <= UNITS


def test_folded_weights_are_rounded_once(device: Device, rng: np.random.Generator) -> None:
    net = random_pair(device, rng, 4, 3, np.float32)
    w, b, gamma, beta, mean, var = (
        to_host(a).astype(np.float64) for a in net.state_dict().values()
    )
    scale = gamma / np.sqrt(var + 1e-5)
    folded = nn.fold_batchnorm(net)
    assert to_host(folded[0].params["w"]).tobytes() == (w * scale).astype(np.float32).tobytes()
    b = (b - mean) * scale + beta
    assert to_host(folded[0].params["b"]).tobytes() == b.astype(np.float32).tobytes()


def test_which_batch_norms_are_folded() -> None:
    with backend.use("cpu"):
        net = nn.Sequential(
            nn.BatchNorm(4),  # at the start
            nn.Affine(4, 4, dtype=np.float32),
            nn.Sequential(nn.BatchNorm(4), nn.BatchNorm(4, relu=True), nn.BatchNorm(4)),
            nn.Affine(4, 4),
            nn.Dropout(0.5, seed=1),
            nn.BatchNorm(4),  # after a dropout
            nn.Sequential(nn.Affine(4, 4)),
            nn.BatchNorm(4),
            nn.LayerNorm(4),
            nn.BatchNorm(4),  # after another norm
        )
    folded = nn.fold_batchnorm(net)
    assert repr(folded) == (
        "Sequential(BatchNorm(4), Affine(4, 4), Sequential(ReLU(), BatchNorm(4)), Affine(4, 4), "
        "Dropout(0.5, seed=1), BatchNorm(4), Sequential(Affine(4, 4)), LayerNorm(4), BatchNorm(4))"
    )
    assert not any(layer.training for _, layer in folded.leaves())
    assert all(layer.training for _, layer in net.leaves())
    arrays = {id(array) for array in net.params.values()}
    assert not any(id(array) in arrays for array in folded.params.values())
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_allclose(folded(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_channels_on_another_axis_are_not_folded(rng: np.random.Generator) -> None:
    with backend.use("cpu"):
        for axis in (-1, 0, -2):
            net = nn.Sequential(nn.Affine(4, 4, seed=1), nn.BatchNorm(4, axis=axis))
            net[1].params["gamma"][...] = [1, 2, 3, 4]
            folded = nn.fold_batchnorm(net)
            assert len(folded) == (1 if axis == -1 else 2)
            x = rng.standard_normal((4, 4)).astype(np.float32)
            np.testing.assert_allclose(folded(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_channels_that_do_not_fit() -> None:
    with backend.use("cpu"):
        net = nn.Sequential(nn.Affine(4, 3), nn.BatchNorm(4))
    with pytest.raises(ValueError, match=r"BatchNorm\(4\) follows Affine\(4, 3\), expected 3"):
        nn.fold_batchnorm(net)


@pytest.mark.parametrize("normalization", [None, "batchnorm", "layernorm"])
def test_a_folded_network(device: Device, normalization: str | None) -> None:
    net = FullyConnectedNet(
        [30, 20, 20],
        input_dim=12,
        normalization=normalization,
        dropout_keep_ratio=0.8,
        weight_scale=0.3,
        seed=3,
        reg=0.1,
    )
    rng = np.random.default_rng(3)
    X, y = rng.standard_normal((40, 3, 4)), rng.integers(0, 10, 40)
    for _ in range(20):
        net.step += 1
        net.params.flat[...] -= 0.1 * net.loss(X, y)[1].flat
    before = contents(net)
    folded = nn.fold_batchnorm(net)
    assert isinstance(folded, FullyConnectedNet)
    assert contents(net) == before
    expected = None if normalization == "batchnorm" else normalization
    assert folded.config == net.config | {"normalization": expected}
    assert folded.device.name == device.name
    scores, theirs = to_host(folded.loss(X)), to_host(net.loss(X))
    if normalization != "batchnorm":
        np.testing.assert_array_equal(scores, theirs)
        return
    assert not folded.bn_params
    # Three pairs and one affine layer, at the scale of the last.
    last = folded.layers[:-1].eval()(folded.as_input(X))
    scale = matmul_scale(to_host(last), to_host(folded.params["W4"]))
    units = np.abs(scores.astype(np.float64) - theirs) / np.spacing(scale.astype(np.float32))
    assert 0 < units.max() <= 4 * UNITS


# --- Population statistics ------------------------------------------------------------------------


def reference(
    X: NDArray[Any], net: Any, batches: list[int], axes: tuple[int, ...] = (0,)
) -> list[dict[str, NDArray[Any]]]:
    """Return mean and variance of every batch norm of ``make``, in float64 NumPy."""
    layers = [layer for _, layer in net.leaves()]
    totals: list[dict[str, Any]] = []
    for batch in np.split(X.astype(np.float64), batches):
        out, at = batch, 0
        for layer in layers:
            params = {
                name: to_host(array).astype(np.float64) for name, array in layer.params.items()
            }
            if isinstance(layer, nn.Affine):
                out = out.reshape(len(out), -1) @ params["w"] + params["b"]
            elif isinstance(layer, nn.BatchNorm):
                mean, var = out.mean(axis=0), out.var(axis=0)
                m = len(out)
                if at == len(totals):
                    totals.append({"running_mean": 0.0, "running_var": 0.0})
                totals[at]["running_mean"] += len(batch) / len(X) * mean
                totals[at]["running_var"] += len(batch) / len(X) * var * m / (m - 1)
                at += 1
                out = (out - mean) / np.sqrt(var + 1e-5) * params["gamma"] + params["beta"]
                out = np.maximum(out, 0) if layer.relu else out
            elif isinstance(layer, nn.ReLU):
                out = np.maximum(out, 0)
    return totals


def make(**k: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Affine(6, 5, seed=1, **k),
        nn.BatchNorm(5, **k),
        nn.ReLU(),
        nn.Dropout(0.5, seed=1),
        nn.Sequential(nn.Affine(5, 4, seed=2, **k), nn.BatchNorm(4, relu=True, momentum=0.5, **k)),
    )


def batch_norms(net: nn.Sequential) -> list[nn.BatchNorm]:
    return [layer for _, layer in net.leaves() if isinstance(layer, nn.BatchNorm)]


@pytest.mark.parametrize(
    ("samples", "size", "batches"),
    [
        (12, 4, [4, 8]),
        (14, 4, [4, 8, 12]),  # a smaller last one
        (13, 4, [4, 8]),  # a single last one joins the one before
        (5, 100, []),
        (3, 2, []),
    ],
)
def test_population_statistics(
    device: Device, samples: int, size: int, batches: list[int], rng: np.random.Generator
) -> None:
    net = make(dtype=np.float64)
    net(draw(device, rng, (8, 2, 3), np.float64))  # what was there before does not matter
    X = rng.standard_normal((samples, 2, 3)) + 2
    params = {name: to_host(array).copy() for name, array in net.params.items()}
    net[0].training = False
    modes = [layer.training for _, layer in net.leaves()]
    for data in (X, device.asarray(X)):
        nn.population_statistics(net, data, size)
        for norm, expected in zip(batch_norms(net), reference(X, net, batches), strict=True):
            for name, value in norm.buffers.items():
                assert backend.place(value) == device.name
                assert value.dtype == np.float64
                np.testing.assert_allclose(to_host(value), expected[name], rtol=1e-12, atol=1e-14)
    for name, array in net.params.items():
        np.testing.assert_array_equal(to_host(array), params[name])
    assert [layer.training for _, layer in net.leaves()] == modes
    assert [norm.momentum for norm in batch_norms(net)] == [0.9, 0.5]
    assert net[4].step == 1
    with pytest.raises(RuntimeError):
        net.backward(X)


def test_population_statistics_of_channels(device: Device, rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.BatchNorm(3, dtype=np.float64))
    X = rng.standard_normal((7, 3, 2, 2))
    nn.population_statistics(net, X, 3)
    means = [X[:3], X[3:]]  # the seventh joins
    for name, expected in (
        ("running_mean", sum(len(b) / 7 * b.mean(axis=(0, 2, 3)) for b in means)),
        ("running_var", sum(len(b) / 7 * b.var(axis=(0, 2, 3), ddof=1) for b in means)),
    ):
        np.testing.assert_allclose(to_host(net[0].buffers[name]), expected, rtol=1e-12, atol=1e-15)


def test_population_statistics_of_a_network(device: Device, rng: np.random.Generator) -> None:
    net = FullyConnectedNet(
        [5, 4], input_dim=6, normalization="batchnorm", dropout_keep_ratio=0.5, seed=1,
        weight_scale=0.5, dtype=np.float64,
    )  # fmt: skip
    X = rng.standard_normal((11, 2, 3))
    held = net.bn_params[0]
    nn.population_statistics(net, X, 4)
    for bn_param, expected in zip(net.bn_params, reference(X, net.layers, [4, 8]), strict=True):
        assert set(bn_param) == {"mode", "running_mean", "running_var"}
        for name, value in expected.items():
            np.testing.assert_allclose(to_host(bn_param[name]), value, rtol=1e-12, atol=1e-14)
    assert net.bn_params[0] is held
    assert net.step == 0
    nn.population_statistics(net, X.astype(np.float32), 4)  # cast, as everywhere


def test_frozen_statistics_stay(device: Device, rng: np.random.Generator) -> None:
    net = make(dtype=np.float64)
    first, second = batch_norms(net)
    first.frozen = True
    before = contents(first)
    nn.population_statistics(net, rng.standard_normal((8, 6)))
    assert contents(first) == before
    assert to_host(second.buffers["running_mean"]).any()


def test_an_exception_changes_nothing(device: Device, rng: np.random.Generator) -> None:
    class Broken(nn.ReLU):
        passes = 0

        def _forward(self, x: Any) -> Any:
            self.passes += 1
            if self.passes == 3:
                raise KeyboardInterrupt
            return super()._forward(x)

    net = nn.Sequential(*make(), Broken())
    net(draw(device, rng, (8, 6)))
    net.eval()
    net[2].training = True
    before, modes = contents(net), [layer.training for _, layer in net.leaves()]
    with pytest.raises(KeyboardInterrupt):
        nn.population_statistics(net, draw(device, rng, (8, 6)), 2)
    assert contents(net) == before
    assert [layer.training for _, layer in net.leaves()] == modes


def test_bad_data() -> None:
    with backend.use("cpu"):
        net = make()
    X = np.zeros((4, 6), np.float32)
    for data, size, text in (
        (X[:1], 2, r"data has shape \(1, 6\), expected \(N, ...\) with N at least 2"),
        (X[0], 2, r"data has shape \(6,\), expected"),
        (X, 1, "batch_size is 1, expected a whole number of at least 2"),
        ([1.0], 2, "data is a list, expected"),
        (X.astype(np.float64), 2, "x has dtype float64, expected float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            nn.population_statistics(net, data, size)
    net = nn.Sequential(nn.ReLU())
    nn.population_statistics(net, X)  # nothing to set
    assert_same(net(X), X)


class _Raised(nn.BatchNorm):
    """A layer of one's own, which is no affine map of its statistics alone."""

    def _forward(self, x: Any) -> Any:
        out, cache = super()._forward(x)
        return out + 5, cache


def test_a_derived_layer_is_not_folded(device: Device) -> None:
    net = nn.Sequential(nn.Affine(4, 3, seed=0), _Raised(3)).eval()
    folded = nn.fold_batchnorm(net)
    assert [type(layer) for layer in folded] == [nn.Affine, _Raised]
    x = device.asarray(np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32))
    assert to_host(folded(x)).tobytes() == to_host(net(x)).tobytes()


@pytest.mark.parametrize("function", [nn.fold_batchnorm, lambda n: nn.population_statistics(n, 0)])
@pytest.mark.parametrize("kind", [nn.BatchNorm, None])
def test_what_is_no_network(function: Any, kind: Any) -> None:
    net = kind and kind(3)
    expected = f"net is a {type(net).__name__}, expected a Sequential or a FullyConnectedNet"
    with pytest.raises(TypeError, match=expected):
        function(net)
