"""What people see of a run: the layers that train, and how far the adapters have moved.

The callback reads the selection from `DynamicLayerSelection`, wherever that stands among the
callbacks, and the adapters from the model. It shows what it finds, and needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from rosa_lightning.inspection.norms import Update, find_updates, update_norms
from rosa_lightning.inspection.raster import draw_raster
from rosa_lightning.inspection.throughput import ThroughputMonitor

RASTER = "dls/raster"
"""Tag of the picture."""


@runtime_checkable
class Selection(Protocol):
    """What is read of the callback that selects layers."""

    active: tuple[int, ...]
    scores: tuple[float, ...] | None
    num_selections: int
    selection_counts: tuple[int, ...]
    positions: tuple[int, ...]
    num_blocks: int


class RunMonitor(Callback):
    """Shows what RoAE and DLS do in a run.

    At each selection, and where final steps of all layers begin, to every logger:
    ``dls/backward_saved``, the share of the layers that the backward pass skips, which is the
    lowest active layer's number by the number of layers; and ``dls/selection_count/<layer>``, how
    often each was selected so far in this run. Every ``trainer.log_every_n_steps`` optimizer steps:
    ``roae/update_norm/<layer>/<target>``, the Frobenius norm of what RoAE adds to a projection's
    weight, and ``roae/relative_update/...``, that norm by the norm of the frozen rows it is added
    to. What a run costs is `ThroughputMonitor`'s to show.

    TensorBoard also gets a picture of the active layers over the steps, ``dls/raster``, and a
    layout of its custom scalars page. The picture begins where this fit began.

    Args:
        raster_interval: Selections from one picture to the next; 0 draws one at the end alone.
    """

    def __init__(self, raster_interval: int = 10) -> None:
        super().__init__()
        if raster_interval < 0:
            raise ValueError(
                f"raster_interval={raster_interval} is below 0. Set the selections from one "
                "picture to the next, or 0 for one at the end of the fit."
            )
        self.raster_interval = raster_interval
        self._forget()

    def _forget(self) -> None:
        """Hold nothing of a model or a fit."""
        self._selection: Selection | None = None
        self._layers: list[int] = []
        self._seen: tuple[int, tuple[int, ...]] | None = None
        self._steps: list[int] = []
        self._active: list[list[bool]] = []
        self._scores: list[list[float]] = []
        self._drawn = 0
        self._updates: list[Update] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what there is to show, and lay the dashboard out."""
        self._forget()
        if not trainer.is_global_zero or not trainer.loggers:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._selection = next((c for c in callbacks if isinstance(c, Selection)), None)
        try:
            self._updates = find_updates(pl_module)
        except ValueError as error:
            rank_zero_info(f"RoAE update norms are not shown: {error}.")
        targets = list(dict.fromkeys(update.target for update in self._updates))
        measures = any(isinstance(c, ThroughputMonitor) for c in callbacks)
        for logger in _tensorboards(trainer):
            layout = dashboard(
                self._selection is not None, targets, logger._prefix, measures=measures
            )
            logger.experiment.add_custom_scalars(layout)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, by which Lightning logs, and where the selection stood before it."""
        self._step = trainer.global_step
        # Not at the start: the other callback may come later, and load its state only then.
        if self._selection is not None and self._seen is None:
            self._seen = _choice(self._selection)
            self._layers = list(self._selection.positions)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what this batch changed about the selection, and the adapters at times."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        if self._selection is not None and (choice := _choice(self._selection)) != self._seen:
            self._seen = choice
            self._log(trainer, self._note_selection(self._selection))
            if self.raster_interval and len(self._steps) % self.raster_interval == 0:
                self._draw(trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Steps, not batches: under accumulation most batches end no step.
        if every and trainer.global_step // every != self._step // every:
            self._log(trainer, self._measure())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole fit."""
        self._draw(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what there was of the fit; the loggers close after this."""
        self._draw(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._forget()

    def _note_selection(self, selection: Selection) -> dict[str, float]:
        active = selection.active
        self._steps.append(self._step)
        self._active.append([layer in active for layer in self._layers])
        self._scores.append(list(selection.scores or [0.0] * len(self._layers)))
        counts = zip(self._layers, selection.selection_counts, strict=True)
        return {
            "dls/backward_saved": min(active) / selection.num_blocks,
            **{f"dls/selection_count/{_number(n, self._layers)}": count for n, count in counts},
        }

    def _measure(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        layers = [update.layer for update in self._updates]
        norms = update_norms(self._updates) if self._updates else []
        for update, norm in zip(self._updates, norms, strict=True):
            place = f"{_number(update.layer, layers)}/{update.target}"
            metrics[f"roae/update_norm/{place}"] = norm
            if update.base_norm:
                metrics[f"roae/relative_update/{place}"] = norm / update.base_norm
        return metrics

    def _log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        # Through the loggers: self.log would keep only every log_every_n_steps-th step.
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=self._step)

    def _draw(self, trainer: Trainer) -> None:
        loggers = _tensorboards(trainer)
        if len(self._steps) == self._drawn or not loggers:
            return
        self._drawn = len(self._steps)
        active_SL, scores_SL = np.array(self._active), np.array(self._scores)
        # A card of TensorBoard shrinks what is wider, and its text with it.
        picture = draw_raster(self._steps, self._layers, active_SL, scores_SL, max_width=360)
        for logger in loggers:
            tag = f"{logger._prefix}-{RASTER}" if logger._prefix else RASTER
            logger.experiment.add_image(tag, picture, self._steps[-1], dataformats="HWC")


def dashboard(
    selects: bool, targets: Sequence[str], prefix: str = "", *, measures: bool = True
) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars: categories, their charts, and the tags of each.

    Tags are patterns there, so that layers need not be counted.

    Args:
        selects: Whether layers are selected.
        targets: The projections that carry RoAE.
        prefix: What the logger puts before every tag.
        measures: Whether `ThroughputMonitor` runs beside.
    """
    layers = {
        "score of each layer": [r"dls/score/\d+"],
        "how often each layer was selected": [r"dls/selection_count/\d+"],
        "lowest active layer": ["dls/lowest_active"],
        "share of the layers that backward skips": ["dls/backward_saved"],
        "mean share of a full backward so far": ["dls/backward_share"],
    }
    training = {
        "loss, nats per response token": ["train/loss", "val/loss"],
        "accuracy of answers to validation prompts": ["val/accuracy(/.+)?"],
        "learning rate": ["train/lr"],
    }
    adapters: dict[str, list[str]] = {}
    for name in ("relative_update", "update_norm"):
        what = "update by weight" if name == "relative_update" else "update norm"
        adapters |= {f"{what}, {target}": [rf"roae/{name}/\d+/{target}"] for target in targets}
    cost = {
        "examples per second": ["throughput/examples_per_s"],
        "tokens per second": ["throughput/(supervised_)?tokens_per_s"],
        "padding, share of the batches": ["throughput/padding_share"],
        "peak memory, MiB": ["memory/peak_mib"],
    }
    charts = {
        "Training": training if targets else {},
        "Layers": layers if selects else {},
        "RoAE": adapters,
        "Cost": cost if measures else {},
    }
    start = re.escape(f"{prefix}-") if prefix else ""
    return {
        category: {
            title: ["Multiline", [f"{start}{tag}$" for tag in tags]] for title, tags in held.items()
        }
        for category, held in charts.items()
        if held
    }


def _choice(selection: Selection) -> tuple[int, tuple[int, ...]]:
    """Changes with every selection, and when all layers begin to train without one."""
    return selection.num_selections, selection.active


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _number(layer: int, layers: Sequence[int]) -> str:
    """A layer's number in tags, with zeros before it, so that tags sort by number."""
    return f"{layer:0{max(2, len(str(max(layers))))}d}"
