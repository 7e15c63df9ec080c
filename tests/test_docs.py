"""The documentation builds, without a warning, and shows what it includes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("sphinx", reason="needs Sphinx: pip install -e '.[docs]'")
pytest.importorskip("myst_parser", reason="needs MyST: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("api", "batchnorm_add_relu_forward"),
        ("derivation", "upstream gradient"),
        ("numerics", "sample order"),
        ("reproducing", "fused multiply-adds"),
        ("from-cs231n", "GPUBN_CIFAR10"),
        ("from-pytorch", "from_torch_state_dict"),
        ("switch", "never falls back"),
        ("getting-started", "handwritten digits"),
        ("training", "checkpoint.safetensors"),
        ("benchmarks", "geometric mean"),
    ],
)
def test_pages(site: Path, page: str, text: str) -> None:
    assert text in (site / f"{page}.html").read_text("utf-8")
