"""A checkpoint of `RoSAModule`: adapters, the base's identity, settings and random states."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from rosa_lightning.base import BaseIdentity
from rosa_lightning.rng import all_rng_states
from rosa_lightning.surgery import is_adapter_key

CHECKPOINT_KEY = "rosa"
"""Entry of a checkpoint with all that is ours but the weights."""


def pack(checkpoint: dict[str, Any], identity: BaseIdentity, roae: dict[str, Any]) -> None:
    """Leave the base's weights out of a Lightning checkpoint and add what must be remembered.

    Every rank must call this, for the random states of all.

    Args:
        checkpoint: What Lightning is about to save; changed in place.
        identity: Of the base.
        roae: The RoAE settings as plain values.
    """
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: state[key] for key in state if is_adapter_key(key)}
    checkpoint[CHECKPOINT_KEY] = {
        **identity.to_dict(),
        "roae": dict(roae),
        "version": version("rosa-lightning"),
        "rng": all_rng_states(),
    }


def unpack(
    checkpoint: dict[str, Any],
    identity: BaseIdentity,
    roae: dict[str, Any],
    *,
    rank: int,
    world_size: int | None,
) -> dict[str, Any] | None:
    """Check that a checkpoint is ours and fits, and return this rank's random state.

    Args:
        checkpoint: As Lightning loaded it.
        identity: Of the base given.
        roae: The RoAE settings given.
        rank: Of this process.
        world_size: Of the training that goes on; None if none does.

    Returns:
        The state, or None, with a warning, where another number of processes wrote it.

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
    if len(states) == world_size:
        return states[rank]
    rank_zero_warn(
        f"the checkpoint holds random states of {len(states)} processes, and this run has "
        f"{world_size}: dropout will differ from that of the run that wrote it."
    )
    return None
