"""The command line: ``gpubn train``, ``evaluate``, ``experiment``, ``info`` and ``parity``.

What takes time to import is imported where it is used, so that ``gpubn --help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import gpubn
from gpubn import backend
from gpubn.train import run as runs
from gpubn.train.checkpoint import CheckpointError, atomic_write
from gpubn.train.config import DTYPES, NORMALIZATIONS, RunConfig
from gpubn.train.data import SPEC_FORMS, DataError
from gpubn.train.optim import RULES
from gpubn.train.solver import NonFiniteLoss, NonFiniteParameters

if TYPE_CHECKING:
    from types import FrameType

DIVERGED = BROKEN = 1
USAGE = 2
"""Exit codes, beside 0. One that a signal stopped ends with 128 + its number, as in a shell."""


class UsageError(Exception):
    """The command line, or what it names, cannot be used."""


# --- Arguments ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, and takes no abbreviated flags: they break when flags come."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
            **arguments,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="gpubn",
        description="Train batch-normalised networks on a CUDA GPU, or on the CPU with the same "
        "code.",
    )
    parser.add_argument("--version", action="version", version=f"gpubn {gpubn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a finished run's network",
        description="Measure a finished run's network on its data's test set.",
    )
    evaluate.add_argument("run", metavar="RUN", help="the run's folder")
    evaluate.add_argument("--data", metavar="SPEC", help="measure on other data of the same kind")
    _add_device(evaluate)
    evaluate.set_defaults(function=_evaluate)
    _add_experiment(commands)
    info = commands.add_parser(
        "info",
        help="show versions and devices",
        description="Show versions, the device that would be used and why, and all devices.",
    )
    info.set_defaults(function=_info)
    _add_parity(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a network",
        description="Train a fully connected network. Without any flag: on handwritten digits, in "
        "seconds once kernels are compiled.",
        epilog="Ctrl-C saves a checkpoint and says how to go on. A run killed at any moment and "
        "resumed ends with the same weights.",
        argument_default=argparse.SUPPRESS,  # so that a flag that is there was given
    )
    default = RunConfig(reproducible=False)  # whatever the environment says

    def add(group: Any, flag: str, what: str, **arguments: Any) -> None:
        value = getattr(default, flag.strip("-").replace("-", "_"))
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        group.add_argument(flag, help=f"{what} (default: {text})", **arguments)

    data = parser.add_argument_group("data")
    add(data, "--data", f"one of {', '.join(SPEC_FORMS)}", metavar="SPEC")

    net = parser.add_argument_group("network")
    width = {"type": int, "nargs": "*", "metavar": "WIDTH"}
    add(net, "--hidden", "width of each hidden layer; none: a linear classifier", **width)
    add(net, "--normalization", "after each hidden layer", choices=NORMALIZATIONS)
    ratio = "probability of keeping a unit; 1: no dropout"
    add(net, "--dropout-keep-ratio", ratio, type=float, metavar="P")
    scale = "standard deviation of the initial weights"
    add(net, "--weight-scale", scale, type=float, metavar="S")
    add(net, "--dtype", "of the parameters and all arithmetic", choices=DTYPES)

    training = parser.add_argument_group("training")
    add(training, "--update-rule", "how a step is taken", choices=RULES)
    add(training, "--learning-rate", "of the first epoch", type=float, metavar="R")
    add(training, "--lr-decay", "its factor after every epoch", type=float, metavar="F")
    add(training, "--reg", "L2 penalty: 0.5 reg sum(W**2)", type=float, metavar="R")
    add(training, "--batch-size", "samples of a step", type=int, metavar="N")
    add(training, "--epochs", "passes over the training set", type=int, metavar="N")
    add(training, "--seed", "of weights, masks and batches", type=int, metavar="N")
    training.add_argument(
        "--reproducible",
        action=argparse.BooleanOptionalAction,
        help="matrix products with the same bits on every device, so that the weights have; prints "
        f"their SHA-256 (default: {backend.REPRODUCIBLE_VARIABLE}, else no)",
    )
    _add_device(training)

    watch = parser.add_argument_group("watching")
    watch.add_argument(
        "--histograms",
        action="store_true",
        help="record what each layer puts out, and its gradients, over training: "
        "activations.png and .npz",
    )
    watch.add_argument(
        "--tensorboard",
        action="store_true",
        help="write events for TensorBoard to the run's folder",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="where it is written (default: runs/DATA-N)")
    run.add_argument(
        "--config", metavar="FILE.toml", help="take what no flag gives from a run's config.toml"
    )
    run.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder; beside it only --epochs, --device and --data "
        "(the same data, elsewhere) may be given",
    )
    parser.set_defaults(function=_train)


def _add_device(group: Any) -> None:
    group.add_argument(
        "--device",
        metavar="D",
        help=f"auto, cpu, cuda or cuda:N (default: {backend.ENVIRONMENT_VARIABLE}, else auto: "
        "CUDA where it works)",
    )


def _add_experiment(commands: Any) -> None:
    parser = commands.add_parser(
        "experiment",
        help="show what normalization does, in pictures",
        description="Train the networks of one or more experiments, and write for each a table of "
        "all losses and accuracies and its figures, and one page, report.html, with all of it. "
        "Experiments: all, batchnorm, weight-scale, batch-size, layernorm, dropout, update-rules.",
        epilog="What is trained is kept in the folder: an interrupted command goes on where it "
        "stopped, and more seeds are added to those that are there.",
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="an experiment, or all")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        default="digits",
        help=f"one of {', '.join(SPEC_FORMS)} (default: digits; CIFAR-10 has the notebooks' "
        "figures)",
    )
    _add_device(parser)
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each network N times; lines are means, bands what they span (default: 1)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes side by side, which share the CPU's threads (default: 1)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs and weight scales")
    parser.add_argument(
        "--out", metavar="DIR", help="where it is written (default: experiments/NAME-DATA)"
    )
    parser.set_defaults(function=_experiment)


def _add_parity(commands: Any) -> None:
    parser = commands.add_parser(
        "parity",
        help="prove that all devices give the same bits",
        description="Run every operation on every device, with several numbers of threads and "
        "compiled for two instruction sets, on shapes and values that are hard for it. Compare all "
        "results bit for bit, and with float64.",
        epilog="Minutes, or seconds with --quick, once kernels are compiled. Exit code 0: the same "
        "bits everywhere; 1: not, and the table says where.",
    )
    parser.add_argument(
        "--op",
        action="append",
        metavar="OP",
        help="only this operation; may be given several times (default: all; a wrong name lists "
        "them)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="only case N of each --op; beyond the grid's cases, one drawn at random",
    )
    parser.add_argument("--quick", action="store_true", help="only the first shapes of the grid")
    parser.add_argument("--json", metavar="FILE", help="write all that is found to a file, too")
    parser.set_defaults(function=_parity)


# --- gpubn train ----------------------------------------------------------------------------------

_RESUMABLE = ("epochs", "device", "data")


def _train(arguments: argparse.Namespace) -> int:
    given = dict(vars(arguments))
    for name in ("command", "function"):
        del given[name]
    folder, out = given.pop("resume", None), given.pop("out", None)
    for flag, path in (("--resume", folder), ("--out", out)):
        if path == "":
            raise UsageError(f"{flag} is empty, expected a folder")
    source = given.pop("config", None)
    if folder is not None:
        refused = [_flag(name) for name in given if name not in _RESUMABLE]
        refused += ["--out"] * (out is not None) + ["--config"] * (source is not None)
        if refused:
            raise UsageError(
                f"{', '.join(refused)} cannot be given beside --resume: the run keeps its own "
                f"(only {', '.join(map(_flag, _RESUMABLE))} may differ)"
            )
        config = runs.read_config(folder)
    else:
        with _usage():
            base = {} if source is None else RunConfig.read(source).as_dict()
            config = RunConfig(**{**base, **given})
    _silence_fallback(given.get("device", config.device))
    _check_threads()
    runs.require("tqdm")
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        progress = _Progress(signals)
        stack.callback(progress.close)
        if folder is not None:
            run = runs.resume(folder, **given, watcher=progress)
        else:
            run = runs.start(config, out, watcher=progress)
        progress.close()
        return _conclude(run, signals.received)


def _conclude(run: runs.Run, signum: int | None) -> int:
    if not run.finished:
        _say(
            f"stopped in epoch {run.solver.epoch + 1} of {run.config.epochs}, after iteration "
            f"{run.solver.iteration}; all is saved. To go on:\n  {_resume_command(run)}"
        )
        _say(f"peak memory {run.peak_memory}")
        return 128 + (signum or signal.SIGINT)
    best = f"validation accuracy {run.solver.best_val_acc:.2%} (best, epoch {run.best_epoch})"
    if run.test is None:
        _say(f"{best}; the data have no test set")
    else:
        _say(f"{best}\ntest accuracy {run.test.accuracy:.2%} on {run.test.count:,} images")
    if run.net.reproducible:
        _say(f"weights SHA-256 {run.net.sha256()}")
    _say(f"peak memory {run.peak_memory}")
    _say(f"wrote {', '.join(run.files)}\n  to {run.folder}; see gpubn evaluate {run.folder}")
    return 0


class _Progress(runs.Watcher):
    """Shows a run: a bar on a terminal, else a line for every epoch."""

    SLOW = 1.0  # seconds after which a first step is worth a word

    def __init__(self, signals: _Signals) -> None:
        self._signals = signals
        self._bar: Any = None
        self._timer: threading.Timer | None = None
        self._started = 0.0
        self._first = 0  # iteration at which this process began

    def begin(self, run: runs.Run) -> None:
        solver, data = run.solver, run.dataset
        tests = "no test set" if data.X_test is None else f"{len(data.X_test):,} for the test"
        _say(f"device   {run.net.device.name} ({run.net.device.reason})")
        _say(
            f"data     {run.config.data}: {len(data.X_train):,} images to train on, "
            f"{len(data.X_val):,} for validation, {tests}"
        )
        _say(f"network  {_network(run)}")
        if solver.placement:
            _say(f"batches  {solver.placement}")
        _say(f"run      {run.folder}")
        if solver.iteration == solver.num_iterations:
            _say(f"the run has finished its {run.config.epochs} epochs; its files are written anew")
        elif solver.iteration:
            _say(f"going on after iteration {solver.iteration} of {solver.num_iterations}")
        elif run.resumed:
            _say("there is no checkpoint yet: starting from the beginning")
        self._first, self._started = solver.iteration, time.monotonic()
        # From here on there is something to save.
        self._signals.arm(run.stop)
        if solver.iteration < solver.num_iterations:
            self._timer = threading.Timer(
                self.SLOW, _say, ["compiling kernels: once, they are kept ..."]
            )
            self._timer.daemon = True
            self._timer.start()

    def iteration(self, run: runs.Run) -> None:
        solver = run.solver
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            # Time left is reckoned from the steps that come, not from the first one's compiling.
            self._first, self._started = solver.iteration, time.monotonic()
            if _terminal():
                self._bar = _bar(solver.iteration, solver.num_iterations)
        last = solver.iteration == solver.num_iterations
        # Losses are on the host only now and then; asking in between would wait for the device.
        if self._bar is not None and (last or solver.iteration % solver.print_every == 0):
            recent = solver.loss_history[-solver.print_every :]
            epoch = min(solver.epoch + 1, run.config.epochs)
            self._bar.set_description_str(f"epoch {epoch}/{run.config.epochs}", refresh=False)
            self._bar.set_postfix_str(
                f"loss {sum(recent) / len(recent):.4f}, val {solver.val_acc_history[-1]:.2%}",
                refresh=False,
            )
            self._bar.update(solver.iteration - self._bar.n)
        if last:
            self.close()

    def epoch(self, run: runs.Run) -> None:
        if _terminal():
            return
        epoch, iteration, _, loss, train, val, seconds, _ = run.metrics()[-1]
        width = len(str(run.config.epochs))
        line = (
            f"epoch {epoch:{width}}/{run.config.epochs}  loss {loss:.4f}  "
            f"training {train:.2%}  validation {val:.2%}  {seconds:.1f} s"
        )
        done = iteration - self._first
        if done and iteration < run.solver.num_iterations:
            left = (time.monotonic() - self._started) / done
            line += f", {left * (run.solver.num_iterations - iteration):.0f} s left"
        _say(line)

    def close(self) -> None:
        """End the bar's line, and say no more about a first step."""
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # a service may have no stderr at all


