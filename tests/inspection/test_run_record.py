"""The record of a run, whole and resumed."""

import json
from itertools import count

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rosa_lightning import DynamicLayerSelection, ReasoningDataModule, RoSAModule, RunRecorder
from rosa_lightning.inspection import run_record


def fit(folder, steps, ckpt_path=None, more=()):
    selection = DynamicLayerSelection(0.5, interval=2)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        limit_val_batches=1,
        val_check_interval=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            selection,
            ModelCheckpoint(folder, monitor="val/loss", save_last=True),
            RunRecorder(str(folder / "run.json")),
            *more,
        ],
    )
    module = RoSAModule("tiny")
    trainer.fit(module, ReasoningDataModule(sources="demo", batch_size=4), ckpt_path=ckpt_path)
    return json.loads((folder / "run.json").read_text()), selection, module, trainer


def test_what_was_trained_and_for_how_long(tmp_path, monkeypatch):
    ticks = count()
    monkeypatch.setattr(run_record.time, "perf_counter", lambda: float(next(ticks)))
    record, selection, module, trainer = fit(tmp_path, 4)
    assert (record["status"], record["step"], record["examples"]) == ("finished", 4, 16)
    assert record["trainable_parameters"] == module.report.num_trainable
    assert record["total_parameters"] == module.report.num_total
    assert record["backward_share"] == selection.backward_share
    assert [one["step"] for one in record["validations"]] == [2, 4]
    loss = record["validations"][-1]["val/loss"]
    assert loss == float(trainer.callback_metrics["val/loss"])
    assert record["checkpoint"] == trainer.checkpoint_callback.best_model_path
    assert record["train_seconds"] >= 4  # a tick or more for each step
    assert record["peak_mib"] > 0


class Raises(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(SIGTERMException(143), "stopped"), (RuntimeError("broken"), "failed")],
)
def test_a_run_that_does_not_come_to_its_end_says_so(tmp_path, error, status):
    with pytest.raises(type(error)):
        fit(tmp_path, 6, more=[Raises(error)])
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["step"]) == (status, 3)


def test_a_resumed_run_adds_up(tmp_path):
    first, *_ = fit(tmp_path, 4)
    second, *_ = fit(tmp_path, 6, tmp_path / "last.ckpt")
    assert (second["step"], second["examples"]) == (6, 24)
    assert [one["step"] for one in second["validations"]] == [2, 4, 6]
    assert second["train_seconds"] > first["train_seconds"]
