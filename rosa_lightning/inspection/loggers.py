"""What loggers get beside numbers: settings, and pictures where they can show them.

Axes: H height, W width, C colours.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from rosa_lightning.adapters.methods import FullFinetuning
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import atomic_write, writing
from rosa_lightning.utils.trainer import callbacks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 150
"""Of pictures, which are some six inches wide."""
Settings = dict[str, str | int | float | bool]


class RunBoard(TensorBoardLogger):
    """TensorBoard's logger, so that its page opens on ``train`` and ``val``.

    TensorBoard opens the first two groups of the alphabet. The curve of the epoch is left out, and
    so are the results of a test, single points that ``results.json`` and the report have.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers."""
        shown = {k: v for k, v in metrics.items() if k != "epoch" and not k.startswith("test/")}
        super().log_metrics(shown, step)


def run_settings(trainer: Trainer, module: LightningModule) -> Settings:
    """What a training was set to do: base, method, layers, optimizer, data, seed; plain values."""
    found: dict[str, Any] = {"base": module.hparams.get("base")}
    found |= _of_method(getattr(module, "method", None))
    for one in callbacks_of(trainer, DynamicLayerSelection):
        if one.selects:
            names = ["num_active", "interval", "policy"]
            names += ["backward_budget"] if one.backward_budget < 1 else []
            found |= {f"dls.{name}": getattr(one, name) for name in names}
    for optimizer in trainer.optimizers[:1]:
        found["optimizer"] = type(optimizer).__name__
        found["learning_rate"] = optimizer.defaults.get("lr")
        found["weight_decay"] = optimizer.defaults.get("weight_decay")
    if (holds := step_size(trainer)) is not None:
        found[f"global_batch_{holds[1].replace('examples', 'size')}"] = holds[0]
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    found["max_length"] = getattr(datamodule, "max_length", None)
    steps = trainer.estimated_stepping_batches
    found["steps"] = int(steps) if 0 <= steps < float("inf") else None
    found["precision"] = str(trainer.precision)
    found["seed"] = int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None
    plain = (str, int, float, bool)
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in found.items()
        if value is not None
    }


def step_size(trainer: Any) -> tuple[int, str] | None:
    """What an optimizer step holds, of all its batches and devices: how many, and of what.

    Examples, packs of best_fit, or tokens (the most, padding counted); None for unknown data.
    """
    data = trainer.datamodule
    size, what = getattr(data, "batch_size", None), "examples"
    if tokens := getattr(getattr(data, "loading", None), "tokens_per_batch", None):
        size, what = tokens, "tokens"
    if getattr(data, "batching", "") == "best_fit":
        size, what = data.longest_rows, "packs"
    batches = trainer.accumulate_grad_batches * trainer.world_size
    return (size * batches, what) if isinstance(size, int) else None


def _of_method(method: Any) -> dict[str, Any]:
    if isinstance(method, RoAEConfig):
        defaults, always = asdict(RoAEConfig()), ("rank", "alpha", "low_freq_ratio", "targets")
        own = {k: v for k, v in asdict(method).items() if k in always or v != defaults[k]}
        return {"method": "RoAE", **own, "targets": ", ".join(method.targets)}
    if isinstance(method, PeftMethod):
        name = method.class_path.rpartition(".")[2].removesuffix("Config")
        return {"method": name, **method.init_args}
    return {"method": "full fine-tuning"} if isinstance(method, FullFinetuning) else {}


def log_settings(loggers: Iterable[Logger], settings: Settings) -> None:
    """Tell loggers the settings of a run, at its start."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # Without a made-up metric in HParams; what came of them follows by `log_hparams`.
            logger.hparams = dict(settings)
            folder = Path(logger.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with writing(folder):
                save_hparams_to_yaml(folder / logger.NAME_HPARAMS_FILE, logger.hparams)
        else:
            logger.log_hyperparams(settings)


def log_hparams(loggers: Iterable[Logger], settings: Settings, metrics: Iterable[str]) -> None:
    """Show settings in TensorBoard's HParams, with the last values of some metrics, by their tags.

    Other loggers have both already.
    """
    from torch.utils.tensorboard import summary  # its functions have no types

    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and settings:
            parts = summary.hparams(settings, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
            for part in parts:
                logger.experiment.file_writer.add_summary(part)
            logger.experiment.flush()


def log_picture(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Give a picture of an optimizer step to the loggers that show pictures.

    CSV's gets a file, ``pictures/<last part of the name>.png``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    image_HWC = np.asarray(canvas.buffer_rgba())[..., :3]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image_HWC, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image_HWC], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image_HWC, key=name, step=step)
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir, "pictures", f"{name.rpartition('/')[2]}.png")
            content = io.BytesIO()
            figure.savefig(content, format="png")
            atomic_write(path, content.getvalue())
