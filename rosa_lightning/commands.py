"""The commands that are no training: ``export`` and ``inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch

from rosa_lightning.adapter import adapter_base
from rosa_lightning.base import load_tokenizer
from rosa_lightning.export import Format, export_adapter
from rosa_lightning.module import RoSAModule


def export(
    module: RoSAModule,
    *,
    output: str,
    ckpt_path: str | None = None,
    format: Format = "peft",
    max_shard_size: str = "5GB",
) -> None:
    """Write a trained adapter into a new folder, for PEFT and servers, merged, or as it is.

    Args:
        module: The model to build.
        output: Folder to write; must not exist.
        ckpt_path: Checkpoint that holds the adapter; its settings are the defaults of ``model``.
            Not needed with ``model.adapter``.
        format: peft: a LoRA for PEFT, vLLM or llama.cpp. merged: the base with the adapter folded
            in, a model like any other. rosa: for model.adapter and load_adapter.
        max_shard_size: Largest weights file of a merged model.
    """
    if ckpt_path is None and module.adapter is None:
        raise ValueError("no adapter is given. Set ckpt_path to a checkpoint, or model.adapter.")
    if Path(output).exists():  # before the base is loaded, which may take minutes
        raise ValueError(f"output={output} exists already. Give a new folder, or remove it first.")
    module.configure_model()
    if ckpt_path is not None:
        load_checkpoint(module, ckpt_path)
    tokenizer = None
    if format == "merged":
        tokenizer = load_tokenizer(
            module.base, revision=module.revision, trust_remote_code=module.trust_remote_code
        )
    model = cast(Any, module.model).eval()
    report = export_adapter(
        model, output, format, tokenizer=tokenizer, max_shard_size=max_shard_size
    )
    sys.stdout.write(f"{report}\n")


def load_checkpoint(module: RoSAModule, ckpt_path: str) -> None:
    """Load a checkpoint of `RoSAModule` into a built one.

    Raises:
        ValueError: It cannot be read, or is of another base or other settings.
    """
    checkpoint = read_checkpoint(ckpt_path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, read without running code from it.

    Raises:
        ValueError: It is missing or damaged, or holds more than plain values.
    """
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path={path} is no file. Give a checkpoint of RoSAModule.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch share no base class
        raise ValueError(
            f"{path} is no checkpoint that can be read safely ({type(error).__name__}). Give "
            "one that RoSAModule has written."
        ) from error
    return content


def remembered_settings(ckpt_path: str | None, adapter: str | None) -> dict[str, Any]:
    """What a checkpoint, or else an adapter's folder, knows of its model, by configuration key.

    Never ``model.trust_remote_code``: whether to run code is the user's to say.

    Raises:
        ValueError: The file cannot be read.
    """
    if ckpt_path is not None:
        known = read_checkpoint(ckpt_path).get("hyper_parameters", {})
        roae = {f"model.roae.{name}": value for name, value in known.get("roae", {}).items()}
        names = ("base", "revision", "dtype")
        return {f"model.{name}": known[name] for name in names if name in known} | roae
    base = adapter_base(Path(adapter)) if adapter is not None else None
    return {} if base is None else {"model.base": base}
