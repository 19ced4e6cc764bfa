"""`RunMonitor`: which layers train, and how far the adapters have moved, for loggers.

Axes: R rank, D input width, L rows that take the term; in the raster S selections, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.charts import CURVES, raster_figure
from rosa_lightning.inspection.throughput import TokenThroughputMonitor
from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.roae.targets import layer_of

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
    to. `TokenThroughputMonitor` shows what a run costs.

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
            rank_zero_info(f"RoAE update norms are not shown: {error}.")
        selects, targets = self._selection is not None, {u.target for u in self._updates}
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
                f"dls/selection_count/{_number(n, self._layers)}": count for n, count in counts
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
    selects: bool, targets: Collection[str], *, measures: bool = True
) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars: sections, their charts, and patterns of tags.

    Args:
        selects: Whether layers are selected.
        targets: The projections that carry RoAE.
        measures: Whether `TokenThroughputMonitor` runs beside.
    """
    charts = [(chart.section, chart.title, chart.unit, chart.tags) for chart in CURVES]
    charts.append(("Layers", "Selections of each layer so far", "", r"dls/selection_count/\d+"))
    shown = {"Training": bool(targets), "Layers": selects, "Cost": measures}
    layout: dict[str, dict[str, list[Any]]] = {}
    for section, title, unit, tags in charts:
        if shown.get(section, tags.rpartition("/")[2] in targets):
            name = f"{title}, {unit}" if unit else title
            # After the prefix of the logger, if it has one.
            layout.setdefault(section, {})[name] = ["Multiline", [f"(?:.+-)?{tags}$"]]
    return layout


def _choice(selection: DynamicLayerSelection) -> tuple[int, tuple[int, ...]]:
    """Changes with every selection, and when all layers begin to train without one."""
    return selection.num_selections, selection.active


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _number(layer: int, layers: Sequence[int]) -> str:
    """A layer's number in tags, with zeros before it, so that tags sort by number."""
    return f"{layer:0{max(2, len(str(max(layers))))}d}"


@dataclass(frozen=True)
class Update:
    """What the terms of one target add in one decoder layer; usually it is one term."""

    layer: int
    """Number of the decoder layer."""
    target: str
    terms: tuple[RoAELinear, ...]
    base_norm: float | None
    """Frobenius norm of the frozen rows that take the terms; None where no plain weight holds them:
    the base is quantised, or the terms are added after a norm."""


def find_updates(root: nn.Module) -> list[Update]:
    """The updates of the adapted model in a module, by layer, then target; empty without RoAE.

    Raises:
        ValueError: A sharded strategy keeps the adapters in pieces, whose norms no rank knows.
    """
    grouped: dict[tuple[int, str], list[RoAELinear]] = {}
    for model in root.modules():
        try:
            projections = roae_report(model).projections
        except ValueError:  # carries no RoAE
            continue
        for projection in projections:
            term: Any = model.get_submodule(projection.name)
            # FSDP1 stands around it, FSDP2 shards its weights.
            if not isinstance(term, RoAELinear) or not all(map(_is_plain, term.parameters(False))):
                raise ValueError("the strategy keeps adapter weights in shards")
            number = int(layer_of(projection.layer).rpartition(".")[2] or 0)
            grouped.setdefault((number, projection.target), []).append(term)
    return [
        Update(layer, target, tuple(terms), _base_norm(terms))
        for (layer, target), terms in sorted(grouped.items(), key=lambda item: item[0][0])
    ]


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Norms of what the updates add to the weights, by tag; in one transfer from the device."""
    metrics: dict[str, float] = {}
    layers = [update.layer for update in updates]
    squares = [torch.stack([update_norm(t) ** 2 for t in update.terms]) for update in updates]
    norms = torch.stack([square.sum().sqrt() for square in squares]).tolist() if updates else []
    for update, norm in zip(updates, norms, strict=True):
        place = f"{_number(update.layer, layers)}/{update.target}"
        metrics[f"roae/update_norm/{place}"] = norm
        if update.base_norm:
            metrics[f"roae/relative_update/{place}"] = norm / update.base_norm
    return metrics


@torch.no_grad()
def update_norm(term: RoAELinear) -> Tensor:
    """Frobenius norm of ``scale * B A``, a scalar.

    ``||B A||^2 = sum((B^T B) * (A A^T))`` takes two R x R products and never the L x D one.
    """
    a_RD, b_LR = _wide(term.roae_A), _wide(term.roae_B)
    square = ((b_LR.T @ b_LR) * (a_RD @ a_RD.T)).sum()
    # Rounding can leave a little less than nothing.
    return term.scale * square.clamp(min=0).sqrt()


@torch.no_grad()
def _base_norm(terms: Sequence[RoAELinear]) -> float | None:
    if any(term.defer or not _is_plain(term.weight) for term in terms):
        return None
    return math.hypot(*(float(_wide(t.weight[t.rows.to(t.weight.device)]).norm()) for t in terms))


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is the whole matrix in numbers of its own: not sharded, not quantised."""
    return type(weight.data) is Tensor and weight.ndim == 2 and weight.is_floating_point()


def _wide(weight: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return weight.float() if weight.device.type == "mps" else weight.double()
