"""The notebook runs from top to bottom without a network, and is committed with the output of a whole run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "lotlip.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_it_is_committed_with_the_outputs_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = printed(notebook)
    assert "checkpoint-700" in text
    assert not re.search(r"(?<![\w.])/\w", text)  # a path of a machine
    assert NOTEBOOK.stat().st_size < 500_000
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOTLIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("LOTLIP_NOTEBOOK_PICTURES", "24")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = printed(notebook)
    assert "checkpoint-2" in text
    assert "24 images" in text
    assert (tmp_path / "lotlip-notebook" / "long.png").is_file()
