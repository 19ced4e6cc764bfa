"""The adapter's own folder: RoAE weights, settings, and what they were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa_lightning.adapters.conditions import Conditions
from rosa_lightning.adapters.lora import METADATA, from_lora, own_config, to_lora
from rosa_lightning.adapters.metadata import Origin, origin_of
from rosa_lightning.adapters.peft_format import CONFIG_FILE as LORA_CONFIG_FILE
from rosa_lightning.adapters.peft_format import WEIGHTS_FILE as LORA_WEIGHTS_FILE
from rosa_lightning.adapters.peft_format import LoraFiles, read_lora, read_tensors, write_lora
from rosa_lightning.models.finite import check_weights
from rosa_lightning.roae.inject import (
    RoAEReport,
    check_adapter_keys,
    inject_roae,
    is_adapter_key,
    remove_roae,
)
from rosa_lightning.roae.layer import RoAEConfig
from rosa_lightning.utils.files import read_text
from rosa_lightning.utils.strict_json import parse

CONFIG_FILE = "roae_config.json"
WEIGHTS_FILE = "roae_adapter.safetensors"
_FORMAT = 1
"""Raised when older code could no longer read what is written."""

_ORIGIN = "roae_origin"
"""Entry of a LoRA's header, beside its settings, that holds what it was trained on, as JSON."""

_CONDITIONS = "roae_conditions"
"""Entry of the configuration file, or of a LoRA's header, with the conditions of the training."""


