"""The notebook docs/quickstart.ipynb runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("steps", [2, pytest.param(160, marks=pytest.mark.slow)])
def test_the_notebook_runs(steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names = ModuleType("quickstart").__dict__
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS = 160", f"STEPS = {steps}")
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert capsys.readouterr().out.rstrip().endswith("True")  # PEFT's logits are ours
    assert (tmp_path / "quickstart_adapter" / "adapter_config.json").exists()
    if steps == 160:
        assert names["scores"]["test/accuracy"] > 0.8
