"""gpubn experiment: what is trained, what is written, and what an interruption leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpubn import backend, cli
from gpubn.experiments import EXPERIMENTS, ExperimentError, Plan, Training, run
from gpubn.experiments.definitions import Experiment, decades_that_train
from gpubn.experiments.figures import MEASURES, draw
from gpubn.experiments.results import COLUMNS, Outcome, Results
from gpubn.experiments.running import OUTCOMES, prepare, train
from gpubn.train import load_data

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*names: str, **options: object) -> Plan:
    return Plan.of(names, **{"quick": True, "device": "cpu", **options})


class Count:
    def __init__(self) -> None:
        self.done = self.total = self.trained_now = 0

    def begin(self, done, total, device, data) -> None:
        self.done, self.total = done, total

    def trained(self, experiment, outcome) -> None:
        self.trained_now += 1


# --- What is trained ------------------------------------------------------------------------------


def settings(name: str) -> list[Training]:
    return EXPERIMENTS[name].of_seeds(1, quick=False)


def test_networks_are_those_of_the_notebooks() -> None:
    ours, none = settings("batchnorm")
    assert ours == replace(none, series=ours.series, normalization="batchnorm")
    assert none == Training(none.series, (100,) * 5, None, 1.0, 2e-2, "adam", 1e-3, 10, 50, 1000)
    scales = settings("weight-scale")
    assert len(scales) == 40
    assert {training.hidden_dims for training in scales} == {(50,) * 7}
    np.testing.assert_allclose(
        sorted({training.weight_scale for training in scales}), np.logspace(-4, 0, 20)
    )
    for name, norm in (("batch-size", "batchnorm"), ("layernorm", "layernorm")):
        found = [(t.normalization, t.batch_size) for t in settings(name)]
        assert found == [(None, 5), (norm, 5), (norm, 10), (norm, 50)]
        assert {t.learning_rate for t in settings(name)} == {10**-3.5}
    dropout = settings("dropout")
    assert [t.dropout_keep_ratio for t in dropout] == [1, 0.25]
    assert {(t.hidden_dims, t.num_epochs, t.batch_size, t.images) for t in dropout} == {
        ((500,), 25, 100, 500)
    }
    rates = {t.update_rule: t.learning_rate for t in settings("update-rules")}
    assert rates == {"sgd": 5e-3, "sgd_momentum": 5e-3, "adam": 1e-3, "rmsprop": 1e-4}


def test_a_training_is_a_plain_networks() -> None:
    from gpubn import FullyConnectedNet, Solver

    data = prepare(load_data("digits"), 200)
    training = Training("x", (8, 8), "batchnorm", num_epochs=2, images=200, seed=5)
    outcome = train(training, data, "cpu")
    net = FullyConnectedNet(
        [8, 8], 64, 10, normalization="batchnorm", weight_scale=2e-2, seed=5, device="cpu"
    )
    solver = Solver(
        net,
        data,
        update_rule="adam",
        optim_config={"learning_rate": 1e-3},
        num_epochs=2,
        batch_size=50,
        verbose=False,
        seed=5,
    )
    solver.train()
    assert outcome.losses == solver.loss_history
    assert outcome.val_accuracies == solver.val_acc_history
    assert outcome.diverged is None


def test_one_that_diverges_is_an_outcome() -> None:
    data = prepare(load_data("digits"), 100)
    training = Training(
        "x", (8,), update_rule="sgd", learning_rate=1e30, num_epochs=3, batch_size=10, images=100
    )
    outcome = train(training, data, "cpu")
    assert outcome.diverged is not None
    assert len(outcome.losses) == outcome.diverged - 1
    assert np.isfinite(outcome.losses).all()
    assert outcome.measure("final_loss") == float("inf")
    assert outcome.val_accuracies


# --- A whole experiment ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real experiment, by the command."""
    folder = tmp_path_factory.mktemp("experiments") / "ws"
    assert cli.main(["experiment", "weight-scale", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_batch_norm_trains_over_two_decades_more(weight_scale: Path) -> None:
    # From the table alone, with a threshold of its own: half of all training images right.
    best: dict[tuple[str, float], float] = {}
    for row in read(weight_scale / "weight-scale.csv"):
        if row["measure"] == "train_accuracy":
            key = row["series"], float(row["weight_scale"])
            best[key] = max(best.get(key, 0), float(row["value"]))
    step = 4 / 19
    decades = {
        series: step * sum(value > 0.5 for (name, _), value in best.items() if name == series)
        for series in ("batch norm", "no norm")
    }
    assert decades["batch norm"] >= decades["no norm"] + 2


def test_what_an_experiment_writes(weight_scale: Path) -> None:
    rows = read(weight_scale / "weight-scale.csv")
    assert tuple(rows[0]) == COLUMNS
    # 40 trainings of 200 iterations and 11 pairs of accuracies
    assert len(rows) == 40 * (200 + 22)
    assert (weight_scale / "weight-scale.png").read_bytes().startswith(b"\x89PNG")
    page = (weight_scale / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)  # nothing is fetched
    finding = re.search(r'class="finding">(.*?)<', page)[1]
    assert re.search(r"over \d\.\d with batch norm and over \d\.\d without", finding)


def test_a_second_time_nothing_is_trained(weight_scale: Path) -> None:
    count = Count()
    run(Plan.of(["weight-scale"], device="cpu"), weight_scale, count)
    assert (count.done, count.total, count.trained_now) == (40, 40, 0)


def test_other_data_are_another_training(weight_scale: Path, tmp_path: Path) -> None:
    digits = load_data("digits")
    np.savez("mine.npz", **{k: v[: len(v) // 2] for k, v in digits.as_dict().items()})
    count = Count()
    with pytest.raises(InterruptedError):
        run(plan("weight-scale", data="mine.npz", quick=False), weight_scale, _Stop(count, 0))
    assert count.done == 0


class _Stop:
    """Ends a run after some trainings."""

    def __init__(self, count: Count, after: int) -> None:
        self.count, self.after = count, after

    def begin(self, *arguments: object) -> None:
        self.count.begin(*arguments)
        if self.after == 0:
            raise InterruptedError

    def trained(self, *arguments: object) -> None:
        self.count.trained(*arguments)
        if self.count.trained_now == self.after:
            raise InterruptedError


@pytest.mark.parametrize("jobs", [1, 2])
def test_it_goes_on_where_it_was_interrupted(jobs: int) -> None:
    whole = run(plan("dropout"), Path("whole"))
    first, second = Count(), Count()
    with pytest.raises(InterruptedError):
        run(plan("dropout", jobs=jobs), Path("cut"), _Stop(first, 1))
    (kept,) = Path("cut", OUTCOMES).glob("*.json")
    before = kept.read_bytes()
    resumed = run(plan("dropout", jobs=jobs), Path("cut"), second)
    assert (second.done, second.trained_now) == (1, 1)
    assert kept.read_bytes() == before
    for a, b in zip(whole["dropout"].outcomes, resumed["dropout"].outcomes, strict=True):
        assert a.losses == pytest.approx(b.losses)  # a BLAS of fewer threads may round otherwise
        assert a.training == b.training


def test_a_damaged_outcome_is_trained_anew() -> None:
    run(plan("dropout"), Path("out"))
    paths = sorted(Path("out", OUTCOMES).glob("*.json"))
    whole = [path.read_text("utf-8") for path in paths]
    paths[0].write_text(whole[0][:100])
    paths[1].write_text("{}")
    count = Count()
    run(plan("dropout"), Path("out"), count)
    assert (count.done, count.trained_now) == (0, 2)
    losses = [json.loads(path.read_text("utf-8"))["losses"] for path in paths]
    assert losses == [json.loads(text)["losses"] for text in whole]


def test_experiments_share_trainings() -> None:
    count = Count()
    plans = plan("batch-size", "layernorm")
    assert len(plans.trainings) == 8
    with pytest.raises(InterruptedError):
        run(plans, Path("out"), _Stop(count, 0))
    assert count.total == 7


# --- Findings and figures -------------------------------------------------------------------------


def outcome(training: Training, train_accuracy: float, val_accuracy: float) -> Outcome:
    steps = training.num_epochs
    return Outcome(
        training,
        [2.0 / (i + 1) for i in range(10 * steps)],
        [0.1] + [train_accuracy] * steps,
        [0.1] + [val_accuracy] * steps,
        None,
        1.0,
        "cpu",
    )


def test_findings_follow_from_the_results() -> None:
    experiment = EXPERIMENTS["batchnorm"]
    trainings = experiment.of_seeds(1, quick=True)
    good = [outcome(t, 0.9 if t.normalization else 0.4, 0.5) for t in trainings]
    bad = [outcome(t, 0.3 if t.normalization else 0.4, 0.5) for t in trainings]
    assert "with 90.0% of its training images right, without any norm with 40.0%" in (
        experiment.finding(Results(good, 0.1))
    )
    assert "reached what the other ended with by epoch 1" in experiment.finding(Results(good, 0.1))
    same = [outcome(t, 1.0, 0.5) for t in trainings]
    assert "reached what the other ended with by epoch 1" in experiment.finding(Results(same, 0.1))
    assert "did not reach" in experiment.finding(Results(bad, 0.1))


def test_decades_are_counted_by_what_trains() -> None:
    trainings = EXPERIMENTS["weight-scale"].of_seeds(1, quick=True)
    found = [
        outcome(t, 0.9 if t.normalization or 0.009 < t.weight_scale < 0.2 else 0.1, 0.5)
        for t in trainings
    ]
    results = Results(found, 0.1)
    assert decades_that_train(results, "batch norm") == pytest.approx(4)
    assert decades_that_train(results, "no norm") == pytest.approx(1.5)  # 0.01, 0.0316 and 0.1


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_experiment_has_a_sentence_and_figures(name: str, seeds: int) -> None:
    experiment = EXPERIMENTS[name]
    trainings = experiment.of_seeds(seeds, quick=True)
    results = Results([outcome(t, 0.5 + 0.1 * t.seed, 0.4) for t in trainings], 0.1)
    assert experiment.finding(results).endswith(".")
    for figure in experiment.figures:
        assert set(figure.measures) <= set(MEASURES)
        assert draw(experiment, figure, results, "digits").startswith(b"\x89PNG")


def test_what_diverged_is_drawn_as_far_as_it_went() -> None:
    trainings = EXPERIMENTS["batchnorm"].of_seeds(1, quick=True)
    cut = replace(outcome(trainings[0], 0.5, 0.5), diverged=3)
    cut = replace(
        cut, losses=[2.0, 1e30], train_accuracies=[0.1], val_accuracies=[0.1]
    )
    results = Results([cut, outcome(trainings[1], 0.5, 0.5)], 0.1)
    assert np.isnan(results.history("batch norm", "loss")[0, 2:]).all()
    assert results.history("batch norm", "val_accuracy").tolist() == [[0.1]]
    experiment: Experiment = EXPERIMENTS["batchnorm"]
    assert draw(experiment, experiment.figures[0], results, "x").startswith(b"\x89PNG")


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiment nothing", "no experiment 'nothing', expected all or some of batchnorm"),
        ("experiment", "the following arguments are required: NAME"),
        ("experiment dropout --seeds 0", "seeds is 0, expected at least 1"),
        ("experiment dropout --jobs 0", "jobs is 0, expected at least 1"),
        ("experiment dropout --data nowhere.npz", "nowhere.npz is missing"),
        ("experiment dropout --out ''", "--out is empty"),
        ("experiment dropout --device tpu", "device"),
    ],
)
def test_refused_in_one_line(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(shlex.split(line)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_plans_name_their_folder() -> None:
    assert plan("all").folder == Path("experiments/all-digits-quick")
    assert Plan.of(["dropout"], data="mnist:some/where/MNIST").folder == Path(
        "experiments/dropout-MNIST"
    )
    assert [e.name for e in plan("all", "dropout").experiments] == list(EXPERIMENTS)
    with pytest.raises(ExperimentError, match="expected all or some of"):
        plan("batch norm")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpubn", "experiment", "all", "--device", "cpu", "--out", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(f"{OUTCOMES}/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "what is trained is kept in out; the same command goes on from there" in out
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path: Path, signum: int) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gpubn", "experiment", "all", "--device", "cpu"),
            *("--jobs", "2", "--out", "out"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(f"{OUTCOMES}/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    process.communicate(timeout=20)  # the pipe stays open while a child of it lives
    assert process.returncode != 0


def test_a_title_is_no_formula() -> None:
    trainings = EXPERIMENTS["batchnorm"].of_seeds(1, quick=True)
    results = Results([outcome(t, 0.5, 0.5) for t in trainings], 0.1)
    experiment = EXPERIMENTS["batchnorm"]
    assert draw(experiment, experiment.figures[0], results, "/d/$a__b$/x.npz")


def test_devices_give_the_same_training(device: backend.Device) -> None:
    data = prepare(load_data("digits"), 60)
    training = Training("x", (6,), "batchnorm", num_epochs=1, batch_size=20, images=60)
    here, there = train(training, data, "cpu"), train(training, data, device.name)
    assert here.losses == pytest.approx(there.losses, rel=1e-4)
    assert there.device == device.name
