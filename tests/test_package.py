"""The wheel holds what the source tree holds, and works without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, for setuptools leaves files in the folder that it builds from.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gpubn", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "kernels")  # gpubn/kernels is a link
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT)).replace("\\", "/")
        for path in (ROOT / "gpubn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "kernels" not in path.parts
    }
    expected |= {
        f"gpubn/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "kernels").iterdir()
        if path.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import numpy as np, gpubn, gpubn.kernels, gpubn.layers, gpubn.nn, gpubn.testing, gpubn.train
assert gpubn.__file__.startswith({str(target)!r}), gpubn.__file__
assert gpubn.kernels.__file__.startswith({str(target)!r}), gpubn.kernels.__file__
from gpubn.kernels.batchnorm_numba import shift
assert shift(np.ones((1, 3, 2, 1), np.float32)).tolist() == [1, 1]
assert gpubn.train.load_data("digits").X_train.shape[1:] == (8, 8)
from importlib.resources import files
assert "real" in (files("gpubn.kernels") / "real.cuh").read_text("utf-8")
try:
    import kernels
except ModuleNotFoundError:
    print("works")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "works"), done.stderr
