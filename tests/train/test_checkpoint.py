"""Checkpoints: a resumed run ends as one that never stopped, and a bad file changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_solver import Linear, assert_equal, draw, host, make_net, make_solver

from gpubn import Solver, backend
from gpubn.backend import Device, to_host
from gpubn.nn import files
from gpubn.train import FullyConnectedNet, NonFiniteLoss, checkpoint, optim
from gpubn.train.checkpoint import CheckpointError

CPU = backend.resolve("cpu")
SAMPLES = 22  # five batches of 4 an epoch, and two samples that do not fill another


class Biased(Linear):
    """A model of other parameters: one of no dimensions, and one that the optimizer leaves at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.params["temperature"] = np.array(1.0)

    def loss(self, X: NDArray[Any], y: NDArray[Any] | None = None) -> Any:
        result = super().loss(X, y)
        return result if y is None else (result[0], result[1] | {"temperature": np.array(0.5)})


def solver_of(model: Any, **changes: Any) -> Solver:
    """Return a solver that leaves nothing out: decay, drawn accuracies, three epochs."""
    config = {
        "data": draw(SAMPLES),
        "num_epochs": 3,
        "lr_decay": 0.7,
        "num_train_samples": 9,
        "num_val_samples": 5,
    }
    return make_solver(model, **config | changes)


def make_everything(**changes: Any) -> Solver:
    """Return a solver whose state has everything in it."""
    net = make_net(normalization="batchnorm", dropout_keep_ratio=0.75, reg=0.01)
    return solver_of(net, **{"update_rule": "adam", "shuffle": True} | changes)


def run_to(solver: Solver, iteration: int) -> Solver:
    def stop(solver: Solver) -> None:
        if solver.iteration == iteration:
            solver.stop()

    solver.on_iteration = stop
    solver.train()
    solver.on_iteration = None
    return solver


def contents(solver: Solver) -> dict[str, Any]:
    """Return the bytes of all that training has made, and its scalars."""
    arrays, values = solver.state()
    return {name: to_host(array).tobytes() for name, array in arrays.items()} | values


def assert_same_state(solver: Solver, expected: Solver | dict[str, Any], what: Any = None) -> None:
    mine = contents(solver)
    theirs = contents(expected) if isinstance(expected, Solver) else expected
    differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    assert not differ, what


def assert_resumes(make: Callable[[], Solver], iterations: tuple[int, ...], path: Path) -> None:
    """Require the same end, to the byte, whether a run was cut or not."""
    whole = make()
    whole.train()
    for iteration in iterations:
        checkpoint.save(path, run_to(make(), iteration))
        solver = make()
        checkpoint.resume(path, solver)
        assert solver.iteration == iteration
        assert solver.last_checkpoint == str(path)
        solver.train()
        assert_same_state(solver, whole)
        assert solver.best_val_acc == whole.best_val_acc
        if solver.best_bn_params:
            for mine, theirs in zip(solver.model.bn_params, whole.model.bn_params, strict=True):
                assert_equal(host(statistics(mine)), host(statistics(theirs)))


def statistics(bn_param: dict[str, Any]) -> dict[str, Any]:
    return {name: bn_param[name] for name in ("running_mean", "running_var")}


# --- The same end ---------------------------------------------------------------------------------

rules = pytest.mark.parametrize("rule", optim.RULES)
# Before the first step, within an epoch, at an epoch's end, before the last step, after it.
CUTS = (1, 3, 5, 8, 14, 15)


@rules
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("normalization", "keep"),
    [(None, 1), ("batchnorm", 1), ("batchnorm", 0.75), ("layernorm", 0.75)],
)
def test_a_network_resumes(
    device: Device, rule: str, shuffle: bool, normalization: str | None, keep: float, tmp_path: Path
) -> None:
    def make() -> Solver:
        net = make_net(normalization=normalization, dropout_keep_ratio=keep, dtype=np.float32)
        return solver_of(net, update_rule=rule, shuffle=shuffle)

    # Kernels run slowly on the host, where one cut within an epoch must do.
    cuts = CUTS if device.kind == "cpu" else (8,)
    assert_resumes(make, cuts, tmp_path / "checkpoint.safetensors")


@rules
@pytest.mark.parametrize("model", [Linear, Biased])
def test_any_object_resumes(rule: str, model: type[Linear], tmp_path: Path) -> None:
    def make() -> Solver:
        return solver_of(model(), update_rule=rule, shuffle=True)

    assert_resumes(make, CUTS, tmp_path / "checkpoint.safetensors")


