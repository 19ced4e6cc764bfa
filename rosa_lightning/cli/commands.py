"""The commands that are no training: ``audit``, ``bench``, ``export``, ``inspect``, ``report``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from rosa_lightning.adapters.checkpoint import read_checkpoint
from rosa_lightning.adapters.export import Format, check_options, export_adapter
from rosa_lightning.cli.audit_tables import audit_tables
from rosa_lightning.cli.bench import run_bench
from rosa_lightning.cli.bench_tables import bench_tables
from rosa_lightning.data.audit import audit_records, token_lengths
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.records import load_records
from rosa_lightning.data.tokenization import Encoder
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.activations import (
    activation_figure,
    adapted_dims,
    rotated_norms,
    save_figure,
)
from rosa_lightning.inspection.memory import check_batch, check_not_quantized
from rosa_lightning.inspection.parameters import (
    compare_memory,
    memory_table,
    parameter_tables,
)
from rosa_lightning.inspection.report import write_report
from rosa_lightning.models.loading import (
    enable_checkpointing,
    has_tokenizer,
    load_skeleton,
    load_tokenizer,
)
from rosa_lightning.module import RoSAModule
from rosa_lightning.training.microbatches import default_microbatch_tokens, rows_at_once
from rosa_lightning.utils.files import atomic_write

_AUTOCAST = {
    **dict.fromkeys(["bf16", "bf16-mixed"], torch.bfloat16),
    **dict.fromkeys(["16", "16-mixed"], torch.float16),
}
"""What a trainer's precision computes in; the others cast nothing on the way."""
_SHARDING = ("fsdp", "modelparallel")
"""In the names of strategies that shard a model."""
_DOUBLE = ("64", "64-true")
"""Precisions that cast the model to float64."""
NO_BASE = (
    "no base is given. Set model.base to a hub id, a folder or tiny, or name what knows its base: "
    "ckpt_path or model.adapter."
)


@dataclass(frozen=True)
class Setting:
    """What a configuration describes; nothing of it is loaded yet."""

    module: RoSAModule
    data: ReasoningDataModule
    trainer: Mapping[str, Any]
    """The trainer's arguments, callbacks instantiated."""


def export(
    setting: Setting,
    *,
    output: str,
    ckpt_path: str | None = None,
    format: Format = "peft",
    max_shard_size: str | None = None,
    dequantize: bool = False,
) -> None:
    """Write a trained adapter into a new folder, for PEFT and servers, merged, or as it is.

    Args:
        setting: The model to build.
        output: Folder to write; must not exist.
        ckpt_path: Checkpoint that holds the adapter; its settings are the defaults of ``model``.
            Not needed with ``model.adapter``.
        format: peft: a LoRA for PEFT, vLLM or llama.cpp. merged: the base with the adapter folded
            in, a model like any other. rosa: for model.adapter and load_adapter.
        max_shard_size: Largest weights file of a merged model; 5GB by default.
        dequantize: Merge into a quantised base by making a plain model of it.
    """
    module = setting.module
    check_options(format, max_shard_size=max_shard_size, dequantize=dequantize)
    _check_base(module)
    if ckpt_path is None and module.adapter is None:
        raise ValueError("no adapter is given. Set ckpt_path to a checkpoint, or model.adapter.")
    if Path(output).exists():  # before the base is loaded, which may take minutes
        raise ValueError(f"output={output} exists already. Give a new folder, or remove it first.")
    module.configure_model()
    if ckpt_path is not None:
        load_checkpoint(module, ckpt_path)
    tokenizer, note = _own_tokenizer(setting) if format == "merged" else (None, ())
    model = cast(Any, module.model).eval()
    report = export_adapter(
        model,
        output,
        format,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        dequantize=dequantize,
        trained=module.trained_under,
    )
    sys.stdout.write(f"{replace(report, notes=(*report.notes, *note))}\n")


