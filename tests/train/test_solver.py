"""The training loop: CS231n's rules, seeds, what it refuses, and what it leaves on the device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_cuda import cupy_stand_in
from numpy.typing import NDArray

from gpubn import FullyConnectedNet, Solver, backend
from gpubn.backend import Array, Device, to_host
from gpubn.testing import reference
from gpubn.train import NonFiniteLoss, Preprocessing, load_data, optim

Arrays = dict[str, NDArray[Any]]

rules = pytest.mark.parametrize("rule", optim.RULES)


def draw(samples: int = 20, validation: int = 8, seed: int = 3) -> Arrays:
    """Return samples of 4 values in 3 classes that can be told apart, mostly."""
    rng = np.random.default_rng(seed)
    data = {}
    for part, count in (("train", samples), ("val", validation)):
        y = np.arange(count) % 3
        data[f"X_{part}"] = np.eye(3, 4)[y] * 2 + rng.standard_normal((count, 4))
        data[f"y_{part}"] = y
    return data


def make_net(**changes: Any) -> FullyConnectedNet:
    config: dict[str, Any] = {
        "hidden_dims": [5],
        "input_dim": 4,
        "num_classes": 3,
        "weight_scale": 0.5,
        "dtype": np.float64,
        "seed": 8,
    }
    return FullyConnectedNet(**config | changes)


class Linear:
    """A linear softmax classifier in NumPy: a plain object with ``params`` and ``loss``."""

    def __init__(self, seed: int = 8) -> None:
        rng = np.random.default_rng(seed)
        self.params = {"W": 0.5 * rng.standard_normal((4, 3)), "b": np.zeros(3)}
        self.batches: list[NDArray[Any]] = []

    def loss(self, X: NDArray[Any], y: NDArray[Any] | None = None) -> Any:
        scores = X @ self.params["W"] + self.params["b"]
        if y is None:
            return scores
        self.batches.append(X)
        loss, dout = reference.softmax_loss(scores, y)
        return loss, {"W": X.T @ dout, "b": dout.sum(axis=0)}


class Recorder(FullyConnectedNet):
    """A network that keeps the batches it was trained on."""

    def loss_into(self, X: Array, y: Array, grads: Any) -> Array:
        self.__dict__.setdefault("batches", []).append(to_host(X).copy())
        return super().loss_into(X, y, grads)


def make_recorder() -> Recorder:
    return Recorder([], 4, 3, seed=8)


def make_solver(model: Any, data: Arrays | None = None, **changes: Any) -> Solver:
    config: dict[str, Any] = {"batch_size": 4, "num_epochs": 2, "seed": 1, "verbose": False}
    return Solver(model, draw() if data is None else data, **config | changes)


def host(arrays: Any) -> Arrays:
    return {name: to_host(array).copy() for name, array in arrays.items()}


def assert_equal(arrays: Arrays, expected: Arrays) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


models = pytest.mark.parametrize("make_model", [make_net, Linear])
recorders = pytest.mark.parametrize("make_model", [make_recorder, Linear])
Maker = Callable[[], Any]

# --- CS231n's rules -------------------------------------------------------------------------------


def cs231n(
    model: Any, data: Arrays, rule: str, optim_config: dict[str, float], lr_decay: float, seed: int
) -> tuple[list[float], list[float], list[float]]:
    """Train as the assignment's Solver does, 2 epochs in batches of 4; return the histories."""
    generator = np.random.default_rng(seed)
    configs = {name: dict(optim_config) for name in model.params}
    best, best_val, losses, train_acc, val_acc = None, 0.0, [], [], []
    X, y = data["X_train"], data["y_train"]
    epoch_length = len(X) // 4

    def accuracy(part: str) -> float:
        scores = to_host(model.loss(data[f"X_{part}"]))
        return float(np.mean(scores.argmax(axis=1) == data[f"y_{part}"]))

    for t in range(2 * epoch_length):
        chosen = generator.choice(len(X), 4)
        loss, grads = model.loss(X[chosen], y[chosen])
        losses.append(float(loss))
        for name in model.params:
            w, configs[name] = optim.get(rule)(model.params[name], grads[name], configs[name])
            model.params[name] = w
        if (t + 1) % epoch_length == 0:
            for config in configs.values():
                config["learning_rate"] *= lr_decay
        if t == 0 or (t + 1) % epoch_length == 0:
            train_acc.append(accuracy("train"))
            val_acc.append(accuracy("val"))
            if val_acc[-1] > best_val:
                best_val, best = val_acc[-1], host(model.params)
    model.params = best
    return losses, train_acc, val_acc


