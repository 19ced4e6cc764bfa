"""`TokenThroughputMonitor`: how fast a training runs, and how many FLOPs a token takes.

The products of attention itself, which depend on the lengths of the rows, are left out of FLOPs.
"""

import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from rosa_lightning.data.collators import IGNORE_INDEX
from rosa_lightning.dls.layers import find_layers
from rosa_lightning.utils.trainer import logs_since

Counts = dict[str, Tensor | int]

RATES = ("examples", "tokens", "supervised_tokens")
"""Counts that are shown per second."""


class TokenThroughputMonitor(Callback):
    """Tells every logger how fast a training runs, and the progress bar its examples/s.

    Every ``trainer.log_every_n_steps`` optimizer steps, over the batches since the last time, of
    all devices and without the time of validations: ``train/examples_per_s``;
    ``train/tokens_per_s``, padding left out; ``train/supervised_tokens_per_s``, those of
    the responses; ``train/padding_share`` of what the batches hold; and ``train/mfu``
    where the device's peak is known: the FLOPs that the training needs as a share of that peak.
    Beside it ``train/peak_mib``, the peak so far: PyTorch's on a CUDA device, else all of the
    process's.

    Batches are those of `ReasoningDataModule`, padded or packed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, float] = {}
        """The last figures of the last fit, by their tags."""
        self._reset()

    def _reset(self) -> None:
        self._blocks: list[nn.Module] = []
        self._head_flops = 0
        self._peak_flops: float | None = None
        self._step = 0
        self._held_at = 0.0
        self._restart()

    def _restart(self) -> None:
        # Counts stay on their device until they are read, to spare a synchronisation a step.
        self._counts: Counts = {}
        self._since = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and the device's peak, and start the clock."""
        self._reset()
        self.latest = {}
        try:
            self._blocks = decoder_blocks(pl_module)
        except ValueError:  # of another shape: nothing to say of layers
            return
        peak = peak_flops(trainer, self._blocks)
        model = next((m for m in pl_module.modules() if hasattr(m, "get_output_embeddings")), None)
        if peak is not None and model is not None:
            sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
            reason = "weights are in shards" if sharded else uncounted(self._blocks)
            if reason is None:
                self._peak_flops, self._head_flops = peak, head_flops(model)
            else:
                rank_zero_info(f"MFU is not shown: {reason}.")
        self._restart()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, by which Lightning logs."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and show the figures where they are due."""
        counts = batch_counts(batch)
        if self._peak_flops is not None:
            in_head = self._head_flops * counts["supervised_tokens"]
            counts["flops"] = flops_per_token(self._blocks) * counts["tokens"] + in_head
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        if logs_since(trainer, self._step):
            self._report(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._held_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock run on."""
        self._since += time.perf_counter() - self._held_at

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._reset()

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = torch.stack([torch.as_tensor(c).cpu().double() for c in self._counts.values()])
        total = trainer.strategy.reduce(own.to(pl_module.device, torch.float32), reduce_op="sum")
        counts = dict(zip(self._counts, total.tolist(), strict=True))
        peak = None if self._peak_flops is None else self._peak_flops * trainer.world_size
        self.latest = rates(counts, time.perf_counter() - self._since, peak)
        if (memory := peak_mib(pl_module.device)) is not None:
            self.latest["train/peak_mib"] = memory
        for logger in trainer.loggers:
            logger.log_metrics(dict(self.latest), step=self._step)
        rate = self.latest["train/examples_per_s"]
        pl_module.log("examples/s", rate, prog_bar=True, logger=False)
        self._restart()


def decoder_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of the list in which layers train, frozen ones too; ValueError without one."""
    path = find_layers(module)[0].name.rpartition(".")[0]
    return list(module.get_submodule(path).children())


def batch_counts(batch: Any) -> Counts:
    """Examples, tokens, supervised tokens, and positions with padding, of a batch."""
    try:
        mask, labels = batch["attention_mask"], batch["labels"]
        examples = len(batch.get("row_lengths", labels))
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"TokenThroughputMonitor cannot count a batch of {type(batch).__name__}: it takes "
            "those of ReasoningDataModule, with attention_mask and labels. Take it out of "
            "trainer.callbacks."
        ) from error
    supervised = (labels != IGNORE_INDEX).sum()
    sizes: Counts = {"tokens": mask.sum(), "supervised_tokens": supervised}
    return {"examples": examples, **sizes, "positions": mask.numel()}


def rates(
    counts: Mapping[str, float], seconds: float, peak_flops: float | None = None
) -> dict[str, float]:
    """Figures by their tags, from `batch_counts`, and from ``flops`` where their peak is known."""
    figures = {f"train/{name}_per_s": counts[name] / seconds for name in RATES}
    figures["train/padding_share"] = 1 - counts["tokens"] / counts["positions"]
    if peak_flops is not None:
        figures["train/mfu"] = counts["flops"] / seconds / peak_flops
    return figures


def peak_flops(trainer: Trainer, blocks: list[nn.Module]) -> float | None:
    """FLOP/s that a device can do in the dtype that layers compute in, if known."""
    precision = str(trainer.precision)
    weights = (p for block in blocks for p in block.parameters() if p.is_floating_point())
    dtype = next((weight.dtype for weight in weights), torch.float32)
    if precision.startswith(("bf16", "16")):
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of devices that Lightning has no figure for
        return get_available_flops(trainer.strategy.root_device, dtype)


def peak_mib(device: torch.device) -> float | None:
    """Peak memory so far, MiB: PyTorch's on a CUDA device, else resident memory of the process.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        # On Linux, getrusage's peak is no less than what the parent process held.
        return int(text.split("VmHWM:")[1].split()[0]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB


def lowest_active(blocks: Iterable[nn.Module]) -> int | None:
    """Number of the first block in which something trains; None if nothing does."""
    active = (any(p.requires_grad for p in block.parameters()) for block in blocks)
    return next((number for number, trains in enumerate(active) if trains), None)


def uncounted(blocks: Iterable[nn.Module]) -> str | None:
    """Why the FLOPs of these blocks do not follow from their weights; None if they do."""
    for block in blocks:
        if any(isinstance(module, nn.ModuleList) for module in block.modules()):
            return "a layer holds parts of which a token may meet some only"
        for parameter in block.parameters():
            if parameter.ndim > 2:
                return "weights of three axes, of experts perhaps, are met by some tokens only"
            if not parameter.is_floating_point():
                return "weights are packed"
    return None


def flops_per_token(blocks: Sequence[nn.Module]) -> int:
    """FLOPs in the blocks, forward and backward, for each token.

    A matrix of n values takes 2n forward. From the lowest active block up it takes 2n backward for
    the activations, and another 2n if it trains itself.
    """
    lowest = lowest_active(blocks)
    total = 0
    for number, block in enumerate(blocks):
        for matrix in (p for p in block.parameters() if p.ndim == 2):
            passes = 1 + (lowest is not None and number >= lowest) + matrix.requires_grad
            total += 2 * passes * matrix.numel()
    return total


def head_flops(model: nn.Module) -> int:
    """FLOPs in the frozen output head, forward and backward, for each supervised token."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else 4 * int(head.weight.numel())
