"""The command line: what it prints, what it writes, its exit codes, and its errors in one line."""

from __future__ import annotations

import csv
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpubn
from gpubn import backend, cli
from gpubn.train import batches, memory
from gpubn.train import run as runs
from gpubn.train.config import RunConfig
from gpubn.train.optim import RULES

TIMEOUT = 120
posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals as on POSIX")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs of these tests are written to a folder of the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path, rng):
    y = rng.integers(0, 3, 100)
    X = (rng.normal(size=(100, 6)) + 3 * np.eye(3)[y].repeat(2, axis=1)).astype(np.float32)
    np.savez(tmp_path / "tiny.npz", X_train=X, y_train=y, X_test=X[:20], y_test=y[:20])
    return "tiny.npz"


@pytest.fixture
def small(data):
    """Flags of a run that takes no time."""
    return f"--data {data} --hidden 8 --epochs 2 --batch-size 10 --device cpu"


@pytest.fixture
def finished(small, capsys):
    assert cli.main(shlex.split(f"train {small} --out done")) == 0
    capsys.readouterr()
    return "done"


def run(capsys, line):
    """Run a command; return its exit code and what it printed."""
    code = cli.main(shlex.split(line))
    return code, *capsys.readouterr()


def refused(capsys, line, *expected, code=2):
    """Run a command that must fail in one line, which holds all that is expected."""
    got, out, err = run(capsys, line)
    assert got == code
    assert err.startswith("gpubn: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    for text in expected:
        assert text in err
    return out


def command(*arguments):
    return [sys.executable, "-m", "gpubn", *arguments]


@pytest.fixture
def process():
    """Start processes that are gone when the test ends."""
    started = []

    def start(arguments, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        started.append(subprocess.Popen(arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


# --- gpubn train ----------------------------------------------------------------------------------


def test_a_run_tells_what_it_does(capsys, small):
    code, out, err = run(capsys, f"train {small}")
    assert code == 0
    assert err == ""
    assert "device   cpu (cpu was asked for)" in out
    assert "tiny.npz: 90 images to train on, 10 for validation, 20 for the test" in out
    assert "fully connected 6-8-3, batchnorm, dropout keeping 0.7; 99 parameters in float32" in out
    assert f"run      {os.path.join('runs', 'tiny-1')}" in out
    # Standard error is no terminal here: a line for every epoch.
    assert len(re.findall(r"^epoch [12]/2  loss \d", out, re.MULTILINE)) == 2
    assert re.search(r"test accuracy \d+\.\d\d% on 20 images", out)
    assert all(name in out for name in runs.FILES)
    assert sorted(os.listdir("runs/tiny-1")) == sorted(runs.FILES)


def test_where_batches_come_from_and_the_peak_are_told(capsys, small, device, monkeypatch):
    told = {}
    for free in (1000, 10**9):
        monkeypatch.setattr(batches, "free_memory", lambda _, free=free: free)
        line = f"train {small} --out out-{free}".replace("--device cpu", f"--device {device.name}")
        code, out, _ = run(capsys, line)
        assert code == 0
        told[free] = re.findall("^batches  (.*)$", out, re.MULTILINE)
        assert len(re.findall(r"^peak memory \d+\.\d [kMG]B \(.*\)$", out, re.MULTILINE)) == 1
    # 90 images of 6 float32 and labels of 8 bytes.
    takes = "the training set takes 2.9 kB,"
    assert told == ({1000: [], 10**9: []} if device.kind == "cpu" else {
        1000: [
            f"from the host, each copied while the step before it runs: {takes} more than a "
            "quarter of the 1.0 kB free on cuda:0; the validation set stays on the host"
        ],
        10**9: [f"from cuda:0: {takes} at most a quarter of the 1.0 GB free on cuda:0"],
    })  # fmt: skip
    assert metrics("out-1000") == metrics("out-1000000000")


def test_the_peak_that_a_system_does_not_tell(capsys, small, monkeypatch):
    monkeypatch.setattr(memory, "_high_water_mark", lambda: None)
    monkeypatch.setattr(memory, "_max_resident", lambda: None)
    code, out, _ = run(capsys, f"train {small} --out out")
    assert code == 0
    assert "\npeak memory unknown (this system does not tell" in out


def test_the_fallback_is_told_once(capsys, caplog, small, monkeypatch):
    monkeypatch.setitem(backend._probes, 0, backend.Probe(False, "no GPU in this test"))
    _, out, err = run(capsys, f"train {small.replace('--device cpu', '')}")
    assert (out + err).count("no GPU in this test") == 1
    assert "no GPU in this test" not in caplog.text


def test_the_environment_names_the_device(capsys, small, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
    _, out, _ = run(capsys, f"train {small.replace('--device cpu', '')}")
    assert "device   cpu (" in out


def test_the_device_of_a_command_is_not_the_callers(capsys, small):
    with gpubn.use("cpu") as before:
        run(capsys, f"train {small}")
        assert gpubn.current() is before


def test_the_command_runs_on_each_device(capsys, data, device):
    line = f"train --data {data} --hidden 4 --epochs 1 --batch-size 30 --out out --device "
    code, out, _ = run(capsys, line + device.name)
    assert code == 0
    assert f"device   {device.name} (" in out
    code, out, _ = run(capsys, f"evaluate out --device {device.name}")
    assert code == 0
    assert f"device   {device.name} (" in out


def test_every_hyperparameter_has_a_flag(capsys, data):
    flags = (
        f"--data {data} --hidden 7 5 --normalization layernorm --dropout-keep-ratio 0.5 "
        "--update-rule adamw --learning-rate 0.003 --lr-decay 0.9 --reg 0.01 --weight-scale 0.1 "
        "--batch-size 20 --epochs 1 --dtype float64 --device cpu --seed 12"
    )
    assert run(capsys, f"train {flags} --out a")[0] == 0
    config = RunConfig.read("a/config.toml")
    assert config == RunConfig(
        os.path.abspath(data), (7, 5), "layernorm", 0.5, "adamw", 0.003, 0.9, 0.01, 0.1, 20, 1,
        "float64", "cpu", 12,
    )  # fmt: skip
    # The file repeats the run, and flags have the last word.
    assert run(capsys, "train --config a/config.toml --out b")[0] == 0
    assert RunConfig.read("b/config.toml") == config
    assert metrics("a") == metrics("b")
    assert run(capsys, "train --config a/config.toml --seed 13 --hidden --out c")[0] == 0
    assert RunConfig.read("c/config.toml").hidden == ()
    assert RunConfig.read("c/config.toml").reg == 0.01
    assert metrics("a") != metrics("c")


def metrics(folder):
    with open(os.path.join(folder, runs.METRICS), newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in runs.NOT_REPEATED} for row in table]


def test_the_defaults_learn_digits():
    # One thread of BLAS: several that wait for each other take minutes on a machine that is busy.
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    run = subprocess.run(
        command("train", "--device", "cpu"),
        env={**os.environ, **threads},
        capture_output=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert float(re.search(rb"test accuracy ([\d.]+)%", run.stdout)[1]) > 97


def test_no_test_set_is_said(capsys, rng, small):
    np.savez("two.npz", X_train=rng.normal(size=(40, 3)), y_train=np.arange(40) % 2)
    _, out, _ = run(capsys, f"train {small} --data two.npz --out a")
    assert "no test set" in out
    assert "the data have no test set" in out
    _, out, _ = run(capsys, "evaluate a")
    assert "validation set (there is no test set), 4 images" in out


def test_the_first_steps_compiling_is_said(capsys, small, monkeypatch):
    monkeypatch.setattr(cli._Progress, "SLOW", 0.05)
    step = gpubn.Solver._step

    def slow(solver):
        time.sleep(0.2 if solver.iteration == 0 else 0)
        step(solver)

    monkeypatch.setattr(gpubn.Solver, "_step", slow)
    _, out, _ = run(capsys, f"train {small}")
    assert out.count("compiling kernels") == 1


# --- --resume -------------------------------------------------------------------------------------


def test_a_finished_run_is_said_to_be(capsys, finished):
    os.unlink(f"{finished}/{runs.MODEL}")
    os.unlink(f"{finished}/{runs.CURVES}")
    code, out, _ = run(capsys, f"train --resume {finished}")
    assert code == 0
    assert "has finished its 2 epochs" in out
    assert "test accuracy" in out
    assert sorted(os.listdir(finished)) == sorted(runs.FILES)


def test_without_a_checkpoint_it_starts_from_the_beginning(capsys, finished):
    before = metrics(finished)
    os.unlink(f"{finished}/{runs.CHECKPOINT}")
    code, out, _ = run(capsys, f"train --resume {finished}")
    assert code == 0
    assert "no checkpoint yet: starting from the beginning" in out
    assert metrics(finished) == before


def test_more_epochs(capsys, finished):
    code, out, _ = run(capsys, f"train --resume {finished} --epochs 3 --device cpu")
    assert code == 0
    assert "going on after iteration 18 of 27" in out
    assert "epoch 3/3" in out
    assert RunConfig.read(f"{finished}/config.toml").epochs == 3


@pytest.mark.parametrize(
    "flag",
    ["--seed 1", "--learning-rate 0.002", "--hidden 3", "--out x", "--config done/config.toml"],
)
def test_other_flags_beside_resume_are_refused(capsys, finished, flag):
    name = flag.split()[0]
    refused(capsys, f"train --resume {finished} {flag}", f"{name} cannot be given beside --resume")


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--epochs", "--epochs: expected one argument (see gpubn train --help)"),
        ("--epochs 3.5", "--epochs: invalid int value: '3.5'"),
        ("--epochs 0", "epochs is 0, expected a whole number of at least 1"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--hidden 8 x", "--hidden: invalid int value: 'x'"),
        ("--hidden 0", "hidden is 0"),
        ("--learning-rate nan", "learning_rate is nan, expected a finite number"),
        ("--learning-rate=-1", "learning_rate is -1.0"),
        ("--dropout-keep-ratio 0", "dropout_keep_ratio is 0.0"),
        ("--dropout-keep-ratio 2", "dropout_keep_ratio is 2.0"),
        ("--normalization group", "--normalization: invalid choice: 'group'"),
        ("--update-rule lion", "--update-rule: invalid choice: 'lion'"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--batch-size 1", "batch_size is 1, expected a whole number of at least 2"),
        ("--batch-size 91", "batch_size is 91, expected at most the 90 training samples"),
        ("--seed -1", "seed is -1"),
        ("--device tpu", "device is 'tpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("--data images", "spec is 'images', expected one of: digits"),
        ("--data missing.npz", "missing.npz is missing"),
        ("--data mnist:nowhere", "nowhere"),
        ("--data cifar10:nowhere", "nowhere"),
        ("--data text.npz", "text.npz"),
        ("--config missing.toml", "missing.toml: No such file or directory"),
        ("--config text.npz", "text.npz is no TOML file"),
        ("--config unknown.toml", "unknown.toml has a key 'layers', expected: data, hidden"),
        ("--config wrong.toml", "wrong.toml: epochs is 'many', expected a whole number"),
        ("--out done", "done already holds a run"),
        ("--out text.npz", "text.npz"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else None,
)
def test_bad_flags(capsys, finished, small, flags, expected):
    with open("text.npz", "w") as file:
        file.write("no archive at all\nno table either\n")
    with open("unknown.toml", "w") as file:
        file.write("layers = 3\n")
    with open("wrong.toml", "w") as file:
        file.write("epochs = 'many'\n")
    refused(capsys, f"train {small} {flags}", expected)
    assert not os.path.exists("runs")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "COMMAND"),
        ("fly", "'fly'"),
        ("evaluate", "RUN"),
        ("evaluate nowhere", "nowhere holds no run"),
        ("evaluate done --data missing.npz", "missing.npz is missing"),
        ("evaluate done --data digits", "digits does not fit the network"),
        ("evaluate done --device tpu", "device is 'tpu'"),
        ("train --resume nowhere", "nowhere holds no run"),
        ("train --resume done --epochs 1", "epochs is 1, expected at least 2"),
        ("train --resume done --epochs 0", "epochs is 0"),
        ("train --resume done --device tpu", "device is 'tpu'"),
        ("train --resume done --data digits", "does not hold the data"),
    ],
)
def test_bad_commands(capsys, finished, line, expected):
    refused(capsys, line, expected)


def test_cuda_that_is_not_there_is_refused(capsys, small, monkeypatch):
    monkeypatch.setitem(backend._probes, 0, backend.Probe(False, "no GPU in this test"))
    refused(capsys, f"train {small} --device cuda", "CUDA cannot be used: no GPU in this test")
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "gpu")
    small = small.replace("--device cpu", "")
    refused(capsys, f"train {small}", "GPUBN_DEVICE is 'gpu', expected")


@pytest.mark.parametrize(
    "name", [runs.CONFIG, runs.CHECKPOINT, runs.MODEL], ids=["config", "checkpoint", "model"]
)
def test_damaged_files(capsys, finished, name):
    with open(f"{finished}/{name}", "r+b") as file:
        file.truncate(50)
    action = f"evaluate {finished}" if name == runs.MODEL else f"train --resume {finished}"
    refused(capsys, action, f"{finished}/{name}")


@pytest.mark.parametrize("package", ["safetensors", "tqdm", "matplotlib", "tomli_w"])
def test_missing_packages(capsys, small, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(capsys, f"train {small}", f"{package} cannot be imported: pip install 'gpubn[train]'")
    assert not os.path.exists("runs")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(capsys, small):
    os.mkdir("locked", 0o500)
    refused(capsys, f"train {small} --out locked/run", "locked/run: Permission denied")


def test_a_full_disk(capsys, small, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpubn.train.checkpoint.atomic_write", full)
    refused(capsys, f"train {small} --out a", "a/config.toml: No space left on device")


def test_a_loss_that_diverges(capsys, small):
    flags = "--normalization none --update-rule sgd --learning-rate 1e30 --out a"
    with np.errstate(all="ignore"):
        refused(capsys, f"train {small} {flags}", "the loss became", "learning rate", code=1)


def test_memory_that_does_not_suffice(capsys, small, monkeypatch):
    def large(*_, **__):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(runs, "FullyConnectedNet", large)
    refused(capsys, f"train {small}", "out of memory; a smaller", "9 TiB")


def test_a_bug_is_not_hidden(small, monkeypatch):
    def broken(solver):
        raise ValueError("a bug")

    monkeypatch.setattr(gpubn.Solver, "_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(shlex.split(f"train {small}"))


# --- Signals, pipes, terminals --------------------------------------------------------------------

LONG = "--hidden 8 --epochs 100000 --batch-size 10 --device cpu --out run"


def first_epoch(process):
    """Read what a process prints up to its first epoch's line."""
    lines = []
    while not lines or not lines[-1].startswith(b"epoch"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    return lines


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(process, data, number, code):
    run = process(command("train", "--data", data, *LONG.split()))
    first_epoch(run)
    run.send_signal(number)
    out, err = run.communicate(timeout=TIMEOUT)
    assert run.returncode == code, err
    assert b"stopping after this iteration" in err
    assert b"Traceback" not in err
    assert b"gpubn train --resume run" in out
    assert re.search(rb"\npeak memory \d+\.\d MB \(resident, this process\)\n", out)
    assert sorted(os.listdir("run")) == sorted([runs.CONFIG, runs.CHECKPOINT, runs.METRICS])
    iteration = int(re.search(rb"after iteration (\d+)", out)[1])

    again = process(command("train", "--resume", "run"))
    told = b"".join(first_epoch(again))
    assert f"going on after iteration {iteration} of".encode() in told


@posix
def test_a_second_signal_ends_it_at_once(process, data):
    # The first is made to have no effect, as if the iteration took for ever.
    script = (
        "import sys; from gpubn import cli; from gpubn.train import run;"
        "run.Run.stop = lambda self: None; sys.exit(cli.main())"
    )
    arguments = ["train", "--data", data, *LONG.split()]
    run = process([sys.executable, "-c", script, *arguments])
    first_epoch(run)
    run.send_signal(signal.SIGINT)
    assert run.stderr.readline() + run.stderr.readline() == (
        b"\nstopping after this iteration; Ctrl-C again ends at once\n"
    )
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=TIMEOUT)
    assert run.returncode == -signal.SIGINT
    assert err == b""


def test_ctrl_c_before_there_is_a_run(capsys, small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "load_data", interrupted)
    code, out, err = run(capsys, f"train {small}")
    assert (code, out, err) == (130, "", "gpubn: stopped\n")


def test_signals_act_as_before_after_a_run(capsys, small):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(capsys, f"train {small}")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@posix
@pytest.mark.parametrize("line", ["train --data tiny.npz " + LONG, "info", "train --help"])
def test_a_reader_that_goes_away(process, data, line):
    run = process(command(*line.split()))
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait(TIMEOUT) in (0, 141)


@posix
@pytest.mark.parametrize("size", [(30, 100), (0, 0)], ids=["100 columns", "unknown size"])
def test_a_terminal_gets_a_bar(process, small, size):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    run = process(command("train", *small.split()), stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert run.wait(TIMEOUT) == 0
    assert "100%|" in shown
    assert "| 18/18 [" in shown
    assert re.search(r"epoch 2/2 .*left, loss \d\.\d+, val \d+\.\d\d%\]", shown)
    assert not re.search(r"epoch +1/2  loss", shown)  # no plain lines as well
    assert re.search(r"test accuracy \d", shown)


def read_terminal(descriptor):
    shown, end = b"", time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        if not select.select([descriptor], [], [], 1)[0]:
            continue
        try:
            part = os.read(descriptor, 4096)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(descriptor)
    return shown.decode()


# --- gpubn evaluate, gpubn info, help -------------------------------------------------------------


def test_evaluate(capsys, finished):
    code, out, err = run(capsys, f"evaluate {finished} --device cpu")
    assert (code, err) == (0, "")
    assert "test set, 20 images" in out
    right = sum(int(n) for n in re.findall(r"^ +\d +(\d+) of +\d+ ", out, re.MULTILINE))
    result = runs.evaluate(finished, device="cpu")
    assert right == round(20 * result.accuracy)
    assert f"accuracy {result.accuracy:.2%}, loss {result.loss:.4f}" in out
    code, out, _ = run(capsys, f"evaluate {finished} --data tiny.npz --device cpu")
    assert "tiny.npz: test set" in out


def test_info(capsys, monkeypatch):
    monkeypatch.setitem(backend._probes, 0, backend.Probe(False, "no GPU in this test"))
    code, out, err = run(capsys, "info")
    assert (code, err) == (0, "")
    for text in (gpubn.__version__, np.__version__, "Python", "Numba", "CuPy", "threads"):
        assert text in out
    assert "device   cpu (auto: CUDA cannot be used: no GPU in this test)" in out
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cuda")
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "device   none: CUDA cannot be used: no GPU in this test" in out


def test_info_names_devices(capsys, device):
    _, out, _ = run(capsys, "info")
    assert ("cuda:0   " in out) == (device.kind == "cuda" or backend.probe().usable)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"gpubn {gpubn.__version__}\n", "")


def test_help_shows_every_flag_with_its_default(capsys):
    code, out, _ = run(capsys, "train --help")
    assert code == 0
    text = " ".join(out.split())
    config = RunConfig()
    for name in config.as_dict():
        assert f"--{name.replace('_', '-')} " in text
    for name in ("learning_rate", "epochs", "batch_size", "dropout_keep_ratio", "weight_scale"):
        assert f"(default: {getattr(config, name)})" in text
    assert all(rule in text for rule in RULES)
    for group in ("data:", "network:", "training:", "run:"):
        assert f"\n{group}\n" in out


@pytest.mark.parametrize("line", ["--help", "train --help", "--version"])
def test_help_imports_nothing_heavy(line):
    script = (
        "import sys; from gpubn import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'numba', 'cupy', 'matplotlib', 'tqdm', 'safetensors', 'tomli_w'};"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    end = subprocess.run(
        [sys.executable, "-c", script, *line.split()], capture_output=True, timeout=TIMEOUT
    )
    assert end.returncode == 0, end.stderr


def test_the_installed_command_is_main():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="gpubn")
    assert script.load() is cli.main


@pytest.mark.parametrize("name", ["GPUBN_NUM_THREADS", "NUMBA_NUM_THREADS"])
def test_a_wrong_number_of_threads_is_told_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpubn.kernels import threads

    monkeypatch.setattr(threads, "_threads", None)
    monkeypatch.setenv(name, "many")
    assert cli.main(["train", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {name} is 'many', expected a whole number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["train", "--out", ""], ["train", "--resume", ""], ["evaluate", ""]]
)
def test_an_empty_path_is_no_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert "is empty, expected a folder" in capsys.readouterr().err
