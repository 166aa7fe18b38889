"""play.ipynb runs from top to bottom, offline, and stores only pictures."""

import json
import os
import shutil
import sys

from conftest import ROOT, TEXT

import pytest

NOTEBOOK = ROOT / "play.ipynb"


def test_it_stores_only_pictures():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert 15 <= len(cells) <= 22
    pictures = 0
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["data"].keys() == {"image/png"}
            pictures += 1
    assert pictures >= 4
    assert NOTEBOOK.stat().st_size < 300_000


def test_it_runs(tmp_path):
    """With a shorter training run, in a copy of the scripts."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("data", "training"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "input.txt").write_text(TEXT * 20)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if "train_gpt2.py" in cell.source and cell.cell_type == "code":
            cell.source = cell.source.replace("!python", "!" + sys.executable) + " --max_steps=20"
            cell.source += " --val_tokens=1000"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=100, resources=resources, kernel_name="python3"
    )
    client.execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert "saved log/tour/model_00020.pt" in texts
    assert "temperature 0.8, top_k 5" in texts
    assert "<- the model" in texts
