"""gpubn.cs231n: the assignment's names, its random numbers, and the numbers of its notebooks.

What a notebook prints after ``np.random.seed(231)`` is known from thousands of published ones; the
cells here are of our own, and ask for the same numbers. ``run_notebook.py`` runs a whole one.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpubn import train
from gpubn.backend import Device, to_host
from gpubn.cs231n.classifiers import fc_net
from gpubn.cs231n.classifiers.fc_net import FullyConnectedNet
from gpubn.cs231n.data_utils import get_CIFAR10_data
from gpubn.cs231n.gradient_check import eval_numerical_gradient, rel_error
from gpubn.cs231n.layers import dropout_backward, dropout_forward
from gpubn.cs231n.solver import Solver
from gpubn.train import DataError

NAMES = {
    "layers": "affine_forward relu_backward softmax_loss svm_loss batchnorm_backward_alt "
    "layernorm_forward dropout_forward spatial_batchnorm_forward spatial_groupnorm_backward",
    "layer_utils": "affine_relu_forward affine_relu_backward affine_bn_relu_forward",
    "classifiers.fc_net": "FullyConnectedNet affine_forward dropout_backward affine_relu_forward",
    "optim": "sgd sgd_momentum rmsprop adam",
    "solver": "Solver",
    "gradient_check": "eval_numerical_gradient eval_numerical_gradient_array rel_error",
    "data_utils": "get_CIFAR10_data",
}


@pytest.mark.parametrize("module", NAMES)
def test_the_assignments_names(module: str) -> None:
    found = importlib.import_module(f"gpubn.cs231n.{module}")
    names = NAMES[module].split()
    assert set(names) <= set(found.__all__)
    assert all(callable(getattr(found, name)) for name in found.__all__)


# --- What is drawn --------------------------------------------------------------------------------


def test_weights_are_the_next_of_the_global_stream(device: Device) -> None:
    np.random.seed(231)
    net = FullyConnectedNet([4, 3], 5, 2, weight_scale=0.3, dtype=np.float64, device=device.name)
    after = np.random.rand()
    np.random.seed(231)
    for name, shape in (("W1", (5, 4)), ("W2", (4, 3)), ("W3", (3, 2))):
        np.testing.assert_array_equal(to_host(net.params[name]), 0.3 * np.random.randn(*shape))
    assert after == np.random.rand()


def test_dropout_is_the_assignments(device: Device) -> None:
    x = np.arange(1.0, 25.0).reshape(4, 6)
    np.random.seed(3)
    mask = (np.random.rand(4, 6) < 0.4) / 0.4
    with device.scope():
        xd = device.asarray(x)
        np.random.seed(3)
        out, cache = dropout_forward(xd, {"p": 0.4, "mode": "train"})
        np.testing.assert_array_equal(to_host(out), x * mask)
        np.testing.assert_array_equal(to_host(dropout_backward(xd, cache)), x * mask)
        # With a seed the stream starts anew, for whoever draws next too.
        seeded, _ = dropout_forward(xd, {"p": 0.4, "mode": "train", "seed": 3})
    np.testing.assert_array_equal(to_host(seeded), x * mask)
    before = np.random.get_state()[1:3]
    out, cache = dropout_forward(x, {"p": 0.4, "mode": "test"})
    assert out is x
    assert dropout_backward(x, cache) is x
    after = np.random.get_state()[1:3]
    assert (before[0] == after[0]).all()
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ({"mode": "train"}, "dropout_param has no 'p'"),
        ({"mode": "train", "p": 0}, "p is 0.0, expected a probability of keeping above 0"),
        ({"mode": "train", "p": 1.5}, "p is 1.5, expected a probability of keeping"),
        ({"p": 0.5}, "mode"),
    ],
)
def test_dropout_refuses(param: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout_forward(np.ones(3), param)


def small_data() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    y = np.arange(40) % 3
    X = np.eye(3, 4)[y] * 2 + rng.standard_normal((40, 4))
    return {"X_train": X[:30], "y_train": y[:30], "X_val": X[30:], "y_val": y[30:]}


def test_batches_are_drawn_in_the_assignments_order(device: Device) -> None:
    data = small_data()
    net = FullyConnectedNet([5], 4, 3, dtype=np.float64, device=device.name)
    np.random.seed(9)
    solver = Solver(
        net,
        data,
        num_epochs=2,
        batch_size=10,
        num_train_samples=8,
        num_val_samples=4,
        verbose=False,
    )
    seen = []
    take = solver._batches.take
    solver._batches.take = lambda chosen: (seen.append(np.array(to_host(chosen))), take(chosen))[1]
    solver.train()
    np.random.seed(9)
    for iteration in range(6):
        np.testing.assert_array_equal(seen[iteration], np.random.choice(30, 10))
        if iteration in (0, 2, 5):  # accuracies: after the first iteration and every epoch
            np.random.choice(30, 8)
            np.random.choice(10, 4)


def test_checkpoints_keep_the_global_stream(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from gpubn.train import checkpoint

    def solver() -> Solver:
        np.random.seed(4)
        net = FullyConnectedNet([5], 4, 3, dropout_keep_ratio=0.5, device="cpu")
        name = str(tmp_path / "run")
        return Solver(
            net, small_data(), num_epochs=3, batch_size=7, checkpoint_name=name, verbose=False
        )

    straight = solver()
    straight.train()
    resumed = solver()
    np.random.seed(99)
    checkpoint.resume(tmp_path / "run_epoch_2.safetensors", resumed)
    resumed.train()
    assert resumed.loss_history == straight.loss_history


def test_a_seed_is_for_numpy() -> None:
    net = FullyConnectedNet([5], 4, 3)
    with pytest.raises(ValueError, match=r"np\.random\.seed"):
        Solver(net, small_data(), seed=1)
    with pytest.raises(ValueError, match="unknown keyword 'epochs'"):
        Solver(net, small_data(), epochs=1)


def test_nothing_is_a_second_implementation() -> None:
    assert issubclass(FullyConnectedNet, train.FullyConnectedNet)
    assert FullyConnectedNet.loss is train.FullyConnectedNet.loss
    assert fc_net.batchnorm_forward.__module__ == "gpubn.layers.batchnorm"


# --- The notebooks' numbers -----------------------------------------------------------------------


def check_net(first_loss: float, X: Any, y: Any, device: Device, **options: Any) -> None:
    net = FullyConnectedNet(
        [20, 30], 15, 10, weight_scale=5e-2, dtype=np.float64, device=device.name, **options
    )
    loss, grads = net.loss(X, y)
    assert float(loss) == pytest.approx(first_loss, rel=1e-12)
    for name in ("b1", "b3", "W3"):
        numeric = eval_numerical_gradient(
            lambda _: float(net.loss(X, y)[0]), net.params[name], verbose=False, h=1e-5
        )
        assert rel_error(numeric, grads[name]) < 1e-5


def test_first_losses_of_the_batch_norm_notebook(device: Device) -> None:
    np.random.seed(231)
    X = np.random.randn(2, 15)
    y = np.random.randint(10, size=2)
    check_net(2.2611955101340957, X, y, device, normalization="batchnorm")


def test_first_losses_of_the_dropout_notebook(device: Device) -> None:
    np.random.seed(231)
    X = np.random.randn(2, 15)
    y = np.random.randint(10, size=2)
    check_net(2.3004790897684924, X, y, device, dropout_keep_ratio=1, seed=123)
    check_net(2.3023714897044125, X, y, device, dropout_keep_ratio=0.75, seed=123)


# --- CIFAR-10 -------------------------------------------------------------------------------------


@pytest.fixture
def cifar() -> dict[str, Any]:
    folder = os.environ.get("GPUBN_TEST_DATA", "")
    path = Path(folder) / "cifar10-subset.npz"
    if not folder or not path.exists():
        pytest.skip("GPUBN_TEST_DATA names no folder with cifar10-subset.npz")
    return get_CIFAR10_data(cifar10_dir=path)


def part(data: dict[str, Any], images: int) -> dict[str, Any]:
    return {
        **data,
        "X_train": data["X_train"][:images],
        "y_train": data["y_train"][:images],
    }


def test_batch_norm_on_cifar10(cifar: dict[str, Any]) -> None:
    np.random.seed(231)
    options = {"weight_scale": 2e-2, "dtype": np.float64, "device": "cpu"}
    nets = [
        FullyConnectedNet([100] * 5, normalization=normalization, **options)
        for normalization in ("batchnorm", None)
    ]
    solvers = []
    for net in nets:
        solver = Solver(
            net,
            part(cifar, 1000),
            num_epochs=10,
            batch_size=50,
            update_rule="adam",
            optim_config={"learning_rate": 1e-3},
            verbose=False,
        )
        solver.train()
        solvers.append(solver)
    first = [f"{solver.loss_history[0]:f}" for solver in solvers]
    assert first == ["2.340974", "2.302332"]
    final = [solver.train_acc_history[-1] for solver in solvers]
    # Rounding that differs between BLAS libraries grows over 200 steps; what was learnt does not.
    assert final == pytest.approx([0.78, 0.71], abs=0.03)


def test_dropout_on_cifar10(cifar: dict[str, Any]) -> None:
    np.random.seed(231)
    first = []
    for keep in (1, 0.25):
        net = FullyConnectedNet([500], dropout_keep_ratio=keep, dtype=np.float64, device="cpu")
        solver = Solver(
            net,
            part(cifar, 500),
            num_epochs=25,
            batch_size=100,
            update_rule="adam",
            optim_config={"learning_rate": 5e-4},
            verbose=False,
        )
        solver.train()
        first.append(solver.loss_history[0])
    # As notebooks have them, which print six digits, of float32 most often.
    assert first == pytest.approx([7.856643, 17.318478], abs=1e-6)


def write_subset(path: Path, **more: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(12) % 3
    cut = {"train": slice(0, 6), "val": slice(6, 9), "test": slice(9, 12)}
    arrays = {f"X_{k}": images[s] for k, s in cut.items()}
    arrays |= {f"y_{k}": labels[s] for k, s in cut.items()}
    np.savez(path, **arrays, **more)
    return images


def test_data_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_subset(tmp_path / "some.npz")
    data = get_CIFAR10_data(cifar10_dir=tmp_path / "some.npz")
    mean = images[:6].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(data["X_val"], images[6:9] - mean, atol=1e-12)
    assert data["X_train"].shape == (6, 3, 32, 32)
    assert data["y_test"].tolist() == [0, 1, 2]
    assert "has 6 images for train, not 49,000" in capsys.readouterr().out
    four = get_CIFAR10_data(4, 2, 1, subtract_mean=False, cifar10_dir=tmp_path / "some.npz")
    np.testing.assert_array_equal(four["X_val"], images[4:6])  # those behind the training images
    assert not capsys.readouterr().out


def test_the_mean_image_of_a_file(tmp_path: Path) -> None:
    mean = np.full((3, 32, 32), 100.0)
    images = write_subset(tmp_path / "some.npz", mean_image=mean)
    data = get_CIFAR10_data(6, 3, 3, cifar10_dir=tmp_path / "some.npz")
    np.testing.assert_array_equal(data["X_test"], images[9:] - 100.0)


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPUBN_CIFAR10", raising=False)
    with pytest.raises(DataError, match=r"cifar-10-batches-py is missing.*GPUBN_CIFAR10"):
        get_CIFAR10_data()
    write_subset(tmp_path / "some.npz")
    monkeypatch.setenv("GPUBN_CIFAR10", str(tmp_path / "some.npz"))
    assert len(get_CIFAR10_data()["X_train"]) == 6