def write_adapter(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write the adapter of a model into a folder that exists, and under what it was trained.

    Raises:
        ValueError: The model carries no RoAE.
        OSError, SafetensorError: The disk is full, or refuses.
    """
    origin = origin_of(model).to_dict()
    state = model.state_dict()
    weights = {key: state[key].cpu().contiguous() for key in state if is_adapter_key(key)}
    config = {
        "format": _FORMAT,
        "package": f"rosa-lightning {version('rosa-lightning')}",
        **origin,
    }
    if trained is not None:
        config[_CONDITIONS] = trained.to_dict()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def write_as_lora(model: nn.Module, folder: Path, trained: Conditions | None = None) -> None:
    """Write the adapter of a model as a LoRA, which remembers its base, into a folder that exists.

    It remembers under what it was trained, too.

    Raises:
        ValueError: The model carries no RoAE, or terms that no LoRA can hold.
        OSError, SafetensorError: The disk is full, or refuses.
    """
    files = to_lora(model)
    origin = origin_of(model).to_dict()
    del origin["roae"]  # stands in the header already
    header = {**files.metadata, _ORIGIN: json.dumps(origin)}
    if trained is not None:
        header[_CONDITIONS] = json.dumps(trained.to_dict())
    write_lora(replace(files, metadata=header), folder)


def read_config(folder: Path) -> Origin:
    """The configuration file of an adapter's folder.

    Raises:
        ValueError: It is missing, damaged, or of a later release.
    """
    path = folder / CONFIG_FILE
    try:
        config = parse(read_text(path))
        written_by, number = config["package"], config["format"]
        origin = Origin.from_dict(config) if number == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Export the adapter again."
        ) from error
    if origin is None:
        raise ValueError(
            f"{path} is of format {number} (written by {written_by}), and this release reads "
            f"format {_FORMAT}. Install the release that wrote it."
        )
    return origin


def _origin_of_lora(folder: Path, files: LoraFiles) -> Origin | None:
    """What a LoRA was trained on, if `write_as_lora` made the files."""
    if _ORIGIN not in files.metadata:
        return None
    try:
        plain = parse(files.metadata[_ORIGIN])
        return Origin.from_dict({**plain, "roae": parse(files.metadata[METADATA])})
    except (ValueError, KeyError, TypeError) as error:
        path = folder / LORA_WEIGHTS_FILE
        raise ValueError(
            f"{_ORIGIN} in the header of {path} cannot be read ({error}). Export the adapter again."
        ) from error


def load_adapter(
    model: nn.Module, folder: str | Path, config: RoAEConfig | None = None
) -> RoAEReport:
    """Put an adapter on a fresh base, in place.

    Warns where a LoRA from elsewhere names another base; whether the weights are others, only our
    own files can tell.

    Args:
        model: The base that it was trained on; another dtype will do.
        folder: Written by `export_adapter` in the format ``rosa`` or ``peft``, or a LoRA of PEFT
            whose B is zero wherever RoAE adds nothing.
        config: For a LoRA: the settings to hold it against; if not given, its own, or for one from
            elsewhere those that hold it with the fewest dimensions. A ``rosa`` folder knows its
            settings; given, they must agree but for the dropout.

    Returns:
        What was added.

    Raises:
        ValueError: No adapter, a damaged one, or one of another base; names what differs. The
            model is left as it was.
    """
    folder = Path(folder)
    check_plain_model(model, "load_adapter")
    if _is_lora(folder):
        files = read_lora(folder)
        origin = _origin_of_lora(folder, files)
        if origin is None:
            _warn_of_another_base(model, files)
        else:
            origin.check_base(model)
        return put_adapter(model, *from_lora(model, files, config), origin)
    origin, weights = read_config(folder), load_tensors(folder / WEIGHTS_FILE)
    settings = agree(origin.config, config)
    origin.check_base(model)
    return put_adapter(model, settings, weights, origin)


def check_plain_model(model: nn.Module, function: str) -> None:
    """Refuse a LightningModule, whose weights go by other names than those of its model."""
    if isinstance(model, LightningModule):
        raise ValueError(
            f"{function} takes the model that a {type(model).__name__} holds, not the "
            f"{type(model).__name__} itself. Pass module.model, after module.configure_model()."
        )


def adapter_settings(folder: Path) -> tuple[str | None, str | None, RoAEConfig | None]:
    """What an adapter's folder says of itself, without a base: the base's name and revision, RoAE.

    Returns:
        None for each that it does not say; a LoRA that was made elsewhere says nothing of RoAE.

    Raises:
        ValueError: It holds no adapter, or a damaged one.
    """
    files = read_lora(folder) if _is_lora(folder) else None
    origin = _origin_of_lora(folder, files) if files else read_config(folder)
    if origin is not None:
        # Says ``tiny`` where PEFT's configuration names a folder, of another machine maybe.
        return origin.base["base"], origin.base["revision"], origin.config
    assert files is not None
    name, revision = (files.config.get(key) for key in ("base_model_name_or_path", "revision"))
    return name or None, revision, own_config(files)


def adapter_conditions(folder: Path) -> Conditions | None:
    """What an adapter's folder says of how it was trained; None if it says nothing.

    Raises:
        ValueError: It holds no adapter, or a damaged one.
    """
    if _is_lora(folder):
        path, plain = folder / LORA_WEIGHTS_FILE, read_lora(folder).metadata.get(_CONDITIONS)
    else:
        path = folder / CONFIG_FILE
        read_config(folder)  # refuses what is damaged or of a later release
        plain = json.loads(path.read_text()).get(_CONDITIONS)
    if plain is None:
        return None
    try:
        return Conditions.from_dict(json.loads(plain) if isinstance(plain, str) else plain)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} Export the adapter again.") from error


def _is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter as PEFT has it, and not one as ``rosa`` has it.

    Raises:
        ValueError: It holds neither.
    """
    if (folder / CONFIG_FILE).exists():
        return False
    if (folder / LORA_CONFIG_FILE).exists():
        return True
    found = f"neither {CONFIG_FILE} nor {LORA_CONFIG_FILE} is there"
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
    raise ValueError(
        f"{folder} holds no adapter: {found}. "
        f"Give a folder on this machine that export has written ({CONFIG_FILE} and {WEIGHTS_FILE}) "
        f"or a LoRA of PEFT ({LORA_CONFIG_FILE} and {LORA_WEIGHTS_FILE})."
    )


def _warn_of_another_base(model: nn.Module, files: LoraFiles) -> None:
    """Say that a LoRA names another base; the name may be another one for the same weights."""
    given = files.config.get("base_model_name_or_path")
    ours = getattr(getattr(model, "config", None), "_name_or_path", None)
    if given and ours and given != ours:
        rank_zero_warn(
            f"The LoRA names {given} as its base, and the base given is {ours}. Its weights are "
            "not compared: make sure that they are the same."
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
    origin: Origin | None = None,
) -> RoAEReport:
    """Add RoAE to a base and give it weights; all of it, or the model stays as it was.

    Args:
        model: A base without RoAE.
        config: What to add.
        weights: By the keys of the adapted model's state dict.
        origin: What they were trained on, if that is known.

    Raises:
        ValueError: The weights do not fit, or the base rotates its heads in another way.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    report = inject_roae(model, config, weights)
    try:
        check_adapter_keys(model, weights)
        if origin is not None:
            origin.check_rotation(model)
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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the weights of an adapter from a safetensors file, on the CPU.

    Raises:
        ValueError: It is missing or damaged, or a tensor holds something else than finite
            floating-point numbers.
    """
    try:
        tensors, _ = read_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{error} Give a folder with all files of the adapter, or export it again."
        ) from error
    try:
        check_weights(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors
