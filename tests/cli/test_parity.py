"""``gpubn parity``: what it prints and writes, its exit codes, and how it tells of failures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import host_cuda

from gpubn import backend, cli
from gpubn.backend import is_cuda
from gpubn.kernels import threads
from gpubn.testing.parity import Plan, cases, contestants
from gpubn.testing.parity.comparison import RANDOM, distance
from gpubn.testing.parity.operation import same_as
from gpubn.testing.parity.operations import OPERATIONS
from gpubn.testing.parity.shapes import DTYPES, FLOATS, HALVES, KINDS
from gpubn.testing.tolerance import BOUNDS

TIMEOUT = 180
TINY = {"float16": 2**-14, "bfloat16": 2**-126, "float32": 2**-126, "float64": 2**-1022}
posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups as on POSIX")


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write to a folder of their own, and see no GPU but the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "_probes", {0: backend.Probe(False, "no GPU in this test")})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for another instruction set: it takes seconds to start."""
    monkeypatch.setattr(contestants, "other_instruction_sets", dict)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let an operation of this process compute ReLU in another way, not in half precision."""

    def replaced(run: Callable[..., Any], op: str = "relu") -> None:
        operation = replace(OPERATIONS["relu"], name=op, run=run, dtypes=FLOATS)
        monkeypatch.setitem(OPERATIONS, op, operation)

    return replaced


def parity(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str]:
    code = cli.main(["parity", *shlex.split(line)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def row(out: str, op: str) -> str:
    (line,) = re.findall(rf"^{op} .*", out, re.MULTILINE)
    return line


def written(path: str = "out.json") -> Any:
    return json.loads(Path(path).read_text("utf-8"))


# --- What is the same -----------------------------------------------------------------------------


def test_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    before = threads.get_num_threads(), threads.WORTH_SPLITTING, threads.PIECE
    code, out = parity(capsys, "--quick --op relu --op channel-sum --json out.json")
    assert code == 0
    assert "CUDA     cannot be used: no GPU in this test" in out
    assert "threads  1, 2, 4" in out
    assert "\ncases    332; " in out
    assert re.search(r"^relu +192 +0  0 of 0 ", out, re.MULTILINE)
    assert re.search(r"^channel-sum +140 +0  [\d.]+ of 5 ", out, re.MULTILINE)
    assert "the same bits everywhere\n" in out
    assert out.endswith("\nno CUDA device took part\n")
    assert (threads.get_num_threads(), threads.WORTH_SPLITTING, threads.PIECE) == before

    content = written()
    assert content["same"] is True
    sets = [f", {name}" for name in contestants.other_instruction_sets()]
    expected = [
        *(f"cpu, {n}" for n in ("1 thread", "2 threads", "4 threads")),
        *map("cpu{}".format, sets),
    ]
    assert content["environment"]["contestants"] == expected
    relu, channel_sum = content["operations"]
    assert (relu["op"], relu["cases"], relu["failures"]) == ("relu", 192, [])
    assert relu["results"] == 192 * 2 * (len(expected) - 1)
    assert relu["apart"]["distance"] == 0
    # Of the first contestant those count that it computed in another way, here channels last.
    assert channel_sum["results"] == 140 * (4 * len(expected) - 2)
    assert channel_sum["from float64"]["bound"] == 5


def test_with_a_second_device(capsys: pytest.CaptureFixture[str], alone: None) -> None:
    with host_cuda():
        code, out = parity(capsys, "--quick --op relu --op dropout --json out.json")
    assert code == 0
    assert "cuda:0 (host stand-in)" in out
    assert "cannot be used" not in out
    assert "no CUDA" not in out
    assert "cuda:0" in written()["environment"]["contestants"]
    assert written()["operations"][0]["results"] == 192 * 2 * 3


def test_every_operation_with_a_second_device(
    capsys: pytest.CaptureFixture[str], alone: None
) -> None:
    with host_cuda():
        code, out = parity(capsys, f"{' '.join(f'--op {op}' for op in OPERATIONS)} --seed 20")
    assert code == 0, out
    for op in OPERATIONS:
        assert re.search(rf"^{op} +1 +0  [\d.e-]+ of ", out, re.MULTILINE), out


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_with_a_second_device(
    capsys: pytest.CaptureFixture[str], alone: None, dtype: str
) -> None:
    taking = [op for op, operation in OPERATIONS.items() if dtype in operation.dtypes]
    assert len(taking) == 13
    with host_cuda():
        for op in taking:
            operation = OPERATIONS[op]
            seed = operation.grid().index((operation.shapes.quick[1], dtype, "ordinary"))
            code, out = parity(capsys, f"--op {op} --seed {seed}")
            assert code == 0, out
            assert re.search(rf"^{op} +1 +0  [\d.e-]+ of .* {dtype} ", out, re.MULTILINE), out


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "gpubn", "parity", "--op", "sgd", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"^sgd +1 +0  [\d.]+ of 2 +\(1,\) float32 .*, seed 3: w$", done.stdout, re.MULTILINE
    )


def test_a_seed_is_a_case_of_the_grid(capsys: pytest.CaptureFixture[str], alone: None) -> None:
    parity(capsys, "--quick --op batchnorm --json all.json")
    worst = written("all.json")["operations"][0]["from float64"]
    assert worst["command"] == f"gpubn parity --op batchnorm --seed {worst['seed']}"
    code, out = parity(capsys, f"--op batchnorm --seed {worst['seed']} --json one.json")
    assert code == 0
    one = written("one.json")["operations"][0]
    assert one["cases"] == 1
    assert one["from float64"] == worst
    assert f"seed {worst['seed']}: {worst['result']}" in row(out, "batchnorm")


def test_seeds_beyond_the_grid(capsys: pytest.CaptureFixture[str], alone: None) -> None:
    beyond = len(OPERATIONS["relu"].grid())
    for _ in range(2):
        code, _ = parity(capsys, f"--op relu --seed {beyond + 10**12} --json {_}.json")
        assert code == 0
    assert written("0.json") == written("1.json")


# --- What is not ----------------------------------------------------------------------------------


def test_bits_that_depend_on_the_threads(
    capsys: pytest.CaptureFixture[str], alone: None, replaced: Callable[..., None]
) -> None:
    def run(x: Any, dout: Any) -> dict[str, Any]:
        up = x.dtype.type(threads.get_num_threads() == 4)
        return {"out": np.nextafter(x, x + up), "dx": dout}

    replaced(run, "threaded")
    code, out = parity(capsys, "--op threaded --op relu --quick --json out.json")
    assert code == 1
    assert re.search(r"^threaded +120 +1 .*BROKEN .*: out of cpu, 4 threads$", out, re.MULTILINE)
    assert "the contract is BROKEN by threaded. To see the worst cases again:" in out
    failures = written()["operations"][0]["failures"]
    differed = [each for each in failures if each["contestant"] != "float64 reference"]
    assert {each["contestant"] for each in differed} == {"cpu, 4 threads"}
    assert {each["distance"] for each in differed} == {1}
    assert written()["same"] is False
    assert written()["operations"][1]["failures"] == []
    # The command that is printed shows the failure again.
    (command,) = re.findall(r"^  gpubn (parity --op threaded --seed \d+)$", out, re.MULTILINE)
    assert cli.main(shlex.split(command)) == 1


def test_the_same_but_wrong(
    capsys: pytest.CaptureFixture[str], alone: None, replaced: Callable[..., None]
) -> None:
    replaced(lambda x, dout: {"out": x, "dx": np.where(x > 0, dout, 0)})
    code, out = parity(capsys, "--op relu --quick --json out.json")
    assert code == 1
    assert re.search(r"^relu +120 +0  \S+ of 0 +BROKEN .*: out$", out, re.MULTILINE)
    failures = written()["operations"][0]["failures"]
    assert {each["contestant"] for each in failures} == {"float64 reference"}


def test_a_count_that_is_wrong(
    capsys: pytest.CaptureFixture[str], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = OPERATIONS["count-correct"]

    def run(x: Any, y: Any) -> dict[str, Any]:
        return {"count": counted.run(x, y)["count"] + (len(x) == 5)}

    monkeypatch.setitem(OPERATIONS, "count-correct", replace(counted, run=run))
    code, out = parity(capsys, "--op count-correct --quick")
    assert code == 1
    assert re.search(
        r"^count-correct +120 +0  1 of 0 +BROKEN \(5, 255\) .*: count$", out, re.MULTILINE
    )


def test_a_case_without_a_reference(capsys: pytest.CaptureFixture[str], alone: None) -> None:
    """The squares of these values do not fit: only the devices are compared."""
    operation = OPERATIONS["adam"]
    seed = next(n for n in range(100) if operation.case(n).kind == "near 1e30")
    assert not operation.holds(operation.case(seed))
    _, out = parity(capsys, f"--op adam --seed {seed}")
    assert re.search(r"^adam +1 +0  -$", out, re.MULTILINE)


def test_a_result_of_another_shape_or_name(
    capsys: pytest.CaptureFixture[str], alone: None, replaced: Callable[..., None]
) -> None:
    def run(x: Any, dout: Any) -> dict[str, Any]:
        name = "more" if threads.get_num_threads() == 2 else "dx"
        return {"out": np.maximum(x, 0), "dx": np.where(x > 0, dout, 0), name: x}

    replaced(run, "odd")
    code, out = parity(capsys, "--op odd --seed 0 --json out.json")
    assert code == 1
    assert re.search(r"^odd +1 +inf ", out, re.MULTILINE)
    infinite = [f for f in written()["operations"][0]["failures"] if f["distance"] == "inf"]
    assert "more" in {each["result"] for each in infinite}


def test_a_result_computed_in_another_way(
    capsys: pytest.CaptureFixture[str], alone: None, replaced: Callable[..., None]
) -> None:
    """It has to have the bits of the one that it is named after, of the first contestant too."""

    def run(x: Any, dout: Any) -> dict[str, Any]:
        out, dx = np.maximum(x, x.dtype.type(0)), np.where(x > 0, dout, x.dtype.type(0))
        last = np.nextafter(out, out + out.dtype.type(1)) if x.size == 7 else out
        return {"out": out, "dx": dx, "out, backwards": last}

    replaced(run, "odd")
    code, out = parity(capsys, "--op odd --quick --json out.json")
    assert code == 1
    assert re.search(
        r"BROKEN \(7,\) .*: out, backwards of cpu, 1 thread$", row(out, "odd"), re.MULTILINE
    )
    failures = [f for f in written()["operations"][0]["failures"] if f["shape"] == [7]]
    assert {each["result"] for each in failures} == {"out, backwards"}
    assert {each["contestant"] for each in failures} == {
        "cpu, 1 thread",
        "cpu, 2 threads",
        "cpu, 4 threads",
    }


def bfloat16(*values: float) -> Any:
    return np.array(values).astype(cases.dtype_of("bfloat16"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.float32([1, np.nan]), np.float32([1, -np.nan]), 0),
        (np.float32([1, np.nan]), np.float32([1, 1]), np.inf),
        (np.float64([0.0]), np.float64([-0.0]), 1),
        (np.float32(1), np.nextafter(np.float32(1), np.float32(2)), 1),
        (np.float32([1]), np.float64([1]), np.inf),
        (np.float32([1]), np.float32([[1]]), np.inf),
        (np.array(3), np.array(3), 0),
        (np.array(3), np.array(4), np.inf),
        (np.float32([]), np.float32([]), 0),
        (np.float32([1]), None, np.inf),
        (np.float16([1, np.nan]), np.float16([1, -np.nan]), 0),
        (np.float16([1]), np.float16([1 + 2**-10]), 1),
        (bfloat16(1, np.nan), bfloat16(1, -np.nan), 0),
        (bfloat16(1), bfloat16(1 + 2**-7), 1),
        (bfloat16(0.0), bfloat16(-0.0), 1),
        (bfloat16(-(2.0**-133)), bfloat16(2.0**-133), 3),
        (bfloat16(np.inf), bfloat16(3.38953139e38), 1),
        (bfloat16(1), bfloat16(np.nan), np.inf),
        (bfloat16(1), np.float16([1]), np.inf),
    ],
)
def test_distance(a: Any, b: Any, expected: float) -> None:
    assert distance(np.asarray(a), b if b is None else np.asarray(b)) == expected


# --- What cannot be computed ----------------------------------------------------------------------


def dead(code: str) -> Callable[[], list[str]]:
    return lambda: [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('first\\nno compiler', file=sys.stderr); sys.exit(3)", "no compiler"),
        ("", "nothing on its standard error"),
        ("print('what is this?')", "exit code 0"),
        (
            """print('{"op": "relu", "seed": 0, "results": [{"name": "out", "shape": [1000], """
            """"dtype": "<f4"}]}')""",
            "exit code 0",
        ),
        ("""print('{"op": "relu", "seed": 7, "results": []}')""", "another case: relu, seed 7"),
    ],
)
def test_a_child_that_dies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: str, expected: str
) -> None:
    monkeypatch.setattr(contestants, "other_instruction_sets", lambda: {"generic": "plain"})
    monkeypatch.setattr(contestants, "_command", dead(code))
    exit_code, out = parity(capsys, "--quick --op relu --op sgd --json out.json")
    assert exit_code == 1
    assert "ERROR cpu, generic, seed 0" in row(out, "relu")
    assert "ERROR: cpu, generic failed in gpubn parity --op relu --seed 0: its process" in out
    assert expected in out
    relu, sgd = written()["operations"]
    assert written()["same"] is False
    assert relu["errors"][0]["contestant"] == "cpu, generic"
    assert expected in relu["errors"][0]["reason"]
    assert (relu["results"], sgd["results"]) == (192 * 2 * 2, 120 * 2)  # the others went on
    assert sgd["errors"] == []