def test_a_network_without_a_seed_resumes(tmp_path: Path) -> None:
    # Its masks come from a key that was drawn: the checkpoint has it.
    def make() -> Solver:
        net = make_net(seed=None, dropout_keep_ratio=0.5)
        return solver_of(net, seed=None)

    whole = run_to(make(), 7)
    checkpoint.save(tmp_path / "run", whole)
    solver = make()
    checkpoint.resume(tmp_path / "run", solver)
    for each in (whole, solver):
        each.train()
    assert_same_state(solver, whole)


@pytest.mark.parametrize("make", [make_everything, lambda: solver_of(Linear(), update_rule="adam")])
def test_a_solver_that_has_trained_takes_the_checkpoints_state(
    device: Device, make: Callable[[], Solver], tmp_path: Path
) -> None:
    for iteration in (0, 1, 8):
        saved = make()
        if iteration:
            run_to(saved, iteration)
        expected = contents(saved)
        checkpoint.save(tmp_path / "run", saved)
        solver = run_to(make(), 11)
        checkpoint.resume(tmp_path / "run", solver)
        assert_same_state(solver, expected)
        for each in (saved, solver):
            run_to(each, iteration + 3)
        assert_same_state(solver, saved)


def test_training_goes_on_for_more_epochs(tmp_path: Path) -> None:
    whole = solver_of(make_net(), num_epochs=5)
    whole.train()
    checkpoint.save(tmp_path / "run", run_to(solver_of(make_net(), num_epochs=3), 10))
    solver = solver_of(make_net(), num_epochs=5)
    checkpoint.resume(tmp_path / "run", solver)
    solver.train()
    assert_same_state(solver, whole)


