"""The default learning rate schedule: linear warm-up, then cosine decay, by optimizer step."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from rosa_lightning.dls.callback import total_optimizer_steps


class WarmupCosine(LambdaLR):
    """Linear warm-up to each group's learning rate, then half a cosine down.

    Args:
        optimizer: The optimizer.
        warmup: Steps of the warm-up, as a count (a whole number) or a share of all steps (below 1).
        total_steps: Optimizer steps of the whole run; None takes them from the trainer, and
            outside `RoSAModule` gives no decay, and a warm-up only if that is a count.
        final_ratio: Learning rate at the end, as a share of the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int | float = 0.05,
        total_steps: int | None = None,
        final_ratio: float = 0.0,
    ) -> None:
        if not 0 <= warmup < math.inf or (warmup >= 1 and int(warmup) != warmup):
            raise ValueError(
                f"warmup={warmup} is neither a whole number of steps nor a share below 1. Set "
                "lr_scheduler.init_args.warmup."
            )
        if total_steps is not None and total_steps < 1:
            raise ValueError(
                f"total_steps={total_steps} is below 1. Set lr_scheduler.init_args.total_steps."
            )
        if not 0 <= final_ratio <= 1:
            fix = "Set lr_scheduler.init_args.final_ratio."
            raise ValueError(f"final_ratio={final_ratio} is outside [0, 1]. {fix}")
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"lr={rates[0]} is no learning rate. Set optimizer.init_args.lr.")
        self.warmup = warmup
        self.total_steps = total_steps
        self.final_ratio = final_ratio
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of the peak."""
        total = self.total_steps
        warmup = self.warmup * (total or 0) if self.warmup < 1 else self.warmup
        if step < warmup:
            # The first step already learns: step 0 of a warm-up of 10 runs at a tenth.
            return min(1.0, (step + 1) / warmup)
        if total is None:
            return 1.0
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    def set_total_steps(self, total_steps: int) -> None:
        """Say how long the run is, once that is known, before the first step."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The step reached; the shape of the schedule is the configuration's."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"last_epoch": self.last_epoch, "_last_lr": rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the step reached."""
        vars(self).update(state_dict)


def lightning_scheduler(scheduler: Any, trainer: Trainer) -> Any:
    """How Lightning shall step a schedule: once an optimizer step, or after each validation.

    A `WarmupCosine` without a length takes the trainer's; ValueError if the run has none.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {"scheduler": scheduler, "monitor": monitor, "strict": False}
    if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
        steps = total_optimizer_steps(trainer)
        if math.isinf(steps):
            raise ValueError(
                "the run has no end, so the schedule has no length. Set trainer.max_steps or "
                "trainer.max_epochs, or lr_scheduler.init_args.total_steps."
            )
        scheduler.set_total_steps(int(steps))
    return {"scheduler": scheduler, "interval": "step"}
