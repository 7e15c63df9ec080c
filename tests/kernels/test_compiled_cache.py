"""What Numba keeps on disk is used again only while no kernel's text has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import numpy as np
from gpubn.kernels import compile_numba, relu_numba
compile_numba._sources = lambda: sys.argv[1]
kernel = compile_numba.compiled(relu_numba._forward.py_func)
x = np.ones(3, np.float32)
kernel(x, x.copy(), 0, 3)
print(sum(kernel.stats.cache_hits.values()))
"""


@pytest.fixture
def hits(tmp_path: Path):
    """A process that compiles a kernel, where all kernels' text has a hash: how many it found."""

    def run(sources: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, sources],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    return run


def test_a_change_in_any_kernels_file_is_seen(hits) -> None:
    assert [hits("one"), hits("one"), hits("other"), hits("other")] == [0, 1, 0, 1]
