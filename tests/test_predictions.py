from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from rosa_lightning.predictions import PredictionWriter


class Echo(LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("broken")
        return [{"index": int(value), "response": "é"} for value in batch]


def predict(tmp_path: Path, writer: PredictionWriter, fail_at: int | None = None) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[writer],
    )
    trainer.predict(Echo(fail_at), DataLoader(torch.arange(5), batch_size=2))


def test_every_record_is_a_line_in_order(tmp_path):
    predict(tmp_path, PredictionWriter())
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["index"] for line in text.splitlines()] == [0, 1, 2, 3, 4]
    assert "é" in text
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_the_file_goes_where_it_is_told(tmp_path):
    predict(tmp_path, PredictionWriter(str(tmp_path / "deep" / "out.jsonl")))
    assert (tmp_path / "deep" / "out.jsonl").exists()


def test_a_run_that_fails_leaves_the_older_file_and_nothing_half_written(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("older\n")
    with pytest.raises(RuntimeError, match="broken"):
        predict(tmp_path, PredictionWriter(), fail_at=1)
    assert (tmp_path / "predictions.jsonl").read_text() == "older\n"
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