@rules
@models
def test_trains_as_the_assignment_does(device: Device, make_model: Maker, rule: str) -> None:
    data, other = draw(), make_model()
    # adamw lets only the weights of a network decay, which a rule by itself cannot know.
    scalars = {"learning_rate": 0.05} | ({"weight_decay": 0.0} if rule == "adamw" else {})
    solver = make_solver(
        make_model(), data, update_rule=rule, optim_config=scalars, lr_decay=0.5, seed=5
    )
    solver.train()
    losses, train_acc, val_acc = cs231n(other, data, rule, scalars, 0.5, seed=5)
    assert solver.loss_history == losses
    assert solver.train_acc_history == train_acc
    assert solver.val_acc_history == val_acc
    assert solver.best_val_acc == max(val_acc)
    assert_equal(host(solver.model.params), host(other.params))
    assert_equal(host(solver.best_params), host(other.params))
    assert solver.epoch == 2
    assert {config["learning_rate"] for config in solver.optim_configs.values()} == {0.05 * 0.25}


def test_only_a_networks_weights_decay(device: Device) -> None:
    # One step from the same point: Adam's own, and where W is concerned lr * decay * W less.
    results = []
    for weight_decay in (0.0, 0.5):
        net = make_net(normalization="layernorm")
        net.params = {name: array + 1 for name, array in host(net.params).items()}
        before = host(net.params)
        config = {"learning_rate": 0.1, "weight_decay": weight_decay}
        solver = make_solver(net, update_rule="adamw", optim_config=config)
        solver._step()
        results.append(host(net.params))
    for name, plain in results[0].items():
        decay = 0.1 * 0.5 * before[name] if name.startswith("W") else np.zeros_like(plain)
        np.testing.assert_allclose(plain - results[1][name], decay, atol=1e-14)


@models
@pytest.mark.parametrize(
    ("samples", "batch_size", "epochs", "iterations", "accuracies"),
    [(20, 4, 3, 15, 4), (22, 4, 2, 10, 3), (4, 4, 2, 2, 2), (3, 4, 2, 2, 2), (20, 20, 1, 1, 1)],
)
def test_lengths(
    make_model: Maker, samples: int, batch_size: int, epochs: int, iterations: int, accuracies: int
) -> None:
    solver = make_solver(make_model(), draw(samples), batch_size=batch_size, num_epochs=epochs)
    assert solver.num_iterations == iterations
    solver.train()
    assert len(solver.loss_history) == solver.iteration == iterations
    assert len(solver.train_acc_history) == len(solver.val_acc_history) == accuracies
    assert solver.epoch == epochs