def test_a_checkpoint_every_epoch(device: Device, tmp_path: Path) -> None:
    name = str(tmp_path / "run")
    whole = make_everything(checkpoint_name=name)
    whole.train()
    files = [f"run_epoch_{epoch}.safetensors" for epoch in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == files
    assert whole.last_checkpoint == f"{name}_epoch_3.safetensors"
    for epoch, file in enumerate(files, 1):
        solver = make_everything()
        checkpoint.resume(tmp_path / file, solver)
        assert (solver.epoch, solver.iteration) == (epoch, 5 * epoch)
        solver.train()
        assert_same_state(solver, whole)


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    def break_down(solver: Solver) -> None:
        if solver.iteration == 7:
            solver.model.params["b1"][0] = np.nan

    name = str(tmp_path / "run")
    solver = solver_of(make_net(), checkpoint_name=name, on_iteration=break_down)
    good = f"{name}_epoch_1.safetensors"
    with pytest.raises(NonFiniteLoss, match="at iteration 8; the last good checkpoint is") as error:
        solver.train()
    assert good in str(error.value)
    assert os.listdir(tmp_path) == ["run_epoch_1.safetensors"]
    resumed = solver_of(make_net())
    checkpoint.resume(good, resumed)
    assert resumed.iteration == 5


# --- Between devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("to_cpu", [False, True])
def test_from_one_device_to_another(device: Device, to_cpu: bool, tmp_path: Path) -> None:
    def make(where: Device) -> Solver:
        net = make_net(
            normalization="batchnorm",
            dropout_keep_ratio=0.75,
            hidden_dims=[5, 4],
            device=where.name,
        )
        return solver_of(net, update_rule="adam", shuffle=True)

    start, end = (device, CPU) if to_cpu else (CPU, device)
    saved = run_to(make(start), 8)
    checkpoint.save(tmp_path / "run", saved)
    solver = make(end)
    checkpoint.resume(tmp_path / "run", solver)
    assert_same_state(solver, saved)
    arrays, _ = solver.state()
    for name, array in arrays.items():
        if name.startswith(("params.", "best.", "optim.", "bn.")):
            assert backend.place(array) == end.name
    solver.train()
    saved.train()
    for name, array in host(solver.best_params).items():  # matrix products differ
        np.testing.assert_allclose(array, to_host(saved.best_params[name]), atol=1e-9)
    assert solver.val_acc_history == saved.val_acc_history


# --- Files that must be refused -------------------------------------------------------------------


def assert_refused(
    path: Path, solver: Solver, error: type[Exception], text: str | None = None, what: Any = None
) -> None:
    """Require an error that names the file, and a solver that is as it was."""
    before, last = contents(solver), solver.last_checkpoint
    with pytest.raises(error, match=text) as caught:
        checkpoint.resume(path, solver)
    assert path.name in str(caught.value), what
    assert_same_state(solver, before, what)
    assert solver.last_checkpoint == last


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a checkpoint that has everything in it, made on the CPU."""
    path = tmp_path_factory.mktemp("good") / "run"
    with backend.use("cpu"):
        checkpoint.save(path, run_to(make_everything(), 8))
    return path.read_bytes()


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_truncated(good: bytes, tmp_path: Path) -> None:
    path, solver, header = tmp_path / "run", run_to(make_everything(), 3), header_length(good)
    lengths = {*range(0, 10), header - 1, header, header + 1, len(good) - 1}
    lengths.update(range(10, len(good), 97))
    for length in sorted(lengths):
        path.write_bytes(good[:length])
        assert_refused(path, solver, CheckpointError, what=length)


def test_too_long(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(good + b"\0")
    assert_refused(path, make_everything(), CheckpointError)


@pytest.mark.parametrize("bit", range(8))
def test_flipped_bits(good: bytes, bit: int, tmp_path: Path) -> None:
    # Every 29th byte, others for each bit, and all bytes of the header's length.
    path, solver = tmp_path / "run", run_to(make_everything(), 3)
    before = contents(solver)
    data = bytearray(good)
    for position in (*range(8), *range(8 + 3 * bit, len(good), 29)):
        data[position] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="run"):
            checkpoint.resume(path, solver)
        data[position] ^= 1 << bit
    assert_same_state(solver, before)


def test_refused_on_the_device_too(good: bytes, device: Device, tmp_path: Path) -> None:
    path, solver = tmp_path / "run", run_to(make_everything(), 3)
    header = header_length(good)
    for position in (0, 20, header // 2, header + 5, len(good) - 1):
        data = bytearray(good)
        data[position] ^= 4
        path.write_bytes(data)
        assert_refused(path, solver, CheckpointError, what=position)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no whole safetensors file"),
        (b"hello, world: no checkpoint at all", "no whole safetensors file"),
        (b"\xff" * 100, "no whole safetensors file"),
        (b"\0" * 100, "no whole safetensors file"),
    ],
    ids=["empty", "text", "ones", "zeros"],
)
def test_another_kind_of_file(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(data)
    assert_refused(path, make_everything(), CheckpointError, text)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.load_model(path)


def test_safetensors_of_others(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for metadata in (None, {"format": "pt"}):
        save_file({"params.W1": np.zeros((4, 5))}, path, metadata)
        assert_refused(path, make_everything(), CheckpointError, "was not written by gpubn")


def test_wrong_kind(tmp_path: Path) -> None:
    path, solver = tmp_path / "run", make_everything()
    checkpoint.save_model(path, solver.model)
    assert_refused(path, solver, CheckpointError, "is a model, expected a checkpoint")
    checkpoint.save(path, solver)
    with pytest.raises(CheckpointError, match="is a checkpoint, expected a model"):
        checkpoint.load_model(path)


def test_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, solver = tmp_path / "run", make_everything()
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", files.FORMAT + 1)
        checkpoint.save(path, solver)
    assert_refused(path, solver, CheckpointError, "has format 2, this gpubn reads 1")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_dims": [6]}, r"another network: its hidden_dims is \[5\], expected \[6\]"),
        ({"hidden_dims": [5, 5]}, r"its hidden_dims is \[5\], expected \[5, 5\]"),
        ({"normalization": "batchnorm"}, "its normalization is None, expected 'batchnorm'"),
        ({"dropout_keep_ratio": 0.5}, "its dropout_keep_ratio is 1.0, expected 0.5"),
        ({"reg": 0.5}, "its reg is 0.0, expected 0.5"),
        ({"dtype": np.float32}, "its dtype is 'float64', expected 'float32'"),
        ({"seed": 9}, "its seed is 8, expected 9"),
    ],
    ids=str,
)
def test_another_network(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, run_to(solver_of(make_net()), 3))
    assert_refused(path, run_to(solver_of(make_net(**changes)), 2), CheckpointError, text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"update_rule": "adam"}, "of another training: its "),
        ({"batch_size": 5}, "its batch_size is 4, expected 5"),
        ({"shuffle": True}, "its shuffle is False, expected True"),
        ({"lr_decay": 0.5}, "its lr_decay is 0.7, expected 0.5"),
        ({"num_train_samples": 10}, "its num_train_samples is 9, expected 10"),
        ({"num_val_samples": None}, "its num_val_samples is 5, expected None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [make_net, Linear])
def test_another_training(
    model: Callable[[], Any], changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, run_to(solver_of(model()), 3))
    assert_refused(path, run_to(solver_of(model(), **changes), 2), CheckpointError, text)


@pytest.mark.parametrize(
    ("rule", "key", "value"),
    [
        ("sgd_momentum", "momentum", 0.5),
        ("rmsprop", "decay_rate", 0.5),
        ("adam", "beta1", 0.5),
        ("adam", "epsilon", 0.5),
        ("adamw", "weight_decay", 0.5),
        ("sgd", "learning_rate", 0.5),
    ],
)
def test_another_configuration_of_the_rule(
    rule: str, key: str, value: float, tmp_path: Path
) -> None:
    # Either is right, to refuse the file or to go on as the run began; not to go on otherwise.
    path = tmp_path / "run"
    whole = solver_of(make_net(), update_rule=rule)
    checkpoint.save(path, run_to(whole, 8))
    solver = solver_of(make_net(), update_rule=rule, optim_config={key: value})
    try:
        checkpoint.resume(path, solver)
    except CheckpointError:
        return
    for each in (whole, solver):
        each.train()
    assert_same_state(solver, whole)


@pytest.mark.parametrize("samples", [SAMPLES - 8, SAMPLES + 8])
def test_another_number_of_samples(samples: int, tmp_path: Path) -> None:
    # An epoch would have another length, and a shuffled order lead beyond the end.
    path = tmp_path / "run"
    checkpoint.save(path, run_to(make_everything(), 8))
    solver = make_everything(data=draw(samples))
    assert_refused(path, solver, CheckpointError, "another training")


def test_of_a_network_for_another_object(tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, solver_of(make_net()))
    assert_refused(path, solver_of(Linear()), CheckpointError, "another network")
    checkpoint.save(path, solver_of(Linear()))
    assert_refused(path, solver_of(make_net()), CheckpointError, "another network")


def test_other_parameters_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "run"
    checkpoint.save(path, run_to(solver_of(Linear()), 3))

    def without_b(params: dict[str, Any]) -> None:
        del params["b"]

    def wider(params: dict[str, Any]) -> None:
        params["W"] = np.zeros((4, 4))

    def single(params: dict[str, Any]) -> None:
        params["b"] = np.zeros(3, np.float32)

    for change in (without_b, wider, single):
        model = Linear()
        change(model.params)
        assert_refused(path, solver_of(model), CheckpointError, "another network", change.__name__)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    solver = make_everything()
    assert_refused(tmp_path / "nothing here", solver, FileNotFoundError)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(folder, solver, OSError)
    with pytest.raises(FileNotFoundError, match="nothing here"):
        checkpoint.load_model(tmp_path / "nothing here")


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [(os, "fsync"), (Path, "replace"), (Path, "open")])
@pytest.mark.parametrize("failure", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_the_old_file(
    broken: tuple[Any, str],
    failure: BaseException,
    existing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, solver = tmp_path / "run", run_to(make_everything(), 3)
    if existing:
        checkpoint.save(path, solver)
    before = path.read_bytes() if existing else None

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    run_to(solver, 8)
    with monkeypatch.context() as patch:
        patch.setattr(*broken, fail)
        with pytest.raises(type(failure)):
            checkpoint.save(path, solver)
    assert os.listdir(tmp_path) == (["run"] if existing else [])
    assert before is None or path.read_bytes() == before
    checkpoint.save(path, solver)
    resumed = make_everything()
    checkpoint.resume(path, resumed)
    assert resumed.iteration == 8


def test_the_new_file_is_whole_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, solver = tmp_path / "run", run_to(make_everything(), 3)
    checkpoint.save(path, solver)
    old, events = path.read_bytes(), []
    fsync, replace = os.fsync, Path.replace

    def watch_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def watch_replace(temporary: Path, target: Path) -> Path:
        assert path.read_bytes() == old
        assert temporary.parent == path.parent
        checkpoint.resume(temporary, make_everything())
        events.append("replace")
        return replace(temporary, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_replace)
    checkpoint.save(path, run_to(solver, 8))
    assert events[:2] == ["fsync", "replace"]
    assert path.read_bytes() != old
    assert os.listdir(tmp_path) == ["run"]


def test_a_failed_write_is_no_good_checkpoint(tmp_path: Path) -> None:
    solver = make_everything(checkpoint_name=str(tmp_path / "missing" / "run"))
    with pytest.raises(FileNotFoundError):
        solver.train()
    assert solver.last_checkpoint is None


def test_saving_changes_nothing(device: Device, tmp_path: Path) -> None:
    whole, saved = make_everything(), make_everything()
    whole.train()
    saved.on_iteration = lambda solver: checkpoint.save(tmp_path / "run", solver)
    saved.train()
    assert_same_state(saved, whole)


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    files = set()
    for name in "abcdef":
        checkpoint.save(tmp_path / name, run_to(make_everything(), 8))
        files.add((tmp_path / name).read_bytes())
    assert len(files) == 1


OPTIONS = [
    (lambda norm: setattr(norm, "frozen", True), "frozen of .* is True, expected False"),
    (lambda norm: norm.bn_param.update(momentum=None), "momentum of .* is None, expected 0.9"),
    (lambda norm: norm.bn_param.update(eps=0.1), r"eps of .* layers\[1\] is 0.1, expected 1e-05"),
    (lambda norm: norm.bn_param.update(unbiased=True), "unbiased of .* is True, expected False"),
]


@pytest.mark.parametrize(("change", "text"), OPTIONS, ids=[text for _, text in OPTIONS])
def test_what_files_do_not_keep_is_refused(
    change: Callable[[Any], None], text: str, tmp_path: Path
) -> None:
    solver = make_everything()
    change(solver.model.layers[1])
    with pytest.raises(ValueError, match=text):
        checkpoint.save(tmp_path / "run", solver)
    with pytest.raises(ValueError, match=text):
        checkpoint.save_model(tmp_path / "model", solver.model)
    assert not os.listdir(tmp_path)


def test_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solver = make_everything()
    checkpoint.save("run", solver)
    checkpoint.resume("run", solver)
    assert os.listdir() == ["run"]


# --- Files of networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", [None, "batchnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_comes_back(
    device: Device, normalization: str | None, dtype: Any, trained: bool, tmp_path: Path
) -> None:
    net = make_net(normalization=normalization, dtype=dtype, dropout_keep_ratio=0.75, reg=0.5)
    X = draw()["X_val"]
    if trained:
        solver_of(net, num_epochs=1).train()
    path = tmp_path / "model.safetensors"
    extra = {"mean": np.arange(4, dtype=np.float32), "classes": np.array([3, 1])}
    checkpoint.save_model(path, net, {"data": "digits", "epochs": 3}, extra)
    other, config, arrays = checkpoint.load_model(path)
    assert isinstance(other, FullyConnectedNet)
    assert other.config == net.config
    assert other.device == device
    assert to_host(other.params.flat).tobytes() == to_host(net.params.flat).tobytes()
    assert to_host(other.loss(X)).tobytes() == to_host(net.loss(X)).tobytes()
    assert config == {"data": "digits", "epochs": 3}
    assert_equal(arrays, extra)
    assert {name: array.dtype for name, array in arrays.items()} == {
        name: array.dtype for name, array in extra.items()
    }

    on_cpu, _, _ = checkpoint.load_model(path, device="cpu")
    assert isinstance(on_cpu.params.flat, np.ndarray)
    tolerance = 1e-5 if dtype is np.float32 else 1e-13
    scores = to_host(net.loss(X))
    np.testing.assert_allclose(on_cpu.loss(X), scores, atol=tolerance * abs(scores).max())


def test_a_loaded_model_trains(device: Device, tmp_path: Path) -> None:
    net = make_net(normalization="batchnorm")
    solver_of(net, num_epochs=1).train()
    checkpoint.save_model(tmp_path / "model", net)
    other, config, extra = checkpoint.load_model(tmp_path / "model")
    assert (config, extra) == ({}, {})
    histories = []
    for model in (net, other):
        solver = solver_of(model, num_epochs=1)
        solver.train()
        histories.append(solver.loss_history)
    assert histories[0] == histories[1]


def test_damaged_models(tmp_path: Path) -> None:
    path = tmp_path / "model"
    checkpoint.save_model(path, make_net(normalization="layernorm"), {"data": "digits"})
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        path.write_bytes(data[:position])
        with pytest.raises(CheckpointError, match="model"):
            checkpoint.load_model(path)
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="model"):
            checkpoint.load_model(path)


def test_saves_extra_arrays_and_settings_beside_a_checkpoint(
    device: Device, tmp_path: Path
) -> None:
    path, solver = tmp_path / "run", run_to(make_everything(), 3)
    checkpoint.save(path, solver, {"epochs": 3}, {"mean": device.asarray(np.ones(4))})
    expected = contents(solver)
    resumed = make_everything()
    checkpoint.resume(path, resumed)
    assert_same_state(resumed, expected)
