"""The notebook: nothing run is kept in git, every cell runs, and its sweep goes on where a killed one stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
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


def start_and_kill(workdir: Path) -> None:
    """The sweep of the notebook's sweep cell, killed as soon as the first rows of the error table stand."""
    errors = workdir / "errors.csv"
    command = [
        sys.executable, "-m", "vlm_jax.sweep", "--config=configs/mini_smoke.py", f"--workdir={workdir}",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 300
    while not errors.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    alive = first.poll() is None
    first.send_signal(signal.SIGKILL)
    _, said = first.communicate()
    assert errors.exists() and alive, said[-2000:]


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs_and_its_sweep_goes_on_where_a_killed_one_stopped(
    tmp_path, smoke
):
    """One sweep for both, since nearly all of its time is compilation: the command is killed, the notebook's cell ends it."""
    workdir = tmp_path / "runs" / "miniature"
    start_and_kill(workdir)
    before = (workdir / "errors.csv").read_text()
    done = {path: path.stat().st_mtime_ns for path in workdir.rglob("final.json")}
    assert done

    notebook = read()
    said = execute(notebook, tmp_path)
    check_sweep(workdir, before, done)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    # A slider's function that raises prints a traceback but does not stop the cell.
    kinds = [o.output_type for found in outputs.values() for o in found]
    assert "error" not in kinds
    assert all(o.get("name") != "stderr" for found in outputs.values() for o in found), said
    pictures = {i: sum("image/png" in o.get("data", {}) for o in f) for i, f in outputs.items()}
    assert {i: n for i, n in pictures.items() if n} == {
        "figure": 2,
        "plan": 1,
        "report": 2,
        "map": 1,
    }
    assert "alpha" in said["fit"] and "qwen1.5-7b with 16 visual tokens" in said["plan"]
    assert "seed 0: quecc-mini-82k-v1" in said["sweep"] and said["report"].count("4 cells") == 2
    assert " -> " in said["ask"]
    assert (workdir / "report.html").is_file()


def check_sweep(workdir: Path, before: str, done: dict[Path, int]) -> None:
    """Nothing was trained twice, the table's lines stayed, and every cell is in table, law, figure and report."""
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    errors = workdir / "errors.csv"
    assert set(before.splitlines()) <= set(errors.read_text().splitlines())
    rows = list(csv.DictReader(errors.open()))
    cells = {(r["compressor"], r["lm"], r["visual_tokens"], r["benchmark"]) for r in rows}
    assert len(rows) == len(cells) == 2 * (2 * 2 + 1)
    laws = json.loads((workdir / "law.json").read_text())["laws"]
    assert set(laws) == {"reasoning", "ocr"}
    page = (workdir / "report.html").read_text()
    assert (workdir / "errors_ocr.png").stat().st_size > 10_000
    for row in rows:
        assert f"{float(row['error']):.3f}" in page