@models
@pytest.mark.parametrize("print_every", [1, 2, 100])
def test_prints_as_the_assignment_does(
    device: Device, make_model: Maker, print_every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    solver = make_solver(make_model(), verbose=True, print_every=print_every)
    solver.train()
    # On CUDA one line more, about what the assignment does not have.
    expected, accuracies = [f"batches {solver.placement}"] if solver.placement else [], 0
    assert bool(solver.placement) == (device.kind == "cuda" and make_model is make_net)
    for t in range(10):
        if t % print_every == 0:
            loss = solver.loss_history[t]
            expected.append(f"(Iteration {t + 1} / 10) loss: {loss:f}")
        if t in (0, 4, 9):
            train, val = (
                history[accuracies]
                for history in (solver.train_acc_history, solver.val_acc_history)
            )
            expected.append(f"(Epoch {accuracies} / 2) train acc: {train:f}; val_acc: {val:f}")
            accuracies += 1
    assert capsys.readouterr().out.splitlines() == expected


def test_silence(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    make_solver(make_net(), print_every=1).train()
    assert capsys.readouterr() == ("", "")


@models
def test_histories_are_floats(device: Device, make_model: Maker) -> None:
    solver = make_solver(make_model())
    solver.train()
    for history in (solver.loss_history, solver.train_acc_history, solver.val_acc_history):
        assert {type(value) for value in history} == {float}
    assert type(solver.best_val_acc) is float


@recorders
def test_batches_are_drawn_with_replacement(device: Device, make_model: Maker) -> None:
    data = draw()
    model = make_model()
    make_solver(model, data, batch_size=10, num_epochs=20).train()
    generator = np.random.default_rng(1)
    assert len(model.batches) == 40
    for batch in model.batches:
        expected = data["X_train"][generator.choice(20, 10)]
        np.testing.assert_array_equal(batch, expected.astype(batch.dtype))
    assert any(len(np.unique(batch, axis=0)) < 10 for batch in model.batches)


@recorders
@pytest.mark.parametrize("samples", [20, 23])
def test_shuffling_visits_each_sample_once(device: Device, make_model: Maker, samples: int) -> None:
    data, model = draw(samples), make_model()
    make_solver(model, data, num_epochs=3, shuffle=True).train()
    index = {x.tobytes(): i for i, x in enumerate(data["X_train"].astype(model.batches[0].dtype))}
    epochs = [
        [index[x.tobytes()] for batch in model.batches[start : start + 5] for x in batch]
        for start in (0, 5, 10)
    ]
    assert len(model.batches) == 15
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20  # where there are 23, three wait
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(epoch != sorted(epoch) for epoch in epochs)


class Scripted:
    """A model that has a given accuracy after each step."""

    def __init__(self, accuracies: list[float]) -> None:
        self.params = {"w": np.zeros(1)}
        self.accuracies = accuracies

    def loss(self, X: NDArray[Any], y: NDArray[Any] | None = None) -> Any:
        if y is not None:
            return 1.0, {"w": np.array([-1.0])}
        scores = np.zeros((len(X), 2))
        # All labels are 0, and the parameter counts the steps.
        wrong = round(len(X) * (1 - self.accuracies[round(self.params["w"][0]) - 1]))
        scores[:wrong, 1] = 1
        return scores


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.1, 0.5, 0.4], 2), ([0.1, 0.5, 0.5], 2), ([0.6, 0.5, 0.5], 1), ([0.1, 0.2, 0.3], 3)],
)
def test_the_best_parameters_are_put_back(accuracies: list[float], best: int) -> None:
    data = {"X_train": np.zeros((10, 1)), "y_train": np.zeros(10, int)}
    data |= {"X_val": data["X_train"], "y_val": data["y_train"]}
    model = Scripted(accuracies)
    solver = make_solver(
        model, data, batch_size=10, num_epochs=3, optim_config={"learning_rate": 1}
    )
    solver.train()
    assert solver.val_acc_history == accuracies
    assert solver.best_val_acc == max(accuracies)
    assert model.params["w"].tolist() == solver.best_params["w"].tolist() == [best]


def test_without_any_accuracy_the_last_parameters_stay() -> None:
    data = draw()
    data["y_val"] = np.full(8, 3)  # a class that Linear has no score for
    solver = make_solver(Linear(), data)
    solver.train()
    assert (solver.best_val_acc, solver.best_params) == (0.0, {})
    assert set(solver.model.params) == {"W", "b"}


