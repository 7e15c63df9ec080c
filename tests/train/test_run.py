"""Runs in a folder: configuration, files, resuming from any moment, evaluation."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import shutil
import sys

import numpy as np
import pytest

import gpubn
from gpubn.train import DataError, NonFiniteLoss, checkpoint
from gpubn.train import run as runs
from gpubn.train.checkpoint import CheckpointError
from gpubn.train.config import RunConfig
from gpubn.train.optim import RULES
from gpubn.train.run import RunError
from gpubn.train.solver import NonFiniteParameters

sys.path.insert(0, os.path.dirname(__file__))
import kill_and_resume
from kill_and_resume import Kill

SMALL = RunConfig(hidden=(12, 9), batch_size=30, epochs=3, device="cpu", seed=5)


@pytest.fixture
def tiny(tmp_path, rng):
    """A data set of three classes, 8 batches of 10, without a validation set."""
    y = rng.integers(0, 3, 100)
    X = (rng.normal(size=(100, 6)) + 3 * np.eye(3)[y].repeat(2, axis=1)).astype(np.float32)
    path = tmp_path / "tiny.npz"
    np.savez(path, X_train=X, y_train=y, X_test=X[:20], y_test=y[:20])
    return str(path)


@pytest.fixture
def small(tiny):
    return dataclasses.replace(SMALL, data=tiny, batch_size=10)


class Killed(BaseException):
    """Ends a run where no code of its own could catch it."""


class Stop(runs.Watcher):
    """Stops a run, or kills it, after an iteration or an epoch; 0 is before the first iteration."""

    def __init__(self, *, iteration=None, epoch=None, kill=False):
        self.at = {"iteration": iteration, "epoch": epoch}
        self.kill = kill

    def _end(self, run):
        if self.kill:
            raise Killed
        run.stop()

    def begin(self, run):
        if self.at["iteration"] == 0:
            self._end(run)

    def iteration(self, run):
        if run.solver.iteration == self.at["iteration"]:
            self._end(run)

    def epoch(self, run):
        if run.solver.epoch == self.at["epoch"]:
            self._end(run)


def rows(folder):
    with open(folder / runs.METRICS, newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in runs.NOT_REPEATED} for row in table]


def same(one, other):
    assert (one / runs.MODEL).read_bytes() == (other / runs.MODEL).read_bytes()
    assert rows(one) == rows(other)


# --- Configuration --------------------------------------------------------------------------------


def test_a_configuration_goes_through_toml(tmp_path):
    config = RunConfig(
        "mnist:a b/ö \"quoted\"", (3, 40), "none", 1, "sgd", 1e-300, 0.1 + 0.2, 1, 0, 1, 7,
        "float64", "cuda:1", 2**63 - 1,
    )  # fmt: skip
    path = tmp_path / "c.toml"
    for each in (config, RunConfig(), RunConfig(hidden=[])):
        path.write_text(each.to_toml(), encoding="utf-8")
        assert RunConfig.read(path) == each
    assert "device" not in RunConfig().as_dict()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data", "", "text"),
        ("data", 3, "text"),
        ("hidden", "256", "list"),
        ("hidden", [0], "at least 1"),
        ("hidden", [2.5], "whole number"),
        ("hidden", [True], "whole number"),
        ("normalization", None, "batchnorm, layernorm, none"),
        ("normalization", "instance", "batchnorm, layernorm, none"),
        ("dropout_keep_ratio", 0, "above 0"),
        ("dropout_keep_ratio", 1.5, "at most 1"),
        ("update_rule", "lion", "adam"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", -1e-3, "at least 0"),
        ("learning_rate", "fast", "number"),
        ("lr_decay", 0.0, "above 0"),
        ("reg", float("inf"), "finite"),
        ("weight_scale", -1, "at least 0"),
        ("batch_size", 1, "at least 2"),
        ("batch_size", 2.0, "whole number"),
        ("epochs", 0, "at least 1"),
        ("epochs", True, "whole number"),
        ("dtype", "float16", "float32, float64"),
        ("device", 1, "text"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "2\\*\\*63"),
    ],
)
def test_bad_values_are_refused(name, value, expected):
    with pytest.raises((ValueError, TypeError), match=f"^{name} is .*{expected}"):
        RunConfig(**{name: value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs = ", "no TOML file"),
        ("epoch = 3", "has a key 'epoch', expected: data, hidden"),
        ("epochs = '3'", "epochs is '3', expected a whole number"),
    ],
)
def test_a_bad_toml_file_is_named(tmp_path, text, expected):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError), match=expected) as error:
        RunConfig.read(path)
    assert str(path) in str(error.value)


def test_every_update_rule_may_be_named():
    assert [RunConfig(update_rule=rule).update_rule for rule in RULES] == list(RULES)


# --- A whole run ----------------------------------------------------------------------------------


def test_a_run_writes_its_files(small, tmp_path):
    out = tmp_path / "run"
    run = runs.start(small, out)
    assert run.finished
    assert run.folder == out
    assert sorted(os.listdir(out)) == sorted(runs.FILES)
    assert RunConfig.read(out / runs.CONFIG) == small
    assert (out / runs.CURVES).read_bytes().startswith(b"\x89PNG")
    with open(out / runs.METRICS, newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == runs.METRICS_COLUMNS
    assert [int(row["epoch"]) for row in table] == [0, 1, 2, 3]
    assert [int(row["iteration"]) for row in table] == [1, 9, 18, 27]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(
        [small.learning_rate * small.lr_decay**k for k in (0, 0, 1, 2)]
    )
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds)
    losses = run.solver.loss_history
    assert float(table[0]["loss"]) == losses[0]
    assert float(table[2]["loss"]) == pytest.approx(np.mean(losses[9:18]))
    assert [float(row["val_accuracy"]) for row in table] == run.solver.val_acc_history
    assert [float(row["train_accuracy"]) for row in table] == run.solver.train_acc_history
    assert run.test.count == 20
    assert run.test.accuracy > 0.9


def test_a_run_on_each_device_ends_with_the_same_files(small, tmp_path, device):
    config = dataclasses.replace(small, device=None, hidden=(5,), epochs=1)
    run = runs.start(config, tmp_path / "run")
    assert run.net.device.name == device.name
    assert run.finished
    assert runs.evaluate(tmp_path / "run") == run.test


def test_one_iteration_an_epoch(small, tmp_path):
    config = dataclasses.replace(small, batch_size=90, epochs=2)
    runs.start(config, tmp_path / "run")
    assert [(row["epoch"], row["iteration"]) for row in rows(tmp_path / "run")] == [
        ("1", "1"),
        ("2", "2"),
    ]


def test_the_model_is_the_best_by_validation_accuracy(small, tmp_path):
    run = runs.start(small, tmp_path / "run")
    net, config, _ = checkpoint.load_model(tmp_path / "run" / runs.MODEL, "cpu")
    assert config["val_accuracy"] == max(run.solver.val_acc_history)
    X = run.preprocessing.apply(run.dataset.X_val)
    accuracy = (net.loss(X).argmax(axis=1) == run.dataset.y_val).mean()
    assert accuracy == config["val_accuracy"]


def test_the_seed_decides_everything(small, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        runs.start(dataclasses.replace(small, seed=seed), tmp_path / name)
    same(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_a_data_set_without_test_images(tmp_path, rng):
    path = tmp_path / "two.npz"
    np.savez(path, X_train=rng.normal(size=(40, 3)), y_train=np.arange(40) % 2)
    run = runs.start(dataclasses.replace(SMALL, data=str(path), batch_size=8), tmp_path / "run")
    assert run.finished
    assert run.test is None
    result = runs.evaluate(tmp_path / "run")
    assert (result.split, result.count) == ("validation", 4)
    assert result.accuracy == run.solver.best_val_acc


def test_folders_are_numbered(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-7").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-x").mkdir()
    (tmp_path / "runs" / "other-9").mkdir()
    config = dataclasses.replace(small, epochs=1)
    assert str(runs.start(config).folder) == os.path.join("runs", "tiny-8")
    assert str(runs.start(config).folder) == os.path.join("runs", "tiny-9")


def test_a_relative_path_of_data_is_kept_whole(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(small, data="tiny.npz", epochs=1)
    runs.start(config, tmp_path / "run")
    assert RunConfig.read(tmp_path / "run" / runs.CONFIG).data == str(tmp_path / "tiny.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.resume(tmp_path / "run").finished


def test_nothing_is_written_for_what_cannot_be(small, tmp_path):
    for wrong, error in (
        ({"data": "nowhere.npz"}, DataError),
        ({"batch_size": 91}, RunError),
        ({"device": "tpu"}, RunError),
    ):
        with pytest.raises(error):
            runs.start(dataclasses.replace(small, **wrong), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(small, tmp_path):
    out = tmp_path / "run"
    runs.start(dataclasses.replace(small, epochs=1), out)
    before = (out / runs.MODEL).read_bytes()
    with pytest.raises(RunError, match=r"already holds a run.*--resume"):
        runs.start(small, out)
    assert (out / runs.MODEL).read_bytes() == before


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(runs.MissingDependency, match=r"safetensors .*pip install 'gpubn\[train\]'"):
        runs.start(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- Stopped, killed, resumed ---------------------------------------------------------------------


@pytest.fixture
def whole(small, tmp_path):
    """The folder of the run that nobody stopped."""
    runs.start(small, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("iteration", [0, 1, 4, 9, 10, 26])
def test_a_stopped_run_goes_on(small, whole, tmp_path, iteration):
    out = tmp_path / "run"
    run = runs.start(small, out, watcher=Stop(iteration=iteration))
    assert not run.finished
    assert run.solver.iteration == iteration
    assert sorted(os.listdir(out)) == sorted([runs.CONFIG, runs.CHECKPOINT, runs.METRICS])
    again = runs.resume(out)
    assert again.resumed
    assert again.finished
    same(out, whole)
    np.testing.assert_array_equal(again.solver.loss_history, run.solver.loss_history
                                  + again.solver.loss_history[iteration:])  # fmt: skip


def test_stopped_at_the_last_iteration_it_is_finished(small, whole, tmp_path):
    assert runs.start(small, tmp_path / "run", watcher=Stop(iteration=27)).finished
    same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "when", [{"iteration": 0}, {"iteration": 3}, {"epoch": 1}, {"iteration": 14}, {"epoch": 3}]
)
def test_a_killed_run_goes_on(small, whole, tmp_path, when):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        runs.start(small, out, watcher=Stop(kill=True, **when))
    assert (out / runs.CHECKPOINT).exists() == (when not in ({"iteration": 0}, {"iteration": 3}))
    assert not (out / runs.MODEL).exists()
    assert runs.resume(out).finished
    same(out, whole)


@pytest.mark.parametrize("name", [runs.CHECKPOINT, runs.METRICS, runs.MODEL, runs.CURVES])
def test_killed_before_any_file_is_in_place(small, whole, tmp_path, monkeypatch, name):
    """Every file's first writing ends the process, in its middle: the name is not there yet."""
    out = tmp_path / "run"
    write = checkpoint.atomic_write

    def dies(path, data):
        if path.name == name:
            (path.parent / f".{name}.123.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write", dies)
        with pytest.raises(Killed):
            runs.start(small, out)
    assert not (out / name).exists()
    assert runs.resume(out).finished
    assert sorted(os.listdir(out)) == sorted(runs.FILES)
    same(out, whole)


