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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from rosa_lightning.dls.layers import find_layers
from rosa_lightning.inspection.throughput import batch_counts, lowest_active
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
OURS, LORA, FLOOR = "as configured", "PEFT LoRA, plain", "frozen base"
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
class Contender:
    """One way to train, and what it took."""

    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    peak_mib: float | None = None
    """Most memory beside the other two; on a CUDA device only."""


@dataclass
class Bench:
    """What was measured."""

    rounds: list[dict[str, int]] = field(default_factory=list)
    """Examples, tokens and the like of each round, the same for all ways."""
    contenders: dict[str, Contender] = field(default_factory=dict)
    lowest: list[int] = field(default_factory=list)
    """The lowest layer that trained, of each step as configured."""

    def per_second(self, way: str, what: str) -> float:
        """Median over the rounds of the examples or tokens a second."""
        pairs = zip(self.rounds, self.contenders[way].seconds, strict=True)
        return statistics.median(counts[what] / seconds for counts, seconds in pairs)

    def times(self, way: str, other: str) -> tuple[float, float, float]:
        """How many times as long another way takes: median of the rounds, lowest, highest."""
        pairs = zip(self.contenders[way].seconds, self.contenders[other].seconds, strict=True)
        ratios = [others / own for own, others in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


def run_bench(
    module: RoSAModule,
    data: ReasoningDataModule,
    settings: Mapping[str, Any],
    *,
    steps: int,
    rounds: int,
) -> Bench:
    """Train as configured on one device, and in between the two other ways.

    Of ``settings``, the trainer's arguments with callbacks instantiated, the ones that a step
    depends on are taken. ``steps`` is the batches of each turn, ``rounds`` the turns of each way.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1. Set {name} to 1 or more.")
    lora = plain_lora(module)
    with _quiet():
        turns = Turns(lora, frozen_floor(_alike(module)), steps, rounds)
        _trainer(settings, turns).fit(module, data)
    return turns.bench


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning tells of a training, of which there are two here."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _trainer(settings: Mapping[str, Any], turns: Turns) -> Trainer:
    """A trainer with what of the settings a step depends on, for as long as the turns last."""
    callbacks = settings.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return Trainer(
        **{name: settings[name] for name in _KEPT if settings.get(name) is not None},
        callbacks=[*(c for c in callbacks if not isinstance(c, _LEFT_OUT)), turns],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=-1,
        max_steps=_WARM_UP + turns.steps * turns.rounds,
    )


def _alike(module: RoSAModule) -> RoSAModule:
    """A module like another, on the same base, without an adapter of its own."""
    # A training from the command line has other hyperparameters beside its arguments.
    known = inspect.signature(RoSAModule).parameters.keys() - {"roae"}
    return RoSAModule(**{name: module.hparams[name] for name in known & module.hparams.keys()})


def frozen_floor(module: RoSAModule) -> RoSAModule:
    """Make a module the least that any training of low layers takes: its base, nothing trained.

    The input of the first layer requires a gradient, so that the backward pass goes down to it.
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
    terms, _ = select_projections(base, wanted, strict=False)
    names = sorted({term.projection for term in terms})
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names)
    with warnings.catch_warnings():
        # It asks transformers for an attribute by its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return cast(nn.Module, peft.get_peft_model(base, config))


class Turns(Callback):
    """Trains the other ways, some batches each, between the batches of the configured training.

    The LoRA trains on the same records in random order, padded on the right to the longest of a
    batch, with logits at every token; the frozen base takes the same batches forward and backward.
    """

    def __init__(self, lora: nn.Module, floor: RoSAModule, steps: int, rounds: int) -> None:
        super().__init__()
        self.bench = Bench(contenders={name: Contender() for name in (OURS, LORA, FLOOR)})
        self.lora, self.floor = lora, floor
        self.steps, self.rounds = steps, rounds
        self._batches: list[Batch] = []
        self._blocks: list[nn.Module] = []
        self._order = Random(0)
        self._optimizer = AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
        self._warm = False
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the other ways to the device, and start the clock."""
        self.lora.to(pl_module.device).train()
        self.floor.to(pl_module.device)
        path = find_layers(pl_module)[0].name.rpartition(".")[0]
        self._blocks = list(pl_module.get_submodule(path).children())
        self._begin(pl_module.device)

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
        device, context = pl_module.device, trainer.precision_plugin.forward_context
        self._end(OURS, pl_module, device)
        rows = [row for batch in self._batches for row in rows_of(batch)]
        self._order.shuffle(rows)
        size = -(-len(rows) // len(self._batches))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._begin(device)
        self._train_lora(parts, context)
        self._end(LORA, self.lora, device)
        self._begin(device)
        self._pass_floor(context)
        self._end(FLOOR, self.floor, device)
        if self._warm:
            self.bench.rounds.append(total_counts(self._batches))
        self._warm = True
        self._batches = []
        trainer.should_stop = len(self.bench.rounds) == self.rounds
        self._begin(device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the models."""
        del self.lora, self.floor, self._optimizer
        self._blocks, self._batches = [], []

    def _train_lora(
        self, parts: list[list[Row]], context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        for rows in parts:
            with context():
                loss = self.lora(**padded(rows)).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _pass_floor(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        for batch in self._batches:
            with context():
                loss = self.floor.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]

    def _begin(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._held = torch.cuda.memory_allocated(device)
        self._since = time.perf_counter()

    def _end(self, name: str, model: nn.Module, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not self._warm:
            return
        contender = self.bench.contenders[name]
        contender.seconds.append(time.perf_counter() - self._since)
        if device.type == "cuda":
            # All three are there: what this one took, and its weights.
            taken = torch.cuda.max_memory_allocated(device) - self._held
            own = sum(p.numel() * p.element_size() for p in model.parameters())
            contender.peak_mib = max(contender.peak_mib or 0.0, (taken + own) / 2**20)


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


def total_counts(batches: Sequence[Batch]) -> dict[str, int]:
    """What several batches hold, as `batch_counts` names it."""
    counts = [batch_counts(batch) for batch in batches]
    return {name: sum(int(count[name]) for count in counts) for name in counts[0]}


def bench_tables(bench: Bench) -> Group:
    """What was measured, for `rich` to print, and the machine it was measured on."""
    has_memory = bench.contenders[OURS].peak_mib is not None
    names = ["examples/s", "tokens/s", "speed, LoRA = 1", "time, frozen = 1"]
    table = text_table(None, "Training", *names, *(["peak MiB"] if has_memory else []))
    spread = "{:.2f} ({:.2f}-{:.2f})"
    for name, contender in bench.contenders.items():
        cells = [
            f"{bench.per_second(name, 'examples'):,.1f}",
            f"{bench.per_second(name, 'tokens'):,.0f}",
            "1" if name == LORA else spread.format(*bench.times(name, LORA)),
            "1" if name == FLOOR else spread.format(*bench.times(FLOOR, name)),
        ]
        cells += [] if contender.peak_mib is None else [f"{contender.peak_mib:,.0f}"]
        table.add_row(name, *cells)
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