def _bar(initial: int, total: int) -> Any:
    from tqdm import tqdm

    # Some terminals, those of containers among them, do not know their size, and say 0.
    known = 0 not in os.get_terminal_size(sys.stderr.fileno())
    return tqdm(
        initial=initial,
        total=total,
        file=sys.stderr,
        ncols=None if known else 80,
        nrows=None if known else 24,
        dynamic_ncols=known,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}, {remaining} left{postfix}]",
    )


class _Signals:
    """Lets Ctrl-C and SIGTERM stop a run after the iteration under way, a second one at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        return self

    def arm(self, stop: Callable[[], None]) -> None:
        """Call ``stop`` when a signal comes. Before this, signals act as ever."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals

        def handle(signum: int, frame: FrameType | None) -> None:
            self.received = signum
            for number in self._previous:
                # The system itself ends the process at the next one, in whatever code it then is.
                signal.signal(number, signal.SIG_DFL)
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this iteration; Ctrl-C again ends at once\n")
            stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _network(run: runs.Run) -> str:
    net, config = run.net, run.config
    parts = [f"fully connected {'-'.join(map(str, (net.input_dim, *config.hidden)))}-"]
    parts[0] += str(net.num_classes)
    if config.hidden:
        parts.append("no normalization" if config.normalization == "none" else config.normalization)
        if config.dropout_keep_ratio < 1:
            parts.append(f"dropout keeping {config.dropout_keep_ratio:g}")
    return f"{', '.join(parts)}; {net.params.flat.size:,} parameters in {config.dtype}"


