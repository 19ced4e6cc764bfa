"""What a checkpoint or an adapter's folder knows of its model, as defaults of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rosa_lightning.adapters.checkpoint import CHECKPOINT_KEY
from rosa_lightning.adapters.conditions import Conditions
from rosa_lightning.adapters.files import adapter_conditions, adapter_settings
from rosa_lightning.adapters.lora import from_lora
from rosa_lightning.adapters.metadata import BaseIdentity
from rosa_lightning.adapters.peft_format import read_lora
from rosa_lightning.models.loading import load_skeleton
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import check_archive, check_name, open_input

_SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds all but the tensors; Lightning's name."""


def remembered_settings(ckpt_path: str | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint, or else an adapter, knows of its model, by configuration key.

    A checkpoint holds its adapter, so with one ``model.adapter`` does not count. Never
    ``model.trust_remote_code``: whether to run code is the user's to say.

    Args:
        ckpt_path: A checkpoint of `RoSAModule`: a file, or a folder of shards.
        model: The keys below ``model`` as they are without that knowledge.

    Raises:
        ValueError: It cannot be read, or is a LoRA that RoAE cannot hold.
    """
    if ckpt_path is not None:
        known = _checkpoint_settings(ckpt_path)
    elif model["adapter"] is not None:
        known = _adapter_settings(Path(model["adapter"]), model)
    else:
        return {}
    if model["base"] and model["base"] != known.get("model.base"):
        known.pop("model.revision", None)  # of another repository
    return known


def _checkpoint_settings(path: str) -> dict[str, Any]:
    content = read_checkpoint(path)
    trained = content[CHECKPOINT_KEY]
    known = content.get("hyper_parameters") or {"base": trained["base"]}
    names = ("base", "revision", "dtype", "quantization")
    return {
        **_of(Conditions.from_dict(trained.get("conditions", {}))),
        **{f"model.{name}": known[name] for name in names if name in known},
        **{f"model.roae.{name}": value for name, value in trained["roae"].items()},
    }


def _adapter_settings(folder: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    base, revision, roae = adapter_settings(folder)
    named = model["base"] or base
    if roae is None and named:  # a LoRA from elsewhere: held against the base's geometry alone
        skeleton = load_skeleton(
            named,
            revision=model["revision"],
            dtype="float32",
            trust_remote_code=model["trust_remote_code"],
        )
        roae, _ = from_lora(skeleton, read_lora(folder))
    known = {"model.base": base, "model.revision": revision}
    settings = {} if roae is None else {f"model.roae.{k}": v for k, v in asdict(roae).items()}
    conditions = adapter_conditions(folder)
    trained = {} if conditions is None else _of(conditions)
    return {name: value for name, value in known.items() if value} | settings | trained


def _of(conditions: Conditions) -> dict[str, Any]:
    """The settings that conditions ask for; the trainer's own precision is left to the trainer."""
    known = conditions.settings()
    if known.get("trainer.precision") == "32-true":
        del known["trainer.precision"]
    return known


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, read without running code from it.

    Of a folder of shards, all but the tensors.

    Raises:
        ValueError: It is missing or damaged, holds more than plain values, or no adapter.
    """
    check_name(path)
    sharded = Path(path, _SHARDED_METADATA)
    file = sharded if sharded.is_file() else Path(path)
    if not file.is_file():
        raise ValueError(f"ckpt_path={path} is no file. Give a checkpoint of RoSAModule.")
    try:
        with open_input(file) as opened:
            check_archive(opened, path)
            content: dict[str, Any] = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch share no base class
        raise ValueError(
            f"{path} is no checkpoint that can be read safely ({_reason(error)}). Give one that "
            "RoSAModule has written."
        ) from error
    needed = {CHECKPOINT_KEY} if file is sharded else {CHECKPOINT_KEY, "state_dict"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise ValueError(
            f"{path} holds no RoSA adapter. Give a checkpoint that RoSAModule has written."
        )
    try:
        about = content[CHECKPOINT_KEY]
        RoAEConfig(**about["roae"])
        BaseIdentity(base=about["base"], revision=about["revision"], samples=dict(about["samples"]))
        Conditions.from_dict(about.get("conditions", {}))
        dict(content.get("hyper_parameters") or {})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: what it says of its adapter cannot be read "
            f"({type(error).__name__}: {error}). Give one that RoSAModule has written."
        ) from error
    return content


def _reason(error: Exception) -> str:
    """Why a file cannot be read: in our words, or torch's long error by its kind alone."""
    known = isinstance(error, ValueError | OSError) and str(error)
    return str(error).rstrip(".") if known else type(error).__name__