def test_a_finished_run_has_its_files_written_anew(whole, tmp_path):
    model = (whole / runs.MODEL).read_bytes()
    curves = (whole / runs.CURVES).read_bytes()
    metrics = (whole / runs.METRICS).read_bytes()
    for name in (runs.MODEL, runs.CURVES, runs.METRICS):
        (whole / name).unlink()
    run = runs.resume(whole)
    assert run.finished
    assert run.test is not None
    assert (whole / runs.MODEL).read_bytes() == model
    assert (whole / runs.METRICS).read_bytes() == metrics  # the seconds too
    assert (whole / runs.CURVES).read_bytes() == curves


def test_more_epochs_are_as_if_asked_for_at_first(small, whole, tmp_path):
    out = tmp_path / "run"
    runs.start(dataclasses.replace(small, epochs=1), out)
    with pytest.raises(Killed):
        runs.resume(out, epochs=3, watcher=Stop(iteration=12, kill=True))
    assert runs.resume(out).finished  # the number is kept, though the process was killed
    same(out, whole)


def test_fewer_epochs_than_are_done_are_refused(whole):
    with pytest.raises(RunError, match="epochs is 2, expected at least 3"):
        runs.resume(whole, epochs=2)
    with pytest.raises(RunError, match="epochs is 0"):
        runs.resume(whole, epochs=0)
    assert RunConfig.read(whole / runs.CONFIG).epochs == 3