def _own_tokenizer(setting: Setting) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer to save beside a merged model, as its owner made it, or why there is none."""
    module, given = setting.module, setting.data.tokenizer
    if isinstance(given, str):
        return load_tokenizer(given, setting="data.tokenizer", for_training=False), ()
    if given is not None:
        return given, ()
    try:
        own = load_tokenizer(
            module.base,
            revision=module.revision,
            trust_remote_code=module.trust_remote_code,
            setting="data.tokenizer",
            for_training=False,
        )
    except ValueError:
        if has_tokenizer(module.base, module.revision):
            raise
        return None, ("without a tokenizer, as the base has none",)
    return own, ()


def inspect(
    setting: Setting,
    *,
    ckpt_path: str | None = None,
    response_length: int | None = None,
    activations: str | None = None,
    num_batches: int = 4,
) -> None:
    """Show what RoAE adapts in each layer, and the memory that training takes, loading no weights.

    Args:
        setting: The model, the batch size and length, the optimizer, the trainer's precision and
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
    module, data = setting.module, setting.data
    _check_base(module)
    length = data.max_length - 1 if response_length is None else response_length
    rows = data.longest_rows
    check_batch(rows, data.max_length, length)
    if activations is not None:
        _check_picture(Path(activations), num_batches)
    precision = str(setting.trainer.get("precision"))
    model = _skeleton(module, double=precision in _DOUBLE)
    tables = parameter_tables(model)
    num_tokens = _tokens_at_once(module, setting.trainer, model)
    if module.quantization is not None:
        check_not_quantized(model, module.quantization)
    drawn = None
    if activations is not None:
        drawn = _draw_activations(setting, ckpt_path, Path(activations), num_batches)
    console.print(tables)
    at_once = rows_at_once(rows, data.max_length, num_tokens)
    parts = "" if at_once == rows else f", in parts of {at_once} row{'s' * (at_once > 1)}"
    console.print(f"Batch of {rows} x {data.max_length} tokens, {length} of them responses{parts}")
    selection = [c for c in _callbacks(setting) if isinstance(c, DynamicLayerSelection)]
    estimates = compare_memory(
        model,
        num_active=selection[0].num_active if selection else 0.5,
        batch_size=rows,
        length=data.max_length,
        response_length=length,
        quantization=module.quantization,
        optimizer=module.make_optimizer,
        autocast=_AUTOCAST.get(precision),
        speed=replace(module.speed, microbatch_tokens=num_tokens),
    )
    console.print(memory_table(estimates))
    if drawn is not None:
        sys.stdout.write(f"{drawn}\n")


def audit(setting: Setting, *, ckpt_path: str | None = None, output: str | None = None) -> None:
    """Look at the training data: lengths, duplicates, contradictions, contamination.

    Args:
        setting: The sources to train on and to test on, and the tokenizer, its own or the base's.
        ckpt_path: Checkpoint whose settings are the defaults of ``model``.
        output: JSON file for the figures, with the numbers of the records concerned.
    """
    if output is not None and (Path(output).suffix != ".json" or Path(output).is_dir()):
        raise ValueError(f"output={output} is not the name of a JSON file, such as audit.json.")
    data = setting.data
    if data.tokenizer is None and setting.module.base:
        data.tokenizer = setting.module.tokenizer
    lengths = None
    if data.tokenizer is not None:
        encoder = Encoder(data.text_tokenizer, data.prompt_style)
        lengths = partial(token_lengths, encoder=encoder)
    found = audit_records(
        {s.label: load_records(s, "audit", data.tasks, data.seed) for s in data.sources},
        {s.label: load_records(s, "audit", data.tasks, data.seed) for s in data.test_sources},
        lengths,
        max_length=data.max_length,
        decontaminate=data.loading.decontaminate,
    )
    Console().print(audit_tables(found))
    if output is not None:
        atomic_write(Path(output), json.dumps(found.to_dict(), indent=1).encode())
        sys.stdout.write(f"\n{output}\n")


def bench(
    setting: Setting, *, ckpt_path: str | None = None, steps: int = 8, rounds: int = 5
) -> None:
    """Measure a training as configured, beside PEFT LoRA in the plain way and the frozen base.

    Args:
        setting: All that a training needs; it runs on one device, and keeps nothing.
        ckpt_path: Checkpoint whose settings are the defaults of ``model``.
        steps: Batches of each turn.
        rounds: Turns of each of the three.
    """
    _check_base(setting.module)
    found = run_bench(setting.module, setting.data, setting.trainer, steps=steps, rounds=rounds)
    Console().print(bench_tables(found))


