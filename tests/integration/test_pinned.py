"""What earlier versions trained and wrote: losses stay, and checkpoints and adapters load.

`pinned/` holds the losses of 100 steps of `configs/tiny.yaml` (float32, one thread), a checkpoint
of six steps, and the adapter in it as exported for this package and for PEFT.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosa_lightning import load_adapter
from rosa_lightning.cli.main import main
from rosa_lightning.models import tiny

PINNED = Path(__file__).parent / "pinned"
CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LOGITS = [-7.083056449890137, 2.937856435775757, 3.981388807296753, 4.573359966278076]
OF_THE_BASE = [-7.083703517913818, 2.934520959854126, 3.97686767578125, 4.562214374542236]


def losses_of(folder: Path, **options: Any) -> list[float]:
    """Training losses of the demonstration, as the shipped configuration runs it."""
    options = {
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.save_dir": folder,
        "data.loading.val_generate": 0,
        "lr_scheduler": "rosa_lightning.WarmupCosine",
        "lr_scheduler.total_steps": 100,
        **options,
    }
    assert main(["fit", "--config", str(CONFIG), *(f"--{k}={v}" for k, v in options.items())]) == 0
    (table,) = folder.rglob("metrics.csv")
    with table.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


LONG = {"marks": pytest.mark.slow}
CPU = Path("/proc/cpuinfo")
SAME_CPU = CPU.exists() and "AuthenticAMD" in CPU.read_text()
"""Whether products are rounded as where the losses were pinned; 100 steps multiply the rest."""


@pytest.mark.parametrize(
    ("steps", "as_written", "close"),
    [
        (6, False, 1e-6),
        pytest.param(100, True, 1e-6 if SAME_CPU else 3e-3, **LONG),
        # Norms and rotations in few passes round otherwise, and steps multiply that.
        pytest.param(100, False, 2e-3 if SAME_CPU else 1e-2, **LONG),
    ],
)
def test_the_losses_of_the_demonstration_are_those_of_earlier_versions(
    steps, as_written, close, tmp_path, monkeypatch
):
    if as_written:
        for name in ("rms_norms", "rotating_files"):
            monkeypatch.setattr(f"rosa_lightning.training.loss.{name}", lambda model: [])
    losses = losses_of(tmp_path, **{"trainer.max_steps": steps})
    pinned = json.loads((PINNED / "losses.json").read_text())
    assert losses == pytest.approx(pinned[:steps], rel=close)


@pytest.mark.parametrize("kind", ["rosa", "peft", None])
def test_an_adapter_of_an_earlier_version_gives_the_same_logits(kind):
    model = AutoModelForCausalLM.from_pretrained(tiny.folder()).eval()
    if kind is not None:
        load_adapter(model, PINNED / f"adapter_{kind}")
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits[0, -1, :4].tolist()
    assert logits == pytest.approx(LOGITS if kind else OF_THE_BASE, abs=1e-5)


def test_a_checkpoint_of_an_earlier_version_exports_the_same_adapter(tmp_path):
    options = ["--ckpt_path", str(PINNED / "before.ckpt"), "--output", str(tmp_path / "adapter")]
    assert main(["export", *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny.folder()).eval()
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits[0, -1, :4].tolist()
    assert logits == pytest.approx(LOGITS, abs=1e-5)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    options = {
        "trainer.max_steps": 8,
        "trainer.val_check_interval": 100,
        "trainer.default_root_dir": tmp_path,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "validate_first": "false",
        "ckpt_path": PINNED / "before.ckpt",
    }
    assert main(["fit", "--config", str(CONFIG), *(f"--{k}={v}" for k, v in options.items())]) == 0
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert saved["ReasoningDataModule"]["seen"] == {"demo": 128}
