"""The notebook of examples/ does what its text says."""

from __future__ import annotations

import nbclient
import nbformat
import pytest

from tests.small_runs import REPO, environment


@pytest.mark.long
def test_the_notebook_of_own_photos_runs(tmp_path, monkeypatch):
    """On a kernel of its own: from a messy folder to neighbours of the same class, and two pictures."""
    for name, value in environment(PYTHONPATH=f"{REPO}:{REPO / 'examples'}", IPYTHONDIR=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(REPO / "examples" / "own_photos.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs are not kept in the repository"
    client = nbclient.NotebookClient(
        book, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "the nearest picture is of the same class for " in said
    assert int(said.split("same class for ")[1].split("%")[0]) >= 80
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in outputs), "a result is a table"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