def test_running_statistics_are_put_back_with_the_best(device: Device) -> None:
    data = draw()
    net = make_net(normalization="batchnorm")
    seen = []

    def look(solver: Solver) -> None:
        seen.append((solver.val_acc_history[-1], host(net.params), statistics(), net.loss(X)))

    def statistics() -> Arrays:
        return host({key: a for key, a in net.bn_params[0].items() if key != "mode"})

    X = data["X_val"]
    # Steps so large that the last epoch is not the best.
    solver = make_solver(
        net, data, num_epochs=6, optim_config={"learning_rate": 1.0}, on_epoch=look
    )
    solver.train()
    best = int(np.argmax([accuracy for accuracy, *_ in seen]))
    accuracy, params, running, scores = seen[best]
    assert best < 5
    assert accuracy == solver.best_val_acc > solver.val_acc_history[0]
    assert_equal(host(net.params), params)
    assert_equal(statistics(), running)
    np.testing.assert_array_equal(to_host(net.loss(X)), to_host(scores))
    assert solver.check_accuracy(X, data["y_val"]) == solver.best_val_acc


# --- Accuracy -------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_check_accuracy(device: Device, make_model: Maker, batch_size: int) -> None:
    data = draw(30)
    solver = make_solver(make_model(), data)
    X, y = data["X_train"], data["y_train"]
    right = to_host(solver.model.loss(X)).argmax(axis=1) == y
    expected = right.mean()
    assert 0 < expected < 1
    accuracy = solver.check_accuracy(X, y, batch_size=batch_size)
    assert type(accuracy) is float
    assert accuracy == expected
    assert solver.check_accuracy(X, y, num_samples=30, batch_size=batch_size) == expected
    # Drawn with replacement, as the batches are.
    chosen = np.random.default_rng(1).choice(30, 7)
    assert solver.check_accuracy(X, y, num_samples=7) == right[chosen].mean()


def test_accuracies_on_part_of_the_samples(device: Device) -> None:
    solver = make_solver(make_net(), num_train_samples=6, num_val_samples=5)
    solver.train()
    for history, count in ((solver.train_acc_history, 6), (solver.val_acc_history, 5)):
        assert all(accuracy in np.arange(count + 1) / count for accuracy in history)


# --- What it trains -------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", [None, "batchnorm", "layernorm"])
def test_overfits_fifty_digits(device: Device, normalization: str | None) -> None:
    digits = load_data("digits")
    prepare = Preprocessing.fit(digits.X_train, digits.max_value).apply
    data = {
        "X_train": prepare(digits.X_train[:50]),
        "y_train": digits.y_train[:50],
        "X_val": prepare(digits.X_val[:50]),
        "y_val": digits.y_val[:50],
    }
    net = FullyConnectedNet([30], 64, 10, normalization=normalization, weight_scale=0.1, seed=0)
    solver = make_solver(
        net,
        data,
        update_rule="adam",
        optim_config={"learning_rate": 1e-2},
        batch_size=25,
        num_epochs=20,
    )
    solver.train()
    assert solver.train_acc_history[-1] == 1.0
    assert solver.loss_history[-1] < 0.1 * solver.loss_history[0]
    assert solver.best_val_acc > 0.5


@rules
def test_a_plain_object_learns(rule: str) -> None:
    rate = {"sgd": 0.5, "sgd_momentum": 0.1}.get(rule, 0.05)
    solver = make_solver(
        Linear(),
        draw(100, 60),
        update_rule=rule,
        optim_config={"learning_rate": rate},
        batch_size=20,
        num_epochs=20,
    )
    solver.train()
    assert np.mean(solver.loss_history[-5:]) < 0.7 * np.mean(solver.loss_history[:5])
    assert solver.best_val_acc > 0.75


@models
def test_any_memory_order_of_the_data(device: Device, make_model: Maker) -> None:
    data = draw()
    runs = []
    for arrange in (np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2]):
        solver = make_solver(make_model(), {name: arrange(array) for name, array in data.items()})
        solver.train()
        runs.append(solver.loss_history)
    assert runs[0] == runs[1] == runs[2]