def _resume_command(run: runs.Run) -> str:
    import shlex

    return f"gpubn train --resume {shlex.quote(str(run.folder))}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- gpubn evaluate and gpubn info ----------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.run == "":
        raise UsageError("RUN is empty, expected a folder")
    _silence_fallback(arguments.device)
    _check_threads()
    result = runs.evaluate(arguments.run, arguments.data, device=arguments.device)
    device = backend.resolve(arguments.device) if arguments.device else backend.current()
    _say(f"device   {device.name} ({device.reason})")
    which = "test set" if result.split == "test" else "validation set (there is no test set)"
    _say(f"data     {result.data}: {which}, {result.count:,} images")
    _say(f"weights  SHA-256 {result.sha256}")
    _say(f"accuracy {result.accuracy:.2%}, loss {result.loss:.4f}")
    if len(result.class_counts) <= 20:
        _say("class    right of images")
        for label, (right, count) in enumerate(
            zip(result.class_right, result.class_counts, strict=True)
        ):
            share = f"{right / count:8.2%}" if count else "       -"
            _say(f"{label:5}    {right:5} of {count:6} {share}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import platform

    from gpubn.kernels import threads

    _silence_fallback(None)
    versions = _versions()
    versions["Python"] += f" on {platform.system()} {platform.machine()}"
    for title, version in versions.items():
        _say(f"{title:8} {version}")
    try:
        device = backend.current()
        _say(f"device   {device.name} ({device.reason})")
    except (backend.DeviceError, ValueError) as error:  # GPUBN_DEVICE names one that is not there
        _say(f"device   none: {error}")
    outcome = backend.probe()
    if outcome.usable:
        runtime = backend.resolve("cuda").xp.cuda.runtime
        for index in range(outcome.device_count):
            properties = runtime.getDeviceProperties(index)
            memory = properties.get("totalGlobalMem", 0) / 2**30
            _say(f"cuda:{index}   {properties['name'].decode()}, {memory:.1f} GiB")
    else:
        _say(f"CUDA     cannot be used: {outcome.reason}")
    with _usage():
        _say(f"CPU      {threads.get_num_threads()} threads")
    return 0


def _versions() -> dict[str, str]:
    import platform

    return {
        "gpubn": gpubn.__version__,
        "Python": platform.python_version(),
        "NumPy": _version(("numpy",)),
        "Numba": _version(("numba",)),
        "CuPy": _version(("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")),
    }


def _version(distributions: tuple[str, ...]) -> str:
    from importlib import metadata

    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{metadata.version(name)}{'' if len(distributions) == 1 else f' ({name})'}"
    return "not installed"


# --- gpubn experiment -----------------------------------------------------------------------------


def _experiment(arguments: argparse.Namespace) -> int:
    import importlib
    from pathlib import Path

    from gpubn import experiments

    if arguments.out == "":
        raise UsageError("--out is empty, expected a folder")
    with _usage():
        plan = experiments.Plan.of(
            arguments.names,
            data=arguments.data,
            device=arguments.device,
            seeds=arguments.seeds,
            jobs=arguments.jobs,
            quick=arguments.quick,
        )
    _silence_fallback(arguments.device)
    _check_threads()
    runs.require("tqdm", "matplotlib")
    folder = plan.folder if arguments.out is None else Path(arguments.out)
    watcher = _Trainings(plan)
    try:
        with contextlib.closing(watcher):
            results = experiments.run(plan, folder, watcher)
    except KeyboardInterrupt:
        _say(f"what is trained is kept in {folder}; the same command goes on from there")
        raise
    report: Any = importlib.import_module("gpubn.experiments.report")
    facts = {"data": plan.data, "device": watcher.device, **_versions()}
    files = report.write(folder, plan, results, facts)
    for experiment in plan.experiments:
        _say(f"{experiment.name:13} {experiment.finding(results[experiment.name])}")
    _say(f"wrote {len(files)} files to {folder}; open {files[-1]}")
    return 0


class _Trainings:
    """Shows how many trainings are done: a bar on a terminal, else a line for every tenth."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan
        self._bar: Any = None
        self._done = self._total = 0
        self.device = ""

    def begin(self, done: int, total: int, device: backend.Device, data: Any) -> None:
        self._done, self._total, self.device = done, total, f"{device.name} ({device.reason})"
        _say(f"device   {self.device}")
        _say(f"data     {self._plan.data}: {len(data.X_train):,} images to train on")
        if done:
            _say(f"{done} of {total} trainings are there already")
        if done < total and _terminal():
            self._bar = _bar(done, total)

    def trained(self, experiment: Any, outcome: Any) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_description_str(experiment.name, refresh=False)
            self._bar.update()
        elif self._done == self._total or self._done % max(1, self._total // 10) == 0:
            _say(f"{self._done} of {self._total} trainings done ({experiment.name})")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# --- gpubn parity ---------------------------------------------------------------------------------


def _parity(arguments: argparse.Namespace) -> int:
    from gpubn.testing import parity

    _check_json(arguments.json)
    with _usage():
        plan = parity.Plan.of(arguments.op, arguments.seed, quick=arguments.quick)
    _check_threads()
    with parity.Contestants(plan.seeds) as contestants:
        environment = parity.environment(contestants, _versions())
        for line in (*parity.header(environment, plan), *parity.table_head()):
            _say(line)
        with _CaseBar(plan.count) as bar:
            rows = parity.run(
                plan, contestants, bar.case, lambda row: bar.say(parity.table_row(row))
            )
    for line in parity.verdict(environment, rows):
        _say(line)
    if arguments.json is not None:
        atomic_write(os.path.realpath(arguments.json), parity.as_json(environment, rows))
    return 0 if all(row.same for row in rows) else BROKEN


def _check_json(path: str | None) -> None:
    """Look at the file's name now, not after minutes."""
    if path is None:
        return
    if path in ("", "-"):
        raise UsageError(f"--json is {path!r}, expected a file")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"--json is {path}, and there is no folder {folder}")
    if os.path.isdir(path):
        raise UsageError(f"--json is {path}, a folder, expected a file")
    # A device or a pipe would be replaced by a file.
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"--json is {path}, which is no regular file")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--json is {path}, which cannot be written: {error.strerror}") from error


