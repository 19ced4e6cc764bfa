"""What was trained, for use without this package: a PEFT LoRA, or a merged model."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError

from rosa_lightning.adapters.files import check_plain_model, write_adapter
from rosa_lightning.adapters.lora import write_lora
from rosa_lightning.adapters.metadata import Conditions
from rosa_lightning.adapters.methods import (
    FullFinetuning,
    Method,
    as_plain,
    trained_otherwise,
    write_peft,
)
from rosa_lightning.models.finite import check_weights
from rosa_lightning.models.loading import base_name
from rosa_lightning.roae.inject import merged, roae_layers, roae_report
from rosa_lightning.utils.files import atomic_directory
from rosa_lightning.utils.modules import in_mode
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = Literal["peft", "rosa", "merged"]

_SAMPLE = (2, 32)
"""Rows and tokens on which a merged model is compared with the adapted one."""


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote."""

    folder: Path
    format: Format
    num_bytes: int
    """Size of all files."""
    logit_difference: float | None = None
    """Merged: largest difference between the logits of the adapted and the merged model."""
    largest_logit: float | None = None
    """Merged: the largest logit's absolute value, to hold that against."""
    notes: tuple[str, ...] = ()
    """What a user should know of the folder."""

    def __str__(self) -> str:
        """One line for people."""
        line = f"{self.format}: {self.folder}, {self.num_bytes / 2**20:.2f} MiB"
        if self.logit_difference is not None:
            rows, tokens = _SAMPLE
            line += (
                f"; largest logit difference {self.logit_difference:.2g} on {rows} x {tokens} "
                f"random tokens (largest logit {self.largest_logit:.3g})"
            )
        return "; ".join((line, *self.notes))


def export_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    format: Format = "peft",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str | None = None,
    dequantize: bool = False,
    trained: Conditions | None = None,
) -> ExportReport:
    """Write what was trained into a new folder. The model stays as it is.

    Args:
        model: A base with RoAE, or as `apply_method` left it; of a `RoSAModule` its ``model``.
        folder: Must not exist. It appears when all files are written.
        format: ``peft``: a LoRA for PEFT, vLLM or llama.cpp. ``merged``: the base with the terms
            folded in, in float32 and cast once. ``rosa``: for `load_adapter`.
        tokenizer: Saved beside a merged model.
        max_shard_size: Largest weights file of a merged model; 5GB if not given.
        dequantize: Merge into a quantised base by making a plain model of it, in the dtype of its
            configuration.
        trained: How it was trained, which ``peft`` and ``rosa`` remember.

    Raises:
        ValueError: Nothing was added to the model, a term that the format cannot hold, an unknown
            format, an option of another format, or a folder that exists.
        OSError: The disk is full, or refuses. Nothing is left behind.
    """
    merged_only = {"max_shard_size": max_shard_size, "dequantize": dequantize}
    check_options(format, tokenizer=tokenizer, **merged_only)
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
    differences: tuple[float | None, float | None] = None, None
    try:
        with atomic_directory(folder) as written:
            if format == "merged":
                own = merged(model, dequantize=dequantize) if other is None else as_plain(model)
                differences = _write_merged(model, written, max_shard_size or "5GB", own)
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(written))
            elif other is not None:
                write_peft(model, written, base_name(model))
            elif format == "rosa":
                write_adapter(model, written, trained)
            else:
                write_lora(model, written, trained)
            num_bytes = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder} cannot be written: {one_line(error)}. Nothing was left behind. Make room, "
            "or give a folder that can be made."
        ) from error
    notes = _loading_note(model) if format == "merged" else ()
    return ExportReport(Path(folder), format, num_bytes, *differences, notes)


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


def _write_merged(
    model: PreTrainedModel, folder: Path, max_shard_size: str, plain: AbstractContextManager[Any]
) -> tuple[float, float]:
    """Save the merged model; the largest difference of its logits, and the largest logit.

    Within ``plain`` the model is merged; it gives the weights to save where not all are a plain
    model's, as a mapping.
    """
    adapted = _sample_logits(model)
    with plain as weights:
        difference = (_sample_logits(model) - adapted).abs().max().item()
        _save(model, folder, max_shard_size, weights if isinstance(weights, dict) else None)
    return difference, adapted.abs().max().item()


def _loading_note(model: PreTrainedModel) -> tuple[str, ...]:
    """What loads the saved model: not always the auto class, of some vision-language models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    known: Any = CAUSAL.get(type(model.config), ())
    own_code = "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})
    if own_code or type(model) in (known if isinstance(known, tuple) else (known,)):
        return ()
    library, name = type(model).__module__.partition(".")[0], type(model).__name__
    return (f"AutoModelForCausalLM does not load it, {library}.{name}.from_pretrained does",)


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


@torch.no_grad()
def _sample_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits on some random tokens, the same at every call, in float32."""
    generator = torch.Generator().manual_seed(0)
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    vocabulary = embeddings.weight.shape[0]
    ids = torch.randint(vocabulary, _SAMPLE, generator=generator)
    with in_mode(model, training=False):
        logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float()