def test_data_on_the_device(device: Device) -> None:
    data = draw()
    runs = []
    for place in (lambda array: array, device.asarray):
        solver = make_solver(
            make_net(), {name: place(array) for name, array in data.items()}, num_train_samples=7
        )
        solver.train()
        runs.append((solver.loss_history, solver.train_acc_history, solver.val_acc_history))
    assert runs[0] == runs[1]


def test_pixels_as_they_are_stored(device: Device) -> None:
    data = draw()
    for part in ("X_train", "X_val"):
        data[part] = np.abs(data[part] * 50).astype(np.uint8).reshape(-1, 2, 2)
    solver = make_solver(make_net(dtype=np.float32), data)
    solver.train()
    assert len(solver.loss_history) == 10


# --- Seeds ----------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_seed_fixes_the_run(device: Device, make_model: Maker, shuffle: bool) -> None:
    losses = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8), ("random", None)):
        solver = make_solver(make_model(), seed=seed, shuffle=shuffle)
        solver.train()
        losses[name] = solver.loss_history
    assert losses["first"] == losses["again"]
    assert len({tuple(history) for history in losses.values()}) == 3


def test_the_same_run_on_the_cpu(device: Device) -> None:
    runs = []
    for where in (None, "cpu"):
        net = make_net(device=where, normalization="batchnorm", dropout_keep_ratio=0.5)
        solver = make_solver(net, update_rule="adam", shuffle=True)
        solver.train()
        runs.append((solver.loss_history, to_host(net.params.flat)))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-9)  # matrix products differ
    np.testing.assert_allclose(runs[0][1], runs[1][1], atol=1e-9)


def test_every_step_has_masks_of_its_own(device: Device) -> None:
    net = make_net(dropout_keep_ratio=0.5, hidden_dims=[40])
    data = draw(4)
    solver = make_solver(net, data, shuffle=True, num_epochs=4, optim_config={"learning_rate": 0.0})
    solver.train()
    assert net.step == 4
    assert len({round(loss, 9) for loss in solver.loss_history}) == 4  # order of samples aside


def test_the_networks_own_steps_count_on(device: Device) -> None:
    net = make_net(dropout_keep_ratio=0.5)
    net.step = 10
    make_solver(net).train()
    assert net.step == 20


# --- On the device --------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("normalization", [None, "batchnorm", "layernorm"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_step_copies_nothing_to_the_host(
    device: Device, rule: str, normalization: str | None, shuffle: bool
) -> None:
    net = make_net(normalization=normalization, dropout_keep_ratio=0.75, reg=0.1)
    solver = make_solver(net, update_rule=rule, shuffle=shuffle, num_epochs=1)
    before = cupy_stand_in.device_to_host_copies
    for _ in range(7):
        solver._step()
    assert cupy_stand_in.device_to_host_copies == before
    assert len(solver.loss_history) == 7
    assert cupy_stand_in.device_to_host_copies - before <= 1  # all losses in one


def test_losses_stay_on_the_device_until_printed(device: Device) -> None:
    pending = []
    make_solver(
        make_net(),
        draw(40),
        num_epochs=1,
        print_every=3,
        on_iteration=lambda solver: pending.append(len(solver._pending)),
    ).train()
    assert pending == [0, 1, 0, 1, 2, 0, 1, 2, 0, 0]


@rules
def test_steps_reuse_their_buffers(device: Device, rule: str) -> None:
    net = make_net(normalization="batchnorm")
    solver = make_solver(net, update_rule=rule)
    flat, views, grads = net.params.flat, dict(net.params), solver._grads.flat
    solver._step()
    states = {name: solver._config[name] for name in optim.state_names(rule)}
    solver._step()
    assert net.params.flat is flat
    assert all(net.params[name] is view for name, view in views.items())
    assert solver._grads.flat is grads
    assert all(solver._config[name] is state for name, state in states.items())


# --- The rules' configurations --------------------------------------------------------------------


