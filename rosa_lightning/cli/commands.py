"""Commands that are no training: ``audit``, ``export``, ``inspect``, ``report``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rosa_lightning.adapters.card import CardDetails
from rosa_lightning.adapters.checkpoint import read_checkpoint
from rosa_lightning.adapters.export import Format, check_options, export_adapter
from rosa_lightning.adapters.hub import check_push
from rosa_lightning.adapters.hub import push as push_folder
from rosa_lightning.data.audit import Audit, audit_records, token_lengths
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.encoding import Example
from rosa_lightning.data.records import load_records
from rosa_lightning.dls.callback import DynamicLayerSelection
from rosa_lightning.inspection.activations import (
    activation_figure,
    adapted_dims,
    rotated_norms,
    save_figure,
)
from rosa_lightning.inspection.memory import check_batch, check_not_quantized
from rosa_lightning.inspection.parameters import compare_memory, memory_table, parameter_tables
from rosa_lightning.inspection.report import write_report
from rosa_lightning.inspection.run_card import run_card
from rosa_lightning.models.loading import (
    enable_checkpointing,
    has_tokenizer,
    load_skeleton,
    load_tokenizer,
)
from rosa_lightning.module import RoSAModule
from rosa_lightning.training.microbatches import default_microbatch_tokens, rows_at_once
from rosa_lightning.utils.errors import ConfigurationError
from rosa_lightning.utils.strict_json import write_json
from rosa_lightning.utils.tables import note, text_table

_AUTOCAST = {
    **dict.fromkeys(["bf16", "bf16-mixed"], torch.bfloat16),
    **dict.fromkeys(["16", "16-mixed"], torch.float16),
}
"""What a trainer's precision computes in; the others cast nothing."""
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


def audit(
    context: CommandContext,
    *,
    ckpt_path: str | None = None,
    output: str | None = None,
    show: NonNegativeInt = 0,
) -> None:
    """Look at the training data: lengths, duplicates, contradictions, contamination.

    Args:
        context: The sources to train on and to test on, and the tokenizer, its own or the base's.
        ckpt_path: Checkpoint whose settings are the defaults of ``model``.
        output: JSON file for the figures, with the numbers of the records concerned.
        show: Records of each source to print as they are trained on: text, tokens, and which of
            them carry loss.
    """
    if output is not None and (Path(output).suffix != ".json" or Path(output).is_dir()):
        raise ValueError(f"output={output} is not the name of a JSON file, such as audit.json.")
    data = context.data
    if data.tokenizer is None and context.module.base:
        data.tokenizer = context.module.tokenizer
    lengths, console, choice = None, Console(), data.loading.choice_seed(data.seed)
    sources = {s.label: load_records(s, "audit", data.tasks, choice) for s in data.sources}
    if data.tokenizer is not None:
        encoder = data.encoder()
        lengths = partial(token_lengths, encoder=encoder)
        for records in sources.values():
            for example in encoder(records[:show])[:show]:
                console.print(shown_example(example, data.text_tokenizer))
    elif show:
        raise ConfigurationError("show needs a tokenizer. Set model.base or data.tokenizer.")
    found = audit_records(
        sources,
        {s.label: load_records(s, "audit", data.tasks, choice) for s in data.test_sources},
        lengths,
        max_length=data.max_length,
        decontaminate=data.loading.decontaminate,
    )
    console.print(audit_tables(found))
    if output is not None:
        write_json(Path(output), found.to_dict())
        sys.stdout.write(f"\n{output}\n")


def shown_example(example: Example, tokenizer: Any) -> Group:
    """A record as it is trained on, for `rich` to print: its text, tokens, and where loss is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    labels = [label >= 0 for label in example.labels(-1)]
    pairs = zip(labels, [*example.prompt, *example.response], strict=True)
    for carries, some in groupby(pairs, key=itemgetter(0)):
        ids = [number for _, number in some]
        style = "green" if carries else "dim"
        table.add_row(Text("loss" if carries else "no loss", style), Text(tokenizer.decode(ids)))
        tokens = "|".join(_shown_token(tokenizer, number) for number in ids)
        table.add_row(Text(f"{len(ids)} tokens", style), Text(tokens, style))
    record = example.record
    title = f"{record.source}, record {record.index}: {sum(labels)} of {len(labels)} tokens"
    cut = ", cut to data.max_length" if example.too_long else ""
    return Group(Text(f"{title} carry loss{cut}", "bold"), table, Text())


def _shown_token(tokenizer: Any, number: int) -> str:
    """A token as text, with its space before it, which some tokenizers do not decode."""
    text: str = tokenizer.decode([number]).replace("\n", "⏎")
    return f" {text}" if tokenizer.convert_ids_to_tokens(number)[:1] == "▁" else text


def audit_tables(audit: Audit) -> Group:
    """The audit for `rich` to print: lengths, contents, contamination."""
    limit = [f"over {audit.max_length:,}"] if audit.unit == "tokens" else []
    names = ("Records", "median", "90 %", "99 %", "longest", *limit)
    lengths = text_table(f"Lengths in {audit.unit}", "Source", *names)
    names = ("Records", "duplicates", "in others", "conflicting", "empty")
    contents = text_table("Contents", "Source", *names)
    for source in audit.sources:
        numbers = [source.num_records, *source.quantiles()[1:]]
        numbers += [] if source.too_long is None else [source.too_long]
        lengths.add_row(source.name, *(f"{number:,}" for number in numbers))
        groups = (source.duplicates, source.elsewhere, source.conflicting, source.empty)
        numbers = [source.num_records, *map(len, groups)]
        contents.add_row(source.name, *(f"{number:,}" for number in numbers))
    parts: list[RenderableType] = [lengths]
    if audit.unit == "words":
        text = "There is no tokenizer, so lengths are in words: set model.base or data.tokenizer."
        parts.append(note(text))
    parts.append(contents)
    if not audit.benchmarks:
        text = "No contamination was looked for: data.test_sources names no benchmark."
        return Group(*parts, note(text))
    title = "Test questions in the training data"
    leaks = text_table(title, "Benchmark", "Questions", "exact", "near")
    leaks.add_column("in", style="dim", overflow="fold")
    for benchmark in audit.benchmarks:
        exact, near = benchmark.num_exact, benchmark.num_near
        leaks.add_row(
            benchmark.name,
            f"{benchmark.questions:,}",
            Text(f"{exact:,}", style="bold red" if exact else ""),
            Text(f"{near:,}", style="yellow" if near else ""),
            ", ".join(benchmark.sources()),
        )
    parts += [leaks, note("near: not exact, but much the same words, and the same numbers")]
    held = [
        f"{len(source.contaminated):,} of {source.num_records:,} records of {source.name}"
        for source in audit.sources
        if source.contaminated
    ]
    if held:
        does = "true leaves out" if audit.decontaminate else "false trains on"
        parts.append(note(f"data.loading.decontaminate: {does} (exact) {', '.join(held)}"))
    return Group(*parts)


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