class _CaseBar:
    """A bar on a terminal, if tqdm is there to draw it; the lines of a table pass above it."""

    def __init__(self, total: int) -> None:
        drawn = _terminal() and importlib.util.find_spec("tqdm") is not None
        self._bar = _bar(0, total) if drawn else None

    def case(self, op: str) -> None:
        """Count a case."""
        if self._bar is not None:
            self._bar.set_description_str(op, refresh=op != self._bar.desc)
            self._bar.update()

    def say(self, line: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._bar.clear()
        _say(line)

    def __enter__(self) -> _CaseBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()


# --- All commands ---------------------------------------------------------------------------------


def _silence_fallback(device: str | None) -> None:
    """Keep the switch from telling by itself what a command prints in its first line."""
    if device is None and not os.environ.get(backend.ENVIRONMENT_VARIABLE):
        with _usage():
            backend.use("auto")
    backend.silence_fallback()


def _check_threads() -> None:
    """Look at the environment's number of threads, and its say on Numba, not in mid-run."""
    from gpubn.kernels import threads

    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise UsageError("NUMBA_DISABLE_JIT is set, but gpubn's kernels need Numba's compiler")
    with _usage():
        threads.get_num_threads()


def _say(text: str) -> None:
    print(text, flush=True)  # at once, also into a pipe


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Take errors of values for the user's, in a stretch that does little but look at them."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory; a smaller --batch-size or --hidden needs less ({error})"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; by default the process's.

    Returns
    -------
    int
        0, 1 where training diverged or bits differ, 2 for bad usage or data, 128 + N after
        signal N.
    """
    try:
        # In a context of its own, so that the device that it chooses is not the caller's.
        return contextvars.copy_context().run(_main, argv)
    except BrokenPipeError:
        # The reader has gone. Nothing is left to say, nor to be flushed when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if by SIGPIPE, which Windows does not have


def _main(argv: list[str] | None) -> int:
    code = USAGE
    try:
        arguments = _parser().parse_args(argv)
        result: int = arguments.function(arguments)
        return result
    except SystemExit as end:  # argparse ends so after --help and --version
        sys.stdout.flush()
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("gpubn: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except (NonFiniteLoss, NonFiniteParameters) as error:
        reason, code = _reason(error), DIVERGED
    except (
        UsageError,
        runs.RunError,
        DataError,
        CheckpointError,
        runs.MissingDependency,
        backend.DeviceError,
        OSError,
        MemoryError,
    ) as error:
        reason = _reason(error)
    # CuPy's own types cannot be named where it is not installed; all others are raised again below.
    except Exception as error:
        if not backend.is_cuda_error(error):
            raise
        reason = f"CUDA failed: {type(error).__name__}: {error}; --device cpu would run here"
    print(f"gpubn: error: {' '.join(reason.split())}", file=sys.stderr)
    return code