@rules
@models
def test_optim_configs(device: Device, make_model: Maker, rule: str) -> None:
    given = {"learning_rate": 0.25}
    solver = make_solver(make_model(), update_rule=rule, optim_config=given, lr_decay=0.5)
    assert list(solver.optim_configs) == list(solver.model.params)
    for _ in range(2):
        solver._step()
    for name, config in solver.optim_configs.items():
        param = solver.model.params[name]
        assert config["learning_rate"] == 0.25
        assert config.get("t", 2) == 2
        for state in optim.state_names(rule):
            assert config[state].shape == param.shape
            assert backend.place(config[state]) == backend.place(param)
            assert to_host(config[state]).any() or name == "b1"
    assert given == {"learning_rate": 0.25}
    assert solver.learning_rate == 0.25


def test_optim_configs_are_of_their_parameter(device: Device) -> None:
    # After one step of momentum from rest the velocity is what the parameter moved by.
    net = make_net(normalization="layernorm")
    before = host(net.params)
    solver = make_solver(net, update_rule="sgd_momentum")
    solver._step()
    for name, config in solver.optim_configs.items():
        moved = to_host(net.params[name]) - before[name]
        np.testing.assert_allclose(to_host(config["velocity"]), moved, atol=1e-15)
        assert moved.any()


# --- Stopping, callbacks --------------------------------------------------------------------------


@models
@pytest.mark.parametrize("at", [1, 3, 5, 10])
def test_stop_and_go_on(device: Device, make_model: Maker, at: int) -> None:
    whole = make_solver(make_model(), update_rule="adam", lr_decay=0.5, num_train_samples=7)
    whole.train()

    def stop(solver: Solver) -> None:
        if solver.iteration == at:
            solver.stop()
            stopped_at.append(host(solver.model.params))

    stopped_at: list[Arrays] = []
    solver = make_solver(
        make_model(),
        update_rule="adam",
        lr_decay=0.5,
        num_train_samples=7,
        on_iteration=stop,
    )
    solver.train()
    assert solver.stopped
    assert solver.iteration == at
    assert_equal(host(solver.model.params), stopped_at[0])  # the best are not put back yet
    solver.on_iteration = None
    solver.train()
    assert not solver.stopped
    assert solver.loss_history == whole.loss_history
    assert solver.val_acc_history == whole.val_acc_history
    assert solver.train_acc_history == whole.train_acc_history
    assert_equal(host(solver.model.params), host(whole.model.params))


def test_callbacks(device: Device) -> None:
    calls = []
    solver = make_solver(
        make_net(),
        on_iteration=lambda s: calls.append(f"{s.iteration} {s.epoch}"),
        on_epoch=lambda s: calls.append(f"epoch {s.epoch} {len(s.val_acc_history)}"),
    )
    solver.train()
    first = ["1 0", "2 0", "3 0", "4 0", "epoch 1 2", "5 1"]
    assert calls == [*first, "6 1", "7 1", "8 1", "9 1", "epoch 2 3", "10 2"]


# --- A loss that is no number ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 3, 10])
@pytest.mark.parametrize("print_every", [1, 1000])
def test_a_loss_that_is_not_finite(device: Device, value: float, at: int, print_every: int) -> None:
    class Broken(FullyConnectedNet):
        def loss_into(self, X: Array, y: Array, grads: Any) -> Array:
            loss = super().loss_into(X, y, grads)
            return loss + value if self.step == at - 1 else loss

    net = Broken([3], 4, 3, seed=0)
    solver = make_solver(net, print_every=print_every)
    with pytest.raises(
        NonFiniteLoss, match=rf"became {value} at iteration {at}; .*no checkpoint"
    ) as e:
        solver.train()
    assert e.value.iteration == at
    # Seen at once where it is printed, else when the accuracies are measured.
    assert solver.iteration == (at if print_every == 1 else math.ceil(at / 5) * 5 if at > 1 else 1)


def test_a_plain_object_whose_loss_is_not_finite() -> None:
    model = Linear()
    model.params["b"][0] = np.nan
    solver = make_solver(model)
    with pytest.raises(NonFiniteLoss, match="the loss became nan at iteration 1;") as error:
        solver.train()
    assert isinstance(error.value, ArithmeticError)
    assert solver.best_params == {}


