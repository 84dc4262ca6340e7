"""The notebook: nothing run is kept in git, and every cell runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "scripts" / "colab.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> dict[str, str]:
    """Runs every cell in `folder`; id -> the text it printed. Raises CellExecutionError where a cell does."""
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}})
    # Without a twin of the Output widget, what sliders print is the cell's own output; the twin can also wait forever for
    # a reply that came already (github.com/jupyter/nbclient/issues/312).
    client.widget_registry = {}
    client.execute()
    return {cell.id: "".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in notebook.cells}  # fmt: skip


@pytest.fixture
def smoke(monkeypatch):
    monkeypatch.setenv("VLM_JAX_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_notebook_is_valid_and_keeps_no_outputs():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 6
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None and cell.metadata == {}, cell.id


def test_a_cell_that_raises_fails_the_run(tmp_path, smoke):
    notebook = read()
    notebook.cells = [nbformat.v4.new_code_cell("1 / 0", id="wrong")]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook, tmp_path)


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, smoke):
    notebook = read()
    said = execute(notebook, tmp_path)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    # A slider's function that raises prints a traceback but does not stop the cell.
    kinds = [o.output_type for found in outputs.values() for o in found]
    assert "error" not in kinds
    assert all(o.get("name") != "stderr" for found in outputs.values() for o in found), said
    pictures = {i: sum("image/png" in o.get("data", {}) for o in f) for i, f in outputs.items()}
    assert {i: n for i, n in pictures.items() if n} == {"figure": 2, "plan": 1, "report": 2}
    assert "alpha" in said["fit"] and "qwen1.5-7b with 16 visual tokens" in said["plan"]
    assert "5/5 seed 0 quecc" in said["sweep"] and said["report"].count("4 cells") == 2
    assert (tmp_path / "runs" / "miniature" / "report.html").is_file()
