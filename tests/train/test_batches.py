"""Where samples lie on CUDA, and that nothing of a training depends on it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_cuda import cupy_stand_in
from numpy.typing import NDArray

from gpubn import FullyConnectedNet, Solver, backend
from gpubn.backend import Array, Device, to_host
from gpubn.train import batches, checkpoint
from gpubn.train import run as runs
from gpubn.train.batches import Streamed
from gpubn.train.config import RunConfig

Arrays = dict[str, NDArray[Any]]

ROUTES = ("device", "host")
shuffled = pytest.mark.parametrize("shuffle", [False, True])


@pytest.fixture(autouse=True)
def a_quiet_start() -> None:
    gc.collect()  # what earlier tests left: streams with copies that nobody waited for
    cupy_stand_in.stream_log.clear()


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that decides where training sets will lie on CUDA."""

    def choose(name: str) -> None:
        free = {"device": 2**40, "host": 1000}[name]
        monkeypatch.setattr(batches, "free_memory", lambda device: free)

    return choose


def draw(samples: int = 40) -> Arrays:
    """Return samples of 2 x 2 float64 values in 3 classes; some become subnormal in float32."""
    rng = np.random.default_rng(7)
    data = {}
    for part, count in (("train", samples), ("val", 9)):
        y = np.arange(count) % 3
        X = np.eye(3, 4)[y] * 2 + rng.standard_normal((count, 4))
        X[::3, 3] = 1e-40
        data[f"X_{part}"], data[f"y_{part}"] = X.reshape(-1, 2, 2), y
    return data


class Recorder(FullyConnectedNet):
    """A network that keeps the bytes of the batches that it was trained on."""

    def loss_into(self, X: Array, y: Array, grads: Any) -> Array:
        batch = to_host(X.astype(self.dtype)).copy(), to_host(y).copy()
        self.__dict__.setdefault("seen", []).append([array.tobytes() for array in batch])
        return super().loss_into(X, y, grads)


def make_solver(data: Arrays | None = None, net: Any = None, **changes: Any) -> Solver:
    if net is None:
        net = Recorder([5], 4, 3, 0.75, "batchnorm", seed=8, reproducible=True)
    config: dict[str, Any] = {
        "batch_size": 6,
        "num_epochs": 3,
        "num_train_samples": 10,
        "seed": 1,
        "verbose": False,
        "shuffle": True,
        "update_rule": "adam",
    }
    return Solver(net, draw() if data is None else data, **config | changes)


def all_of(solver: Solver) -> tuple[Any, ...]:
    """Return all that a training leaves, to the bit."""
    return (
        solver.loss_history,
        solver.train_acc_history,
        solver.val_acc_history,
        solver.model.sha256(),
        getattr(solver.model, "seen", None),
        solver.generator.bit_generator.state,
    )


