"""The benchmarks run, on shapes so small that their times say nothing, and refuse what is wrong."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpubn import layers

ROOT = Path(__file__).parent.parent
TINY = ("--device", "cpu", "--tiny", "--peer")  # no peer: PyTorch need not be there
WHOLE = {"forward", "backward", "forward+backward"}
DIRECTIONS = {
    "batchnorm": WHOLE | {"test"},
    "batchnorm_relu": WHOLE,
    "layernorm": WHOLE,
    "groupnorm": WHOLE,
    "rmsnorm": WHOLE,
    "relu": WHOLE,
    "dropout": WHOLE,
    "optimizer": {"update"},
    "step": {"step"},
}


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the benchmarks, which lie beside the package and are not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the environment and the rows of a CSV file."""
    lines = path.read_text("utf-8").splitlines()
    facts = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    return dict(facts), list(csv.DictReader(line for line in lines if line[0] != "#"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The environment and the rows of one run of every op."""
    path = tmp_path_factory.mktemp("benchmarks") / "folder" / "times.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        main = importlib.import_module("benchmarks.__main__").main
        assert main([*TINY, "--op", *DIRECTIONS, "--out", str(path)]) == 0
    return read(path)


def test_the_environment_is_recorded(table: Any) -> None:
    facts, _ = table
    assert {"date", "commit", "tree", "cpu", "threads", "numpy", "numba", "torch"} <= facts.keys()


@pytest.mark.parametrize("op", DIRECTIONS)
def test_every_op_has_its_rows(op: str, table: Any, benchmark_module: Callable[[str], Any]) -> None:
    rows = [row for row in table[1] if row["op"].partition(" ")[0] == op]
    assert {row["direction"] for row in rows} == DIRECTIONS[op]
    for row in rows:
        assert tuple(row) == benchmark_module("report").COLUMNS
        assert row["dtype"] == "float32"
        assert row["buffers"] == "fresh"
        median, p20, p80 = (float(row[f"gpubn_{what}us"]) for what in ("", "p20_", "p80_"))
        assert 0 < p20 <= median <= p80
        assert row["ratio"] == row["torch_us"] == ""
        assert (float(row["of_copy"]) > 0) if op != "step" else (row["of_copy"] == "")


def test_every_op_is_known(benchmark_module: Callable[[str], Any]) -> None:
    assert set(benchmark_module("__main__").OPS) == set(DIRECTIONS)


def test_bytes_are_those_that_must_move(table: Any) -> None:
    passes = {}
    for row in table[1]:
        if row["op"] == "batchnorm":
            nbytes = 4 * np.prod([int(length) for length in row["shape"].split("x")])
            passes[row["layout"], row["direction"]] = int(row["bytes"]) / nbytes
    assert passes == {
        **{("NCHW", "forward"): 2, ("NCHW", "backward"): 3, ("NCHW", "forward+backward"): 5},
        **{("NHWC", "forward"): 3, ("NHWC", "backward"): 5, ("NHWC", "forward+backward"): 8},
        **{("2-D", "forward"): 3, ("2-D", "backward"): 5, ("2-D", "forward+backward"): 8},
        **{(layout, "test"): 2 for layout in ("NCHW", "NHWC", "2-D")},
    }


def test_a_wrong_result_is_not_timed(
    benchmark_module: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right, harness = layers.layernorm_forward, benchmark_module("harness")
    calls: list[str] = []

    def wrong(*arguments: Any) -> tuple[Any, Any]:
        out, cache = right(*arguments)
        return out + 1, cache

    monkeypatch.setattr(layers, "layernorm_forward", wrong)
    monkeypatch.setattr(harness, "_turn", lambda *rest: calls.append("turn") or [1.0])
    path = tmp_path / "times.csv"
    arguments = [*TINY, "--op", "layernorm", "--out", str(path)]
    assert benchmark_module("__main__").main(arguments) == 1
    printed = capsys.readouterr().out
    assert "NOT TIMED: gpubn, layernorm forward (4, 6) 2-D float32: out is off by 1" in printed
    assert [row["direction"] for row in read(path)[1]] == ["backward"]
    assert len(calls) == harness.ROUNDS * 2  # the backward pass and its copy


def test_a_wrong_peer_is_left_out(
    benchmark_module: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    harness, checks = benchmark_module("harness"), benchmark_module("checks")

    def check(name: str, results: Any) -> None:
        if results["out"]:
            raise checks.WrongResult("out is wrong")

    def contestant(name: str, value: int) -> Any:
        return harness.Contestant(name, lambda: lambda: value, lambda value: {"out": value})

    ways = (contestant(harness.OURS, 0), contestant("torch", 1), contestant("torch_fused", 0))
    case = harness.Case("op", "forward", (1,), "2-D", "float32", 4, 0, ways, check)
    with_cpu = importlib.import_module("gpubn.backend").resolve("cpu")
    assert set(harness.measure(case, with_cpu, 0.0)) == {harness.OURS, "torch_fused"}
    assert "torch is left out of op forward" in capsys.readouterr().out


def test_reuse_takes_what_has_out(
    benchmark_module: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward, buffers = layers.relu_forward, []

    def with_out(x: Any, out: Any = None) -> tuple[Any, Any]:
        result, cache = forward(x)
        out[...] = result
        buffers.append(id(out))
        return out, cache

    def without(dout: Any, cache: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(layers, "relu_forward", with_out)
    monkeypatch.setattr(layers, "relu_backward", without)
    path = tmp_path / "times.csv"
    arguments = [*TINY, "--reuse", "--op", "relu", "--out", str(path)]
    benchmark_module("layer").note.cache_clear()
    assert benchmark_module("__main__").main(arguments) == 0
    assert [(row["direction"], row["buffers"]) for row in read(path)[1]] == [("forward", "reused")]
    assert len(set(buffers)) == 1
    assert "relu backward is left out: no out= in relu_backward" in capsys.readouterr().out


def test_charts_are_drawn(benchmark_module: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.png"
    ops = ["--op", "relu", "dropout", "--plot", str(chart)]
    assert benchmark_module("__main__").main([*TINY, *ops]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"chart-relu.png", "chart-dropout.png"}


def test_sizes(
    benchmark_module: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = benchmark_module("sizes")
    monkeypatch.setattr(sizes, "QUICK_SECONDS", 0.0)
    path = tmp_path / "sizes.csv"
    arguments = ["--device", "cpu", "--quick", "--most", "10", "--out", str(path)]
    assert sizes.main(arguments) == 0
    assert len(read(path)[1]) == 2 * 8  # two sizes of every line
    assert "batchnorm backward   largest step" in capsys.readouterr().out
    assert "2.00, from 2 to 4" in sizes.largest_step("op", {1: 8.0, 2: 8.0, 4: 32.0})
