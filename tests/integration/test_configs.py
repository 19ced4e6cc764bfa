from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rosa_lightning.cli.main import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FULL_RUN = Path(__file__).parents[2] / "configs" / "rosa.yaml"
RECIPES = ("one_gpu", "qlora", "slurm", "two_gpus")
"""What differs from the full run, on other machines."""


def cases() -> Iterator[Any]:
    """Every file with every command, and all commands of one file before others are `slow`."""
    for path in CONFIGS:
        compares = "comparison" in yaml.safe_load(path.read_text())
        for command in ["compare"] if compares else ["fit", "test", "validate", "predict"]:
            slow = command in ("validate", "predict") and path != FULL_RUN
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(path, command, marks=marks, id=f"{command}-{path.stem}")


@pytest.mark.parametrize(("path", "command"), [*cases()])
def test_every_configuration_parses_for_every_command(path, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    files = [FULL_RUN, path] if path.stem in RECIPES else [path]
    with pytest.raises(SystemExit) as exit_:
        main([command, *(f"--config={file}" for file in files), "--print_config"])
    assert exit_.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    for group in ("model", "data", "trainer"):
        for key, value in written.get(group, {}).items():
            if isinstance(value, dict) and "class_path" not in value:
                assert parsed[group][key].items() >= value.items()
            elif not isinstance(value, list | dict):
                assert parsed[group][key] == value
    for key, value in written.get("comparison", {}).items():
        if key == "methods":  # in which classes are given all of their arguments
            assert parsed["comparison"][key].keys() == value.keys()
        else:
            assert parsed["comparison"][key] == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_field_of_a_configuration_is_explained(path):
    """Each setting has a comment on its line or above the run of lines that it stands in."""
    lines = path.read_text().splitlines()
    structure = re.compile(r"^\s*(- )?(class_path|init_args|name|hub|subset|split|weight|path)\b")
    for number, line in enumerate(lines):
        setting = re.match(r"^\s*(?:- )?[\w.]+: .+", line)
        if not setting or structure.match(line) or "#" in line:
            continue
        above = number - 1
        while above >= 0 and not lines[above].strip().startswith("#") and lines[above].strip():
            above -= 1
        assert above >= 0, f"{path.name}:{number + 1}"
        assert lines[above].strip().startswith("#"), f"{path.name}:{number + 1} {line}"
