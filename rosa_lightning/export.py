"""What was trained, for use without this package: a PEFT LoRA, or a merged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError

from rosa_lightning.adapter import write_adapter
from rosa_lightning.folder import new_folder
from rosa_lightning.lora import to_lora
from rosa_lightning.modes import in_mode
from rosa_lightning.peft_files import write_lora
from rosa_lightning.surgery import merged, roae_report

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

    def __str__(self) -> str:
        """One line for people."""
        line = f"{self.format}: {self.folder}, {self.num_bytes / 2**20:.2f} MiB"
        if self.logit_difference is None:
            return line
        rows, tokens = _SAMPLE
        return (
            f"{line}; largest logit difference {self.logit_difference:.2g} on {rows} x {tokens} "
            f"random tokens (largest logit {self.largest_logit:.3g})"
        )


def export_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    format: Format = "peft",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
    dequantize: bool = False,
) -> ExportReport:
    """Write what was trained into a new folder. The model stays as it is.

    Args:
        model: A base with RoAE.
        folder: Where to; must not exist. It appears when all files are written.
        format: ``peft``: a LoRA for PEFT, vLLM or llama.cpp. ``merged``: the base with the terms
            folded in, in float32 and cast once, as `AutoModelForCausalLM.from_pretrained` loads it.
            ``rosa``: weights and settings for `load_adapter`.
        tokenizer: Saved beside a merged model.
        max_shard_size: Largest weights file of a merged model, such as ``5GB``.
        dequantize: Merge into a quantised base by making a plain model of it, in the dtype of its
            configuration.

    Returns:
        Size, and for ``merged`` how far the logits moved.

    Raises:
        ValueError: No RoAE in the model, a term that the format cannot hold, an unknown format, or
            a folder that exists.
        OSError: The disk is full, or refuses. Nothing is left behind.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown. Set one of {', '.join(get_args(Format))}.")
    report = roae_report(model)
    after_norm = [term for term in report.projections if term.norm]
    if format != "rosa" and after_norm:
        what = "a LoRA" if format == "peft" else "a merged weight"
        raise ValueError(
            f"placement=state adds the term of {after_norm[0].projection} after "
            f"{after_norm[0].norm}, which {what} cannot express. Export with format rosa, or train "
            "with model.roae.placement=projection."
        )
    differences: tuple[float, float] | tuple[()] = ()
    try:
        with new_folder(folder) as written:
            if format == "merged":
                differences = _write_merged(model, written, max_shard_size, dequantize)
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(written))
            elif format == "rosa":
                write_adapter(model, written)
            else:
                write_lora(to_lora(model), written)
            num_bytes = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    return ExportReport(Path(folder), format, num_bytes, *differences)


def _write_merged(
    model: PreTrainedModel, folder: Path, max_shard_size: str, dequantize: bool
) -> tuple[float, float]:
    """Save the merged model; the largest difference of its logits, and the largest logit."""
    adapted = _sample_logits(model)
    with merged(model, dequantize=dequantize):
        difference = (_sample_logits(model) - adapted).abs().max().item()
        _save(model, folder, max_shard_size)
    return difference, adapted.abs().max().item()


def _save(model: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """Save a model with its generation settings as the base has them.

    `transformers` refuses to save settings that contradict each other, which many bases carry.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    if own is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.generation_config = own
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
