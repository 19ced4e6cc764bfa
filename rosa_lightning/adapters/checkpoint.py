"""A checkpoint of `RoSAModule`: adapters, the base's identity, settings, and each rank's state."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from rosa_lightning.adapters.metadata import BaseIdentity
from rosa_lightning.roae.inject import is_adapter_key
from rosa_lightning.utils.rng import of_all_ranks, rng_state

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_KEY = "rosa"
"""Entry of a checkpoint with all that is ours but the weights."""


@dataclass(frozen=True)
class RankState:
    """What one process goes on with, besides what Lightning restores."""

    rng: dict[str, Any]
    """States of its random generators."""
    gradients: dict[str, Tensor] | None
    """Its gradients by the parameter's name, where the checkpoint lies between two batches of one
    optimizer step."""


def pack(
    checkpoint: dict[str, Any],
    identity: BaseIdentity,
    roae: dict[str, Any],
    gradients: dict[str, Tensor] | None = None,
) -> None:
    """Leave the base's weights out of a Lightning checkpoint and add what must be remembered.

    Every rank must call this, for the state of all.

    Args:
        checkpoint: What Lightning is about to save; changed in place.
        identity: Of the base.
        roae: The RoAE settings as plain values.
        gradients: Of this rank, where an optimizer step has had some of its batches; None on
            every rank or on none.
    """
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: state[key] for key in state if is_adapter_key(key)}
    checkpoint[CHECKPOINT_KEY] = {
        **identity.to_dict(),
        "roae": dict(roae),
        "version": version("rosa-lightning"),
        "rng": of_all_ranks(rng_state()),
    }
    if gradients is not None:
        checkpoint[CHECKPOINT_KEY]["gradients"] = of_all_ranks(gradients)


def unpack(
    checkpoint: dict[str, Any],
    identity: BaseIdentity,
    roae: dict[str, Any],
    *,
    rank: int,
    world_size: int | None,
) -> RankState | None:
    """Check that a checkpoint is ours and fits, and return what this rank goes on with.

    Args:
        checkpoint: As Lightning loaded it.
        identity: Of the base given.
        roae: The RoAE settings given.
        rank: Of this process.
        world_size: Of the training that goes on; None if none does.

    Returns:
        The state; None where no training goes on or, with a warning, where another number of
        processes wrote the checkpoint.

    Raises:
        ValueError: No adapter in it, another base, or settings that would make the same weights
            another function; says what differs.
    """
    remembered = checkpoint.get(CHECKPOINT_KEY)
    if remembered is None:
        raise ValueError(
            "the checkpoint holds no RoSA adapter. Give one that RoSAModule has written."
        )
    identity.check(remembered)
    for key, value in remembered["roae"].items():
        if key != "dropout" and roae[key] != value:
            raise ValueError(
                f"the adapter was trained with model.roae.{key}={value}, and {roae[key]} is given. "
                f"Set model.roae.{key} to what it was trained with."
            )
    states: list[dict[str, Any]] = remembered["rng"]
    if world_size is None:
        return None
    gradients: list[dict[str, Any]] | None = remembered.get("gradients")
    if len(states) == world_size:
        return RankState(states[rank], None if gradients is None else gradients[rank])
    lost = " The batches that its unfinished optimizer step had are lost." if gradients else ""
    rank_zero_warn(
        f"the checkpoint holds random states of {len(states)} processes, and this run has "
        f"{world_size}: dropout will differ from that of the run that wrote it.{lost}"
    )
    return None
