"""``export`` and ``report``, and what commands that are no training share."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rosa_lightning.adapters.card import CardDetails
from rosa_lightning.adapters.checkpoint import read_checkpoint
from rosa_lightning.adapters.export import Format, check_options, export_adapter
from rosa_lightning.adapters.hub import check_push
from rosa_lightning.adapters.hub import push as push_folder
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.inspection.report import write_report
from rosa_lightning.inspection.run_card import run_card
from rosa_lightning.models.loading import has_tokenizer, load_tokenizer
from rosa_lightning.module import RoSAModule
from rosa_lightning.utils.errors import ConfigurationError

NO_BASE = (
    "no base is given. Set model.base to a hub id, a folder or tiny, or name what knows its base: "
    "ckpt_path or model.adapter."
)


@dataclass(frozen=True)
class CommandContext:
    """What a configuration describes; nothing of it is loaded yet."""

    module: RoSAModule
    data: ReasoningDataModule
    trainer: Mapping[str, Any]
    """The trainer's arguments, callbacks instantiated."""
    shared: Callable[..., str]
    """The configuration of the training as YAML for ``fit``, or that of some files or texts."""
    build: Callable[[Sequence[Path]], RoSAModule]
    """The module that some configuration files describe."""


def export(
    context: CommandContext,
    *,
    output: str,
    ckpt_path: str | None = None,
    format: Format = "peft",
    max_shard_size: str | None = None,
    dequantize: bool = False,
    license: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write a trained adapter into a new folder, for PEFT and servers, merged, or as it is.

    A model card and the tokenizer come with it.

    Args:
        context: The model to build.
        output: Folder to write; must not exist.
        ckpt_path: Checkpoint that holds the adapter; its settings are the defaults of ``model``.
            Not needed with ``model.adapter``.
        format: peft: a LoRA for PEFT, vLLM or llama.cpp. merged: the base with the adapter folded
            in, a model like any other. rosa: for model.adapter and load_adapter.
        max_shard_size: Largest weights file of a merged model; 5GB by default.
        dequantize: Merge into a quantised base by making a plain model of it.
        license: Licence of what is exported, for the model card, such as apache-2.0.
        push: USER/NAME of a model on the Hugging Face hub to push the finished folder to. Nothing
            is pushed without it.
        private: With ``push``, make a new repository a private one.
    """
    module = context.module
    check_options(format, max_shard_size=max_shard_size, dequantize=dequantize)
    if private and push is None:
        raise ConfigurationError(
            "private is an option of push. Set push to USER/NAME, or leave it out."
        )
    check_base(module)
    if ckpt_path is None and module.adapter is None:
        raise ConfigurationError(
            "no adapter is given. Set ckpt_path to a checkpoint, or model.adapter."
        )
    if Path(output).exists():  # before the base is loaded, which may take minutes
        raise ValueError(f"output={output} exists already. Give a new folder, or remove it first.")
    if push is not None:
        check_push(push)
    card = CardDetails(name=push, license=license)
    if ckpt_path is None:
        model = loaded_model(module, None)
    else:
        checkpoint = read_checkpoint(ckpt_path)
        model = loaded_model(module, ckpt_path, checkpoint)
        card = run_card(ckpt_path, checkpoint, card)
    tokenizer = _own_tokenizer(context)
    report = export_adapter(
        model.eval(),
        output,
        format,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
        trained=module.training_conditions,
        card=card,
    )
    if tokenizer is None:
        report = replace(report, notes=(*report.notes, "without a tokenizer, as the base has none"))
    sys.stdout.write(f"{report}\n")
    if push is not None:
        sys.stdout.write(f"pushed to {push_folder(Path(output), push, private=private)}\n")


def loaded_model(
    module: RoSAModule, ckpt_path: str | None, checkpoint: dict[str, Any] | None = None
) -> Any:
    """The adapted model, with the weights of a checkpoint, which is read unless it is given."""
    module.configure_model()
    if ckpt_path is not None:
        checkpoint = checkpoint or read_checkpoint(ckpt_path)
        if "state_dict" not in checkpoint:
            raise ValueError(
                f"ckpt_path={ckpt_path} is a folder of shards. Make one file of it with "
                "python -m lightning.pytorch.utilities.consolidate_checkpoint, and give that."
            )
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    return module.model


def _own_tokenizer(context: CommandContext) -> Any:
    """The tokenizer to save with an export, as its owner made it; None if there is none."""
    module, given = context.module, context.data.tokenizer
    if given is not None and not isinstance(given, str):
        return given
    options: dict[str, Any] = {"setting": "data.tokenizer", "for_training": False}
    if given is None:
        options |= {"revision": module.revision, "trust_remote_code": module.trust_remote_code}
    try:
        return load_tokenizer(given or module.base, **options)
    except ValueError:
        if given or has_tokenizer(module.base, module.revision):
            raise
        return None


def report(context: CommandContext, run: str, *, output: str | None = None) -> None:
    """Write what a run has logged as one HTML page that needs nothing else.

    Args:
        context: Not looked at: what was logged stands in the run's folder.
        run: Folder of the run, such as lightning_logs/version_0; of a folder of runs, such as
            lightning_logs, the newest that has something to show.
        output: File to write; report.html in the run's folder by default.
    """
    sys.stdout.write(f"{write_report(run, output=output)}\n")


def check_base(module: RoSAModule) -> None:
    """Refuse a configuration that names no base."""
    if not module.base:
        raise ConfigurationError(NO_BASE)
