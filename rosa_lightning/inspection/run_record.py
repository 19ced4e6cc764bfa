"""`RunRecorder`: what a run trained, how long that took, and its validations, as ``run.json``."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rosa_lightning.data.collators import num_rows
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.throughput import peak_mib
from rosa_lightning.models.quantization import num_parameters
from rosa_lightning.utils.files import atomic_write

RECORD = "run.json"
_SECONDS = 2.0
"""Between two writes of the file."""


class RunRecorder(Callback):
    """Writes ``run.json`` into the run's folder, again and again while the run goes on.

    Its fields: ``status`` (running, stopped, failed or finished), ``step`` of ``max_steps``,
    ``trainable_parameters`` of ``total_parameters``, ``train_seconds``, ``examples``,
    ``peak_mib``, ``backward_share``, ``checkpoint`` (the best one), and ``validations``, a list of
    ``step`` and the metrics logged. Seconds are those of training alone, without start-up and
    validations; they add up over the parts of a run that was stopped and resumed.
    ``backward_share`` is that of `DynamicLayerSelection`, 1 without it. Figures are of rank 0 but
    for ``examples``.

    Args:
        path: The file; by default ``run.json`` in the run's log folder, and none without a logger.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._seconds = 0.0
        self._examples = 0
        self._peak: float | None = None
        self._validations: list[dict[str, Any]] = []
        self._selections: list[DynamicLayerSelection] = []
        self._parameters = (0, 0)
        self._target: Path | None = None
        self._since = 0.0
        self._is_held = False
        self._written = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "seconds": self._seconds,
            "examples": self._examples,
            "peak": self._peak,
            "validations": self._validations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the parameters, and start the clock."""
        own = Path(trainer.log_dir, RECORD) if trainer.log_dir and trainer.loggers else None
        self._target = own if self.path is None else Path(self.path)
        if trainer.ckpt_path is None:
            self.load_state_dict(type(self)().state_dict())
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._selections = [one for one in callbacks if isinstance(one, DynamicLayerSelection)]
        held = [
            group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups
        ]
        trainable = sum(parameter.numel() for group in held for parameter in group)
        self._parameters = (trainable, num_parameters(pl_module))
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._examples += num_rows(batch) * trainer.world_size
        if now - self._written >= _SECONDS:
            self._write(trainer, "running")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics; the time of a validation does not count."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            self._validations.append({"step": trainer.global_step, **metrics})
        self._is_held = True  # checkpoints are saved after it

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run on after a validation."""
        if self._is_held:
            self._since, self._is_held = time.perf_counter(), False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last state."""
        self._write(trainer, "finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write how far a training came that was stopped, by a signal, or failed."""
        if self._target is not None and trainer.state.fn == "fit":
            by_signal = isinstance(exception, KeyboardInterrupt | SystemExit)
            with suppress(OSError):  # the error at hand is the one to be seen
                self._write(trainer, "stopped" if by_signal else "failed")

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """Examples, seconds of training, and peak memory so far."""
        peak = peak_mib(trainer.strategy.root_device)
        self._peak = peak if self._peak is None or peak is None else max(peak, self._peak)
        return {
            "train_seconds": round(self._seconds, 3),
            "examples": self._examples,
            "peak_mib": None if self._peak is None else round(self._peak, 1),
        }

    def _write(self, trainer: Trainer, status: str) -> None:
        self._written = time.perf_counter()
        if not trainer.is_global_zero or self._target is None:
            return
        trainable, total = self._parameters
        path, _ = best_checkpoint(trainer)
        record = {
            "status": status,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
            **self.figures(trainer),
            "backward_share": self._selections[0].backward_share if self._selections else 1.0,
            "checkpoint": path and str(Path(path).absolute()),
            "validations": self._validations,
        }
        atomic_write(self._target, json.dumps(record, indent=1).encode())


def best_checkpoint(trainer: Any) -> tuple[str | None, str]:
    """The best checkpoint by validation loss, or else the last; and what it was chosen by."""
    found = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    for one in sorted(found, key=lambda one: one.monitor != "val/loss"):
        if path := one.best_model_path or one.last_model_path:
            score = one.best_model_score
            if one.monitor is None or score is None:
                return path, ""
            return path, f"{one.monitor} {float(score):.4g}"
    return None, ""
