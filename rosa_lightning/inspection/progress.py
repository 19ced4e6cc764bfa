"""`RunProgressBar`: one bar to the real end of a command, and a line below it with the figures.

While it is shown, whatever is written to the terminal goes through its console, above the bar.
"""

import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

SHOWN = {
    "train/loss": "loss",
    "val/loss": "val loss",
    "val/accuracy": "val accuracy",
    "examples/s": "examples/s",
}
"""What is shown of the metrics that are logged for the bar, and its names there."""
_SECONDS_A_LINE = 60.0
"""From one line of progress to the next, where there is no terminal."""
_SECONDS_A_READ = 0.5
"""From one look at the metrics to the next: on a GPU each look waits for the step."""


class _TimeLeft(ProgressColumn):
    """The time left, or what a finished task took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(time_left(task), style="progress.remaining")


class _Bar(Progress):
    """A bar with a line of text below it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures, no_wrap=True, overflow="ellipsis")


class RunProgressBar(ProgressBar):
    """Shows how far a command is: optimizer steps of a training, batches of the other commands.

    Below it stand loss, validation loss and accuracy, and examples/s, as far as they are known.
    Each validation of a training leaves a line. Where the error stream is no terminal, there are
    these lines, and one a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._metrics: dict[str, float] = {}
        self._read = self._said = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Without the bar, which holds threads."""
        return {**vars(self), "_bar": None}

    @property
    def is_enabled(self) -> bool:
        """Whether it is shown; Lightning disables it on other ranks."""
        return self._is_enabled

    def disable(self) -> None:
        """Show nothing."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._is_enabled = True

    # What Lightning calls.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count to the last optimizer step of all epochs."""
        self._metrics = {}
        self._begin("Training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer step."""
        if time.monotonic() - self._read >= _SECONDS_A_READ:
            self._look(trainer, pl_module)
        self._advance(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it stands at the end."""
        self._look(trainer, pl_module)
        self._end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, where this is no part of a training."""
        if trainer.state.fn == "validate":
            self._begin("Validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch; in a training it is told below the bar."""
        if trainer.state.fn == "validate":
            self._advance(batch_idx + 1)
        elif self._bar is not None:
            self._show(f"validating {batch_idx + 1}/{sum(trainer.num_val_batches)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a line with what a validation has found."""
        if trainer.state.fn == "validate":
            self._end()
        elif not trainer.sanity_checking and self.is_enabled:
            self._look(trainer, pl_module)
            self._say(f"step {trainer.global_step}: {self._text()}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of prompts."""
        self._begin("Testing", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of prompts."""
        self._begin("Answering", sum(trainer.num_predict_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        self._advance(batch_idx + 1)

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End before results are shown."""
        self._end()

    on_predict_epoch_end = on_test_epoch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar as it stands."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the bar as it stands."""
        self._end()

    # What is shown.

    def _begin(self, what: str, total: float, completed: int = 0) -> None:
        self._end()
        if not self.is_enabled:
            return
        console = Console(stderr=True)
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _TimeLeft(),
            console=console,
            disable=not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # results in a file stay out of the terminal
            refresh_per_second=4,
            speed_estimate_period=300,
        )
        known = 0 <= total < float("inf")
        self._task = self._bar.add_task(what, total=total if known else None, completed=completed)
        self._said = time.monotonic()
        self._bar.start()

    def _advance(self, completed: int) -> None:
        if self._bar is None:
            return
        self._bar.update(self._task, completed=completed)
        self._show()
        if self._bar.disable and time.monotonic() - self._said >= _SECONDS_A_LINE:
            task = self._bar.tasks[0]
            total = "" if task.total is None else f"/{task.total:.0f}"
            text = ", ".join(filter(None, (time_left(task), self._text())))
            self._say(f"{task.description} {completed}{total}: {text}")

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metrics."""
        self._read = time.monotonic()
        if self.is_enabled:
            found = self.get_metrics(trainer, pl_module)
            self._metrics = {SHOWN[name]: _number(found[name]) for name in SHOWN if name in found}
            self._show()

    def _show(self, first: str = "") -> None:
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            # Until examples/s are known, or where nothing measures them.
            steps = speed and self._metrics and "examples/s" not in self._metrics
            parts = first, self._text(), f"{speed:.3g} steps/s" if steps else ""
            self._bar.figures = " · ".join(filter(None, parts))

    def _text(self) -> str:
        """The figures, as one line."""
        rate = self._metrics.get("examples/s")
        parts = [f"{k} {v:.4g}" for k, v in self._metrics.items() if k != "examples/s"]
        return " · ".join(parts if rate is None else [*parts, f"{rate:.3g} examples/s"])

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        rank_zero_info(line)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def time_left(task: Task) -> str:
    """Such as ``0:01:23 left``; of a finished task the time that it took."""
    if task.finished:
        return f"{timedelta(seconds=int(task.finished_time or 0))}"
    left = task.time_remaining
    return "" if left is None else f"{timedelta(seconds=int(left))} left"


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)
