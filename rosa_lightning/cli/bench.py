"""A training as configured, beside PEFT LoRA in the plain way and the frozen base, in one run.

The three take turns within the training itself, some batches each, so that whatever else the
machine does meets all of them. They see the same records.

Axes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
import logging
import platform
import re
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from rich.console import Group
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW

from rosa_lightning.data.collators import IGNORE_INDEX, is_packed_batch
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.inspection.throughput import batch_counts, decoder_blocks, lowest_active
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import remove_roae
from rosa_lightning.roae.layer import RoAEConfig, Target
from rosa_lightning.roae.targets import select_projections
from rosa_lightning.utils.tables import text_table

Row = tuple[Tensor, Tensor]
"""Token ids and labels of a record, both (T,)."""
Batch = dict[str, Any]

LORA_RANK = 16
LORA_TARGETS: tuple[Target, ...] = ("q", "k", "v", "up", "down")
OURS, LORA, FROZEN = "as configured", "PEFT LoRA, plain", "frozen base"
METHODS = (OURS, LORA, FROZEN)
_WARM_UP = 2
"""Batches at the start that are not counted."""
_KEPT = (
    *("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "deterministic", "benchmark", "plugins"),
)
"""Arguments of the trainer that a step depends on."""
_LEFT_OUT = (Checkpoint, EarlyStopping, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks that validate, write or show."""


@dataclass
class Bench:
    """What was measured, by method and round."""

    rounds: list[dict[str, int]] = field(default_factory=list)
    """Examples, tokens and the like of each round, the same for all methods."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METHODS})
    peak_mib: dict[str, float] = field(default_factory=dict)
    """Most memory of a method beside the other two; on a CUDA device only."""
    lowest: list[int] = field(default_factory=list)
    """The lowest layer that trained, of each step as configured."""

    def per_second(self, method: str, what: str) -> float:
        """Median over the rounds of the examples or tokens a second."""
        pairs = zip(self.rounds, self.seconds[method], strict=True)
        return statistics.median(counts[what] / seconds for counts, seconds in pairs)

    def ratio(self, method: str, other: str) -> str:
        """How many times as long another method takes: median of the rounds, lowest, highest."""
        pairs = zip(self.seconds[method], self.seconds[other], strict=True)
        ratios = [others / own for own, others in pairs]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def run_bench(
    module: RoSAModule,
    data: ReasoningDataModule,
    settings: Mapping[str, Any],
    *,
    steps: int,
    rounds: int,
) -> Bench:
    """Train as configured on one device, and in between by the two other methods.

    Of ``settings``, the trainer's arguments with callbacks instantiated, the ones that a step
    depends on are taken. ``steps`` is the batches of each turn, ``rounds`` the turns of a method.
    """
    lora = plain_lora(module)
    # A training from the command line has other hyperparameters beside its arguments.
    known = inspect.signature(RoSAModule).parameters.keys() - {"roae"}
    alike = {name: module.hparams[name] for name in known & module.hparams.keys()}
    callbacks = settings.get("callbacks") or []
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.disabled, before = True, log.disabled  # there are two trainings here to tell of
    try:
        turns = Turns(lora, frozen_base(RoSAModule(**alike)), steps, rounds)
        Trainer(
            **{name: settings[name] for name in _KEPT if settings.get(name) is not None},
            callbacks=[*(c for c in callbacks if not isinstance(c, _LEFT_OUT)), turns],
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            max_epochs=-1,
            max_steps=_WARM_UP + steps * rounds,
        ).fit(module, data)
    finally:
        log.disabled = before
    return turns.bench


def frozen_base(module: RoSAModule) -> RoSAModule:
    """The frozen-base baseline: a module without adapters, in which nothing trains.

    The input of the first layer requires a gradient, so that the backward pass goes down to it:
    the least that any training of low layers takes.
    """
    module.configure_model()
    model = cast(Any, module.model)
    remove_roae(model)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return module


def plain_lora(module: RoSAModule) -> nn.Module:
    """The module's base with a LoRA of PEFT on q, k, v, up and down, as far as it has them."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "bench compares with PEFT, which is missing: pip install 'rosa-lightning[bench]'"
        ) from error
    base = load_base(module.base, quantization=module.quantization, **module.loading)
    wanted = RoAEConfig(targets=LORA_TARGETS, low_freq_ratio=1.0)
    projections, _ = select_projections(base, wanted, strict=False)
    names = sorted({found.projection for found in projections})
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names)
    with warnings.catch_warnings():
        # It asks transformers for an attribute by its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return cast(nn.Module, peft.get_peft_model(base, config))


