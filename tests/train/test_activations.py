"""What ``gpubn train --histograms`` and ``--tensorboard`` keep, in a resumed run too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpubn import FullyConnectedNet
from gpubn.backend import Device, to_host
from gpubn.train import run as runs
from gpubn.train.activations import BINS, KINDS, Activations, Record, rebinned
from gpubn.train.config import RunConfig


def test_a_record() -> None:
    values = np.array([0.0, 1.0, 1.0, 4.0, np.inf, np.nan], np.float32)
    record = Record.of(values)
    assert (record.mean, record.low, record.high) == (1.5, 0, 4)
    assert record.deviation == pytest.approx(np.std([0, 1, 1, 4]))
    assert record.counts.sum() == 4
    assert record.counts[[0, 16, -1]].tolist() == [1, 2, 1]
    assert np.isnan(Record.of(np.array([np.inf])).mean)
    constant = Record.of(np.full(3, 7.0))
    assert (constant.low, constant.high, constant.counts.sum()) == (7, 7, 3)


@pytest.mark.parametrize(
    "values",
    [[1e15, 1e15], [1, np.nextafter(1, 2)], [0, 5e-324], [-1.7e308, 1.7e308], [1e160, -1e160]],
    ids=str,
)
def test_a_record_of_what_no_bins_fit(values: list[float]) -> None:
    record = Record.of(np.array(values))
    assert (record.low, record.high) == (min(values), max(values))
    assert record.counts.sum() == 2


def test_rebinned() -> None:
    counts = np.array([4, 0, 0, 4])
    np.testing.assert_allclose(rebinned(counts, 0, 4, np.array([0.0, 1, 2, 4])), [0.5, 0, 0.5])
    np.testing.assert_allclose(rebinned(counts, 0, 4, np.array([-1.0, 0, 0.5])), [0, 0.25])


def test_what_is_seen_of_a_step(device: Device) -> None:
    rng = np.random.default_rng(2)
    X, y = rng.standard_normal((6, 4)).astype(np.float32), np.arange(6) % 3
    net = FullyConnectedNet(
        [5], 4, 3, 0.5, normalization="batchnorm", seed=1, weight_scale=0.5, device=device.name
    )
    seen = Activations(net.layers, 300)
    assert seen.names == ["affine 1", "batchnorm relu 1", "dropout 1", "affine 2"]
    seen.before(1)
    _, grads = net.loss(X, y)
    assert seen.after(1)
    seen.before(2)
    net.loss(X, y)
    assert not seen.after(2)
    seen.before(3)
    net.loss(X, y)
    assert seen.after(3)
    assert seen.iterations == [1, 3]
    arrays = seen.arrays()
    assert arrays["counts"].shape == (2, len(KINDS), 4, BINS)
    outputs = X @ to_host(net.params["W1"]) + to_host(net.params["b1"])
    assert arrays["mean"][0, 0, 0] == pytest.approx(outputs.mean(), rel=1e-4)
    assert arrays["deviation"][0, 0, 0] == pytest.approx(outputs.std(), rel=1e-4)
    assert arrays["low"][0, 0, 1] == 0  # behind the ReLU
    assert arrays["counts"][0, 0].sum(axis=-1).tolist() == [30, 30, 30, 18]
    # The bias's gradient is the sum of that of the output.
    assert arrays["mean"][0, 1, 3] == pytest.approx(
        float(to_host(grads["b2"]).sum()) / 18, abs=1e-7
    )
    again = Activations(net.layers, 300)
    again.load(arrays)
    assert again.as_npz() == seen.as_npz()
    assert seen.draw("title").startswith(b"\x89PNG")


def test_training_is_the_same_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"hidden": (8, 8), "epochs": 3, "device": "cpu", "reproducible": False}
    plain = runs.start(RunConfig(**config), tmp_path / "plain")
    watched = runs.start(RunConfig(**config, histograms=True), tmp_path / "watched")
    assert watched.net.sha256() == plain.net.sha256()
    with np.load(tmp_path / "watched" / "activations.npz") as file:
        assert file["layers"].tolist()[:2] == ["affine 1", "batchnorm relu 1"]
        assert len(file["iterations"]) == pytest.approx(100, rel=0.5)
    assert watched.files[-2:] == ("activations.npz", "activations.png")
    assert plain.files == runs.FILES

    class Stop(runs.Watcher):
        def iteration(self, run: runs.Run) -> None:
            if run.solver.iteration == 30:
                run.stop()

    runs.start(RunConfig(**config, histograms=True), tmp_path / "cut", watcher=Stop())
    runs.resume(tmp_path / "cut")
    for name in ("activations.npz", "activations.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()


def test_a_run_that_was_stopped_before_its_first_iteration(tmp_path: Path) -> None:
    config = RunConfig(hidden=(8,), epochs=1, device="cpu", histograms=True, reproducible=False)

    class Stop(runs.Watcher):
        def begin(self, run: runs.Run) -> None:
            run.stop()

    runs.start(config, tmp_path / "run", watcher=Stop())
    run = runs.resume(tmp_path / "run")
    assert run.finished
    assert run.activations is not None
    assert run.activations.iterations[0] == 1
    assert all(layer.observer is None for layer in run.net.layers)


def test_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    config = RunConfig(
        hidden=(8,), epochs=2, device="cpu", histograms=True, tensorboard=True, reproducible=False
    )
    run = runs.start(config, tmp_path / "run")
    tags = events(tmp_path / "run" / "tensorboard")
    assert {"loss/training", "accuracy/validation", "output/affine 1", "gradient/affine 2"} <= set(
        tags
    )
    losses = [row[3] for row in run.metrics()]
    assert tags["loss/training"] == pytest.approx(losses, rel=1e-6)


def events(folder: Path) -> dict[str, list[float]]:
    """Read event files: records of a length, its checksum, the bytes, and theirs."""
    from tensorboardX.proto.event_pb2 import Event

    tags: dict[str, list[float]] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(value.simple_value)
            at += 16 + size
    return tags
