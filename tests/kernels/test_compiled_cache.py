"""Compiled kernels are kept on disk while no kernel's text has changed, whatever the disk does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpubn.kernels import cache_numba

# Prints how many of the dtypes' kernels were on disk, then the warnings, a line each.
SCRIPT = """
import sys, warnings
sources, dtypes = sys.argv[1], sys.argv[2].split()
exec(sys.argv[3])
import numpy as np
from gpubn.kernels import cache_numba, compile_numba, relu_numba
cache_numba._sources = lambda: sources
kernel = compile_numba.compiled(relu_numba._forward.py_func)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for dtype in dtypes:
        x, out = np.array([-1, 2, np.nan], dtype), np.empty(3, dtype)
        kernel(x, out, 0, 3)
        assert out[0] == 0 and out[1] == 2 and np.isnan(out[2]), out
print(sum(kernel.stats.cache_hits.values()))
for warning in seen:
    print(warning.message)
"""
Kernels = Callable[..., tuple[int, list[str]]]


def begin(folder: Path, sources: str, dtypes: str, first: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, sources, dtypes, first],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    hits, *warnings = out.splitlines()
    return int(hits), warnings


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    """A process that needs a kernel: how many it found on disk, and the warnings that it gave."""

    def run(
        sources: str = "one", dtypes: str = "float32", first: str = "", **env: str
    ) -> tuple[int, list[str]]:
        return finish(begin(tmp_path, sources, dtypes, first, **env))

    return run


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nbc"))


def test_a_change_in_any_kernels_file_is_seen(kernels: Kernels) -> None:
    texts = "one", "one", "other", "other"
    assert [kernels(sources) for sources in texts] == [(0, []), (1, []), (0, []), (1, [])]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other file"])
def test_what_is_damaged_is_compiled_anew_with_a_warning(
    kernels: Kernels, damage: str, tmp_path: Path
) -> None:
    kernels()
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "other file": b"#!/bin/sh\n" * 1000,
        }[damage]
    )
    assert kernels() == (0, [f"{path} is damaged, and is compiled anew"])
    assert kernels() == (1, [])


def test_a_deleted_folder_is_made_anew(kernels: Kernels, tmp_path: Path) -> None:
    kernels()
    shutil.rmtree(tmp_path)
    assert kernels() == (0, [])
    assert kernels() == (1, [])


@pytest.mark.skipif(os.name != "posix", reason="limits as Unix has them")
def test_a_full_disk_is_no_error_and_leaves_nothing_behind(
    kernels: Kernels, tmp_path: Path
) -> None:
    no_room = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    hits, warnings = kernels(dtypes="float32 float64", first=no_room)
    assert hits == 0
    (text,) = warnings  # once, not for every kernel
    assert text.startswith("compiled kernels cannot be kept, so that each process compiles anew: ")
    assert "File too large" in text
    assert "NUMBA_CACHE_DIR" in text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_folder_is_no_error(kernels: Kernels, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = {
        "NUMBA_CACHE_DIR": str(tmp_path / "file"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    hits, warnings = kernels(dtypes="float32 float64", **nowhere)
    assert hits == 0
    (text,) = warnings
    assert "no folder that may be written to" in text


def test_eight_processes_that_begin_at_once_share_a_folder(
    kernels: Kernels, tmp_path: Path
) -> None:
    """Also where an older text's files are there, and each needs the types in another order."""
    kernels("older", "float32 float64")
    orders = ["float32 float64", "float64 float32"] * 4
    for process in [begin(tmp_path, "one", order, "") for order in orders]:
        finish(process)
    assert kernels("one", "float32 float64") == (2, [])
    assert len(kept(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_a_file_of_other_types_is_never_used(tmp_path: Path) -> None:
    """Were two names equal, what is in the file would tell."""
    files = cache_numba._Files(str(tmp_path), "kernel", "stamp")
    files.save("types", "code")
    assert files.load("types") == "code"
    os.replace(files._path("types"), files._path("other types"))
    assert files.load("other types") is None
    assert files.load("types") is None