def report(setting: Setting, run: str, *, output: str | None = None) -> None:
    """Write what a run has logged as one HTML page that needs nothing else.

    Args:
        setting: Not looked at: what was logged stands in the run's folder.
        run: Folder of the run, such as lightning_logs/version_0.
        output: File to write; report.html in the run's folder by default.
    """
    sys.stdout.write(f"{write_report(run, output=output)}\n")


def _check_base(module: RoSAModule) -> None:
    if not module.base:
        raise ValueError(NO_BASE)


def _check_picture(png: Path, num_batches: int) -> None:
    """Refuse early what would fail after minutes of loading, or write over something."""
    if png.suffix != ".png":
        raise ValueError(f"activations={png} is not the name of a PNG file, such as norms.png.")
    for path in (png, png.with_suffix("")):
        if path.exists():
            raise ValueError(f"activations={png}: {path} exists already. Give another name.")
    folder = next(path for path in png.absolute().parents if path.exists())
    if not folder.is_dir():
        raise ValueError(f"activations={png}: {folder} is no folder. Give another name.")
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches} is below 1. Set num_batches; 4 is usual.")


def _skeleton(module: RoSAModule, *, double: bool) -> Any:
    """The adapted model without its weights.

    Raises:
        ValueError: It cannot be made, or should be cast to float64 and quantised.
    """
    if double and module.quantization is not None:
        raise ValueError(
            f"trainer.precision 64-true cannot be had with model.quantization="
            f"{module.quantization}. Take one of them out."
        )
    model = load_skeleton(module.base, **module.loading)
    module.adapt(model)
    if module.gradient_checkpointing:
        enable_checkpointing(model)
    return model.double() if double else model


def _tokens_at_once(
    module: RoSAModule, trainer: Mapping[str, Any], model: torch.nn.Module
) -> int | None:
    """Most tokens that a training runs forward and backward at once; None for whole batches."""
    given = module.speed.microbatch_tokens
    strategy = str(trainer.get("strategy")).lower()
    accelerator = str(trainer.get("accelerator") or "auto").lower()
    if accelerator == "auto":
        accelerator = "gpu" if torch.accelerator.is_available() else "cpu"
    device = "cpu" if "cpu" in accelerator else accelerator
    # Lightning takes bfloat16 on a CPU.
    scaled = device != "cpu" and _AUTOCAST.get(str(trainer.get("precision"))) == torch.float16
    if given is None or scaled or any(word in strategy for word in _SHARDING):
        return None
    return default_microbatch_tokens(model, device) if given == "auto" else given


def _loaded(module: RoSAModule, ckpt_path: str | None) -> Any:
    module.configure_model()
    if ckpt_path is not None:
        load_checkpoint(module, ckpt_path)
    return module.model


def _callbacks(setting: Setting) -> list[Any]:
    callbacks = setting.trainer.get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _draw_activations(setting: Setting, ckpt_path: str | None, png: Path, num_batches: int) -> str:
    """Draw the rotated states of some training texts; a PNG, and beside it a TensorBoard folder.

    Returns:
        What to tell the user.
    """
    model = _loaded(setting.module, ckpt_path)
    data = setting.data
    if data.tokenizer is None:
        data.tokenizer = setting.module.tokenizer
    data.num_embeddings = setting.module.num_embeddings
    if data.batching == "packed":  # the figure is of padded rows
        data.batching = "length"
    data.setup("fit")
    norms = rotated_norms(model, islice(data.train_dataloader(), num_batches))
    title = f"{setting.module.base}: mean L2 norm per layer and head dimension"
    log_dir = save_figure(activation_figure(norms, adapted_dims(model), title), png)
    return f"{png}; as an image of TensorBoard: tensorboard --logdir {log_dir}"


def load_checkpoint(module: RoSAModule, ckpt_path: str) -> None:
    """Load a checkpoint of `RoSAModule` into a built one.

    Raises:
        ValueError: It cannot be read, or is of another base or other settings.
    """
    checkpoint = read_checkpoint(ckpt_path)
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"ckpt_path={ckpt_path} is a folder of shards. Make one file of it with "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint, and give that."
        )
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
