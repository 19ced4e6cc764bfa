"""Fix Lightning's counts of batches and epochs in a checkpoint, so that a resumed run is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from rosa_lightning.utils.stopping import validation_is_due


def settle_epoch(loops: Mapping[str, Any]) -> None:
    """Make the counts of a checkpoint that was saved at an epoch's end those of its last batch.

    Lightning takes an epoch that `max_steps` or a callback has cut short for a whole one. Under
    `max_steps` it begins the next one with the count of batches of the last one, and ends it after
    a single batch. Where the checkpoint was saved right after an epoch's last batch, it takes the
    next epoch for the one that is over, and so do all checkpoints of that epoch. Changes `loops`,
    the entry of that name of a checkpoint, in place.
    """
    fit: Mapping[str, Any] = loops.get("fit_loop", {})
    epochs, batches = fit.get("epoch_progress"), fit.get("epoch_loop.batch_progress")
    if epochs is None or batches is None:
        return
    last, all_batches = batches["is_last_batch"], batches["total"]
    if _is_after_batch(loops):
        if not last:
            return
        for kind in ("total", "current"):
            epochs[kind]["processed"] = epochs[kind]["started"]
        all_batches["completed"] = all_batches["processed"]
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # loggers count by it
    elif epochs["total"]["processed"] < epochs["total"]["started"]:
        return  # saved within an epoch, in a validation
    for kind in ("total", "current"):
        if last:
            epochs[kind]["completed"] = epochs[kind]["processed"]
        elif epochs[kind]["processed"] > 0:
            epochs[kind]["processed"] = epochs[kind]["completed"] = epochs[kind]["started"] - 1
    if last:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def accumulates(trainer: Trainer) -> bool:
    """Whether the optimizer step of the batch at hand waits for more batches."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    ready = progress.current.ready
    is_last = progress.is_last_batch or ready == trainer.num_training_batches
    return ready % trainer.accumulate_grad_batches != 0 and not is_last


def due_validation(trainer: Trainer, loops: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that make a validation follow on the batch a checkpoint is saved at.

    None where none follows, or where a clock or a request to stop has made it due, of which a
    resumed run does not know.
    """
    if not _is_after_batch(loops) or trainer.should_stop:
        return None
    return _validation_settings(trainer) if validation_is_due(trainer) else None


def begin_due_validation(
    trainer: Trainer, loops: Mapping[str, Any], due: Mapping[str, Any] | None
) -> None:
    """Let a resumed run begin with the validation that was due, which Lightning leaves out.

    Changes `loops` in place. With other settings than `due` has, no validation may be due.
    """
    if due is None or due != _validation_settings(trainer) or not _is_after_batch(loops):
        return
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    validated = fit["epoch_loop.val_loop.batch_progress"]
    done = validated["total"]["completed"]
    for kind, count in (("total", done), ("current", 0)):
        begun = dict.fromkeys(("ready", "started"), count + 1)
        validated[kind] = begun | dict.fromkeys(("processed", "completed"), count)


def _is_after_batch(loops: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved in `on_train_batch_end`."""
    batches = loops.get("fit_loop", {}).get("epoch_loop.batch_progress")
    return batches is not None and batches["total"]["completed"] < batches["total"]["processed"]


def _validation_settings(trainer: Trainer) -> dict[str, Any]:
    names = ("val_check_interval", "check_val_every_n_epoch", "limit_val_batches")
    return {name: getattr(trainer, name) for name in (*names, "limit_train_batches")}


def untrained_reason(trainer: Trainer) -> str:
    """Which limits a resumed run had reached already, and what to do, in one line."""
    loop: Any = trainer.fit_loop
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    epochs: int = loop.epoch_progress.current.processed
    times = [c.time_remaining() for c in callbacks if isinstance(c, Timer)]
    limits = {
        f"trainer.max_steps={trainer.max_steps}": 0 <= trainer.max_steps <= trainer.global_step,
        f"trainer.max_epochs={loop.max_epochs}": 0 <= (loop.max_epochs or -1) <= epochs,
        "trainer.max_time": any(time is not None and time <= 0 for time in times),
        "trainer.limit_train_batches=0": trainer.limit_train_batches == 0,
    }
    reached = [name for name, holds in limits.items() if holds]
    names = " and ".join(name.partition("=")[0] for name in reached)
    why = f"{' and '.join(reached)} {'is' if len(reached) == 1 else 'are'} reached"
    if not reached:
        why, names = "a callback has stopped the run", "the limits of trainer.callbacks"
    anew = ", or leave out ckpt_path to begin anew" if trainer.ckpt_path else ""
    return (
        f"nothing was trained: the run stands at step {trainer.global_step} after {epochs} whole "
        f"epochs, and {why}. Raise {names} to go on{anew}."
    )
