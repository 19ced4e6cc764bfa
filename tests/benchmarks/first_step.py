"""A callback that ends the process after the first optimizer step, for start_up.py."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfterFirstStep(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step >= 1:
            os._exit(0)
