"""What was trained, for use without this package: a PEFT LoRA, or a merged model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safetensors import SafetensorError

from rosa_lightning.adapters.card import CardDetails, loads_as_auto, write_card
from rosa_lightning.adapters.fidelity import (
    Agreement,
    agreement,
    logits_on,
    rounding_of_base,
    sample_tokens,
)
from rosa_lightning.adapters.files import check_plain_model, write_adapter
from rosa_lightning.adapters.lora import write_lora
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import FullFinetuning, Method, as_plain, trained_otherwise
from rosa_lightning.adapters.peft_folder import write_peft
from rosa_lightning.models.finite import check_weights
from rosa_lightning.roae.inject import merged, roae_layers, roae_report
from rosa_lightning.utils.files import atomic_directory
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = Literal["peft", "rosa", "merged"]
_WRITTEN = {
    "peft": "a LoRA for PEFT, vLLM and llama.cpp",
    "rosa": "an adapter for model.adapter and load_adapter",
    "merged": "a model like any other, without this package",
}
"""What each format is, in a few words."""
_NO_DETAILS = CardDetails()


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote."""

    folder: Path
    format: Format
    num_bytes: int
    """Size of all files."""
    merged: Agreement | None = None
    """Merged: of the adapted and the merged model."""
    rounding: Agreement | None = None
    """Merged: of the base in float32 and in its own dtype, where that is half precision."""
    notes: tuple[str, ...] = ()
    """What a user should know of the folder."""

    def __str__(self) -> str:
        """Lines for people."""
        lines = [f"wrote {self.folder} ({self.num_bytes / 2**20:.2f} MiB): {self.what}"]
        if self.merged is not None:
            on = f"on {self.merged.num_tokens} tokens"
            lines.append(f"merged against adapted, {on}: {self.merged}")
        if self.rounding is not None:
            lines.append(f"for scale, the base as it is against float32: {self.rounding}")
        return "\n".join((*lines, *self.notes))

    @property
    def what(self) -> str:
        """What the folder holds, in a few words."""
        return _WRITTEN[self.format]


def export_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    format: Format = "peft",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str | None = None,
    dequantize: bool = False,
    trained: Conditions | None = None,
    card: CardDetails = _NO_DETAILS,
) -> ExportReport:
    """Write what was trained into a new folder, with a model card. The model stays as it is.

    Args:
        model: A base with RoAE, or as `apply_method` left it; of a `RoSAModule` its ``model``.
        folder: Must not exist. It appears when all files are written.
        format: ``peft``: a LoRA for PEFT, vLLM or llama.cpp. ``merged``: the base with the terms
            folded in, in float32 and cast once. ``rosa``: for `load_adapter`.
        tokenizer: Saved beside the weights, with its chat template.
        max_shard_size: Largest weights file of a merged model; 5GB if not given.
        dequantize: Merge into a quantised base by making a plain model of it, in the dtype of its
            configuration.
        trained: How it was trained, which ``peft`` and ``rosa`` remember.
        card: What the model card says of the training.

    Raises:
        ValueError: Nothing was added to the model, a term that the format cannot hold, an unknown
            format, an option of another format, or a folder that exists.
        OSError: The disk is full, or refuses. Nothing is left behind.
    """
    merged_only = {"max_shard_size": max_shard_size, "dequantize": dequantize}
    check_options(format, **merged_only)
    check_plain_model(model, "export_adapter")
    other = trained_otherwise(model)
    if other is None:
        roae_report(model)
    else:
        _check_format(format, other)
    for name, layer in roae_layers(model):
        check_weights({f"{name}.roae_A": layer.roae_A, f"{name}.roae_B": layer.roae_B})
        if format != "rosa":
            layer.check_mergeable(dequantize=dequantize or format == "peft")
    compared: tuple[Agreement | None, Agreement | None] = None, None
    try:
        with atomic_directory(folder) as written:
            if format == "merged":
                own = merged(model, dequantize=dequantize) if other is None else as_plain(model)
                ids = sample_tokens(model, tokenizer)
                adapted_NV = logits_on(model, ids)
                with own as weights:
                    merged_NV = logits_on(model, ids)
                    own_state = weights if isinstance(weights, dict) else None
                    _save(model, written, max_shard_size or "5GB", own_state)
                compared = agreement(adapted_NV, merged_NV), rounding_of_base(model, ids)
            elif other is not None:
                write_peft(model, written, trained)
            elif format == "rosa":
                write_adapter(model, written, trained)
            else:
                write_lora(model, written, trained)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(written))
            named = replace(card, name=card.name or Path(folder).resolve().name)
            write_card(model, written, format, named, trained)
            num_bytes = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder} cannot be written: {one_line(error)}. Nothing was left behind. Make room, "
            "or give a folder that can be made."
        ) from error
    notes: tuple[str, ...] = ()
    if format == "merged" and not loads_as_auto(model):
        library, name = type(model).__module__.partition(".")[0], type(model).__name__
        notes = (f"AutoModelForCausalLM does not load it, {library}.{name}.from_pretrained does",)
    return ExportReport(Path(folder), format, num_bytes, *compared, notes)


def check_options(format: str, **merged_only: Any) -> None:
    """Check what `export_adapter` is told, before a model is loaded for it."""
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown. Set one of {', '.join(get_args(Format))}.")
    for name, value in merged_only.items():
        if value not in (None, False) and format != "merged":
            raise ValueError(
                f"{name} is an option of format merged, and format is {format}. Leave it out, or "
                "set format to merged."
            )
    size = merged_only.get("max_shard_size")
    if size is not None and not re.fullmatch(
        r"\s*(?=.*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", str(size), re.IGNORECASE
    ):
        raise ValueError(
            f"max_shard_size={size!r} is no size of a file. Give a number above 0 with KB, MB, GB "
            "or TB, such as 5GB."
        )


def _check_format(format: str, method: Method) -> None:
    possible = ("merged",) if isinstance(method, FullFinetuning) else ("peft", "merged")
    if format not in possible:
        what = "all weights" if isinstance(method, FullFinetuning) else "an adapter of PEFT"
        raise ValueError(
            f"format={format} cannot hold what was trained, {what}. Set format to "
            f"{' or '.join(possible)}."
        )


def _save(
    model: PreTrainedModel, folder: Path, max_shard_size: str, weights: dict[str, Any] | None
) -> None:
    """Save a model with its generation settings as the base has them.

    `transformers` refuses to save settings that contradict each other, which many bases carry.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    if own is not None:
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=weights)
    finally:
        model.generation_config = own
    if own is not None:
        own.to_json_file(folder / "generation_config.json")
