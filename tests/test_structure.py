"""The rules of the layout: which way imports run, and that the kernels are pairs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import host_cuda

ROOT = Path(__file__).parent.parent
# Each may import those before it, and itself.
ROOMS = (
    "gpubn.backend",
    "gpubn.interop",
    "gpubn.kernels",
    "gpubn.layers",
    "gpubn.nn",
    "gpubn.train",
    "gpubn.cs231n",
    "gpubn.experiments",
    "gpubn.cli",
)
CLI = ROOT / "gpubn" / "cli.py"
SOURCES = sorted([*(ROOT / "gpubn").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "gpubn" else ("gpubn", *parts))
    return name.removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, types excepted."""
    yield from imported_by(ast.parse(path.read_text("utf-8")), str(path))


def imported_by(tree: ast.AST, path: str = "") -> Iterator[str]:
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    return next((r for r in (*ROOMS, "gpubn.testing") if f"{name}.".startswith(f"{r}.")), None)


def test_imports_run_one_way() -> None:
    assert len(SOURCES) > 20
    for path in SOURCES:
        if path.is_relative_to(ROOT / "gpubn" / "kernels"):
            continue  # the link to kernels/
        mine = room(module_name(path))
        if mine is None or mine == "gpubn.testing":
            continue
        for imported in imports(path):
            other = room(imported)
            if other == "gpubn.testing":
                check = path.name == "gradient_check.py"  # the assignment's module for tests
                assert path == CLI or check, f"{path} imports {imported}: that is for tests"
            elif other is not None:
                assert ROOMS.index(other) <= ROOMS.index(mine), f"{path} imports {imported}"


def test_the_command_line_imports_of_testing_only_parity_and_that_in_its_command() -> None:
    # gpubn parity is a test that users run; no other command may need what is for tests.
    tree = ast.parse(CLI.read_text("utf-8"))
    (command,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_parity"
    )

    def of_testing(node: ast.AST) -> list[str]:
        return [name for name in imported_by(node) if room(name) == "gpubn.testing"]

    assert of_testing(command) == ["gpubn.testing", "gpubn.testing.parity"]
    assert of_testing(tree) == of_testing(command)


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["train", "--help"]])
def test_other_commands_do_not_import_testing(arguments: list[str]) -> None:
    code = f"""
import sys, gpubn, gpubn.cli
gpubn.cli.main({arguments})
print([name for name in sys.modules if name.startswith("gpubn.testing")], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_who_may_import_cupy_and_numba() -> None:
    for path in SOURCES:
        packages = {name.partition(".")[0] for name in imports(path)}
        if not path.stem.endswith("_cuda"):
            # backend.py imports it by name, where it tries CUDA.
            assert "cupy" not in packages, path
        if not path.stem.endswith("_numba"):
            assert "numba" not in packages, path


PAIRS = sorted(
    path.name.removesuffix("_cuda.py")
    for path in (ROOT / "kernels").glob("*_cuda.py")
    if not path.name.startswith("compile")
)


def test_every_kernel_has_its_pair() -> None:
    halves = {p.stem for p in (ROOT / "kernels").glob("*.py") if "_" in p.stem.strip("_")}
    # The other halves of real.cuh, of samples.cuh, of rows.cuh; and what CUDA has itself.
    shared = {"compile_cuda", "compile_numba", "real_numba", "vectors_numba"}
    shared |= {"buffers_numba", "columns_numba", "planes_numba", "rows_numba", "threads_numba"}
    shared |= {"cache_numba", "subnormals_numba"}
    assert halves - shared == {f"{op}_{device}" for op in PAIRS for device in ("cuda", "numba")}


def functions(module: ModuleType) -> dict[str, inspect.Signature]:
    """What other modules call: the functions that a kernel module documents as its own."""
    return {
        name: inspect.signature(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        # How a device reduces channels, and what Numba's compiled code calls for a scalar.
        and not re.match("reduce_\\w+|merge_parts|middle|\\w+_of", name)
    }


@pytest.mark.parametrize("op", PAIRS)
def test_pairs_have_the_same_functions(op: str) -> None:
    with host_cuda():
        cuda = functions(importlib.import_module(f"gpubn.kernels.{op}_cuda"))
    numba = functions(importlib.import_module(f"gpubn.kernels.{op}_numba"))
    assert cuda == numba
    assert cuda


def test_kernels_go_by_one_name_only() -> None:
    import runpy

    with pytest.raises(ImportError, match=r"gpubn\.kernels"):
        runpy.run_path(str(ROOT / "kernels" / "__init__.py"), run_name="kernels")


def test_sizes_are_the_same_in_cuda_and_python() -> None:
    kernels = ROOT / "kernels"
    constants = dict(
        re.findall(
            r"^const int (\w+) = (\d+);",
            "\n".join(path.read_text("utf-8") for path in kernels.glob("*.cuh")),
            re.MULTILINE,
        )
    )
    with host_cuda():
        samples = importlib.import_module("gpubn.kernels.samples_cuda")
        sizes = {name: getattr(samples, name) for name in ("THREADS", "WIDE", "LEAVES")}
        rows = importlib.import_module("gpubn.kernels.layernorm_cuda")
        sizes |= {name: getattr(rows, name) for name in ("MAX_TEAM", "MERGED")}
    assert sizes == {name: int(constants[name]) for name in sizes}
