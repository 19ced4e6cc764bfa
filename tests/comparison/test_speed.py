"""Methods that train in turn: the turns of one, their order, ratios, and the command."""

import io
import json
import subprocess
import sys

import pytest
import yaml
from lightning.pytorch import Trainer
from rich.console import Console

from rosa_lightning import ReasoningDataModule
from rosa_lightning.cli.main import main
from rosa_lightning.cli.names import answer_early
from rosa_lightning.comparison import speed
from rosa_lightning.comparison.plan import ComparisonConfig, Method
from rosa_lightning.comparison.runner import RunFailedError
from rosa_lightning.comparison.speed import TakeTurns, measure_speed, speed_ratio, speed_table
from tests.conftest import rosa_module


def train(base_folder, sources, path, monkeypatch, told):
    data = ReasoningDataModule(sources=sources, batch_size=3, max_length=256, val_fraction=0.1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(told))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TakeTurns(str(path), 2)],
    )
    trainer.fit(rosa_module(base_folder), data)
    turns = [json.loads(line) for line in path.read_text().splitlines()]
    return trainer.global_step, turns


def test_a_training_takes_turns_of_some_optimizer_steps(
    base_folder, sources, tmp_path, monkeypatch
):
    steps, turns = train(base_folder, sources, tmp_path / "turns", monkeypatch, "\n" * 9)
    assert steps == 6
    assert [turn["examples"] for turn in turns] == [12, 12, 12]
    assert all(turn["seconds"] > 0 and turn["tokens"] > 12 for turn in turns)
    assert {turn["backward_share"] for turn in turns} == {1.0}


def test_a_training_ends_when_nobody_gives_it_a_turn(base_folder, sources, tmp_path, monkeypatch):
    steps, turns = train(base_folder, sources, tmp_path / "turns", monkeypatch, "\n")
    assert (steps, len(turns)) == (4, 2)


def turn(seconds, examples=16, **other):
    about = {"tokens": 10 * examples, "peak_mib": 500.0, "backward_share": 0.5}
    return {"seconds": seconds, "examples": examples, **about, **other}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Trainings of numbers alone; the turns that were taken, in their order."""
    taken = []

    class Training:
        def __init__(self, base, overrides, folder):
            assert overrides["trainer"]["max_steps"] == 12
            self.name, self.process = folder.name, subprocess.Popen([sys.executable, "-c", ""])

        def turn(self, number):
            taken.append((self.name, number))
            if self.name == "broken" and number:
                raise RunFailedError("exit status 1: out of memory")
            return turn({"a": 2.0, "b": 4.0}.get(self.name, 1.0) * (1 if number else 100))

    monkeypatch.setattr(speed, "_Training", Training)
    config = ComparisonConfig(
        methods={name: {} for name in ("a", "broken", "b")}, reference="b", folder=str(tmp_path)
    )
    methods = [Method(name, {}, 4, 8000) for name in config.methods]
    said = []
    content = measure_speed(config, methods, steps=3, rounds=3, say=said.append)
    return content, taken, said


def test_methods_alternate_and_the_first_turn_does_not_count(measured):
    content, taken, said = measured
    assert taken[:3] == [("a", 0), ("broken", 0), ("b", 0)]
    assert taken[3:] == [("a", 1), ("broken", 1), ("b", 1), *[(n, r) for r in (2, 3) for n in "ab"]]
    assert [one["seconds"] for one in content["methods"]["a"]["turns"]] == [2.0, 2.0, 2.0]
    assert said[:4] == ["start: a", "start: broken", "start: b", "round 1 of 3: a"]
    assert content["methods"]["broken"]["turns"] == []


def test_the_table_has_ratios_and_why_a_method_failed(measured):
    console = Console(width=120, file=io.StringIO())
    console.print(speed_table(measured[0]))
    text = console.file.getvalue()
    assert "2.00 (2.00 to 2.00)" in text
    assert "broken: exit status 1: out of memory" in text
    assert "8.00" in text  # examples a second: 16 in two seconds


def test_a_ratio_is_of_all_rounds_with_the_lowest_and_the_highest():
    ours, theirs = [turn(1.0), turn(3.0, 32)], [turn(2.0), turn(6.0)]
    # 48 examples in 4 s beside 32 in 8 s; 2 and 4 in the rounds.
    assert speed_ratio(ours, theirs) == "3.00 (2.00 to 4.00)"


def test_counts_below_one_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--speed_only", "--speed_rounds=0", "--model.base=tiny"])
    assert "speed_rounds" in capsys.readouterr().err


def test_the_command_that_this_was_is_named(capsys):
    assert answer_early(["bench", "--config", "configs/tiny.yaml"]) == 2
    assert capsys.readouterr().err == "error: the command bench is compare --speed_only now.\n"


@pytest.mark.slow
def test_the_command_measures_methods_at_a_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}
    plan = {
        "methods": {
            "RoSA": {},
            "LoRA": {"model.peft": lora, "dls.policy": "all"},
            "broken": {"data.sources": "missing.json"},
        },
        "reference": "LoRA",
        "trainable_parameters": 10_000,
    }
    shared = {
        "model": {"base": "tiny"},
        "data": {"sources": "demo", "batch_size": 4},
        "trainer": {"accelerator": "cpu"},
        "comparison": plan,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(shared))
    counts = ["--speed_steps=2", "--speed_rounds=1"]
    assert main(["compare", "--speed_only", "--config", "plan.yaml", *counts]) == 0
    shown = capsys.readouterr().out
    assert "Speed; LoRA = 1" in shown
    assert "missing.json" in shown
    content = json.loads((tmp_path / "comparison" / "speed.json").read_text())
    for name in ("RoSA", "LoRA"):
        (one,) = content["methods"][name]["turns"]
        assert one["examples"] == 8
        assert abs(content["methods"][name]["trainable_parameters"] / 10_000 - 1) < 0.3
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "comparison",
        "plan.yaml",
        "speed.json",
    ]