def test_on_another_device(small, tmp_path, device):
    config = dataclasses.replace(small, hidden=(5,), epochs=2)
    runs.start(config, tmp_path / "run", watcher=Stop(iteration=12))
    run = runs.resume(tmp_path / "run", device=device.name)
    assert run.net.device.name == device.name
    assert run.finished
    assert RunConfig.read(tmp_path / "run" / runs.CONFIG).device == "cpu"


def test_where_the_data_have_moved(small, whole, tmp_path):
    out = tmp_path / "run"
    runs.start(small, out, watcher=Stop(iteration=12))
    moved = shutil.move(small.data, tmp_path / "moved.npz")
    with pytest.raises(DataError, match="missing"):
        runs.resume(out)
    assert runs.resume(out, data=str(moved)).finished
    same(out, whole)


def test_where_the_data_have_changed(small, tmp_path):
    out = tmp_path / "run"
    runs.start(small, out, watcher=Stop(iteration=12))
    arrays = dict(np.load(small.data))
    arrays["y_train"][:2] = arrays["y_train"][1::-1]
    arrays["X_train"][0, 0] += 1
    np.savez(small.data, **arrays)
    with pytest.raises(DataError, match="not hold the data that the run was begun with"):
        runs.resume(out)


def test_where_the_configuration_was_changed(small, tmp_path):
    out = tmp_path / "run"
    runs.start(small, out, watcher=Stop(iteration=12))
    changed = dataclasses.replace(small, learning_rate=0.5)
    (out / runs.CONFIG).write_text(changed.to_toml())
    with pytest.raises(RunError, match=r"learning_rate is 0\.5 in .*begun with 0\.002"):
        runs.resume(out)


