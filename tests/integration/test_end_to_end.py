from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from rosa_lightning.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


def logged():
    """What TensorBoard shows of the one run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = Path("lightning_logs").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    return log


def test_the_demonstration_reaches_what_the_readme_says():
    assert main(["fit", "--config", str(CONFIGS / "tiny.yaml")]) == 0
    accuracy = [event.value for event in logged().Scalars("val/accuracy")]
    assert accuracy[0] < 0.2
    assert accuracy[-1] > 0.8


def test_real_data_trains_as_a_weighted_mixture(real_data):
    weights = {"boolq": 0.3, "openbookqa": 0.2, "arc_easy": 0.1, "arc_challenge": 0.1, "gsm8k": 0.3}
    sources = [
        {"path": str(next((real_data / "train").glob(f"{name}.json*"))), "weight": weight}
        for name, weight in weights.items()
    ]
    arguments = ["--model.base", "tiny", "--data.sources", yaml.safe_dump(sources)]
    limits = ["--trainer.max_steps", "200", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", str(CONFIGS / "rosa.yaml"), *arguments, *limits]) == 0
    log = logged()
    losses = [event.value for event in log.Scalars("val/loss")]
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        assert abs(log.Scalars(f"train/share/{name}")[-1].value - weight) < 0.02
