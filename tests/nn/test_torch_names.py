"""To and from PyTorch's modules: names, orientation, whole networks' outputs, and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpubn import FullyConnectedNet, backend, nn

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[compare]'")


@pytest.fixture(autouse=True)
def cpu() -> Any:
    with backend.use("cpu"):
        yield


def randomize(module: Any, seed: int = 0) -> Any:
    """Let the whole state be general, and train on a few batches' worth of statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(generator=generator)
    return module.eval()


def mlp() -> Any:
    t = torch.nn
    return t.Sequential(
        t.Flatten(),
        t.Linear(12, 7),
        t.BatchNorm1d(7),
        t.ReLU(),
        t.Dropout(0.5),
        t.Sequential(t.Linear(7, 6), t.LayerNorm(6), t.ReLU()),
        t.Linear(6, 3),
    )


def same_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Affine(12, 7),
        nn.BatchNorm(7),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Affine(7, 6), nn.LayerNorm(6), nn.ReLU()),
        nn.Affine(6, 3),
    )


def fused_mlp() -> nn.Sequential:
    # The batch norm counts for its ReLU too.
    return nn.Sequential(
        nn.Flatten(),
        nn.Affine(12, 7),
        nn.BatchNorm(7, relu=True),
        nn.Dropout(0.5),
        nn.Sequential(nn.Affine(7, 6), nn.LayerNorm(6), nn.ReLU()),
        nn.Affine(6, 3),
    )


def norms() -> Any:
    t = torch.nn
    return t.Sequential(
        t.BatchNorm2d(6, momentum=None),
        t.GroupNorm(2, 6),
        t.ReLU(),
        t.InstanceNorm2d(6, affine=True),
        t.RMSNorm((3, 2), eps=1e-5),
        t.LayerNorm((3, 2)),
    )


def same_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm(6, momentum=None),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.InstanceNorm(6),
        nn.RMSNorm((3, 2)),
        nn.LayerNorm((3, 2)),
    )


PAIRS = [
    (mlp, same_mlp, (4, 3, 4)),
    (mlp, fused_mlp, (4, 3, 4)),
    (norms, same_norms, (4, 6, 3, 2)),
    (lambda: torch.nn.Linear(5, 2), lambda: nn.Affine(5, 2), (4, 5)),
    (lambda: torch.nn.BatchNorm1d(5), lambda: nn.BatchNorm(5), (4, 5)),
]


@pytest.mark.parametrize(
    ("theirs", "mine", "shape"), PAIRS, ids=["mlp", "fused", "norms", "1", "2"]
)
def test_there_and_back(
    theirs: Callable[[], Any], mine: Callable[[], nn.Layer], shape: tuple[int, ...]
) -> None:
    module, net = randomize(theirs()), mine().eval()
    nn.from_torch_state_dict(net, module.state_dict())
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-4)

    state = nn.to_torch_state_dict(net)
    assert list(state) == list(module.state_dict())
    other = theirs().eval()
    other.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    for name, tensor in module.state_dict().items():
        assert state[name].dtype == tensor.numpy().dtype
        assert state[name].flags.c_contiguous
        np.testing.assert_array_equal(state[name], tensor.numpy())
        assert torch.equal(other.state_dict()[name], tensor)
    for array in state.values():
        array += 1  # copies
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-4)


def test_training_goes_on_as_there() -> None:
    t = torch.nn
    module = randomize(t.Sequential(t.Linear(5, 4), t.BatchNorm1d(4)))
    net = nn.Sequential(nn.Affine(5, 4), nn.BatchNorm(4, unbiased=True))
    nn.from_torch_state_dict(net, module.state_dict())
    module.train()
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.standard_normal((6, 5)).astype(np.float32)
        with torch.no_grad():
            module(torch.from_numpy(x))
        net(x)
    for name, array in nn.to_torch_state_dict(net).items():
        if name != "1.num_batches_tracked":
            theirs = module.state_dict()[name].numpy()
            np.testing.assert_allclose(array, theirs, rtol=1e-4, atol=1e-5)


