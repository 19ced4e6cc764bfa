"""Where a resumed run goes on: Lightning's counts of batches and epochs in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


def settle_epoch(loops: Mapping[str, Any]) -> None:
    """Make the counts of a checkpoint that was saved at an epoch's end those of its last batch.

    Lightning takes an epoch that `max_steps` or a callback has cut short for a whole one. Under
    `max_steps` it begins the next one with the count of batches of the last one, and ends it after
    a single batch. Where the checkpoint was saved right behind an epoch's last batch, it takes the
    next epoch for the one that is over, and so do all checkpoints of that epoch.

    Args:
        loops: The entry of that name of a Lightning checkpoint; changed in place.
    """
    fit: Mapping[str, Any] = loops.get("fit_loop", {})
    epochs, batches = fit.get("epoch_progress"), fit.get("epoch_loop.batch_progress")
    if epochs is None or batches is None:
        return
    last, all_batches = batches["is_last_batch"], batches["total"]
    if all_batches["completed"] < all_batches["processed"]:  # saved in `on_train_batch_end`
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


def why_nothing_to_train(trainer: Trainer) -> str:
    """Which limits a run that goes on has reached already, and what to do, in a line."""
    loop: Any = trainer.fit_loop
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    epochs: int = loop.epoch_progress.current.processed
    timers = [c for c in callbacks if isinstance(c, Timer) and c.time_remaining() is not None]
    limits = {
        f"trainer.max_steps={trainer.max_steps}": 0 <= trainer.max_steps <= trainer.global_step,
        f"trainer.max_epochs={loop.max_epochs}": 0 <= (loop.max_epochs or -1) <= epochs,
        "trainer.max_time": any((timer.time_remaining() or 0) <= 0 for timer in timers),
        "trainer.limit_train_batches=0": trainer.limit_train_batches == 0,
    }
    reached = [name for name, holds in limits.items() if holds]
    names = " and ".join(name.partition("=")[0] for name in reached)
    if reached:
        why = f"{' and '.join(reached)} {'is' if len(reached) == 1 else 'are'} reached"
    else:
        why, names = "a callback has stopped the run", "the limits of trainer.callbacks"
    anew = ", or leave out ckpt_path to begin anew" if trainer.ckpt_path else ""
    return (
        f"nothing was trained: the run stands at step {trainer.global_step} after {epochs} whole "
        f"epochs, and {why}. Raise {names} to go on{anew}."
    )
