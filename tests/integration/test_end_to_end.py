from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from rosa_lightning.cli.main import main

STEPS = 16


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(base_folder, sources) -> dict:
    """Accumulation, dropout, loader workers, and a selection every fourth step."""
    selection = {"interval": 4, "policy": "sample", "num_active": 2}
    every_step = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    return {
        "seed_everything": 3,
        "model": {
            "base": str(base_folder),
            "roae": {"rank": 4, "dropout": 0.1},
            "max_new_tokens": 8,
        },
        "data": {
            "sources": sources,
            "batch_size": 4,
            "loading": {"num_workers": 2},
            "val_fraction": 0.1,
        },
        "lr_scheduler": {
            "class_path": "rosa_lightning.WarmupCosine",
            "init_args": {"total_steps": STEPS},
        },
        "dls": selection,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": every_step,
                },
            ],
        },
    }


def fit(settings: dict, name: str, *arguments: str) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    options = ["--config", "config.yaml", "--trainer.default_root_dir", name]
    assert main(["fit", *options, *arguments]) == 0


def at_step(name: str, step: int) -> Path:
    (path,) = Path(name).rglob(f"step={step}.ckpt")
    return path


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(first: dict, second: dict) -> None:
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    for ours, theirs in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for index, moments in ours["state"].items():
            assert all(torch.equal(moments[k], theirs["state"][index][k]) for k in moments)
    assert first["lr_schedulers"] == second["lr_schedulers"]


# An epoch has 8 steps: 64 training records, 4 a batch, 2 batches a step.
@pytest.mark.parametrize(
    "stop",
    [pytest.param(6, id="mid-epoch", marks=pytest.mark.slow), pytest.param(11, id="second-epoch")],
)
def test_a_run_that_was_stopped_and_resumed_ends_bit_for_bit_as_one_that_was_not(settings, stop):
    fit(settings, "straight")
    fit(settings, "stopped", "--trainer.max_steps", str(stop))
    fit(settings, "resumed", "--ckpt_path", str(at_step("stopped", stop)))
    assert load(at_step("straight", stop))["epoch"] == stop // 8
    assert_same(load(at_step("straight", STEPS)), load(at_step("resumed", STEPS)))


@pytest.mark.slow
def test_resuming_from_the_middle_of_a_straight_run_gives_its_end(settings):
    fit(settings, "straight")
    fit(settings, "resumed", "--ckpt_path", str(at_step("straight", 7)))
    assert_same(load(at_step("straight", STEPS)), load(at_step("resumed", STEPS)))


def test_dropout_makes_runs_of_different_seeds_differ(settings):
    """Without this, the tests above could pass with generators that are never restored."""
    fit(settings, "one", "--trainer.max_steps", "3")
    fit(settings, "two", "--trainer.max_steps", "3", "--seed_everything", "4")
    first, second = (load(at_step(name, 3))["state_dict"] for name in ("one", "two"))
    assert any(not torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_demonstration_reaches_what_the_readme_says():
    config = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    assert main(["fit", "--config", str(config)]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = Path("lightning_logs").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    accuracy = [event.value for event in log.Scalars("val/accuracy")]
    assert accuracy[0] < 0.2
    assert accuracy[-1] > 0.8


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_real_data_trains_as_a_weighted_mixture(real_data):
    weights = {"boolq": 0.3, "openbookqa": 0.2, "arc_easy": 0.1, "arc_challenge": 0.1, "gsm8k": 0.3}
    suffix = {"gsm8k": "jsonl"}
    sources = [
        {"path": str(real_data / "train" / f"{name}.{suffix.get(name, 'json')}"), "weight": weight}
        for name, weight in weights.items()
    ]
    config = Path(__file__).parents[2] / "configs" / "rosa.yaml"
    arguments = ["--model.base", "tiny", "--data.sources", yaml.safe_dump(sources)]
    limits = ["--trainer.max_steps", "200", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", str(config), *arguments, *limits]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = Path("lightning_logs").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    losses = [event.value for event in log.Scalars("val/loss")]
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        assert abs(log.Scalars(f"data/share/{name}")[-1].value - weight) < 0.02
