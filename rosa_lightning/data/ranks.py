"""What the ranks of a run compare of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from rosa_lightning.data.tokenization import Example, tokens_digest
from rosa_lightning.utils.agreement import RanksError, agree, configuration, several_ranks, together
from rosa_lightning.utils.stopping import Stopping


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
