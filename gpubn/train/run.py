"""A training run in a folder: begun from a ``RunConfig``, killed at will, resumed, evaluated.

The folder holds

- ``config.toml``: every hyper-parameter; it is written first, and is enough to begin again;
- ``checkpoint.safetensors``: all that training needs to go on, replaced after every epoch;
- ``metrics.csv``: a row for the first iteration and for every epoch;
- ``model.safetensors``: the parameters of the best validation accuracy, and the preprocessing;
- ``curves.png``: loss and accuracies;
- with ``histograms``, ``activations.npz`` and ``activations.png``: what layers put out, and its
  gradients, over training;
- with ``tensorboard``, a folder ``tensorboard`` of events.

What is in all but the first two follows from the checkpoint alone, events apart, so that a run may
be killed at any moment: resumed, it ends with the weights, bit for bit, that it would have had.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubn import backend
from gpubn.layers import softmax_loss
from gpubn.nn import files
from gpubn.train import checkpoint
from gpubn.train.activations import Activations
from gpubn.train.checkpoint import CheckpointError
from gpubn.train.config import RunConfig
from gpubn.train.data import DataError, Preprocessing
from gpubn.train.data import load as load_data
from gpubn.train.memory import Meter, Peak
from gpubn.train.net import FullyConnectedNet
from gpubn.train.solver import Solver
from gpubn.train.tensorboard import Events

CONFIG, CHECKPOINT, METRICS = "config.toml", "checkpoint.safetensors", "metrics.csv"
MODEL, CURVES = "model.safetensors", "curves.png"
FILES = (CONFIG, CHECKPOINT, METRICS, MODEL, CURVES)
"""The files of a finished run."""

EXTRA_FILES = (ACTIVATIONS, PICTURE) = ("activations.npz", "activations.png")
"""Those that it has beside them with ``histograms``."""

EVENTS = "tensorboard"
"""The folder of events."""

NUM_TRAIN_SAMPLES = 1000
"""Training samples that an epoch's training accuracy is measured on."""

METRICS_COLUMNS = (
    "epoch",
    "iteration",
    "learning_rate",
    "loss",
    "train_accuracy",
    "val_accuracy",
    "seconds",
    "peak_memory_bytes",
)

_ACTIVATIONS_PREFIX = "activations."  # of their arrays' names in a checkpoint

NOT_REPEATED = ("seconds", "peak_memory_bytes")
"""Columns of metrics.csv that are of the machine, and of the process that computed an epoch: they
differ between two runs that are equal in all else, and after a run was resumed."""

_MAY_CHANGE = ("epochs", "device", "data")
"""What of a configuration a resumed run may have otherwise; data may have moved, not changed."""


class RunError(ValueError):
    """A run that cannot be begun, resumed or evaluated. The message says why, in one line."""


class MissingDependency(ImportError):
    """A package is needed that only the extra ``train`` installs."""


# --- A run ----------------------------------------------------------------------------------------


class Watcher:
    """What a run calls on its way. The methods do nothing: override those that you need."""

    def begin(self, run: Run) -> None:
        """Hear that all is ready, and the first iteration comes next."""

    def iteration(self, run: Run) -> None:
        """Hear that an iteration is done."""

    def epoch(self, run: Run) -> None:
        """Hear that an epoch is done, and saved."""


@dataclass(frozen=True)
class Evaluation:
    """How a network does on images that it was not trained on.

    Attributes
    ----------
    data, split : str
        Which data, and which part of them: ``"test"`` or ``"validation"``.
    count : int
        Number of images.
    accuracy : float
        Share of images whose highest score is their label's.
    loss : float
        Mean cross entropy, without the L2 penalty.
    class_counts : tuple of int
        Images of each class.
    class_right : tuple of int
        Those of them that were recognised.
    sha256 : str
        Of the network's weights: ``FullyConnectedNet.sha256``.
    """

    data: str
    split: str
    count: int
    accuracy: float
    loss: float
    class_counts: tuple[int, ...]
    class_right: tuple[int, ...]
    sha256: str


