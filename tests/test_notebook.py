"""notebooks/your_photos.py runs as a notebook, from the first cell to the last."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(ROOT / "notebooks" / "your_photos.py")
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": tmp_path}}
    ).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    scores = json.loads((tmp_path / "notebook-run" / "scores.json").read_text())
    lines = (tmp_path / "notebook-run" / "scores" / "predictions.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    for task in ("point", "count"):
        own = [value["score"] for value in values if value["task"] == task]
        assert len(own) == 6 and scores[task] == pytest.approx(sum(own) / 6)
    shown = [output for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in output["data"] for output in shown) == 3
    assert any("F1 of points" in output["data"].get("text/markdown", "") for output in shown)
