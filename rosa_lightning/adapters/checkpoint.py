"""A checkpoint of `RoSAModule`: adapters, the base's fingerprint, settings, each rank's state."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rosa_lightning.adapters.files import read_metadata
from rosa_lightning.adapters.fingerprint import BaseFingerprint
from rosa_lightning.adapters.metadata import AdapterMetadata, Conditions
from rosa_lightning.adapters.methods import (
    FullFinetuning,
    Method,
    check_same_method,
    method_to_dict,
)
from rosa_lightning.roae.inject import is_adapter_key
from rosa_lightning.utils.files import SHARDED_METADATA, check_archive, check_name, open_input
from rosa_lightning.utils.rng import of_all_ranks, rng_state

CHECKPOINT_KEY = "rosa"
"""Entry of a checkpoint with all that is ours but the weights."""


class RankState(NamedTuple):
    """What one process goes on with, besides what Lightning restores."""

    rng: dict[str, Any]
    gradients: dict[str, Tensor] | None
    """By the parameter's name, where the checkpoint lies between two batches of one step."""


def pack(
    checkpoint: dict[str, Any],
    base: BaseFingerprint,
    method: Method,
    gradients: dict[str, Tensor] | None = None,
) -> None:
    """Leave the base's weights out of a checkpoint and add what must be remembered.

    Every rank must call this. ``gradients`` are this rank's, where an optimizer step has had some
    of its batches; None on every rank or on none.
    """
    state = checkpoint["state_dict"]
    if not isinstance(method, FullFinetuning):
        checkpoint["state_dict"] = {key: state[key] for key in state if is_adapter_key(key)}
    checkpoint[CHECKPOINT_KEY] = {
        **asdict(base),
        **method_to_dict(method),
        "version": version("rosa-lightning"),
        "rng": of_all_ranks(rng_state()),
    }
    if gradients is not None:
        checkpoint[CHECKPOINT_KEY]["gradients"] = of_all_ranks(gradients)


def checkpoint_metadata(checkpoint: Mapping[str, Any]) -> AdapterMetadata:
    """What a checkpoint remembers of its adapter; ValueError if it holds none, or a damaged one."""
    about = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict):
        raise ValueError(
            "the checkpoint holds no RoSA adapter. Give one that RoSAModule has written."
        )
    base = {name: about.get(name) for name in ("base", "revision", "samples")}
    method = {name: about.get(name) for name in ("roae", "peft", "finetune")}
    return AdapterMetadata.from_dict(
        {"base": base, **method, "roae_conditions": about.get("conditions")}
    )


def unpack(
    checkpoint: dict[str, Any],
    base: BaseFingerprint,
    method: Method,
    *,
    rank: int,
    world_size: int | None,
) -> RankState | None:
    """Check that a checkpoint is of this base and these settings; what this rank goes on with.

    None where no training goes on (``world_size`` None) or, with a warning, where another number
    of processes wrote the checkpoint.
    """
    metadata = checkpoint_metadata(checkpoint)
    base.check(metadata.base, "checkpoint")
    check_same_method(metadata.method, method)
    if world_size is None:
        return None
    states: list[dict[str, Any]] = checkpoint[CHECKPOINT_KEY]["rng"]
    gradients: list[dict[str, Any]] | None = checkpoint[CHECKPOINT_KEY].get("gradients")
    if len(states) == world_size:
        return RankState(states[rank], None if gradients is None else gradients[rank])
    lost = " The batches that its unfinished optimizer step had are lost." if gradients else ""
    rank_zero_warn(
        f"the checkpoint holds random states of {len(states)} processes, and this run has "
        f"{world_size}: dropout will differ from that of the run that wrote it.{lost}"
    )
    return None


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, read without running code from it.

    Of a folder of shards, all but the tensors. ValueError if it is missing or damaged, holds more
    than plain values, or no adapter.
    """
    check_name(path)
    sharded = Path(path, SHARDED_METADATA)
    file = sharded if sharded.is_file() else Path(path)
    if not file.is_file():
        problem = "is no file" if Path(path).exists() else "does not exist"
        raise ValueError(
            f"ckpt_path={path} {problem}. Give a checkpoint that fit has written, such as "
            "lightning_logs/version_0/checkpoints/last.ckpt."
        )
    try:
        with open_input(file) as opened:
            check_archive(opened, path)
            content: dict[str, Any] = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch share no base class
        known = isinstance(error, ValueError | OSError) and str(error).rstrip(".")
        raise ValueError(
            f"{path} is no checkpoint that can be read safely ({known or type(error).__name__}). "
            "Give one that RoSAModule has written."
        ) from error
    try:
        checkpoint_metadata(content)
        if file is not sharded and "state_dict" not in content:
            raise ValueError("it holds no weights. Give another one.")
        dict(content.get("hyper_parameters") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def checkpoint_defaults(ckpt_path: str | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint, or else an adapter, knows of its model, by configuration key.

    ``model`` holds the keys below ``model`` as they are without that knowledge. A checkpoint holds
    its adapter, so with one ``model.adapter`` does not count. Never ``model.trust_remote_code``:
    whether to run code is the user's to say.
    """
    options: dict[str, Any] = {}
    if ckpt_path is not None:
        content = read_checkpoint(ckpt_path)
        metadata, options = checkpoint_metadata(content), content.get("hyper_parameters") or {}
    elif model["adapter"] is not None:
        metadata = read_metadata(Path(model["adapter"]))
    else:
        return {}
    conditions = metadata.conditions or Conditions()
    known = conditions.settings()
    if known.get("trainer.precision") == "32-true":
        del known["trainer.precision"]  # the trainer's own default
    base = metadata.base.base or model["base"]  # PEFT may know of none
    known |= {"model.base": base, "model.revision": metadata.base.revision}
    names = ("base", "revision", "dtype", "quantization")
    known |= {f"model.{name}": options[name] for name in names if name in options}
    for group, value in method_to_dict(metadata.method).items():
        own = {f"model.roae.{name}": one for name, one in value.items()} if group == "roae" else {}
        known |= own or {f"model.{group}": value}
    if known.get("model.revision") is None or model["base"] not in (
        None,
        "",
        known.get("model.base"),
    ):
        known.pop("model.revision", None)  # of another repository
    return known