class Run:
    """One training run. ``start`` and ``resume`` make it, and return it when it ends.

    Attributes
    ----------
    config : RunConfig
        As in config.toml.
    folder : Path
    dataset : Dataset
    preprocessing : Preprocessing
    net : FullyConnectedNet
        At the end, with the parameters of the best validation accuracy.
    solver : Solver
    resumed : bool
        Whether this is a run that was begun earlier.
    finished : bool
        Whether all epochs are done and all files written; False after ``stop``.
    test : Evaluation or None
        On the test set, once finished; None where the data have none.
    activations : Activations or None
        What layers put out, where ``config.histograms`` asks for it.
    peak_memory : Peak
        Of this process, or of its GPU's memory, so far: see ``gpubn.train.memory.Meter``.
    """

    def __init__(
        self, config: RunConfig, *, device: str | None = None, data: str | None = None
    ) -> None:
        self.config = config
        self.folder = Path()
        self.resumed = self.finished = False
        self.test: Evaluation | None = None
        self._stop_asked = False
        self._seconds: list[float] = []  # for each row of metrics.csv
        self._peaks: list[int | None] = []  # likewise, in bytes
        self._elapsed = 0.0  # seconds of training before this process
        self._clock = time.monotonic()
        self._watcher = Watcher()
        self._events: Events | None = None

        if config.tensorboard:
            require("tensorboardX", extra="tensorboard")
        name = device or config.device
        try:
            _place(name)  # a device that is none is no fault of the data
            self.dataset = load_data(data or config.data)
            self._data_digest = self.dataset.digest()
            self.preprocessing = Preprocessing.fit(self.dataset.X_train, self.dataset.max_value)
            self.net = FullyConnectedNet(
                config.hidden,
                self.dataset.input_dim,
                self.dataset.num_classes,
                config.dropout_keep_ratio,
                None if config.normalization == "none" else config.normalization,
                config.reg,
                config.weight_scale,
                config.dtype,
                config.seed,
                name,
                config.reproducible,
            )
            self._meter = Meter(self.net.device)
            self.solver = Solver(
                self.net,
                {
                    "X_train": self._input(self.dataset.X_train),
                    "y_train": self.dataset.y_train,
                    "X_val": self._input(self.dataset.X_val),
                    "y_val": self.dataset.y_val,
                },
                update_rule=config.update_rule,
                optim_config={"learning_rate": config.learning_rate},
                lr_decay=config.lr_decay,
                batch_size=config.batch_size,
                num_epochs=config.epochs,
                num_train_samples=NUM_TRAIN_SAMPLES,
                verbose=False,
                shuffle=True,
                seed=_shuffle_seed(config.seed),
                on_iteration=self._after_iteration,
                on_epoch=self._after_epoch,
            )
        except DataError:
            raise
        except (ValueError, TypeError) as error:  # an argument's: nothing has been computed yet
            raise RunError(str(error)) from error
        self.activations = (
            Activations(self.net.layers, self.solver.num_iterations) if config.histograms else None
        )
        # Losses come to the host this often: often enough to watch, seldom enough not to wait for.
        self.solver.print_every = max(10, self.solver.iterations_per_epoch // 20)

    def stop(self) -> None:
        """Let the run save a checkpoint and return once the iteration under way is done."""
        self._stop_asked = True
        self.solver.stop()

    @property
    def peak_memory(self) -> Peak:
        """The most memory that was held so far."""
        return self._meter.read()

    def metrics(self) -> list[tuple[Any, ...]]:
        """Return the rows of metrics.csv so far, of ``METRICS_COLUMNS``.

        A row's loss is the mean over the epoch's iterations, and its memory the peak, until the
        epoch's end, of the process that computed it; None where that is not known. The first row is
        of the first iteration, as epoch 0, unless one iteration is an epoch.
        """
        solver, rows = self.solver, []
        losses, per_epoch = solver.loss_history, solver.iterations_per_epoch
        rate = self.config.learning_rate
        epoch = solver.epoch - len(solver.val_acc_history)
        for train, val, seconds, peak in zip(
            solver.train_acc_history,
            solver.val_acc_history,
            self._seconds,
            self._peaks,
            strict=True,
        ):
            epoch += 1
            if epoch == 0:
                iteration, mean = 1, losses[0]
            else:
                iteration = epoch * per_epoch
                mean = math.fsum(losses[iteration - per_epoch : iteration]) / per_epoch
            rows.append((epoch, iteration, rate, mean, train, val, round(seconds, 3), peak))
            if epoch:
                rate *= self.config.lr_decay
        return rows

    @property
    def best_epoch(self) -> int:
        """The epoch of the best validation accuracy so far; 0 is the first iteration."""
        best = max(range(len(self.metrics())), key=lambda row: self.solver.val_acc_history[row])
        return int(self.metrics()[best][0])

    def _train(self, folder: Path, watcher: Watcher | None) -> None:
        self.folder = folder
        self._watcher = watcher or Watcher()
        self._watcher.begin(self)
        self._clock = time.monotonic()
        if not self._stop_asked:
            if self.config.tensorboard:
                self._events = Events(folder / EVENTS, self.solver.iteration)
            self._before_iteration()
            # A loss that overflows stops the run with a message of its own.
            try:
                with np.errstate(over="ignore", invalid="ignore"):
                    self.solver.train()
            finally:
                if self._events is not None:
                    self._events.close()
        if self.solver.iteration < self.solver.num_iterations:
            self._save()
            self._write_metrics()
            return
        self.solver.restore_best()  # train() leaves it out where it was asked to stop at the end
        config = {**self.config.as_dict(), "val_accuracy": self.solver.best_val_acc}
        # The weights do not depend on the device, so neither does the file.
        config.pop("device", None)
        with _naming(folder / MODEL) as path:
            checkpoint.save_model(path, self.net, config, _arrays_of(self.preprocessing))
        self._write_metrics()
        with _naming(folder / CURVES) as path:
            checkpoint.atomic_write(path, _curves(self))
        if self.activations is not None:
            with _naming(folder / ACTIVATIONS) as path:
                checkpoint.atomic_write(path, self.activations.as_npz())
            with _naming(folder / PICTURE) as path:
                checkpoint.atomic_write(path, self.activations.draw(_title(self.config)))
        if self.dataset.X_test is not None and self.dataset.y_test is not None:
            X = self._input(self.dataset.X_test)
            self.test = _evaluate(self.net, X, self.dataset.y_test, self.config.data, "test")
        self.finished = True

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that a finished run has."""
        return (*FILES, *(EXTRA_FILES if self.config.histograms else ()))

    def _before_iteration(self) -> None:
        if self.activations is not None and self.solver.iteration < self.solver.num_iterations:
            self.activations.before(self.solver.iteration + 1)

    def _after_iteration(self, solver: Solver) -> None:
        activations = self.activations
        if activations is not None and activations.after(solver.iteration) and self._events:
            self._events.histograms(activations)
        self._before_iteration()
        if solver.iteration == 1 and solver.iterations_per_epoch > 1:
            self._note_row()
        if self._stop_asked:
            solver.stop()  # the request may have come before train(), which forgets earlier ones
        self._watcher.iteration(self)

    def _after_epoch(self, solver: Solver) -> None:
        self._note_row()
        self._save()
        self._write_metrics()
        self._watcher.epoch(self)

    def _note_row(self) -> None:
        """Note what a new row of metrics.csv says of the machine, and tell TensorBoard of it."""
        self._seconds.append(self._total_seconds())
        self._peaks.append(self.peak_memory.bytes)
        if self._events is not None:
            self._events.scalars(dict(zip(METRICS_COLUMNS, self.metrics()[-1], strict=True)))

    def _save(self) -> None:
        self.solver.check_parameters()
        state = {
            "run": self.config.as_dict(),
            "data": self._data_digest,
            "row_seconds": self._seconds,
            "row_peaks": self._peaks,
            "seconds": self._total_seconds(),
        }
        with _naming(self.folder / CHECKPOINT) as path:
            checkpoint.save(path, self.solver, state, self._extra_arrays())
        self.solver.last_checkpoint = str(path)

    def _extra_arrays(self) -> dict[str, NDArray[Any]]:
        arrays = _arrays_of(self.preprocessing)
        if self.activations is not None:
            for name, array in self.activations.arrays().items():
                arrays[f"{_ACTIVATIONS_PREFIX}{name}"] = array
        return arrays

    def _load(self, path: Path) -> None:
        """Go on from a checkpoint of this run, and of no other."""
        arrays, header = files.read(path, "checkpoint")
        state = header["config"]
        if "run" not in state:
            raise CheckpointError(f"{path} was not written by a run")
        # Earlier versions knew none of these.
        unknown = {"reproducible": False, "histograms": False, "tensorboard": False}
        saved, mine = {**unknown, **state["run"]}, self.config.as_dict()
        for name in sorted({*saved, *mine} - {*_MAY_CHANGE}):
            old, new = saved.get(name), mine.get(name)
            if old != new:
                raise RunError(
                    f"{name} is {new!r} in {path.with_name(CONFIG)}, but the run was begun with "
                    f"{old!r}: change it back, or begin another run"
                )
        if state["data"] != self._data_digest:
            raise DataError(
                f"{self.dataset.name} does not hold the data that the run was begun with"
            )
        checkpoint.resume(path, self.solver)
        if self.solver.iteration > self.solver.num_iterations:
            done = math.ceil(self.solver.iteration / self.solver.iterations_per_epoch)
            raise RunError(
                f"epochs is {self.config.epochs}, expected at least {done}: the run is in that "
                "epoch already"
            )
        if self.activations is not None:
            prefix = f"extra.{_ACTIVATIONS_PREFIX}"
            self.activations.load(
                {k[len(prefix) :]: a for k, a in arrays.items() if k.startswith(prefix)}
            )
        self._seconds, self._elapsed = list(state["row_seconds"]), float(state["seconds"])
        # Earlier versions kept no peaks.
        self._peaks = list(state.get("row_peaks", [None] * len(self._seconds)))

    def _total_seconds(self) -> float:
        return self._elapsed + time.monotonic() - self._clock

    def _input(self, X: NDArray[Any]) -> NDArray[Any]:
        return self.preprocessing.apply(X, self.config.dtype)

    def _write_metrics(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(METRICS_COLUMNS)
        writer.writerows(self.metrics())
        with _naming(self.folder / METRICS) as path:
            checkpoint.atomic_write(path, text.getvalue().encode())


def _place(device: str | None) -> backend.Device:
    """Return a device by name, or the one in force; RunError where the name is none."""
    try:
        return backend.current() if device is None else backend.resolve(device)
    except ValueError as error:
        raise RunError(str(error)) from error


def _shuffle_seed(seed: int) -> int:
    """Derive a seed for the batches: with the seed itself they would repeat the weights' draws."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])


def _arrays_of(preprocessing: Preprocessing) -> dict[str, NDArray[Any]]:
    return {
        "preprocessing.scale": np.array([preprocessing.scale], np.float64),
        "preprocessing.mean": preprocessing.mean,
    }


# --- The folder -----------------------------------------------------------------------------------


def start(
    config: RunConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    watcher: Watcher | None = None,
) -> Run:
    """Train a network in a new folder.

    Parameters
    ----------
    config : RunConfig
    out : path, optional
        A folder without a run in it, made if need be; by default ``runs/<data>-N`` with the next
        free N.
    watcher : Watcher, optional
        Called on the way.

    Returns
    -------
    Run
        Finished, or stopped by ``Run.stop`` after it saved a checkpoint.

    Raises
    ------
    RunError, DataError, DeviceError
        Something does not fit; nothing has been written.
    MissingDependency
        A package of the extra ``train`` is not installed.
    NonFiniteLoss, NonFiniteParameters
        Training diverged.
    OSError
        A file cannot be read or written.
    """
    require("safetensors", "tomli_w", "matplotlib")
    if out is not None:
        _refuse_used(Path(out))
    # From config.toml the data must be found whatever the working folder is.
    config = replace(config, data=_absolute(config.data))
    run = Run(config)
    folder = _new_folder(config.data) if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _refuse_used(folder)
        _write_config(folder, config)
        run._train(folder, watcher)
    return run


def resume(
    folder: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    device: str | None = None,
    data: str | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Go on with a run, or begin again where it has no checkpoint yet.

    Of a finished run the files are written anew, from its checkpoint.

    Parameters
    ----------
    folder : path
        Of a run that ``start`` began.
    epochs : int, optional
        Another number of epochs, not below those that are done; kept in config.toml.
    device : str, optional
        Another device, this time.
    data : str, optional
        Where the same data are found, this time.
    watcher : Watcher, optional

    Returns
    -------
    Run
        As from ``start``.

    Raises
    ------
    RunError, CheckpointError, DataError, DeviceError, MissingDependency, OSError
        The run cannot go on; its files are as they were.
    NonFiniteLoss, NonFiniteParameters
        Training diverged.
    """
    require("safetensors", "tomli_w", "matplotlib")
    folder = Path(folder)
    old = read_config(folder)
    try:
        config = old if epochs is None else replace(old, epochs=epochs)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error
    with _locked(folder):
        run = Run(config, device=device, data=data)
        run.resumed = True
        path = folder / CHECKPOINT
        if path.exists():
            run._load(path)
        _remove_leftovers(folder)
        if config != old:
            _write_config(folder, config)
        run._train(folder, watcher)
    return run


def evaluate(
    folder: str | os.PathLike[str], data: str | None = None, *, device: str | None = None
) -> Evaluation:
    """Measure a finished run's network.

    Parameters
    ----------
    folder : path
        Of the run.
    data : str, optional
        Other data than the run's, of the same kind. The test set is taken, or the validation set
        where there is none.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.

    Raises
    ------
    RunError, CheckpointError, DataError, DeviceError, MissingDependency, OSError
        There is no finished run, a file is damaged, or the data do not fit the network.
    """
    require("safetensors")
    _place(device)  # a name that is none is no fault of the file
    path = Path(folder) / MODEL
    if not path.exists():
        if (path.parent / CONFIG).exists():
            raise RunError(f"{folder} is not finished: go on with gpubn train --resume {folder}")
        raise RunError(f"{folder} holds no run: there is no {MODEL} in it")
    net, config, arrays = checkpoint.load_model(path, device)
    try:
        preprocessing = Preprocessing(
            float(arrays["preprocessing.scale"][0]), arrays["preprocessing.mean"]
        )
        spec = str(config["data"]) if data is None else data
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} was not written by a run: {error}") from error
    dataset = load_data(spec)
    if dataset.X_test is not None and dataset.y_test is not None:
        split, X, y = "test", dataset.X_test, dataset.y_test
    else:
        split, X, y = "validation", dataset.X_val, dataset.y_val
    try:
        X = preprocessing.apply(X, net.dtype)
    except DataError as error:
        raise DataError(f"{spec} does not fit the network: {error}") from error
    if int(y.max()) >= net.num_classes:
        raise DataError(
            f"{spec} has a label {y.max()}, expected 0 to {net.num_classes - 1} as in the data "
            "that the network was trained on"
        )
    return _evaluate(net, X, y, spec, split)


def read_config(folder: str | os.PathLike[str]) -> RunConfig:
    """Return the configuration of a run's folder; RunError where there is none."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise RunError(f"{folder} holds no run: there is no {CONFIG} in it")
    try:
        # A run that was begun before there were reproducible ones is none, whatever is asked now.
        return RunConfig.read(path, reproducible=False)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def require(*packages: str, extra: str = "train") -> None:
    """Raise MissingDependency if one of these packages of an extra is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"{' and '.join(missing)} cannot be imported: pip install 'gpubn[{extra}]'"
        )


def _absolute(spec: str) -> str:
    kind, _, path = spec.partition(":")
    if kind in ("mnist", "cifar10") and path:
        return f"{kind}:{os.path.abspath(os.path.expanduser(path))}"
    if spec.lower().endswith(".npz"):
        return os.path.abspath(os.path.expanduser(spec))
    return spec


def _new_folder(spec: str) -> Path:
    """Make the folder ``runs/<data>-N`` of the next free N."""
    kind = spec.partition(":")[0]
    name = kind if kind in ("digits", "mnist", "cifar10") else Path(spec).stem
    parent = Path("runs")
    parent.mkdir(exist_ok=True)
    numbers = [path.name.removeprefix(f"{name}-") for path in parent.iterdir()]
    number = max((int(text) for text in numbers if text.isascii() and text.isdigit()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):  # another process was quicker
            folder = parent / f"{name}-{number}"
            folder.mkdir()
            return folder


def _refuse_used(folder: Path) -> None:
    there = [name for name in (*FILES, *EXTRA_FILES) if (folder / name).exists()]
    if there:
        raise RunError(
            f"{folder} already holds a run ({', '.join(there)}): go on with it by "
            f"gpubn train --resume {folder}, or choose another folder"
        )


def _write_config(folder: Path, config: RunConfig) -> None:
    with _naming(folder / CONFIG) as path:
        checkpoint.atomic_write(path, config.to_toml().encode())


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process killed in the middle of ``atomic_write`` left behind."""
    for name in (*FILES, *EXTRA_FILES):
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Let an OSError name this file: one from writing names none, one from opening a temporary."""
    try:
        yield path
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process off the run. The lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder cannot be locked
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use: another process trains it") from None
        except OSError:
            pass  # a file system without locks: the run itself needs none
        yield
    finally:
        os.close(descriptor)


# --- Results --------------------------------------------------------------------------------------


def _evaluate(
    net: FullyConnectedNet,
    X: NDArray[Any],
    y: NDArray[Any],
    data: str,
    split: str,
    batch_size: int = 100,
) -> Evaluation:
    # Every image is seen once: batches are copied to the device as they come.
    losses, predictions = [], []
    with net.device.scope():
        for at in range(0, len(X), batch_size):
            scores = net.loss(X[at : at + batch_size])
            labels = y[at : at + batch_size]
            loss, _ = softmax_loss(scores, net.device.asarray(labels))
            losses.append(float(loss) * len(labels))
            predictions.append(backend.to_host(scores).argmax(axis=1))
    right = np.concatenate(predictions) == y
    return Evaluation(
        data,
        split,
        len(y),
        float(right.mean()),
        math.fsum(losses) / len(y),
        tuple(np.bincount(y, minlength=net.num_classes).tolist()),
        tuple(np.bincount(y[right], minlength=net.num_classes).tolist()),
        net.sha256(),
    )


def _title(config: RunConfig) -> str:
    hidden = " ".join(map(str, config.hidden)) or "none"
    return (
        f"{Path(config.data).name} · hidden {hidden} · {config.normalization} · "
        f"{config.update_rule} · seed {config.seed}"
    )


def _curves(run: Run) -> bytes:
    """Draw loss against iteration and accuracies against epoch; return a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = run.metrics()
    epochs, ends, _, means, train, val = list(zip(*rows, strict=True))[:6]
    losses = run.solver.loss_history
    config = run.config
    # Neither pyplot nor a global backend: drawing must not touch the caller's figures.
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_title(config), parse_math=False)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.35, lw=0.8, label="iteration")
    # Each mean in the middle of what it is the mean of; the first row is of one iteration only.
    per_epoch = run.solver.iterations_per_epoch
    middles = [end - (per_epoch - 1) / 2 for end in ends[-config.epochs :]]
    left.plot(middles, means[-config.epochs :], "C0.-", lw=2, label="mean of an epoch")
    left.set(title="Training loss", xlabel="iteration", ylabel="loss")
    if min(losses) > 0:
        left.set_yscale("log")
    right.plot(epochs, [100 * a for a in train], color="C0", marker=".", label="training")
    right.plot(epochs, [100 * a for a in val], color="C1", marker=".", label="validation")
    right.set(title="Accuracy", xlabel="epoch", ylabel="accuracy in %")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()
