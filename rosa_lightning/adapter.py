"""The adapter's own folder: RoAE weights, settings, and what they were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosa_lightning.base import base_name, identify
from rosa_lightning.lora import from_lora, own_config
from rosa_lightning.peft_files import CONFIG_FILE as LORA_CONFIG_FILE
from rosa_lightning.peft_files import read_lora
from rosa_lightning.roae import RoAEConfig
from rosa_lightning.surgery import (
    RoAEReport,
    check_adapter_keys,
    inject_roae,
    is_adapter_key,
    remove_roae,
    roae_report,
)

CONFIG_FILE = "roae_config.json"
WEIGHTS_FILE = "roae_adapter.safetensors"
_FORMAT = 1
"""Raised when older code could no longer read what is written."""


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter of a model into a folder that exists.

    Raises:
        ValueError: The model carries no RoAE.
        OSError, SafetensorError: The disk is full, or refuses.
    """
    report = roae_report(model)
    state = model.state_dict()
    weights = {key: state[key].cpu().contiguous() for key in state if is_adapter_key(key)}
    config = {
        "format": _FORMAT,
        "package": f"rosa-lightning {version('rosa-lightning')}",
        "base": identify(model, base_name(model)).to_dict(),
        "roae": asdict(report.config),
        **_geometry(report),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def _geometry(report: RoAEReport) -> dict[str, Any]:
    """The pair tables, each once, and which of them every term uses."""
    tables = list(dict.fromkeys(term.table for term in report.projections))
    terms = [
        {
            "name": term.name,
            "target": term.target,
            "projection": term.projection,
            "norm": term.norm,
            "table": tables.index(term.table),
            "low_pairs": list(term.low_pairs),
        }
        for term in report.projections
    ]
    plain: dict[str, Any] = json.loads(
        json.dumps({"tables": [asdict(table) for table in tables], "terms": terms})
    )
    return plain


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration file of an adapter's folder.

    Raises:
        ValueError: It is missing, damaged, or of a later release.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        written_by, number = config["package"], config["format"]
        asked = {name: config[name] for name in ("base", "roae", "tables", "terms")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Export the adapter again."
        ) from error
    if number != _FORMAT:
        raise ValueError(
            f"{path} is of format {number} (written by {written_by}), and this release reads "
            f"format {_FORMAT}. Install the release that wrote it."
        )
    return asked


def load_adapter(
    model: nn.Module, folder: str | Path, config: RoAEConfig | None = None
) -> RoAEReport:
    """Put an adapter on a fresh base, in place.

    Args:
        model: The base that it was trained on; another dtype will do.
        folder: Written by `export_adapter` in the format ``rosa`` or ``peft``, or a LoRA of PEFT
            whose B is zero wherever RoAE adds nothing.
        config: For a LoRA from elsewhere: the settings to hold it against; those that hold it with
            the fewest dimensions if not given. Other adapters know theirs; given, they must agree
            but for the dropout.

    Returns:
        What was added.

    Raises:
        ValueError: No adapter, a damaged one, or one of another base; names what differs. The
            model is left as it was.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        stored, weights = read_config(folder), load_tensors(folder / WEIGHTS_FILE)
        settings = agree(RoAEConfig(**stored["roae"]), config)
        identify(model, base_name(model)).check(stored["base"], what="adapter")
        return put_adapter(model, settings, weights, stored)
    if (folder / LORA_CONFIG_FILE).exists():
        settings, weights = from_lora(model, read_lora(folder), config)
        return put_adapter(model, settings, weights)
    raise ValueError(_no_adapter(folder))


def adapter_settings(folder: Path) -> tuple[str | None, str | None, RoAEConfig | None]:
    """What an adapter's folder says of itself, without a base: the base's name and revision, RoAE.

    Returns:
        None for each that it does not say; a LoRA that was made elsewhere says nothing of RoAE.

    Raises:
        ValueError: It holds no adapter, or a damaged one.
    """
    if (folder / CONFIG_FILE).exists():
        stored = read_config(folder)
        base = stored["base"]
        return base["base"], base["revision"], RoAEConfig(**stored["roae"])
    if (folder / LORA_CONFIG_FILE).exists():
        files = read_lora(folder)
        name, revision = (files.config.get(k) for k in ("base_model_name_or_path", "revision"))
        return name or None, revision, own_config(files)
    raise ValueError(_no_adapter(folder))


def _no_adapter(folder: Path) -> str:
    return (
        f"{folder} holds no adapter: neither {CONFIG_FILE} nor {LORA_CONFIG_FILE} is there. Give a "
        "folder that export has written, or a LoRA of PEFT."
    )


def agree(trained: RoAEConfig, given: RoAEConfig | None) -> RoAEConfig:
    """The settings of an adapter, with the dropout that is given.

    Raises:
        ValueError: Another setting is given that would make the same weights another function.
    """
    if given is None:
        return trained
    for name, value in asdict(trained).items():
        if name != "dropout" and getattr(given, name) != value:
            raise ValueError(
                f"the adapter was trained with model.roae.{name}={value}, and "
                f"{getattr(given, name)} is given. Leave model.roae out, or set it to what the "
                "adapter was trained with."
            )
    return replace(trained, dropout=given.dropout)


def put_adapter(
    model: nn.Module,
    config: RoAEConfig,
    weights: Mapping[str, Tensor],
    geometry: Mapping[str, Any] | None = None,
) -> RoAEReport:
    """Add RoAE to a base and give it weights; all of it, or the model stays as it was.

    Args:
        model: A base without RoAE.
        config: What to add.
        weights: By the keys of the adapted model's state dict.
        geometry: The tables and terms it was trained with, if they are known.

    Raises:
        ValueError: The weights do not fit, or the base rotates its heads in another way.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    report = inject_roae(model, config)
    try:
        check_adapter_keys(model, weights)
        if geometry is not None:
            _check_geometry(model, _geometry(report), geometry)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for key, value in weights.items():
                parameters[key].copy_(value)
    except BaseException:
        remove_roae(model)
        for parameter, required_grad in trained:
            parameter.requires_grad_(required_grad)
        raise
    return report


def _check_geometry(model: nn.Module, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a base with the same weights and another rotation, scaled for longer text say."""
    for own, other in zip(ours["terms"], theirs["terms"], strict=True):
        table, trained = ours["tables"][own["table"]], theirs["tables"][other["table"]]
        close = len(table["inv_freq"]) == len(trained["inv_freq"]) and torch.allclose(
            torch.tensor(table["inv_freq"]), torch.tensor(trained["inv_freq"]), rtol=1e-3, atol=1e-9
        )
        same = {**own, "table": 0} == {**other, "table": 0} and table["pairs"] == trained["pairs"]
        if not (close and same):
            raise ValueError(
                f"the adapter was trained where {other['name']} rotates other dimensions, or at "
                f"other frequencies, than in this {type(model).__name__}. Give the base that it "
                "was trained on, with the same rope settings in its config.json."
            )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Give a folder with all files of the adapter, or "
            "export it again."
        ) from error