def test_batches_are_counted_where_they_matter() -> None:
    module = torch.nn.BatchNorm1d(3, momentum=None)
    module(torch.randn(4, 3))
    net = nn.BatchNorm(3, momentum=None)
    nn.from_torch_state_dict(net, module.state_dict())
    assert net.bn_param["num_batches"] == 1
    assert nn.to_torch_state_dict(net)["num_batches_tracked"] == 1
    plain = nn.BatchNorm(3)
    nn.from_torch_state_dict(plain, module.state_dict())
    assert "num_batches" not in plain.bn_param
    state = module.state_dict()
    del state["num_batches_tracked"]  # as PyTorch before 0.4.1 wrote it
    nn.from_torch_state_dict(plain, state)
    with pytest.raises(ValueError, match="state_dict has no num_batches_tracked, expected"):
        nn.from_torch_state_dict(net, state)


@pytest.mark.parametrize("normalization", [None, "batchnorm", "layernorm"])
@pytest.mark.parametrize("keep", [1, 0.5])
def test_the_fully_connected_network(normalization: str | None, keep: float) -> None:
    t = torch.nn
    net = FullyConnectedNet(
        [7, 6], input_dim=12, num_classes=3, normalization=normalization, dropout_keep_ratio=keep
    )
    modules: list[Any] = []
    for rows, columns in ((12, 7), (7, 6)):
        modules.append(t.Linear(rows, columns))
        if normalization is not None:
            modules.append(
                {"batchnorm": t.BatchNorm1d, "layernorm": t.LayerNorm}[normalization](columns)
            )
        modules.append(t.ReLU())
        if keep < 1:
            modules.append(t.Dropout(1 - keep))
    module = randomize(t.Sequential(*modules, t.Linear(6, 3)))
    nn.from_torch_state_dict(net, module.state_dict())
    x = np.random.default_rng(0).standard_normal((4, 3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x).flatten(1)).numpy()
    np.testing.assert_allclose(net.loss(x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(net.params["W1"], module[0].weight.detach().numpy().T)
    assert list(nn.to_torch_state_dict(net)) == list(module.state_dict())


WRONG = [
    ({"weight": None}, ValueError, "state_dict has no weight, expected weight, bias, running_mean"),
    ({"gamma": np.ones(3)}, ValueError, "state_dict has gamma, expected weight, bias"),
    ({"bias": np.zeros(4, "f4")}, ValueError, r"bias has shape \(4,\), expected \(3,\)"),
    ({"bias": np.zeros(3)}, TypeError, "bias has dtype float64, expected float32"),
    ({"bias": [0.0] * 3}, TypeError, "bias is a list, expected"),
]


@pytest.mark.parametrize(("changes", "error", "text"), WRONG, ids=[case[2] for case in WRONG])
def test_a_wrong_state_changes_nothing(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    net = nn.BatchNorm(3)
    state = dict(randomize(torch.nn.BatchNorm1d(3)).state_dict()) | changes
    state = {name: array for name, array in state.items() if array is not None}
    before = nn.to_torch_state_dict(net)
    with pytest.raises(error, match=text):
        nn.from_torch_state_dict(net, state)
    for name, array in nn.to_torch_state_dict(net).items():
        np.testing.assert_array_equal(array, before[name])


PLAIN = [
    (lambda t: t.BatchNorm2d(6, affine=False), lambda: nn.BatchNorm(6)),
    (lambda t: t.InstanceNorm2d(6), lambda: nn.InstanceNorm(6)),
    (lambda t: t.GroupNorm(2, 6, affine=False), lambda: nn.GroupNorm(2, 6)),
    (lambda t: t.LayerNorm((3, 2), bias=False), lambda: nn.LayerNorm((3, 2))),
    (lambda t: t.LayerNorm(2, elementwise_affine=False), lambda: nn.LayerNorm(2)),
    (lambda t: t.RMSNorm(2, eps=1e-5, elementwise_affine=False), lambda: nn.RMSNorm(2)),
]


@pytest.mark.parametrize(("theirs", "mine"), PLAIN, ids=[repr(f(torch.nn)) for f, _ in PLAIN])
@pytest.mark.parametrize("nested", [False, True])
def test_norms_without_parameters(
    theirs: Callable[[Any], Any], mine: Callable[[], nn.Layer], nested: bool
) -> None:
    module, net = theirs(torch.nn), mine()
    if nested:
        module, net = torch.nn.Sequential(torch.nn.ReLU(), module), nn.Sequential(nn.ReLU(), net)
    randomize(module)
    net.eval()
    for array in net.params.values():
        array[...] = 7
    nn.from_torch_state_dict(net, module.state_dict())
    x = np.random.default_rng(0).standard_normal((4, 6, 3, 2)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-4)


def test_parameters_of_other_names_are_not_left_out() -> None:
    net = nn.Sequential(nn.Affine(5, 2), nn.LayerNorm(2))
    module = torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.ReLU(), torch.nn.LayerNorm(2))
    text = "state_dict has no 1.weight, 1.bias and has 2.weight, 2.bias, expected 0.weight,"
    with pytest.raises(ValueError, match=text):
        nn.from_torch_state_dict(net, module.state_dict())
    with pytest.raises(ValueError, match=r"state_dict has no 0.weight, 0.bias, expected 0.weight"):
        nn.from_torch_state_dict(net, {"1.weight": np.ones(2, "f4")})

    class Shift(nn.ReLU):
        """No norm, whatever its parameter's name."""

    shift = Shift()
    shift.params["beta"] = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="state_dict has no bias, expected bias"):
        nn.from_torch_state_dict(shift, {})


def test_weights_are_not_taken_untransposed() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(5, 2\), expected \(2, 5\)"):
        nn.from_torch_state_dict(
            nn.Affine(5, 2), {"weight": np.ones((5, 2), "f4"), "bias": np.ones(2, "f4")}
        )


# --- Tensors as input -----------------------------------------------------------------------------


def test_tensors_come_and_go() -> None:
    net = nn.Sequential(nn.Affine(5, 4, seed=1), nn.BatchNorm(4, relu=True), nn.Dropout(0.5, 2))
    other = nn.Sequential(nn.Affine(5, 4, seed=1), nn.BatchNorm(4, relu=True), nn.Dropout(0.5, 2))
    x = torch.randn(6, 5)
    out = net(x)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), other(x.numpy()))
    dx = net.backward(out)
    assert isinstance(dx, torch.Tensor)
    np.testing.assert_array_equal(dx.numpy(), other.backward(out.numpy()))
    assert all(isinstance(array, np.ndarray) for array in net.grads.values())
    with pytest.raises(TypeError, match=r"x requires a gradient.*: pass x.detach\(\)"):
        net(x.requires_grad_())


