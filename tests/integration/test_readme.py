from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("default")
def test_every_python_block_runs_as_a_newcomer_would_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "RoAE on" in capsys.readouterr().out


def test_every_file_and_configuration_that_is_named_exists():
    named = re.findall(r"`([a-z_/]+\.py)`", README) + re.findall(r"configs/\w+\.yaml", README)
    assert named
    for name in set(named):
        assert any((ROOT / folder / name).exists() for folder in ("", "rosa_lightning")), name


def test_every_key_of_the_configuration_table_exists(capsys, monkeypatch):
    import sys

    from rosa_lightning.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rosa"])
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    keys = re.findall(r"`((?:model|data)\.(?!py`)[\w.]+)`", README)
    assert len(keys) > 15
    for key in set(keys):
        assert f"--{key}" in text, key


def test_every_argument_of_the_modules_stands_in_the_table():
    from rosa_lightning import ReasoningDataModule, RoSAModule

    elsewhere = {"model.optimizer", "model.lr_scheduler"}
    for group, kind in (("model", RoSAModule), ("data", ReasoningDataModule)):
        for name in inspect.signature(kind).parameters:
            key = f"{group}.{name}"
            assert key in elsewhere or re.search(rf"^\| .*`{key}[`.]", README, re.MULTILINE), key


def test_every_argument_of_layer_selection_stands_in_its_table_with_its_default():
    from rosa_lightning import DynamicLayerSelection

    parameters = dict(inspect.signature(DynamicLayerSelection).parameters)
    options = parameters.pop("policy_options").default
    defaults_of = {name: parameter.default for name, parameter in parameters.items()}
    defaults_of |= {f"policy_options.{name}": value for name, value in vars(options).items()}
    rows = re.findall(r"^\| (`.+?) \| (`.+?`) \| ", README, flags=re.MULTILINE)
    told = {
        name: yaml.safe_load(default)
        for names, defaults in rows
        for name, default in zip(
            re.findall(r"`([\w.]+)`", names), re.findall(r"`([^`]+)`", defaults), strict=False
        )
    }
    assert {name: told[name] for name in defaults_of} == defaults_of


def test_the_readme_opens_with_its_two_commands():
    first, second = blocks("bash")[:2]
    assert first.strip() == (
        "pip install -e . && python -m rosa_lightning fit --config configs/tiny.yaml"
    )
    assert second.strip() == "pip install -e '.[test]' && pytest"
