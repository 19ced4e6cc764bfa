"""`RunSummary`: what a training is going to do, when it begins, and what came of it, at its end."""

import math
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.dls.layers import find_layers
from rosa_lightning.dls.policies import resolve_num_active
from rosa_lightning.inspection.loggers import step_size
from rosa_lightning.inspection.run_record import RunRecorder, best_checkpoint
from rosa_lightning.utils.files import shown
from rosa_lightning.utils.trainer import callbacks_of, log_folder

_POLICIES = {
    "top_k": "by the gradients of their norm weights",
    "sample": "at random, in proportion to the gradients of their norm weights",
    "threshold": "by the gradients of their norm weights",
    "random": "at random",
    "fixed": "as policy_options.fixed_layers says",
    "all": "as the backward budget allows",
}
"""How each policy of DLS chooses, in a few words."""


class RunSummary(Callback):
    """Begins a training with what it will do, and ends it with what came of it.

    At the start: base, method, trainable parameters, data, steps, and what DLS does. At the end:
    the run's folder, the best checkpoint and its validation loss, time, examples/s, peak memory,
    layers selected (these from the run's `RunRecorder`), and commands to go on with. Both go to the
    error stream.

    Args:
        selections: The callbacks that select layers.
    """

    def __init__(self, selections: Sequence[DynamicLayerSelection] = ()) -> None:
        super().__init__()
        self._selections = selections
        self._has_begun = False
        self._since = 0.0
        self._first_step = 0
        self._folder = Path()
        self._seen: dict[str, int] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a validation that comes before the training."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be done; a run that would log nothing logs each step."""
        self._begin(trainer, pl_module)
        self._first_step = trainer.global_step
        self._folder = log_folder(trainer)
        settings: Any = trainer  # `log_every_n_steps` is there, but not declared
        if 0 < trainer.estimated_stepping_batches - self._first_step < settings.log_every_n_steps:
            settings.log_every_n_steps = 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what was trained on, which takes all ranks."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._seen = datamodule.examples_seen() if hasattr(datamodule, "examples_seen") else {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what came of it."""
        if trainer.is_global_zero and trainer.global_step > self._first_step:
            rows = _results(trainer, self._folder, time.monotonic() - self._since)
            if len(self._seen) > 1:  # that of an only source tells nothing
                total = max(1, sum(self._seen.values()))
                shares = (f"{k} {n:,} ({100 * n / total:.1f} %)" for k, n in self._seen.items())
                rows.append(("data", f"examples trained on: {', '.join(shares)}"))
            _show(rows, next_commands(trainer, pl_module, self._folder))
        self._has_begun = False

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_begun:
            return
        self._has_begun, self._since = True, time.monotonic()
        if trainer.is_global_zero:
            _show(_plan(trainer, pl_module, self._selections))


