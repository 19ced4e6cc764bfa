"""`RunRecorder`: what a run trained, how long that took, and its validations, as ``run.json``."""

import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rosa_lightning.data.collators import num_rows
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.loggers import Settings, log_hparams, log_settings, run_settings
from rosa_lightning.inspection.throughput import TokenThroughputMonitor, peak_mib
from rosa_lightning.models.quantization import num_parameters
from rosa_lightning.utils.strict_json import write_json
from rosa_lightning.utils.trainer import callbacks_of, run_folder

RECORD = "run.json"
_SECONDS = 2.0
"""Between two writes of the file."""
_FINAL = ("val/loss", "val/accuracy", "train/loss")
"""What HParams shows of a run."""


class RunRecorder(Callback):
    """Writes ``run.json`` into the run's folder, again and again while the run goes on.

    Its fields: ``status`` (running, stopped, failed or finished), ``settings``, ``started`` and
    ``written`` (times, with their zone), ``step`` of ``max_steps``,
    ``trainable_parameters`` of ``total_parameters``, ``train_seconds``, ``examples``,
    ``peak_mib``, ``backward_share``, ``checkpoint`` (the best one), and ``validations``, a list of
    ``step`` and the metrics logged. Seconds are those of training alone, without start-up and
    validations; they add up over the parts of a run that was stopped and resumed.
    ``backward_share`` is that of `DynamicLayerSelection`, 1 without it. Figures are of rank 0 but
    for ``examples``.

    Loggers get the settings too. TensorBoard shows them under HParams when the training ends, with
    the last losses, accuracy and figures.

    Args:
        path: The file; by default ``run.json`` in the run's folder, and none without a logger.
        hparams: Whether to write TensorBoard's HParams.
    """

    def __init__(self, path: str | None = None, *, hparams: bool = True) -> None:
        super().__init__()
        self.path, self.hparams = path, hparams
        self._settings: Settings = {}
        self._started = ""
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
            "started": self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the parameters, tell loggers the settings, and start the clock."""
        folder = run_folder(trainer)
        own = None if folder is None else folder / RECORD
        self._target = own if self.path is None else Path(self.path)
        if trainer.ckpt_path is None:
            self.load_state_dict(type(self)().state_dict())
        self._selections = callbacks_of(trainer, DynamicLayerSelection)
        groups = [group for one in trainer.optimizers for group in one.param_groups]
        trainable = sum(parameter.numel() for group in groups for parameter in group["params"])
        self._parameters = (trainable, num_parameters(pl_module))
        self._settings = run_settings(trainer, pl_module) | {"trainable_parameters": trainable}
        self._started = self._started or _now()
        if trainer.is_global_zero:
            log_settings(trainer.loggers, self._settings)
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
        """Write the last state, and show what came of the settings."""
        self._write(trainer, "finished")
        if self.hparams and trainer.is_global_zero:
            logged = [tag for tag in _FINAL if tag in trainer.callback_metrics]
            if callbacks_of(trainer, TokenThroughputMonitor):
                logged += ["train/examples_per_s", "train/peak_mib"]
            log_hparams(trainer.loggers, self._settings, logged)

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
            "settings": self._settings,
            "started": self._started,
            "written": _now(),
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
            **self.figures(trainer),
            "backward_share": self._selections[0].backward_share if self._selections else 1.0,
            "checkpoint": path and str(Path(path).absolute()),
            "validations": self._validations,
        }
        write_json(self._target, record)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def best_checkpoint(trainer: Any) -> tuple[str | None, str]:
    """The best checkpoint by validation loss, or else the last; and what it was chosen by."""
    found = callbacks_of(trainer, ModelCheckpoint)
    for one in sorted(found, key=lambda one: one.monitor != "val/loss"):
        if path := one.best_model_path or one.last_model_path:
            score = one.best_model_score
            if one.monitor is None or score is None:
                return path, ""
            return path, f"{one.monitor} {float(score):.4g}"
    return None, ""
