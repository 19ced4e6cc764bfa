"""What a run has trained on, in which order, and what its ranks compare of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rosa_lightning.data.tokenization import Example, tokens_digest
from rosa_lightning.utils.agreement import RanksError, agree, configuration, several_ranks, together
from rosa_lightning.utils.stopping import Stopping


class SampleCounter:
    """Counts the examples of each source that a run has trained on, resumed parts included."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.start()

    def start(self, before: Mapping[str, int] | None = None) -> None:
        """Begin anew, or from the counts of a checkpoint."""
        self._logged = 0
        self._here = torch.zeros(len(self.names), dtype=torch.long)  # on this rank
        self._before = torch.tensor([(before or {}).get(name, 0) for name in self.names])

    def add(self, source_B: Tensor) -> None:
        """Count a batch, by the sources of its examples, shape (B,)."""
        self._here += torch.bincount(source_B.cpu(), minlength=len(self.names))

    def counts(self, trainer: Trainer | None) -> dict[str, int]:
        """Examples of each source so far, on all ranks; every rank must call this."""
        here = self._here
        if trainer is not None and trainer.world_size > 1:
            strategy = trainer.strategy
            here = strategy.reduce(here.clone().to(strategy.root_device), reduce_op="sum").cpu()
        return dict(zip(self.names, (here + self._before).tolist(), strict=True))

    def shares(self, trainer: Trainer | None) -> dict[str, float]:
        """Each source's part of the examples so far; every rank must call this."""
        seen = self.counts(trainer)
        return {name: count / max(1, sum(seen.values())) for name, count in seen.items()}

    def log(self, trainer: Trainer) -> None:
        """Log the shares at the trainer's interval; that of an only source tells nothing."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self.names) > 1 and interval and step % interval == 0 and step > self._logged:
            self._logged = step
            shares = {f"data/share/{name}": share for name, share in self.shares(trainer).items()}
            for logger in trainer.loggers:
                logger.log_metrics(shares, step=step)

    def report(self, trainer: Trainer | None, weights: Sequence[float]) -> None:
        """Say what was trained on, beside the weights that were asked for."""
        seen, shares = self.counts(trainer), self.shares(trainer)
        for name, weight in zip(self.names, weights, strict=True):
            rank_zero_info(
                f"trained on {name}: {seen[name]} examples, share {shares[name]:.3f}, "
                f"weight {weight:.3f}"
            )


def order_changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What of the settings that decide the order of records is not as a checkpoint says."""
    then = {"batching": "random", "content": {}, **then}  # earlier versions do not know every key
    changed = [key for key in now if key != "content" and now[key] != then.get(key, now[key])]
    told = [f"{key} was {then[key]} and is {now[key]}" for key in changed]
    for name, digest in now["content"].items():
        earlier = then["content"].get(name, "")
        # A digest of a file, which its first word tells, says nothing of one of records.
        if digest != earlier and digest.split()[:1] == earlier.split()[:1]:
            told.append(f"source {name} holds other records")
    return told


# --- what ranks compare ---


def ranks_of(trainer: Trainer | None) -> dict[str, Any]:
    """Which rank this is of how many, as samplers take it."""
    return getattr(trainer, "distributed_sampler_kwargs", None) or {}


def agree_on_settings(trainer: Trainer | None) -> None:
    """Compare the ranks before any does what the others might not, a broadcast say."""
    if trainer is None or not several_ranks():
        return
    if (stopping := Stopping.of(trainer)) is not None:
        stopping.agree(trainer)
    else:
        agree("settings", configuration(trainer))


def agree_on_data(examples: Mapping[str, Sequence[Example]], lengths: str | None) -> None:
    """Compare the ranks' examples by name, and the digest of their lengths."""
    if several_ranks():
        with together("comparison of the data"):
            found = {k: f"{len(v)} records, {tokens_digest(v)}" for k, v in examples.items()}
        agree("data", found | {"lengths of the records": lengths})


def check_prompts(setting: str, number: int, trainer: Trainer | None) -> None:
    """Refuse fewer prompts than ranks: one without any would not take part in what all do."""
    world = 1 if trainer is None else trainer.world_size
    if number < world:
        raise RanksError(
            f"{setting} hold {number} prompts for {world} processes, and each needs one. Set "
            f"trainer.devices and trainer.num_nodes to {number} processes or fewer."
        )
