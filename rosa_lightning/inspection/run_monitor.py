"""`RunMonitor`: which layers train, and how far the adapters have moved."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.charts import layer_figures
from rosa_lightning.inspection.curves import CURVES, as_run
from rosa_lightning.inspection.layer_log import LAYERS, append_rows, layer_series, read_rows
from rosa_lightning.inspection.loggers import log_picture
from rosa_lightning.inspection.updates import Update, find_updates, measure_updates
from rosa_lightning.utils.trainer import callbacks_of, logs_since, run_folder


class RunMonitor(Callback):
    """Shows what RoAE and DLS do in a run, in pictures and a few curves.

    Every ``trainer.log_every_n_steps`` optimizer steps every logger gets, for each target,
    ``weights/relative_update/<target>``: the Frobenius norm of what RoAE adds to the weights of all
    layers, by the norm of the frozen rows it is added to; ``weights/update_norm/<target>``, the
    norm alone, where that is not known. Of a method of PEFT it is what merging changes in a
    module's weight; full fine-tuning has none, as no copy of the base is kept.

    The numbers of each layer go to ``layers.jsonl`` in the run's folder, which `report` reads: each
    update, and at each selection, and where final steps of all layers begin, score, activity, and
    number of selections so far. Loggers that show pictures (TensorBoard, W&B, MLflow; CSV's gets
    files) get them drawn: layers that train, their scores, and the update of each target in each
    layer, over the run's steps. TensorBoard gets a layout of its custom scalars page.

    Args:
        raster_interval: Selections from pictures to the next; 0 draws them at the end alone.
    """

    def __init__(self, raster_interval: NonNegativeInt = 10) -> None:
        super().__init__()
        if raster_interval < 0:
            raise ValueError(
                f"raster_interval={raster_interval} is below 0. Set the selections from pictures "
                "to the next; 0 draws them at the end alone."
            )
        self.raster_interval = raster_interval
        self._reset()

    def _reset(self) -> None:
        self._selection: DynamicLayerSelection | None = None
        self._seen: tuple[int, tuple[int, ...]] | None = None
        self._num_seen = 0
        self._updates: list[Update] = []
        self._is_drawn = True
        self._step = 0
        self._folder: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what there is to show, and lay the dashboard out."""
        self._reset()
        self._folder = run_folder(trainer)  # all ranks must ask
        if not trainer.is_global_zero or self._folder is None:
            return
        selections = callbacks_of(trainer, DynamicLayerSelection)
        self._selection = next((one for one in selections if one.selects), None)
        try:
            self._updates = find_updates(pl_module)
        except ValueError as error:
            rank_zero_info(f"update norms are not shown: {error}.")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(dashboard())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, by which Lightning logs, and where the selection stood before it."""
        self._step = trainer.global_step
        # Not at the start: the other callback may come later, and load its state only then.
        if self._selection is not None and self._seen is None:
            self._seen = _choice(self._selection)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what this batch changed about the selection, and the adapters at times."""
        if not trainer.is_global_zero or self._folder is None:
            return
        selection = self._selection
        if selection is not None and _choice(selection) != self._seen:
            self._seen = _choice(selection)
            self._num_seen += 1
            self._keep(_selection_measures(selection))
            if self.raster_interval and self._num_seen % self.raster_interval == 0:
                self._draw(trainer)
        if self._updates and logs_since(trainer, self._step):
            measures = measure_updates(self._updates)
            self._keep({tag: measure.by_layer for tag, measure in measures.items()})
            # Through the loggers: self.log would keep only every log_every_n_steps-th step.
            totals = {f"weights/{t}": one.total for t, one in measures.items() if one.is_headline}
            for logger in trainer.loggers:
                logger.log_metrics(dict(totals), step=self._step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole fit."""
        self._draw(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Draw what there was of the fit; the loggers close after this."""
        with suppress(OSError):  # the error at hand is the one to be seen
            self._draw(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._reset()

    def _keep(self, measures: dict[str, dict[int, float]]) -> None:
        assert self._folder is not None
        append_rows(self._folder / LAYERS, self._step, measures)
        self._is_drawn = False

    def _draw(self, trainer: Trainer) -> None:
        if self._is_drawn or self._folder is None:
            return
        self._is_drawn = True
        series = as_run(layer_series(read_rows(self._folder / LAYERS)))
        for name, figure in layer_figures(series):
            log_picture(trainer.loggers, f"weights/{name}", figure, self._step)


def dashboard() -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars: sections, their charts, and patterns of tags."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for chart in CURVES:
        name = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
        # After the prefix of the logger, if it has one.
        tags = [f"(?:.+-)?{chart.tags}$"]
        layout.setdefault(chart.section, {})[name] = ["Multiline", tags]
    return layout


def _choice(selection: DynamicLayerSelection) -> tuple[int, tuple[int, ...]]:
    """Changes with every selection, and when all layers begin to train without one."""
    return selection.num_selections, selection.active


def _selection_measures(selection: DynamicLayerSelection) -> dict[str, dict[int, float]]:
    layers = selection.candidate_layers
    found = {
        "active": {layer: float(layer in selection.active) for layer in layers},
        "selections": dict(zip(layers, map(float, selection.selection_counts), strict=True)),
    }
    if selection.scores:
        found["score"] = dict(zip(layers, selection.scores, strict=True))
    return found