def test_a_tensor_is_not_copied() -> None:
    seen = []

    class Look(nn.ReLU):
        def _forward(self, x: Any) -> Any:
            seen.append(x)
            return super()._forward(x)

    x = torch.randn(6, 5)
    for net in (Look(), nn.Sequential(nn.Sequential(Look()))):
        net(x)
        assert isinstance(seen[-1], np.ndarray)
        assert seen[-1].ctypes.data == x.data_ptr()
    layer = nn.BatchNorm(5)
    layer(x)
    flat = nn.Flatten()
    assert flat(x).data_ptr() == x.data_ptr()


def test_bfloat16_tensors() -> None:
    pytest.importorskip("ml_dtypes")
    layer = nn.BatchNorm(5)
    out = layer(torch.randn(6, 5).to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert layer.backward(out).dtype == torch.bfloat16


def test_data_of_other_libraries() -> None:
    net, other = (nn.Sequential(nn.Affine(5, 4, seed=1), nn.BatchNorm(4)) for _ in range(2))
    x = torch.randn(8, 5)
    nn.population_statistics(net, x, 4)
    nn.population_statistics(other, x.numpy(), 4)
    for name, array in net.buffers.items():
        np.testing.assert_array_equal(array, other.buffers[name])
    net.load_state_dict({name: torch.from_numpy(a) for name, a in other.state_dict().items()})


def test_a_linear_without_a_bias() -> None:
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.BatchNorm1d(3))
    net = nn.Sequential(nn.Affine(4, 3), nn.BatchNorm(3)).eval()
    net.params["0.b"] = np.ones(3, np.float32)
    nn.from_torch_state_dict(net, theirs.state_dict())
    x = torch.randn(5, 4)
    np.testing.assert_allclose(net(x), theirs.eval()(x).detach(), atol=1e-6)
    with pytest.raises(ValueError, match=r"0\.weight"):  # a weight is not made up
        nn.from_torch_state_dict(net, {k: v for k, v in theirs.state_dict().items() if k[0] != "0"})
