"""How long a run will be, in optimizer steps."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def planned_steps(trainer: Trainer) -> float:
    """The optimizer step at which the trainer will stop; infinite where it cannot know.

    Lightning's own estimate takes the accumulation of the moment for that of all epochs, and tells
    the end of a run of so many epochs without a length as -1.
    """
    total: float = trainer.estimated_stepping_batches
    if total < 0:
        return math.inf
    batches = trainer.num_training_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    # Without a number of epochs or of batches only max_steps can end the run.
    if scheduler is None or trainer.max_epochs in (None, -1) or math.isinf(batches):
        return total
    windows = (scheduler.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs))
    steps = sum(math.ceil(batches / window) for window in windows)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