def test_a_device_that_fails_in_one_operation(
    capsys: pytest.CaptureFixture[str], alone: None, replaced: Callable[..., None]
) -> None:
    relu = OPERATIONS["relu"].run

    def run(x: Any, dout: Any) -> Any:
        if is_cuda(x) and x.size == 7:
            raise RuntimeError("out of registers")
        return relu(x=x, dout=dout)

    replaced(run, "failing")
    with host_cuda():
        code, out = parity(capsys, "--quick --op failing --op relu --json out.json")
    assert code == 1
    first = OPERATIONS["relu"].grid().index(((7,), "float32", "ordinary"))
    assert f"ERROR cuda:0, seed {first}" in row(out, "failing")
    assert out.count("out of registers") == 1  # not once for every case
    failing, whole = written()["operations"]
    assert failing["results"] == 120 * 2 * 2 + first * 2
    assert whole["results"] == 192 * 2 * 3


def test_without_bfloat16(
    capsys: pytest.CaptureFixture[str], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other cases keep their numbers."""
    bfloat16 = OPERATIONS["relu"].grid().index(((1,), "bfloat16", "ordinary"))
    parity(capsys, "--op relu --quick --json with.json")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    code, out = parity(capsys, "--op relu --quick --json without.json")
    assert code == 0
    assert "bfloat16 cannot be used: NumPy has it from ml_dtypes, which is not installed" in out
    assert "\ncases    156; " in out
    assert re.search(r"^relu +156 +0  0 of 0 ", out, re.MULTILINE)
    assert written("with.json")["operations"][0]["apart"]["seed"] == 0
    assert cli.main(["parity", "--op", "relu", "--seed", str(bfloat16)]) == 2
    assert f"seed {bfloat16} of relu is of bfloat16: NumPy has it" in capsys.readouterr().err


# --- Another instruction set ----------------------------------------------------------------------


def test_the_child_compiles_for_its_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2")  # of this process, not the child's
    code = "from numba.core.registry import cpu_target; t = cpu_target.target_context.codegen()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(t.magic_tuple()[1:])"],
        env=contestants._environment("generic", str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert done.stdout.strip() == "('generic', '')"


def test_the_childs_code_is_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert contestants._cache_folder("generic") == str(tmp_path / "numba" / "gpubn-generic")
    assert (tmp_path / "numba" / "gpubn-generic").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert contestants._cache_folder("generic") is None


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("x86_64", ["generic"]), ("AMD64", ["generic"]), ("aarch64", ["generic"]), ("riscv64", [])],
)
def test_architectures(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    expected: list[str],
) -> None:
    monkeypatch.setattr(contestants.platform, "machine", lambda: machine)
    assert list(contestants.other_instruction_sets()) == expected
    monkeypatch.setattr(contestants, "own_instruction_set", lambda: "generic")
    assert contestants.other_instruction_sets() == {}
    code, out = parity(capsys, "--op relu --seed 0")
    assert code == 0
    assert "compiled for generic (this process), no other to compare with here" in out


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--op relux", f"op is 'relux', expected one of {', '.join(OPERATIONS)}"),
        ("--op relu --op relux", "op is 'relux'"),
        ("--seed 3", "seed is 3 without an operation, expected --op OP beside it"),
        ("--op relu --seed -1", "seed is -1, expected the number of a case, at least 0"),
        ("--op relu --seed 1.5", "invalid int value: '1.5'"),
        ("--op relu --seed 3 --quick", "quick is set beside a seed, expected one of the two"),
        ("--json ''", "--json is '', expected a file"),
        ("--json -", "--json is '-', expected a file"),
        ("--json no/such/file", "--json is no/such/file, and there is no folder no/such"),
        ("--json .", "--json is ., a folder, expected a file"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    assert cli.main(["parity", *shlex.split(line)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gpubn: error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_an_operation_given_twice_runs_once(
    capsys: pytest.CaptureFixture[str], alone: None
) -> None:
    _, out = parity(capsys, "--op relu --op relu --seed 0")
    assert "\ncases    1; " in out


def test_a_bar_where_tqdm_draws_one(
    capfd: pytest.CaptureFixture[str], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_terminal", lambda: True)
    monkeypatch.setattr(cli.os, "get_terminal_size", lambda fd: os.terminal_size((100, 30)))
    assert cli.main(["parity", "--quick", "--op", "relu"]) == 0
    out, err = capfd.readouterr()
    assert row(out, "relu")
    assert "relu" in err
    assert "0/192" in err
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["parity", "--op", "relu", "--seed", "0"]) == 0
    assert capfd.readouterr().err == ""


@posix
def test_ctrl_c_ends_the_children_too() -> None:
    run = subprocess.Popen(
        [sys.executable, "-u", "-m", "gpubn", "parity"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert run.stdout is not None
        # The head of the table is printed when the children have been started.
        assert any(line.startswith(b"op ") for line in run.stdout)
        os.kill(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=TIMEOUT)
        assert (run.returncode, err) == (128 + signal.SIGINT, b"gpubn: stopped\n")
        with pytest.raises(ProcessLookupError):  # no one is left in the group
            os.killpg(run.pid, 0)
    finally:
        with_no_one_left(run)


def with_no_one_left(run: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


# --- Cases ----------------------------------------------------------------------------------------


@pytest.fixture(params=OPERATIONS)
def op(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


def test_quick_cases_are_the_grids_first(op: str) -> None:
    operation = OPERATIONS[op]
    quick, full = operation.grid(quick=True), operation.grid()
    assert full[: len(quick)] == quick
    assert len(set(full)) == len(full)
    assert Plan.of([op], quick=True).seeds == {op: range(len(quick))}
    assert Plan.of([op]).seeds == {op: range(len(full) + RANDOM)}
    assert {dtype for _, dtype, _ in quick} == set(operation.dtypes)
    assert {kind for _, _, kind in quick} == set(KINDS)
    # Some are large enough to be split among threads in pieces as large as in use.
    assert any(np.prod(shape) >= 8 * threads.PIECE for shape, _, _ in full)


def test_every_result_is_held_to_a_bound(op: str) -> None:
    operation = OPERATIONS[op]
    held = [case for case in map(operation.case, range(200)) if operation.holds(case)]
    assert {case.kind for case in held} >= {"ordinary", "mean 1e6", "subnormal"}
    assert {case.dtype for case in held} == set(operation.dtypes)
    firsts = {case.dtype: case for case in reversed(held)}
    for case in firsts.values():
        arguments = operation.draw(case)
        results = contestants.compute(contestants.CPU, op, arguments)
        expected = operation.expected(arguments, results)
        assert expected.keys() == set(map(same_as, results))
        assert {each.row for each in expected.values()} <= BOUNDS.keys()


def test_a_case_is_the_same_whenever_it_is_drawn(op: str) -> None:
    operation = OPERATIONS[op]
    for seed in (0, 3, 150, 10**6):
        case = operation.case(seed)
        assert operation.case(seed) == case
        a, b = operation.draw(case), operation.draw(case)
        assert a.keys() == b.keys()
        for name, value in a.items():
            np.testing.assert_array_equal(value, b[name])


def test_operations_draw_different_numbers() -> None:
    drawn = [OPERATIONS[op].draw(OPERATIONS[op].case(0))["w"] for op in ("sgd", "adam")]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_are_what_they_say(dtype: str) -> None:
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        x = {kind: cases.values(kind, (30, 40), dtype, rng) for kind in KINDS}
        squares, square = np.square(x["near 1e30"]), np.square(x["outlier"].max())
        x = {kind: array.astype(np.float64) for kind, array in of_dtype(x, dtype).items()}
    assert np.isinf(squares).mean() > 0.9
    assert np.isfinite(x["near 1e30"]).mean() > 0.9  # a few are too large for float16
    assert np.abs(x["subnormal"]).max() < float(cases.dtype_of(dtype).type(TINY[dtype]))
    assert np.count_nonzero(x["subnormal"]) > (1100 if dtype in HALVES else 1199)
    zeros = x["signed zeros"][x["signed zeros"] == 0]
    assert 0.4 < np.signbit(zeros).mean() < 0.6
    assert np.isnan(x["NaN"]).any()
    assert np.isinf(x["infinities"]).any()
    assert np.unique(x["constant"]).size == 1
    assert np.isinf(square)


def of_dtype(arrays: dict[str, Any], dtype: str) -> dict[str, Any]:
    assert {(array.dtype.name, array.shape) for array in arrays.values()} == {(dtype, (30, 40))}
    return arrays


def test_every_operation_of_the_layers_and_rules_is_there() -> None:
    from gpubn import layers
    from gpubn.train.optim import RULES

    names = {name for name in layers.__all__ if not name.endswith(("_backward", "_gradients"))}
    names = {name.removesuffix("_forward") for name in names - {"batchnorm_backward_alt"}}
    names = {name.replace("_", "-") for name in names}
    # These are made of the others, and nothing else.
    assert names - set(OPERATIONS) == {"affine-relu", "affine-bn-relu", "spatial-groupnorm"}
    assert set(RULES) <= set(OPERATIONS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_json_replaces_nothing_but_files(capsys: Any, tmp_path: Path) -> None:
    os.mkfifo("pipe")
    assert cli.main(["parity", "--op", "relu", "--seed", "0", "--json", "pipe"]) == 2
    assert "--json is pipe, which is no regular file" in capsys.readouterr().err
    Path("real.json").write_text("")
    os.symlink("real.json", "link.json")
    assert cli.main(["parity", "--op", "relu", "--seed", "0", "--json", "link.json"]) == 0
    assert Path("link.json").is_symlink()
    assert written("real.json")["same"]
    assert cli.main(["parity", "--op", "relu", "--seed", "0", "--json", "/proc/x"]) == 2
    assert "--json is /proc/x, which cannot be written" in capsys.readouterr().err


def test_numba_must_be_allowed_to_compile(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert cli.main(["parity", "--op", "relu", "--seed", "0"]) == 2
    assert "NUMBA_DISABLE_JIT is set" in capsys.readouterr().err


def test_what_has_no_reference_is_not_said_to_be_right(capsys: Any) -> None:
    assert cli.main(["parity", "--op", "matmul", "--seed", "100000"]) == 0
    out = capsys.readouterr().out
    assert "no case was compared with float64" in out
