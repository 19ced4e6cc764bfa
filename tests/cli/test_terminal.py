"""What a user sees: in a terminal of several widths, and in a file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from rosa_lightning.cli.main import main
from rosa_lightning.inspection import run_summary
from rosa_lightning.module import RoSAModule
from tests.conftest import write_records
from tests.terminal import terminal


class Talks(Callback):
    """Says something after each batch, and at the end."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rank_zero_info(f"message of batch {batch_idx}")

    def on_train_end(self, trainer, pl_module):
        rank_zero_info("message at the end")

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        rank_zero_info(f"message of batch {batch_idx}")


@pytest.fixture
def settings(base_folder, sources, tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)
    tests = [{"path": str(write_records(tmp_path / "t.json", 5)), "task": "gsm8k"}]
    return {
        "model": {"base": str(base_folder), "evaluation": {"max_new_tokens": 2}},
        "data": {"sources": sources, "batch_size": 4, "val_fraction": 0.1, "test_sources": tests},
        "dls": {"interval": 3},
        "validate_first": True,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 50,
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "callbacks": [
                {"class_path": "rosa_lightning.TokenThroughputMonitor"},
                {"class_path": "tests.cli.test_terminal.Talks"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/loss", "filename": "{step}"},
                },
            ],
        },
    }


def run(command: str, settings: dict, *arguments: str) -> int:
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return main([command, "--config", "config.yaml", *arguments])


def once(lines: list[str], pattern: str) -> int:
    """The place of the only line that a pattern matches."""
    (place,) = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    return place


@pytest.mark.parametrize("width", [80, pytest.param(100, marks=pytest.mark.slow), 160])
def test_a_training_shows_its_plan_one_bar_to_its_end_and_what_came_of_it(
    width, settings, monkeypatch
):
    with terminal(monkeypatch, width) as lines:
        assert run("fit", settings) == 0
    for batch in range(6):
        once(lines, f"^message of batch {batch}$")
    once(lines, "^message at the end$")
    places = [
        once(lines, r"^base  "),
        once(lines, r"^steps  +6 of 4 examples each$"),
        once(lines, r"^layers  .*train at a time"),
        once(lines, r"^before training: val loss"),
        once(lines, r"^step 3: loss .* val loss"),
        once(lines, r"^Training ━+ 6/6 \d:\d\d:\d\d$"),
        once(lines, r"^loss \S+ · val loss \S+ · .*examples/s$"),
        once(lines, r"^done  +6 steps in"),
        once(lines, r"^run  +lightning_logs/version_0$"),
        once(lines, r"^best  +lightning_logs/.*ckpt \(val/loss"),
    ]
    assert places == sorted(places)
    text = "\n".join(lines)
    for noise in ("available", "Tip", "FLOPs", "Loading", "Seed", "stopped", "Epoch"):
        assert noise not in text
    logged = json.loads(Path("lightning_logs/version_0/run.json").read_text())
    assert logged["step"] == 6


@pytest.mark.parametrize("width", [None, 80])
def test_the_commands_at_the_end_run(width, settings, monkeypatch, capsys):
    if width is None:
        assert run("fit", settings) == 0
        lines = capsys.readouterr().err.splitlines()
    else:
        with terminal(monkeypatch, width) as lines:
            assert run("fit", settings) == 0
    text = "\n".join(lines)
    assert (" \\\n" in text) == (width is not None)
    commands = [
        line.split()[3:]
        for line in text.replace("\\\n", "").splitlines()
        if line.startswith("  python -m rosa_lightning")
    ]
    assert [command[0] for command in commands] == ["test", "export"]
    for command in commands:
        assert main(command) == 0
    assert Path("exported", "adapter_config.json").exists()


def test_the_time_at_the_end_is_that_of_all_validations_too(settings, monkeypatch, capsys):
    clock = [0.0]

    def a_minute_passes(module):
        clock[0] += 60
        return validated(module)

    validated = RoSAModule.on_validation_epoch_end
    monkeypatch.setattr(RoSAModule, "on_validation_epoch_end", a_minute_passes)
    monkeypatch.setattr(run_summary, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert run("fit", settings) == 0  # validates before the first step, and after steps 3 and 6
    assert re.search("done +6 steps in 0:03:00", capsys.readouterr().err)


def test_a_run_shorter_than_the_log_interval_logs_its_steps(settings, capsys):
    settings["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": ".", "name": "", "version": "csv"},
    }
    assert run("fit", settings) == 0
    rows = Path("csv/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 6


def test_a_test_ends_its_bar_before_its_table_and_names_no_adapter_of_a_base(settings, monkeypatch):
    with terminal(monkeypatch, 100) as lines:
        assert run("test", settings) == 0
    bar = once(lines, r"^Testing ━+ 2/2")
    assert bar < once(lines, r"Task .*strict|Task .*generate")
    once(lines, r"^message of batch 1$")
    assert not any("adapter" in line or "RoAE" in line for line in lines)


def test_predict_prints_each_answer_and_where_all_are(settings, capsys):
    Path("q.txt").write_text("Is it?\nAnd this?\n")
    assert run("predict", settings, "--data.predict_sources", "q.txt") == 0
    out, err = capsys.readouterr()
    assert out.count("> Is it?") == out.count("> And this?") == 1
    assert "2 answers are in" in err


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("fit", ["--optimizer.lr", "-1"]),
        ("fit", ["--model.base", "missing"]),
        ("test", ["--data.test_sources", "[{path: missing.json}]"]),
        ("predict", []),
    ],
)
def test_a_command_that_fails_leaves_nothing(command, given, settings, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run(command, settings, *given) != 0
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "config.yaml"]


def test_a_run_that_fails_after_its_first_step_is_kept(settings, monkeypatch):
    def fails(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(Talks, "on_train_end", fails)
    with pytest.raises(ValueError, match="a defect"):
        run("fit", settings)
    assert list(Path("lightning_logs/version_0").glob("checkpoints/*.ckpt"))


def test_default_root_dir_decides_where_a_run_goes(settings):
    assert run("fit", settings, "--trainer.default_root_dir", "elsewhere") == 0
    assert list(Path("elsewhere").rglob("*.ckpt"))
    assert not Path("lightning_logs").exists()