def test_nan_pixels_stop_the_run(device: Device) -> None:
    data = draw()
    data["X_train"][:] = np.nan
    with pytest.raises(NonFiniteLoss, match=r"at iteration 1; .* a smaller learning rate may help"):
        make_solver(make_net(), data).train()


# --- Bad input ------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    (
        {"learning_rate": 1},
        ValueError,
        "unknown keyword 'learning_rate', expected one of update_rule, optim",
    ),
    (
        {"epochs": 1, "bs": 2},
        ValueError,
        "unknown keyword 'epochs', 'bs', expected one of .*num_ep",
    ),
    ({"update_rule": "sdg"}, ValueError, "update_rule is 'sdg', expected one of sgd, sgd_mom"),
    ({"update_rule": None}, ValueError, "update_rule is None, expected"),
    ({"optim_config": {"lr": 1}}, ValueError, "config has a key 'lr', expected for sgd: learning"),
    ({"optim_config": {"learning_rate": -1}}, ValueError, "learning_rate is -1, expected"),
    ({"optim_config": 0.1}, TypeError, "config is a float, expected a dict"),
    ({"lr_decay": 0}, ValueError, "lr_decay is 0, expected a number above 0"),
    ({"lr_decay": math.nan}, ValueError, "lr_decay is nan, expected"),
    ({"lr_decay": "1"}, TypeError, "lr_decay is '1', expected"),
    ({"batch_size": 0}, ValueError, "batch_size is 0, expected a whole number of at least 1"),
    ({"batch_size": 2.5}, TypeError, "batch_size is 2.5, expected a whole number"),
    ({"batch_size": True}, ValueError, "batch_size is True, expected"),
    ({"num_epochs": -1}, ValueError, "num_epochs is -1, expected"),
    ({"num_epochs": None}, TypeError, "num_epochs is None, expected"),
    ({"print_every": 0}, ValueError, "print_every is 0, expected"),
    ({"num_train_samples": 0}, ValueError, "num_train_samples is 0, expected"),
    ({"num_val_samples": 1.5}, TypeError, "num_val_samples is 1.5, expected"),
    ({"shuffle": True, "batch_size": 21}, ValueError, "batch_size is 21, expected at most the 20"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": "one"}, TypeError, "seed"),
]


