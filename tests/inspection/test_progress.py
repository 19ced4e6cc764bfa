"""What the bar counts, and what is said where there is no terminal."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from rosa_lightning.inspection import progress
from rosa_lightning.inspection.progress import RunProgressBar
from tests.terminal import terminal


class Line(LightningModule):
    """Fits a line, and logs what the bar shows."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(12, 1))


def fit(data, ckpt_path=None, validate=False, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[RunProgressBar()], **quiet, num_sanity_val_steps=0, **settings
    )
    loader = DataLoader(data, batch_size=2)
    trainer.fit(Line(), loader, loader if validate else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({"max_epochs": 3}, "18/18"),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, "9/9"),
        ({"max_steps": 8}, "8/8"),
        ({"max_steps": 8, "max_epochs": -1}, "8/8"),
        ({"max_steps": 80, "max_epochs": 2}, "12/12"),
    ],
)
def test_it_counts_optimizer_steps_to_the_real_end(settings, end, monkeypatch):
    with terminal(monkeypatch, 100) as lines:
        fit(torch.ones(12, 1), **settings)
    (line,) = [line for line in lines if line.startswith("Training")]
    assert f" {end} " in f"{line} "


@pytest.mark.filterwarnings("ignore")
def test_a_stream_without_a_known_end_is_counted_too(monkeypatch):
    with terminal(monkeypatch, 80) as lines:
        fit(Stream(), max_epochs=2)
    (line,) = [line for line in lines if line.startswith("Training")]
    assert "12/?" in line


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_counting(monkeypatch, tmp_path):
    first = fit(torch.ones(12, 1), max_steps=4)
    first.save_checkpoint(tmp_path / "four.ckpt")
    with terminal(monkeypatch, 100) as lines:
        fit(torch.ones(12, 1), tmp_path / "four.ckpt", max_steps=7)
    (line,) = [line for line in lines if line.startswith("Training")]
    assert "7/7" in line


@pytest.mark.filterwarnings("ignore")
def test_in_a_file_a_line_a_minute_and_one_for_each_validation(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", said.append)
    ticks = iter(range(0, 100_000, 10))  # ten seconds at each look
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    fit(torch.ones(12, 1), validate=True, max_epochs=2)
    kinds = [re.sub(r"\d[\d.]*(:\d\d)*", "N", line.partition(" ·")[0]) for line in said]
    assert kinds.count("step N: loss N") == 2
    assert 1 <= sum(kind.startswith("Training N/N: ") for kind in kinds) <= 8
    assert re.match(r"step 6: loss \S+ · val loss \S+$", next(s for s in said if "step" in s))
