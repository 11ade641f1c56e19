"""Every notebook runs from its first cell to its last, in a fresh kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CELL_SECONDS = 180

# The kernel machinery's own habits, none of them ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_there_is_a_tour() -> None:
    assert ROOT / "notebooks" / "00_tour.py" in NOTEBOOKS


ON_A_GPU = ("05_runtime",)  # what these show on one needs no model that must be pulled


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_notebook_runs_on_a_gpu(name: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")
    run(ROOT / "notebooks" / f"{name}.py", monkeypatch)


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells in a fresh kernel, which sees a GPU where this process does."""
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    # Kernels see the package from a checkout that is not installed too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path, fmt="py:percent")
    assert sum(cell.cell_type == "code" for cell in notebook.cells) > 1, "not in the percent format?"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()  # raises CellExecutionError, which shows the cell and its traceback