@models
@pytest.mark.parametrize(
    ("changes", "error", "text"), BAD_ARGUMENTS, ids=[str(case[0]) for case in BAD_ARGUMENTS]
)
def test_bad_arguments(
    make_model: Maker, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make_solver(make_model(), **changes)


def test_the_message_lists_the_keywords() -> None:
    with pytest.raises(ValueError, match="unknown keyword") as error:
        make_solver(Linear(), learning_rates=1)
    listed = re.sub(".*expected one of ", "", str(error.value)).split(", ")
    assert "update_rule" in listed
    assert not {"model", "data", "self", "unknown"} & set(listed)


def test_only_model_and_data_are_positional() -> None:
    with pytest.raises(TypeError, match="positional"):
        Solver(Linear(), draw(), "sgd")


BAD_DATA = [
    *(
        ({name: None}, ValueError, f"data has no '{name}', expected X_train, y_train, X_val and")
        for name in ("X_train", "y_train", "X_val", "y_val")
    ),
    ({"X_train": [[1.0] * 4]}, TypeError, "X_train is a list, expected a NumPy or CuPy array"),
    ({"X_train": np.zeros((0, 4))}, ValueError, r"X_train has shape \(0, 4\), expected \(N, d1,"),
    ({"X_val": np.zeros((0, 4))}, ValueError, r"X_val has shape \(0, 4\), expected"),
    ({"X_train": np.zeros(20)}, ValueError, r"X_train has shape \(20,\), expected"),
    ({"y_train": np.zeros(19, int)}, ValueError, r"y_train has shape \(19,\), expected \(20,\)"),
    ({"y_val": np.zeros((8, 1), int)}, ValueError, r"y_val has shape \(8, 1\), expected \(8,\)"),
    ({"y_train": np.zeros(20)}, TypeError, "y_train has dtype float64, expected integers"),
    ({"y_val": np.zeros(8, bool)}, TypeError, "y_val has dtype bool, expected integers"),
    ({"y_val": [0] * 8}, TypeError, "y_val is a list, expected"),
]
BAD_DATA_FOR_A_NET = [
    ({"y_train": np.full(20, 3)}, ValueError, "y_train has a label 3, expected 0 to 2"),
    ({"y_val": np.full(8, -1)}, ValueError, "y_val has a label -1, expected 0 to 2"),
    ({"X_train": np.zeros((20, 5))}, ValueError, r"X_train has shape .*, expected .* 4 values"),
    ({"X_val": np.zeros((8, 2, 1))}, ValueError, r"X_val has shape .*, expected .* 4 values"),
    ({"X_train": np.zeros((20, 4), complex)}, TypeError, "X_train has dtype complex128, expected"),
    ({"X_val": np.zeros((8, 4), bool)}, TypeError, "X_val has dtype bool, expected"),
]


@pytest.mark.parametrize(
    ("make_model", "changes", "error", "text"),
    [
        *((maker, *case) for maker in (make_net, Linear) for case in BAD_DATA),
        *((make_net, *case) for case in BAD_DATA_FOR_A_NET),
    ],
)
def test_bad_data(
    device: Device, make_model: Maker, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    data = {name: array for name, array in (draw() | changes).items() if array is not None}
    model = make_model()
    before = host(model.params)
    with pytest.raises(error, match=text):
        make_solver(model, data)
    assert_equal(host(model.params), before)


def test_batches_of_one_sample(device: Device) -> None:
    with pytest.raises(ValueError, match="batch_size is 1, expected at least 2 with batch norm"):
        make_solver(make_net(normalization="batchnorm"), batch_size=1)
    for normalization in (None, "layernorm"):
        solver = make_solver(make_net(normalization=normalization), batch_size=1, num_epochs=1)
        solver.train()
        assert len(solver.loss_history) == 20


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"X": np.zeros((0, 4)), "y": np.zeros(0, int)}, "X"),
        ({"y": np.zeros(5, int)}, "y"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=["no samples", "too few labels", "num_samples", "batch_size"],
)
def test_bad_arguments_of_check_accuracy(changes: dict[str, Any], text: str) -> None:
    solver = make_solver(Linear())
    arguments = {"X": np.zeros((8, 4)), "y": np.zeros(8, int)} | changes
    with pytest.raises(ValueError, match=f"^{text}.*expected"):
        solver.check_accuracy(**arguments)


def test_a_subclass_is_trained_through_its_own_loss() -> None:
    class Counting(FullyConnectedNet):
        calls = 0

        def loss(self, X: Any, y: Any = None) -> Any:
            self.calls += y is not None
            return super().loss(X, y)

    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 4)), rng.integers(0, 3, 20)
    data = {"X_train": X, "y_train": y, "X_val": X, "y_val": y}
    net = Counting([5], input_dim=4, num_classes=3, seed=0, device="cpu")
    Solver(net, data, batch_size=5, num_epochs=1, verbose=False, seed=0).train()
    assert net.calls == 4


def test_an_interrupted_iteration_is_not_gone_on_from() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 4)), rng.integers(0, 3, 20)
    data = {"X_train": X, "y_train": y, "X_val": X, "y_val": y}
    net = FullyConnectedNet([5], input_dim=4, num_classes=3, seed=0, device="cpu")
    solver = Solver(net, data, batch_size=5, num_epochs=2, verbose=False, seed=0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    net.loss_into = interrupt
    with pytest.raises(KeyboardInterrupt):
        solver.train()
    del net.loss_into
    with pytest.raises(RuntimeError, match="interrupted in the middle of an iteration"):
        solver.train()
