"""The notebooks run from a clean kernel, and print what they hold.

After a change: ``jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb``. What
differs between machines stands in cells with the tag "varies", and is not compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[test]'")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[test]'")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install -e '.[test]'")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shown(cell: Any) -> str:
    """What a cell printed, and its last value."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif "data" in output:
            texts.append(output.data.get("text/plain", ""))
    return "".join(texts)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# An exception in IPython's kernel, not of ours: it warns of its own sockets.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:zmq", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kept, run = (nbformat.read(path, as_version=4) for _ in range(2))
    client = nbclient.NotebookClient(
        run, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert code(kept)
    for old, new in zip(code(kept), code(run), strict=True):
        assert old.execution_count == new.execution_count, "run the notebook as a whole"
        if "varies" in old.metadata.get("tags", []):
            assert bool(old.outputs) == bool(new.outputs)
        else:
            assert shown(old) == shown(new), old.source


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "batch-normalization",
        "one-program-two-devices",
    ]
