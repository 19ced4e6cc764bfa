"""``inspect``: what is adapted and the memory that it takes, without weights; the states drawn."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console

from rosa_lightning.cli.commands import CommandContext, check_base, loaded_model
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.activations import (
    activation_figure,
    adapted_dims,
    rotated_norms,
    save_figure,
)
from rosa_lightning.inspection.memory import check_batch, check_not_quantized
from rosa_lightning.inspection.parameters import compare_memory, memory_table, parameter_tables
from rosa_lightning.models.loading import enable_checkpointing, load_skeleton
from rosa_lightning.module import RoSAModule
from rosa_lightning.training.microbatches import default_microbatch_tokens, rows_at_once

_AUTOCAST = {
    **dict.fromkeys(["bf16", "bf16-mixed"], torch.bfloat16),
    **dict.fromkeys(["16", "16-mixed"], torch.float16),
}
"""What a trainer's precision computes in; the others cast nothing."""


def inspect(
    context: CommandContext,
    *,
    ckpt_path: str | None = None,
    response_length: int | None = None,
    activations: str | None = None,
    num_batches: PositiveInt = 4,
) -> None:
    """Show what RoAE adapts in each layer, and the memory that training takes, loading no weights.

    Args:
        context: The model, the batch size and length, the optimizer, the trainer's precision and
            the share of layers that DynamicLayerSelection trains.
        ckpt_path: Checkpoint whose settings are the defaults of ``model``.
        response_length: Tokens of the longest response, for the memory of the logits; by default
            all but one of data.max_length, which is the most it can be.
        activations: PNG to draw: mean L2 norm of the rotated Q and K states per head dimension and
            layer; beside it, a folder of its name for TensorBoard. Neither may exist. It takes the
            weights, and texts of data.sources.
        num_batches: Batches of training texts that the drawing is the mean of.
    """
    console = Console()
    module, data = context.module, context.data
    check_base(module)
    length = data.max_length - 1 if response_length is None else response_length
    rows = data.longest_rows
    check_batch(rows, data.max_length, length)
    if activations is not None:
        _check_picture(Path(activations))
    precision = str(context.trainer.get("precision"))
    model = _skeleton(module, double=precision in ("64", "64-true"))
    tables = parameter_tables(model)
    num_tokens = _tokens_at_once(module, context.trainer, model)
    if module.quantization is not None:
        check_not_quantized(model, module.quantization)
    drawn = None
    if activations is not None:
        drawn = _draw_activations(context, ckpt_path, Path(activations), num_batches)
    console.print(tables)
    at_once = rows_at_once(rows, data.max_length, num_tokens)
    parts = "" if at_once == rows else f", in parts of {at_once} row{'s' * (at_once > 1)}"
    console.print(
        f"Batch of {rows} x {data.max_length} tokens, {length} response tokens in each row{parts}"
    )
    callbacks = context.trainer["callbacks"]
    selection = next(c for c in callbacks if isinstance(c, DynamicLayerSelection))
    estimates = compare_memory(
        model,
        selection=selection.config if selection.selects else None,
        batch_size=rows,
        length=data.max_length,
        response_length=length,
        quantization=module.quantization,
        optimizer=module.make_optimizer,
        autocast=_AUTOCAST.get(precision),
        speed=replace(module.speed, microbatch_tokens=num_tokens),
        attn_implementation=module.attn_implementation,
        device=_device(context.trainer),
    )
    console.print(memory_table(estimates))
    if drawn is not None:
        sys.stdout.write(f"{drawn}\n")


def _check_picture(png: Path) -> None:
    """Refuse early what would fail after minutes of loading, or overwrite something."""
    folder = next(path for path in png.absolute().parents if path.exists())
    there = [path for path in (png, png.with_suffix("")) if path.exists()]
    if png.suffix != ".png":
        raise ValueError(f"activations={png} is not the name of a PNG file, such as norms.png.")
    if there or not folder.is_dir():
        problem = f"{there[0]} exists already" if there else f"{folder} is no folder"
        raise ValueError(f"activations={png}: {problem}. Give another name.")


def _skeleton(module: RoSAModule, *, double: bool) -> Any:
    """The adapted model without its weights."""
    if double and module.quantization is not None:
        raise ValueError(
            f"trainer.precision 64-true cannot be had with model.quantization="
            f"{module.quantization}. Take one of them out."
        )
    model = load_skeleton(module.base, **module.loading)
    module.adapt(model)
    if module.speed.gradient_checkpointing:
        enable_checkpointing(model)
    return model.double() if double else model


def _tokens_at_once(
    module: RoSAModule, trainer: Mapping[str, Any], model: torch.nn.Module
) -> int | None:
    """Most tokens that a training runs forward and backward at once; None for whole batches."""
    given, device = module.speed.microbatch_tokens, _device(trainer)
    # Lightning takes bfloat16 on a CPU.
    scaled = device != "cpu" and _AUTOCAST.get(str(trainer.get("precision"))) == torch.float16
    strategy = str(trainer.get("strategy")).lower()
    if given is None or scaled or "fsdp" in strategy or "modelparallel" in strategy:
        return None
    return default_microbatch_tokens(model, device) if given == "auto" else given


def _device(trainer: Mapping[str, Any]) -> str:
    accelerator = str(trainer.get("accelerator") or "auto").lower()
    if accelerator == "auto":
        accelerator = "gpu" if torch.accelerator.is_available() else "cpu"
    return "cpu" if "cpu" in accelerator else accelerator


def _draw_activations(
    context: CommandContext, ckpt_path: str | None, png: Path, num_batches: int
) -> str:
    """Draw the rotated states of some training texts; says where the pictures are."""
    model, data = loaded_model(context.module, ckpt_path), context.data
    if data.tokenizer is None:
        data.tokenizer = context.module.tokenizer
    data.num_embeddings = context.module.num_embeddings
    if data.batching in ("packed", "best_fit"):  # the figure is of padded rows
        data.batching = "length"
    data.setup("fit")
    norms = rotated_norms(model, islice(data.train_dataloader(), num_batches))
    title = f"{context.module.base}: mean L2 norm per layer and head dimension"
    log_dir = save_figure(activation_figure(norms, adapted_dims(model), title), png)
    return f"{png}; as an image of TensorBoard: tensorboard --logdir {log_dir}"
