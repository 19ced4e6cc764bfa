"""What ``predict`` leaves behind: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class PredictionWriter(BasePredictionWriter):
    """Writes the records that ``predict_step`` returns, as they come.

    The file takes its name when the last record is in it, so that it is never seen half-written.

    Args:
        path: The file; by default ``predictions.jsonl`` in the run's log folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's part."""
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._file = part.open("w", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        assert self._file is not None
        for record in prediction:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks' parts and give the file its name."""
        self._close()
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        target = self._target(trainer)
        first = self._part(trainer, 0)
        with first.open("a", encoding="utf-8") as joined:
            for rank in range(1, trainer.world_size):
                part = self._part(trainer, rank)
                joined.write(part.read_text(encoding="utf-8"))
                part.unlink()
        first.replace(target)
        rank_zero_info(f"predictions: {target}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing half-written."""
        if self._file is not None:
            self._close()
            self._part(trainer, trainer.global_rank).unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _target(self, trainer: Trainer) -> Path:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        return Path(self.path) if self.path is not None else folder / "predictions.jsonl"

    def _part(self, trainer: Trainer, rank: int) -> Path:
        target = self._target(trainer)
        return target.with_name(f".{target.name}.rank{rank}")