@pytest.mark.parametrize("name", [runs.CHECKPOINT, runs.MODEL])
@pytest.mark.parametrize("damage", ["short", "flipped", "empty"])
def test_a_damaged_file_is_named(whole, name, damage):
    path = whole / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes({"short": data[:-100], "flipped": data, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=name):
        runs.resume(whole) if name == runs.CHECKPOINT else runs.evaluate(whole)


def test_a_folder_without_a_run(tmp_path):
    for function in (runs.resume, runs.evaluate):
        for folder in (tmp_path, tmp_path / "missing"):
            with pytest.raises(RunError, match="holds no run"):
                function(folder)


def test_two_processes_do_not_share_a_run(small, tmp_path):
    pytest.importorskip("fcntl")

    class Second(runs.Watcher):
        def begin(self, run):
            with pytest.raises(RunError, match="in use"):
                runs.resume(run.folder)

    assert runs.start(small, tmp_path / "run", watcher=Second()).finished


def test_a_run_that_diverges(small, tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(small, normalization="none", update_rule="sgd", hidden=(4,))
    with pytest.raises(NonFiniteLoss, match="no checkpoint"), np.errstate(all="ignore"):
        runs.start(dataclasses.replace(config, learning_rate=1e30), out)
    assert not (out / runs.CHECKPOINT).exists()


def test_the_last_good_checkpoint_is_named(small, tmp_path):
    class Poison(runs.Watcher):
        def epoch(self, run):
            if run.solver.epoch == 2:
                run.net.params.flat[0] = np.nan

    with pytest.raises(NonFiniteLoss, match=r"iteration 19;.*checkpoint\.safetensors"):
        runs.start(small, tmp_path / "run", watcher=Poison())
    assert runs.resume(tmp_path / "run").finished


def test_broken_parameters_are_not_saved(small, tmp_path):
    class Poison(runs.Watcher):
        def iteration(self, run):
            if run.solver.iteration == 4:
                run.net.params.flat[0] = np.inf
                run.stop()

    with pytest.raises(NonFiniteParameters, match="iteration 4"):
        runs.start(small, tmp_path / "run", watcher=Poison())
    assert not (tmp_path / "run" / runs.CHECKPOINT).exists()


def test_a_full_disk_names_the_file(small, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    runs.start(small, out, watcher=Stop(iteration=9))
    before = (out / runs.CHECKPOINT).read_bytes()
    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(OSError, match=r"No space left.*checkpoint\.safetensors"):
        runs.resume(out)
    assert (out / runs.CHECKPOINT).read_bytes() == before


def test_killed_with_sigkill_at_random_times(tmp_path, rng):
    """Three runs; ``kill_and_resume.py`` does as many as asked."""
    whole, epochs = tmp_path / "whole", 20
    expected, started, ended = kill_and_resume.uninterrupted(whole, epochs)
    times = random.Random(int(rng.integers(2**32)))
    for number in range(3):
        # Early in the run, and then in the middle of writing a checkpoint.
        delay = times.uniform(started, (started + ended) / 2)
        kills = [Kill(delay), Kill(0.8 * started, in_checkpoint=True)]
        folder = tmp_path / f"run-{number}"
        outcome = kill_and_resume.kill_and_resume(folder, epochs, expected, kills)
        assert outcome.equal, outcome


# --- Evaluation -----------------------------------------------------------------------------------


def test_an_evaluation(small, whole, tmp_path):
    result = runs.evaluate(whole)
    net, _, _ = checkpoint.load_model(whole / runs.MODEL, "cpu")
    data = np.load(small.data)
    run = runs.resume(whole)
    assert result == run.test
    X = run.preprocessing.apply(data["X_test"])
    scores = net.loss(X).astype(np.float64)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    y = data["y_test"]
    assert result.loss == pytest.approx(-log_p[np.arange(20), y].mean(), rel=1e-5)
    assert result.accuracy == (scores.argmax(axis=1) == y).mean()
    assert result.class_counts == tuple(np.bincount(y, minlength=3))
    assert sum(result.class_right) == round(result.accuracy * 20)


def test_an_evaluation_on_other_data(whole, tmp_path, rng):
    def saved(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    y = np.arange(30) % 3
    X = rng.normal(size=(30, 6)).astype(np.float32)
    result = runs.evaluate(whole, saved("a.npz", X_train=X, y_train=y))
    assert (result.split, result.count) == ("validation", 3)
    for name, X_bad, y_bad in (
        ("wide.npz", rng.normal(size=(30, 7)), y),
        ("bytes.npz", np.ones((30, 6), np.uint8), y),
        ("label.npz", X, np.arange(30) % 2 + 2),
    ):
        path = saved(name, X_train=X_bad, y_train=y_bad)
        with pytest.raises(DataError, match=name):
            runs.evaluate(whole, path)


def test_an_evaluation_of_what_is_not_finished(small, tmp_path):
    runs.start(small, tmp_path / "run", watcher=Stop(iteration=3))
    with pytest.raises(RunError, match=r"not finished.*--resume"):
        runs.evaluate(tmp_path / "run")


def test_a_model_that_no_run_wrote(tmp_path):
    net = gpubn.FullyConnectedNet([3], input_dim=4, seed=0, device="cpu")
    checkpoint.save_model(tmp_path / runs.MODEL, net)
    with pytest.raises(CheckpointError, match="not written by a run"):
        runs.evaluate(tmp_path)
