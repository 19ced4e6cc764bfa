"""Stop a run, or skip an optimizer step, where the loss or a gradient is not finite.

Costs one check and one wait for the device per optimizer step, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from rosa_lightning.models.finite import local_parts
from rosa_lightning.utils.agreement import RanksError, exchange, several_ranks

_MOST_RECORDS = 20
"""Record numbers of a source that a message lists."""


def check_max_nonfinite_steps(value: Any) -> None:
    """Raise ValueError for a setting that is not a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"max_nonfinite_steps={value!r} is not a whole number of at least 0. Set it to the "
            "number of such steps that a run may leave out; 0 stops at the first."
        )


def check_clipping(value: float | None) -> None:
    """Raise ValueError for a clipping value below 0, which clips nothing, or NaN, spoiling all."""
    if value is not None and not value >= 0:
        raise ValueError(
            f"gradient_clip_val={value} clips nothing. Set trainer.gradient_clip_val to a number "
            "above 0, 1.0 say, or to null for no clipping."
        )


class StepGuard:
    """Checks losses and gradients before each optimizer step, and clips the gradients.

    A gradient counts as not finite, too, where the sum of its squares is not in its data type:
    clipping and Adam's moments need it. `max_skipped` steps of a run are left out; the next such
    step is an error.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        """Steps left out so far in this run."""
        self.reset()

    def reset(self) -> None:
        """Begin a new window of gradient accumulation."""
        self._losses: list[Tensor] = []
        self._batches: list[Mapping[str, Any]] = []
        self._norm: Tensor | None = None
        """L2 norm of the gradients, where this rank holds all of them."""

    def add(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Remember a batch of the step, without waiting for the device."""
        self._losses.append(loss.detach().float())
        self._batches.append({k: batch[k] for k in ("source", "index") if k in batch})

    def check(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Check the step's losses and gradients, on all ranks; drop the gradients of a bad step.

        ValueError, which names the records, where no step may be left out any more.
        """
        problem, norm = self._find_problem(module, optimizer)
        if problem:
            self._skip(module.trainer, problem)
            _drop_gradients(optimizer, _scaler(module.trainer))
        self.reset()
        self._norm = None if problem else norm

    def check_begun(self, module: LightningModule) -> None:
        """As `check` for a step that has begun, before its gradients are saved."""
        for optimizer in module.trainer.optimizers if self.skipped >= self.max_skipped else ():
            if problem := self._find_problem(module, optimizer)[0]:
                self._skip(module.trainer, problem)

    def clip(
        self, model: nn.Module, optimizer: Optimizer, value: float, algorithm: str | None
    ) -> bool:
        """Clip gradients by the norm that `check` has computed, or under FSDP1; False elsewhere."""
        norm, self._norm = self._norm, None
        if value <= 0:
            return False
        if norm is not None and algorithm != "value":
            clip_grads_with_norm_(_parameters(optimizer), value, norm)
        elif not isinstance(model, FullyShardedDataParallel):
            return False
        elif algorithm == "value":
            clip_grad_value_(model.parameters(), value)
        else:
            model.clip_grad_norm_(value)
        return True

    def _find_problem(
        self, module: LightningModule, optimizer: Optimizer
    ) -> tuple[str, Tensor | None]:
        """What is not finite, on any rank (empty if nothing is), and the norm of the gradients."""
        trainer = module.trainer
        device, scaler = trainer.strategy.root_device, _scaler(trainer)
        held = [p.grad.detach() for p in _parameters(optimizer) if p.grad is not None]
        gradients = [part for grad in held for part in local_parts(grad)]
        norm = get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1, device=device)
        bad = ~torch.stack([losses.isfinite().all(), norm.to(losses.device).isfinite()])
        flags = bad.to(device, torch.float32)
        if several_ranks():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad_loss, bad_gradient = map(bool, flags.tolist())
        if bad_gradient and not bad_loss and scaler is not None:
            # Infinite gradients are normal under a scaler, which skips their step, until it scales
            # by less than 1.
            bad_gradient = scaler.get_scale() < 1
        problem = self._describe(module, bad_loss) if bad_loss or bad_gradient else ""
        sharded = isinstance(getattr(module, "model", None), FullyShardedDataParallel)
        sharded = sharded or any(isinstance(grad, DTensor) for grad in held)
        return problem, None if sharded or scaler is not None else norm

    def _describe(self, module: LightningModule, bad_loss: bool) -> str:
        """What is not finite, and on which records, on all ranks that have seen it."""
        own = ""
        if bad_loss:
            losses = zip(self._losses, self._batches, strict=True)
            bad = [(loss.item(), batch) for loss, batch in losses if not loss.isfinite()]
            own = "; ".join(f"the loss is {loss} {_records(module, [b])}" for loss, b in bad)
        elif names := [n for n, p in module.named_parameters() if _has_bad_gradient(p)]:
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            where = _records(module, self._batches)
            own = f"the gradient of {names[0]}{more} is not finite {where}"
        if not several_ranks():
            return own or "the norm of the gradients is not finite"
        texts = enumerate(exchange("step that is not finite", own))
        return "; ".join(f"on rank {rank} {text}" for rank, text in texts if text)

    def _skip(self, trainer: Trainer, problem: str) -> None:
        """Count the step, or stop."""
        step = trainer.global_step
        if self.skipped >= self.max_skipped:
            before = f", after {self.skipped} that were left out" if self.skipped else ""
            raise RanksError(
                f"optimizer step {step} is not finite{before}: {problem}. The weights are as they "
                "were before it. Look at these records, lower optimizer.lr, set "
                "trainer.gradient_clip_val, or let max_nonfinite_steps such steps be left out."
            )
        self.skipped += 1
        rank_zero_warn(
            f"Optimizer step {step} is left out, {self.skipped} of max_nonfinite_steps="
            f"{self.max_skipped}: {problem}."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"train/nonfinite_steps": self.skipped}, step=step)


def _has_bad_gradient(weight: Tensor) -> bool:
    parts = [] if weight.grad is None else local_parts(weight.grad)
    return any(not get_total_norm([part]).isfinite() for part in parts)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _drop_gradients(optimizer: Optimizer, scaler: Any) -> None:
    # A scaler leaves unscaling to fused optimizers, and then looks for infinity in gradients.
    unscales = scaler is not None and optimizer.defaults.get("fused")
    for parameter in _parameters(optimizer):
        if parameter.grad is not None and unscales:
            parameter.grad.fill_(torch.nan)
        else:
            parameter.grad = None


def _records(module: LightningModule, batches: Sequence[Mapping[str, Any]]) -> str:
    """Which records batches hold, by source."""
    names = getattr(getattr(module.trainer, "datamodule", None), "source_names", ())
    found: dict[str, list[int]] = {}
    for batch in (batch for batch in batches if len(batch) == 2):
        for source, index in zip(batch["source"].tolist(), batch["index"].tolist(), strict=True):
            name = names[source] if source < len(names) else f"source {source}"
            found.setdefault(name, []).append(index)
    if not found:
        return f"in batch {module.trainer.fit_loop.batch_idx}"
    texts = [
        f"{', '.join(map(str, sorted(numbers)[:_MOST_RECORDS]))} of {name}"
        for name, numbers in found.items()
    ]
    return f"on records {'; '.join(texts)}"