class Turns(Callback):
    """Trains by the other methods, some batches each, between batches of the configured training.

    The LoRA trains on the same records in random order, padded on the right to the longest of a
    batch, with logits at every token; the frozen base takes the same batches forward and backward.
    """

    def __init__(self, lora: nn.Module, frozen: RoSAModule, steps: int, rounds: int) -> None:
        super().__init__()
        self.bench = Bench()
        self.lora, self.frozen = lora, frozen
        self.steps, self.rounds = steps, rounds
        self._batches: list[Batch] = []
        self._blocks: list[nn.Module] = []
        self._order = Random(0)
        self._optimizer = AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
        self._warm = False
        self._since, self._held = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the other models to the device, and start the clock."""
        self.lora.to(pl_module.device).train()
        self.frozen.to(pl_module.device)
        self._blocks = decoder_blocks(pl_module)
        self._start_clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a turn, let the others have theirs."""
        self._batches.append(batch)
        lowest = lowest_active(self._blocks)
        if self._warm and lowest is not None:
            self.bench.lowest.append(lowest)
        if len(self._batches) < (self.steps if self._warm else _WARM_UP):
            return
        self._stop_clock(OURS, pl_module, pl_module.device)
        rows = [row for batch in self._batches for row in rows_of(batch)]
        self._order.shuffle(rows)
        size = -(-len(rows) // len(self._batches))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._start_clock(pl_module.device)
        self.train_lora(parts, trainer)
        self._stop_clock(LORA, self.lora, pl_module.device)
        self._start_clock(pl_module.device)
        self.pass_frozen(self._batches, trainer)
        self._stop_clock(FROZEN, self.frozen, pl_module.device)
        if self._warm:
            counts = [batch_counts(batch) for batch in self._batches]
            self.bench.rounds.append(
                {name: sum(int(count[name]) for count in counts) for name in counts[0]}
            )
        self._warm = True
        self._batches = []
        trainer.should_stop = len(self.bench.rounds) == self.rounds
        self._start_clock(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the models."""
        del self.lora, self.frozen, self._optimizer
        self._blocks, self._batches = [], []

    def train_lora(self, parts: Sequence[Sequence[Row]], trainer: Trainer) -> None:
        """A step of the LoRA on each part of the records."""
        for rows in parts:
            with trainer.precision_plugin.forward_context():
                loss = self.lora(**padded(rows)).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

    def pass_frozen(self, batches: Sequence[Batch], trainer: Trainer) -> None:
        """The frozen base forward and backward on each batch."""
        for batch in batches:
            with trainer.precision_plugin.forward_context():
                loss = self.frozen.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]

    def _start_clock(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._held = torch.cuda.memory_allocated(device)
        self._since = time.perf_counter()

    def _stop_clock(self, method: str, model: nn.Module, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not self._warm:
            return
        self.bench.seconds[method].append(time.perf_counter() - self._since)
        if device.type == "cuda":
            # All three are there: what this one took, and its weights.
            taken = torch.cuda.max_memory_allocated(device) - self._held
            own = sum(p.numel() * p.element_size() for p in model.parameters())
            before = self.bench.peak_mib.get(method, 0.0)
            self.bench.peak_mib[method] = max(before, (taken + own) / 2**20)


def rows_of(batch: Batch) -> Iterator[Row]:
    """The records of a batch, padded or packed, without padding."""
    if is_packed_batch(batch):
        lengths = batch["row_lengths"].tolist()
        ids, labels = batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths)
        yield from zip(ids, labels, strict=True)
        return
    for ids_T, labels_T, mask_T in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        yield ids_T[mask_T], labels_T[mask_T]


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch padded on the right, as a model's own forward takes it; each (B, T)."""
    ids, labels = zip(*rows, strict=True)
    ones = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "attention_mask": pad_sequence(ones, batch_first=True),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
    }


def bench_tables(bench: Bench) -> Group:
    """What was measured, for `rich` to print, and the machine it was measured on."""
    names = ["examples/s", "tokens/s", "speed, LoRA = 1", "time, frozen = 1"]
    table = text_table(None, "Training", *names, *(["peak MiB"] if bench.peak_mib else []))
    for method in METHODS:
        table.add_row(
            method,
            f"{bench.per_second(method, 'examples'):,.1f}",
            f"{bench.per_second(method, 'tokens'):,.0f}",
            "1" if method == LORA else bench.ratio(method, LORA),
            "1" if method == FROZEN else bench.ratio(FROZEN, method),
            *([f"{bench.peak_mib[method]:,.0f}"] if bench.peak_mib else []),
        )
    lowest = f"{statistics.mean(bench.lowest):.3g}" if bench.lowest else "none"
    return Group(
        table,
        f"{len(bench.rounds)} rounds of some {bench.rounds[0]['examples']} examples, in turn; "
        "median and (lowest-highest) of the rounds.",
        f"LoRA: rank {LORA_RANK} on {', '.join(LORA_TARGETS)} where there are such, the same "
        "records in random order, padded to the longest. Frozen base: forward and backward, no "
        "optimizer.",
        f"Lowest layer that trained, as configured: {lowest} on average.",
        machine(),
    )


def machine() -> str:
    """The processors, and the versions that speed depends on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (named := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = named[1]
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    packages = ("torch", "transformers", "peft", "lightning", "rosa-lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads = f"{cpu}, {torch.get_num_threads()} threads"
    return f"{'; '.join([threads, *devices])}; Python {platform.python_version()}, {versions}"