def _show(rows: Sequence[tuple[str, str]], commands: Iterable[str] = ()) -> None:
    """Write rows under their labels, and commands that can be pasted."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 10_000  # a file is as wide as it must be
    table = Table.grid(padding=(0, 2))
    for label, text in rows:
        table.add_row(Text(label, style="bold"), Text(text, overflow="fold"))
    with console.capture() as captured:
        console.print(table)
        for command in commands:
            console.print(Text(f"  {_folded(command, console.width - 2)}"), soft_wrap=True)
    text = captured.get()
    sys.stderr.write("\n".join(map(str.rstrip, text.splitlines())) + "\n")


def _folded(command: str, width: int) -> str:
    """A command with an option a line where one line is too narrow, for the shell to join."""
    if len(command) <= width or "'" in command:  # a quoted name may hold what looks like an option
        return command
    return command.replace(" --", " \\\n      --")


def _plan(
    trainer: Trainer, module: Any, selections: Sequence[DynamicLayerSelection]
) -> list[tuple[str, str]]:
    rows = [("base", str(module.base))] if hasattr(module, "base") else []
    if (report := getattr(module, "report", None)) is not None:
        model, (method, _, parameters) = module.model, str(report).partition("; ")
        kind = f"{type(model).__name__}, {model.dtype}".replace("torch.", "")
        rows[0] = ("base", f"{module.base}: {kind}")
        rows += [("method", method), ("parameters", parameters)]
        remark = getattr(report, "remark", "")
        rows += [("note", remark)] if remark else []
    speed = getattr(module, "speed", None)
    if speed is not None and not speed.prompt_gradients:
        rows.append(("gradients", "through responses alone (model.speed.prompt_gradients: false)"))
    if hasattr(trainer.datamodule, "training_summary"):  # type: ignore[attr-defined]
        lines = trainer.datamodule.training_summary()  # type: ignore[attr-defined]
        rows += zip(("data", *[""] * len(lines)), lines, strict=False)
    rows.append(("steps", _steps(trainer)))
    rows += [("layers", _layers(one, module)) for one in selections]
    return rows


def _steps(trainer: Any) -> str:
    total, before = num_steps(trainer), trainer.global_step
    text = "without an end" if total is None else f"{total:,}"
    if (holds := step_size(trainer)) is not None:
        number, what = holds
        text += f" of {'at most ' * (what == 'tokens')}{number:,} {what} each"
    if before:
        text += f", going on after step {before:,} of {trainer.ckpt_path}"
    return text


def num_steps(trainer: Any) -> int | None:
    """Optimizer steps of a training, also before it begins; None without an end."""
    if trainer.state.fn == "fit":
        steps = trainer.estimated_stepping_batches
        return int(steps) if 0 <= steps < math.inf else None
    epochs = trainer.max_epochs
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if epochs is not None and epochs >= 0:
        batches = len(trainer.datamodule.train_dataloader())
        share = trainer.limit_train_batches
        batches = min(batches, share) if isinstance(share, int) else int(batches * share)
        limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * epochs)
    return min(limits, default=None)


def _layers(selection: DynamicLayerSelection, module: LightningModule) -> str:
    """What DLS does."""
    try:
        found = find_layers(module, selection.layers, selection.norms, selection.trainable)
    except ValueError:  # said where the training begins
        return "chosen by DLS"
    if not selection.selects:
        return f"all {found[0].num_layers} train"
    count = resolve_num_active(selection.num_active, len(found))
    free = selection.policy in ("threshold", "all")
    which = "some" if free else str(count)
    budget = selection.backward_budget
    limit = f", within {100 * budget:.3g} % of the backward pass" if budget < 1 else ""
    how = _POLICIES.get(selection.policy, f"by the policy {selection.policy}")
    return (
        f"{which} of {found[0].num_layers} train at a time (DLS), chosen every "
        f"{selection.interval} steps {how}{limit}"
    )


def _results(trainer: Any, folder: Path, seconds: float) -> list[tuple[str, str]]:
    done = f"{trainer.global_step:,} steps in {timedelta(seconds=round(seconds))}"
    recorder = next(iter(callbacks_of(trainer, RunRecorder)), None)
    figures = {} if recorder is None else recorder.figures(trainer)
    if figures.get("train_seconds"):
        done += f", {figures['examples'] / figures['train_seconds']:.3g} examples/s in training"
    if figures.get("peak_mib"):
        done += f", {figures['peak_mib']:,.0f} MiB at most"
    rows = [("done", done), ("run", shown(folder))] if trainer.loggers else [("done", done)]
    path, score = best_checkpoint(trainer)
    if path is not None:
        rows.append(("best" if score else "checkpoint", shown(path) + f" ({score})" * bool(score)))
    for one in callbacks_of(trainer, DynamicLayerSelection):
        if one.num_selections:
            pairs = zip(one.candidate_layers, one.selection_counts, strict=True)
            counts = ", ".join(f"{n} ({count})" for n, count in pairs if count)
            rows.append(("layers", f"times selected, of {one.num_selections}: {counts}"))
    return rows


def next_commands(trainer: Any, module: Any, folder: Path) -> list[str]:
    """Commands to go on with: test, export, and the curves."""
    path, _ = best_checkpoint(trainer)
    config, commands, start = folder / "config.yaml", [], "python -m rosa_lightning"
    if path is not None:
        checkpoint = f"--ckpt_path {shlex.quote(shown(path))}"
        if trainer.loggers and config.exists():
            sources = getattr(trainer.datamodule, "test_sources", ())
            given = "" if sources else " --data.test_sources FILE.jsonl"
            commands.append(
                f"{start} test --config {shlex.quote(shown(config))} {checkpoint}{given}"
            )
        merged = " --format merged" if getattr(module, "finetune", "") == "full" else ""
        commands.append(f"{start} export {checkpoint} --output exported{merged}")
    if trainer.loggers and any(folder.glob("*tfevents*")):
        commands.append(f"tensorboard --logdir {shlex.quote(shown(folder.parent))}")
    elif trainer.loggers:
        commands.append(f"{start} report {shlex.quote(shown(folder))}")
    return commands
