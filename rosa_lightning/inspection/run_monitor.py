"""`RunMonitor`: which layers train, and how far the adapters have moved, for loggers.

Axes: S selections, L layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.charts import CURVES, raster_figure, update_charts
from rosa_lightning.inspection.throughput import TokenThroughputMonitor
from rosa_lightning.inspection.updates import Update, find_updates, layer_number, update_metrics

RASTER = "dls/raster"
"""Tag of the picture."""


class RunMonitor(Callback):
    """Shows what RoAE and DLS do in a run.

    At each selection, and where final steps of all layers begin, to every logger:
    ``dls/backward_saved``, the share of the layers that the backward pass skips, which is the
    lowest active layer's number by the number of layers; and ``dls/selection_count/<layer>``, how
    often each was selected so far in this run. Every ``trainer.log_every_n_steps`` optimizer steps:
    ``roae/update_norm/<layer>/<target>``, the Frobenius norm of what RoAE adds to a projection's
    weight, and ``roae/relative_update/...``, that norm by the norm of the frozen rows it is added
    to. Of a method of PEFT these are ``peft/update_norm/<layer>/<module>`` and so on, of what
    merging changes in a module's weight; full fine-tuning has none, as no copy of the base is kept.
    `TokenThroughputMonitor` shows what a run costs.

    TensorBoard also gets a picture of the active layers over the steps of this fit, ``dls/raster``,
    and a layout of its custom scalars page.

    Args:
        raster_interval: Selections from one picture to the next; 0 draws one at the end alone.
    """

    def __init__(self, raster_interval: NonNegativeInt = 10) -> None:
        super().__init__()
        if raster_interval < 0:
            raise ValueError(
                f"raster_interval={raster_interval} is below 0. Set the selections from one "
                "picture to the next; 0 draws one at the end alone."
            )
        self.raster_interval = raster_interval
        self._reset()

    def _reset(self) -> None:
        self._selection: DynamicLayerSelection | None = None
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
        self._reset()
        if not trainer.is_global_zero or not trainer.loggers:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        selections = [c for c in callbacks if isinstance(c, DynamicLayerSelection) and c.selects]
        self._selection = next(iter(selections), None)
        try:
            self._updates = find_updates(pl_module)
        except ValueError as error:
            rank_zero_info(f"update norms are not shown: {error}.")
        selects, targets = self._selection is not None, {(u.kind, u.target) for u in self._updates}
        measures = any(isinstance(c, TokenThroughputMonitor) for c in callbacks)
        for board in _tensorboards(trainer):
            board.experiment.add_custom_scalars(dashboard(selects, targets, measures=measures))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, by which Lightning logs, and where the selection stood before it."""
        self._step = trainer.global_step
        # Not at the start: the other callback may come later, and load its state only then.
        if self._selection is not None and self._seen is None:
            self._seen = _choice(self._selection)
            self._layers = list(self._selection.candidate_layers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what this batch changed about the selection, and the adapters at times."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        selection = self._selection
        if selection is not None and _choice(selection) != self._seen:
            self._seen = _choice(selection)
            self._steps.append(self._step)
            self._active.append([layer in selection.active for layer in self._layers])
            self._scores.append(list(selection.scores or [0.0] * len(self._layers)))
            counts = zip(self._layers, selection.selection_counts, strict=True)
            metrics: dict[str, float] = {
                f"dls/selection_count/{layer_number(n, self._layers)}": count for n, count in counts
            }
            metrics["dls/backward_saved"] = min(selection.active) / selection.num_layers
            self._log(trainer, metrics)
            if self.raster_interval and len(self._steps) % self.raster_interval == 0:
                self._draw(trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Steps, not batches: under accumulation most batches end no step.
        if every and trainer.global_step // every != self._step // every:
            self._log(trainer, update_metrics(self._updates))

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
        self._reset()

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        # Through the loggers: self.log would keep only every log_every_n_steps-th step.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)

    def _draw(self, trainer: Trainer) -> None:
        if len(self._steps) == self._drawn:
            return
        self._drawn = len(self._steps)
        active_SL, scores_SL = np.array(self._active), np.array(self._scores)
        for board in _tensorboards(trainer):
            figure = raster_figure(self._steps, self._layers, active_SL, scores_SL)
            board.experiment.add_figure(RASTER, figure, self._steps[-1], close=False)


def dashboard(
    selects: bool, targets: Collection[tuple[str, str]], *, measures: bool = True
) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars: sections, their charts, and patterns of tags.

    Args:
        selects: Whether layers are selected.
        targets: Kind and target of the updates that are logged.
        measures: Whether `TokenThroughputMonitor` runs beside.
    """
    updates = update_charts(targets)
    curves = [chart for chart in CURVES if chart.section != "Cost"]
    curves += updates + [chart for chart in CURVES if chart.section == "Cost"]
    charts = [(chart.section, chart.title, chart.unit, chart.tags) for chart in curves]
    charts.append(("Layers", "Selections of each layer so far", "", r"dls/selection_count/\d+"))
    shown = {"Training": bool(targets), "Layers": selects, "Cost": measures}
    layout: dict[str, dict[str, list[Any]]] = {}
    for section, title, unit, tags in charts:
        if shown.get(section, True):
            name = f"{title}, {unit}" if unit else title
            # After the prefix of the logger, if it has one.
            layout.setdefault(section, {})[name] = ["Multiline", [f"(?:.+-)?{tags}$"]]
    return layout


def _choice(selection: DynamicLayerSelection) -> tuple[int, tuple[int, ...]]:
    """Changes with every selection, and when all layers begin to train without one."""
    return selection.num_selections, selection.active


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