# --- The choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 40 * 4 * 4), (np.uint8, 40 * 4), (np.float16, 40 * 4 * 4)]
)
def test_a_quarter_of_the_free_memory(
    two_devices: None, dtype: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw()
    for part in ("train", "val"):
        data[f"X_{part}"] = abs(data[f"X_{part}"] * 20).astype(dtype)
    total = 4 * (size + 40 * 8)  # floats in the network's dtype, int64 labels
    monkeypatch.setattr(cupy_stand_in.MemoryPool, "total", cupy_stand_in.MemoryPool.used)
    for free, there in ((total, True), (total - 1, False), (1, False)):
        monkeypatch.setattr(cupy_stand_in, "free_memory", free)
        solver = make_solver(data, FullyConnectedNet([5], 4, 3, seed=8, device="cuda"))
        X_val_fits = 4 * (size * 9 // 40 + 9 * 8) <= free
        assert (backend.is_cuda(solver.X_train), backend.is_cuda(solver.X_val)) == (
            there,
            X_val_fits,
        )
        assert solver.placement.startswith("from cuda:0:" if there else "from the host, each")
        assert ("; the validation set stays" in solver.placement) == (not X_val_fits)


def test_what_is_free(two_devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device, pool = backend.resolve("cuda"), cupy_stand_in.MemoryPool
    monkeypatch.setattr(cupy_stand_in, "free_memory", 1000)
    monkeypatch.setattr(pool, "total", 70)
    monkeypatch.setattr(pool, "used", 30)
    assert batches.free_memory(device) == 1040  # what the pool does not use is ours too
    monkeypatch.setattr(pool, "limit", 500)
    assert batches.free_memory(device) == 470
    monkeypatch.setattr(pool, "limit", 5000)
    assert batches.free_memory(device) == 1040


def test_on_the_cpu_nothing_is_decided_or_copied() -> None:
    data = draw()
    solver = make_solver(data, FullyConnectedNet([5], 4, 3, seed=8, device="cpu"))
    for name, array in data.items():
        assert getattr(solver, name) is array
    assert solver.placement == ""


def test_samples_that_are_on_the_device_stay_as_they_are(
    two_devices: None, route: Callable[[str], None]
) -> None:
    route("host")
    device = backend.resolve("cuda")
    data = draw()
    there = {name: device.asarray(array) for name, array in data.items()}
    net = FullyConnectedNet([5], 4, 3, seed=8, device="cuda")
    solver = make_solver(there, net)
    assert solver.X_train is there["X_train"]
    assert solver.X_val is there["X_val"]
    assert solver.placement == ""
    make_solver({**there, "y_train": data["y_train"], "y_val": data["y_val"]}, net).train()


def test_a_model_of_another_kind_gets_its_samples_as_they_are(two_devices: None) -> None:
    class Own(FullyConnectedNet):
        def loss(self, X: Any, y: Any = None) -> Any:
            return super().loss(X, y)

    data = draw()
    solver = make_solver(data, Own([5], 4, 3, seed=8, device="cuda"))
    assert solver.X_train is data["X_train"]
    assert solver.placement == ""
    solver.train()


def test_it_is_told_once(
    device: Device, route: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    route("host")
    solver = make_solver(verbose=True, on_iteration=lambda s: s.iteration == 3 and s.stop())
    solver.train()
    solver.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batches")]
    # 40 samples of 4 float32 and a label of 8 bytes.
    assert lines == [
        "batches from the host, each copied while the step before it runs: the training set takes "
        "1.0 kB, more than a quarter of the 1.0 kB free on cuda:0"
    ] * (device.kind == "cuda")


def test_the_training_set_is_what_a_solver_was_made_with() -> None:
    solver = make_solver(net=FullyConnectedNet([5], 4, 3, seed=8, device="cpu"))
    with pytest.raises(AttributeError, match="X_train"):  # not taken and then left aside
        solver.X_train = np.zeros((40, 4))


# --- The same bits --------------------------------------------------------------------------------


def memory_map(array: NDArray[Any], folder: Path) -> NDArray[Any]:
    np.save(folder / "mapped.npy", array)
    mapped: NDArray[Any] = np.load(folder / "mapped.npy", mmap_mode="r")
    return mapped


def read_only(array: NDArray[Any], folder: Path) -> NDArray[Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS: dict[str, Callable[[NDArray[Any], Path], NDArray[Any]]] = {
    "float64": lambda array, _: array,
    "float32": lambda array, _: array.astype(np.float32),
    "float16": lambda array, _: array.astype(np.float16),
    "bytes of images": lambda array, _: abs(array * 50).astype(np.uint8),
    "large int64": lambda array, _: (array * 2**40).astype(np.int64),
    "read-only": read_only,
    "memory-mapped": memory_map,
    "memory-mapped bytes": lambda array, folder: memory_map((array * 20).astype(np.uint8), folder),
    "Fortran's order": lambda array, _: np.asfortranarray(array),
    "every second row": lambda array, _: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array, _: array[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "the other order of bytes": lambda array, _: array.astype(array.dtype.newbyteorder()),
    "integers in it": lambda array, _: (array * 20).astype(np.dtype(np.int32).newbyteorder()),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whatever_the_samples_are(
    device: Device,
    kind: str,
    route: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "_BLOCK", 7 * 4 * 4)  # seven samples of four float32
    data, left = draw(), []
    X = data["X_train"] = KINDS[kind](data["X_train"], tmp_path)
    for name in ROUTES:
        route(name)
        solver = make_solver(data)
        assert backend.is_cuda(solver.X_train) == (device.kind == "cuda" and name == "device")
        assert solver.X_train.dtype.isnative or not backend.is_cuda(solver.X_train)
        solver.train()
        left.append(all_of(solver))
    assert left[0] == left[1]
    # And they are the samples, as NumPy casts them.
    generator = np.random.default_rng(1)
    order = generator.permutation(40)
    expected = X[order[:6]].astype(np.float32), data["y_train"][order[:6]]
    assert left[0][4][0] == [array.tobytes() for array in expected]


@shuffled
def test_the_same_bits_as_on_the_cpu(
    device: Device, shuffle: bool, route: Callable[[str], None]
) -> None:
    left = []
    for where, name in (("cpu", "device"), (device.name, "device"), (device.name, "host")):
        route(name)
        net = Recorder(
            [5], 4, 3, 0.75, "batchnorm", reg=1e-3, seed=8, device=where, reproducible=True
        )
        solver = make_solver(net=net, shuffle=shuffle)
        states = []
        solver.on_iteration = lambda s, states=states: states.append(
            s.generator.bit_generator.state
        )
        solver.train()
        left.append((*all_of(solver), states))
    assert left[0] == left[1] == left[2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, ">i8"])
def test_labels_of_any_integers(device: Device, dtype: Any, route: Callable[[str], None]) -> None:
    left = []
    for name, cast in (("device", np.int64), ("device", dtype), ("host", dtype)):
        route(name)
        data = draw()
        data["y_train"] = np.repeat(data["y_train"], 2).astype(cast)[::2]
        solver = make_solver(data)
        solver.train()
        left.append(all_of(solver))
    assert left[0] == left[1] == left[2]


def test_labels_that_are_on_the_device(device: Device, route: Callable[[str], None]) -> None:
    left = []
    for name, place in (
        ("device", np.asarray),
        ("device", device.asarray),
        ("host", device.asarray),
    ):
        route(name)
        data = draw()
        for part in ("train", "val"):
            data[f"y_{part}"] = place(data[f"y_{part}"])
        solver = make_solver(data)
        solver.train()
        left.append(all_of(solver))
    assert left[0] == left[1] == left[2]


@pytest.mark.parametrize(("samples", "batch_size"), [(40, 40), (12, 6), (13, 6), (4, 6)])
def test_epochs_of_few_batches(
    device: Device, samples: int, batch_size: int, route: Callable[[str], None]
) -> None:
    for shuffle in (False, True)[: 1 + (samples >= batch_size)]:
        left = []
        for name in ROUTES:
            route(name)
            solver = make_solver(draw(samples), batch_size=batch_size, shuffle=shuffle)
            solver.train()
            left.append(all_of(solver))
        assert left[0] == left[1]


@shuffled
def test_numbers_drawn_between_two_steps(
    device: Device, shuffle: bool, route: Callable[[str], None]
) -> None:
    """What was foreseen is then not what comes."""
    data, left = draw(), []

    def measure(solver: Solver) -> None:
        if solver.iteration % 4 == 2:
            solver.check_accuracy(data["X_train"], data["y_train"], num_samples=5)

    for name in ROUTES:
        route(name)
        solver = make_solver(data, shuffle=shuffle, on_iteration=measure)
        solver.train()
        left.append(all_of(solver))
    assert left[0] == left[1]


# --- Stopped and resumed --------------------------------------------------------------------------


@shuffled
@pytest.mark.parametrize("at", [1, 5, 6, 8])
@pytest.mark.parametrize("begun", ROUTES)
def test_a_checkpoint_does_not_know_the_way(
    device: Device,
    shuffle: bool,
    at: int,
    begun: str,
    route: Callable[[str], None],
    tmp_path: Path,
) -> None:
    route("device")
    whole = make_solver(shuffle=shuffle)
    whole.train()

    def stop(solver: Solver) -> None:
        if solver.iteration == at:
            solver.stop()

    route(begun)
    first = make_solver(shuffle=shuffle, on_iteration=stop)
    first.train()
    checkpoint.save(tmp_path / "one.safetensors", first)
    route({"device": "host", "host": "device"}[begun])
    second = make_solver(shuffle=shuffle)
    checkpoint.resume(tmp_path / "one.safetensors", second)
    second.train()
    first.on_iteration = None
    first.train()  # the one that was stopped may go on, too
    for solver in (first, second):
        assert solver.loss_history == whole.loss_history
        assert solver.model.sha256() == whole.model.sha256()
        assert solver.generator.bit_generator.state == whole.generator.bit_generator.state
    assert first.model.seen == first.model.seen[:at] + second.model.seen == whole.model.seen


class Killed(BaseException):
    """Ends a run where no code of its own could catch it."""


class KillAt(runs.Watcher):
    """Kills a run in its second epoch."""

    def iteration(self, run: runs.Run) -> None:
        if run.solver.iteration == run.solver.iterations_per_epoch + 2:
            raise Killed


def test_a_run_that_was_killed(
    two_devices: None, route: Callable[[str], None], tmp_path: Path
) -> None:
    config = RunConfig(hidden=(8,), batch_size=200, epochs=3, reproducible=True, device="cpu")
    whole = runs.start(config, tmp_path / "whole")
    route("host")
    with pytest.raises(Killed):
        runs.start(
            RunConfig(**{**config.as_dict(), "device": "cuda"}), tmp_path / "run", watcher=KillAt()
        )
    assert cupy_stand_in.pending_copies() == 0
    run = runs.resume(tmp_path / "run")
    assert isinstance(run.solver._batches, Streamed)
    assert run.net.sha256() == whole.net.sha256()
    models = [(tmp_path / name / runs.MODEL).read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]
    assert run.test == whole.test


# --- What a step copies and waits for -------------------------------------------------------------


def count(solver: Solver, steps: int) -> tuple[float, int, int]:
    """Return a step's copies to the device, and all steps' copies to the host and waits."""
    stand_in = cupy_stand_in
    before = (
        stand_in.host_to_device_copies,
        stand_in.device_to_host_copies,
        stand_in.synchronisations,
    )
    for _ in range(steps):
        solver._step()
    after = (
        stand_in.host_to_device_copies,
        stand_in.device_to_host_copies,
        stand_in.synchronisations,
    )
    up, down, waits = (b - a for a, b in zip(before, after, strict=True))
    return up / steps, down, waits


def plain(data: Arrays | None = None, **changes: Any) -> Solver:
    net = FullyConnectedNet([5], 4, 3, 0.75, "batchnorm", reg=0.1, seed=8, device="cuda")
    return make_solver(data, net, **changes)


@shuffled
def test_copies_of_a_step(two_devices: None, shuffle: bool, route: Callable[[str], None]) -> None:
    # There: the indices of the batch. From the host: samples and labels; six steps are an epoch,
    # and send six batches.
    for name, expected in (("device", 1), ("host", 2)):
        route(name)
        assert count(plain(shuffle=shuffle), 6) == (expected, 0, 0)


def test_the_next_batch_is_on_its_way_when_a_step_ends(
    two_devices: None, route: Callable[[str], None]
) -> None:
    route("host")
    under_way = []
    solver = plain(on_iteration=lambda s: under_way.append(cupy_stand_in.pending_copies() > 0))
    waits = cupy_stand_in.synchronisations
    solver.train()
    assert cupy_stand_in.synchronisations == waits  # the copy stream is waited for, and no more
    # Six steps an epoch: the first of the next is known only when its order is drawn.
    assert under_way == [True, True, True, True, True, False] * 3
    assert cupy_stand_in.pending_copies() == 0


class Watched(np.ndarray):
    """Samples that log when they are gathered, which is when pinned memory is written."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray):
            cupy_stand_in.stream_log.append(("gather", None, None))
        return super().__getitem__(key)


class Stepping(FullyConnectedNet):
    """A network that logs when a step has read its batch."""

    def loss_into(self, X: Array, y: Array, grads: Any) -> Array:
        loss = super().loss_into(X, y, grads)
        for array in (X, y):
            cupy_stand_in.stream_log.append(("read", None, array.data.ptr))
        return loss


def test_no_copy_overtakes_what_still_needs_its_place(
    two_devices: None, route: Callable[[str], None]
) -> None:
    """A copy goes over a batch that was read, and pinned memory is written after it was copied.

    On the stand-in kernels are done at once, so this cannot show in what they compute.
    """
    route("host")
    data = draw()
    data["X_train"] = data["X_train"].astype(np.float32).view(Watched)
    solver = make_solver(data, Stepping([5], 4, 3, seed=8, device="cuda"), num_train_samples=None)
    log = cupy_stand_in.stream_log
    log.clear()
    solver.train()
    last_read: dict[int, int] = {}  # address on the device: place in the log
    last_copy: dict[int, int] = {}
    recorded: dict[Any, int] = {}
    # For the copy stream and the host: up to where in the log each has waited for the other two.
    kernels_done, copies_done, gathered_knowing = -1, -1, -1
    copies = 0
    for at, (what, stream, value) in enumerate(log):
        own = stream is not None and stream.ptr != 0
        if what == "record":
            recorded[value] = at
        elif what == "wait" and own:
            kernels_done = max(kernels_done, recorded.get(value, -1))
        elif what == "synchronize":
            copies_done = max(copies_done, recorded.get(value, -1))
        elif what == "gather":
            gathered_knowing = copies_done
        elif what == "read":
            last_read[value] = at
        elif what == "copy":
            assert own, "batches are copied on a stream of their own"
            assert last_read.get(value, -1) <= kernels_done
            assert last_copy.get(value, -1) <= gathered_knowing
            last_copy[value] = at
            copies += 1
    assert copies == 2 * solver.num_iterations
    assert len(last_copy) == 4  # two places for samples, two for labels
    assert set(last_read) == set(last_copy)


def test_a_place_waits_for_what_its_memory_was_before(
    two_devices: None, route: Callable[[str], None]
) -> None:
    route("host")
    log = cupy_stand_in.stream_log
    solver = plain()
    # Kernels may still read the array whose memory it was: both are recorded when it is taken.
    assert [(what, stream.ptr) for what, stream, _ in log] == [("record", 0)] * 2
    events = {event for _, _, event in log}
    solver._step()
    waited = {value for what, stream, value in log if what == "wait" and stream.ptr != 0}
    assert waited == events


# --- Failures -------------------------------------------------------------------------------------


class Failing(Recorder):
    """A network whose step fails once."""

    at = 3

    def loss_into(self, X: Array, y: Array, grads: Any) -> Array:
        if self.step == self.at:
            raise KeyboardInterrupt
        return super().loss_into(X, y, grads)


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_step_that_fails_leaves_nothing_behind(
    two_devices: None, at: int, route: Callable[[str], None]
) -> None:
    route("host")
    net = Failing([5], 4, 3, seed=8, device="cuda")
    net.at = at
    solver = make_solver(net=net)
    with pytest.raises(KeyboardInterrupt):
        solver.train()
    assert cupy_stand_in.pending_copies() == 0
    with pytest.raises(RuntimeError, match="interrupted in the middle of an iteration"):
        solver.train()
    # And batches are right again.
    net.at = -1
    solver._step()
    generator = np.random.default_rng(1)
    order = generator.permutation(40)
    if at == 0:  # an epoch's first: its order is drawn again
        order = generator.permutation(40)
    chosen = order[6 * at : 6 * at + 6]
    assert net.seen[-1][1] == draw()["y_train"][chosen].tobytes()


def test_a_callback_that_fails_leaves_nothing_behind(
    two_devices: None, route: Callable[[str], None]
) -> None:
    def fail(solver: Solver) -> None:
        if solver.iteration == 4:
            assert cupy_stand_in.pending_copies() > 0
            raise KeyboardInterrupt

    route("host")
    with pytest.raises(KeyboardInterrupt):
        plain(on_iteration=fail).train()
    assert cupy_stand_in.pending_copies() == 0


def test_samples_that_cannot_be_read(two_devices: None) -> None:
    class Torn(np.ndarray):
        """A file on a disk that fails now and then."""

        fails = False

        def __getitem__(self, key: Any) -> Any:
            if Torn.fails:
                raise OSError("Input/output error")
            return super().__getitem__(key)

    data = draw()
    X = data["X_train"].astype(np.float32).view(Torn)
    device = backend.resolve("cuda")
    source = Streamed(X, data["y_train"], 2, np.dtype(np.float32), device)
    one, other = np.array([3, 4]), np.array([7, 8])
    source.take(one)
    Torn.fails = True
    with pytest.raises(OSError, match="Input/output error"):
        source.step_launched(other)
    Torn.fails = False
    X_batch, y_batch = source.take(other)  # not what was left in its place
    np.testing.assert_array_equal(to_host(X_batch), data["X_train"][other].astype(np.float32))
    np.testing.assert_array_equal(to_host(y_batch), data["y_train"][other])


def test_a_copy_that_fails_half_way(two_devices: None) -> None:
    data, device = draw(), backend.resolve("cuda")
    source = Streamed(data["X_train"], data["y_train"], 2, np.dtype(np.float32), device)
    one, other = np.array([3, 4]), np.array([7, 8])
    source.take(one)
    (slot, _), labels = source._slots, source._slots[0].device[1]
    slot.device[1] = None
    with pytest.raises(AttributeError, match="set"):
        source.take(other)  # its samples have been copied
    slot.device[1] = labels
    source.settle()
    X, _ = source.take(one)
    np.testing.assert_array_equal(to_host(X), data["X_train"][one].astype(np.float32))


def test_a_batch_that_no_step_ended_gives_way(two_devices: None) -> None:
    data, device = draw(), backend.resolve("cuda")
    source = Streamed(data["X_train"], data["y_train"], 2, np.dtype(np.float32), device)
    log = cupy_stand_in.stream_log
    for chosen in np.arange(10).reshape(5, 2):
        log.clear()
        _, y = source.take(chosen)
        assert to_host(y).tolist() == data["y_train"][chosen].tolist()
        # Kernels of the step before, which failed, may still be reading.
        (record,) = (i for i, entry in enumerate(log) if entry[:2] == ("record", log[0][1]))
        copies = [i for i, entry in enumerate(log) if entry[0] == "copy"]
        assert record < min(copies)
        assert log[record][1].ptr == 0


def test_what_is_dropped_waits_for_its_copies(two_devices: None) -> None:
    """Else its memory would be another array's while they are still writing to it."""
    data, device = draw(), backend.resolve("cuda")
    source = Streamed(data["X_train"], data["y_train"], 2, np.dtype(np.float32), device)
    source.take(np.array([0, 1]))
    source.step_launched(np.array([2, 3]))
    stream = source._stream
    assert not stream.done
    del source
    gc.collect()
    assert stream.done
