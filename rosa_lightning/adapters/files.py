"""Loading and writing adapters: weights, settings, and what they were trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import nn

from rosa_lightning.adapters import lora
from rosa_lightning.adapters.fingerprint import fingerprint
from rosa_lightning.adapters.metadata import AdapterMetadata, Conditions
from rosa_lightning.adapters.methods import Method, MethodReport, as_method, check_same_method
from rosa_lightning.adapters.peft_folder import load_peft, peft_metadata
from rosa_lightning.adapters.reading import naming, read_json, read_tensors
from rosa_lightning.roae.inject import (
    RoAEReport,
    check_adapter_keys,
    inject_roae,
    is_adapter_key,
    remove_roae,
)
from rosa_lightning.roae.layer import RoAEConfig

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG_FILE = "roae_config.json"
WEIGHTS_FILE = "roae_adapter.safetensors"
_FORMAT = 2
"""Raised when older code could no longer read what is written. 1 held rotation tables, which are
ignored."""


def write_adapter(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write the adapter of a model, and how it was trained, into an existing folder."""
    metadata = AdapterMetadata.of(model, trained).to_dict()
    state = model.state_dict()
    weights = {key: state[key].cpu().contiguous() for key in state if is_adapter_key(key)}
    package = f"rosa-lightning {version('rosa-lightning')}"
    config = {"format": _FORMAT, "package": package, **metadata}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def read_metadata(folder: Path) -> AdapterMetadata:
    """What an adapter's folder says of itself, without a base.

    Raises:
        ValueError: It holds no adapter of this package, or a damaged one.
    """
    kind = _kind(folder)
    if kind != "rosa":
        return lora.lora_metadata(folder) if kind == "lora" else peft_metadata(folder)
    path = folder / CONFIG_FILE
    config = read_json(path)
    if config.get("format") not in (1, _FORMAT) and "base" in config:
        raise ValueError(
            f"{path} is of format {config.get('format')} (written by {config.get('package')}), and "
            f"this release reads format {_FORMAT}. Install the release that wrote it."
        )
    with naming(path):
        return AdapterMetadata.from_dict(config)


def load_adapter(
    model: nn.Module, folder: str | Path, config: Method | PeftConfig | None = None
) -> RoAEReport | MethodReport:
    """Put an adapter on a fresh base, in place.

    Args:
        model: The base that it was trained on; another dtype will do.
        folder: Written by `export_adapter` in the format ``rosa`` or ``peft``, or by PEFT.
        config: Settings that must agree with those of the adapter but for the dropout, which is
            taken from here; by default the adapter's own.

    Returns:
        What was added.

    Raises:
        ImportError: It is an adapter of PEFT, which is missing.
        ValueError: No adapter, a damaged one, or one of another base; names what differs. The
            model is left as it was.
    """
    folder = Path(folder)
    check_plain_model(model, "load_adapter")
    method = None if config is None else as_method(config)
    if _kind(folder) == "peft":
        return load_peft(model, folder, method)
    metadata = read_metadata(folder)
    given = metadata.method if method is None else method
    check_same_method(metadata.method, given)
    assert isinstance(given, RoAEConfig), "as the adapter's"
    fingerprint(model).check(metadata.base)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    report = inject_roae(model, replace(metadata.roae, dropout=given.dropout))
    try:
        metadata.check_rotation(report)
        _load_weights(model, folder, report)
    except BaseException:
        remove_roae(model)
        for parameter, required_grad in trained:
            parameter.requires_grad_(required_grad)
        raise
    return report


@torch.no_grad()
def _load_weights(model: nn.Module, folder: Path, report: RoAEReport) -> None:
    own = {name: value for name, value in model.named_parameters() if is_adapter_key(name)}
    if _kind(folder) == "lora":  # it leaves out what training did not change, which begins anew
        weights = lora.lora_weights(folder, report)
        left_out = {name: torch.zeros(own[name].shape) for name in own.keys() - weights.keys()}
        check_adapter_keys(model, {**weights, **left_out})
    else:
        weights = read_tensors(folder / WEIGHTS_FILE)
        check_adapter_keys(model, weights)
    for name, value in weights.items():
        own[name].copy_(value)


def check_plain_model(model: nn.Module, function: str) -> None:
    """Refuse a LightningModule, whose weights go by other names than those of its model."""
    if isinstance(model, LightningModule):
        raise ValueError(
            f"{function} takes the model that a {type(model).__name__} holds, not the "
            f"{type(model).__name__} itself. Pass module.model, after module.configure_model()."
        )


def _kind(folder: Path) -> Literal["rosa", "lora", "peft"]:
    """What a folder holds: RoAE, RoAE as LoRA, or a method of PEFT; ValueError if none."""
    if (folder / CONFIG_FILE).exists():
        return "rosa"
    if (folder / lora.CONFIG_FILE).exists():
        return "lora" if lora.holds_roae(folder) else "peft"
    found = f"neither {CONFIG_FILE} nor {lora.CONFIG_FILE} is there"
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
    raise ValueError(
        f"{folder} holds no adapter: {found}. Give a folder on this machine that export or PEFT "
        "has written."
    )
