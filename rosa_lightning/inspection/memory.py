"""Memory that a training step takes, measured on fake tensors, which have shapes and no data.

The model runs forward and backward, and the optimizer steps; the storages that are alive are
counted. So all that architecture, attention kernel, dtypes and checkpointing do is included.

Axes: B batch, T tokens.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rosa_lightning.dls.layers import find_layers
from rosa_lightning.dls.policies import resolve_indices
from rosa_lightning.models.quantization import Quantization
from rosa_lightning.roae.tracing import fake_tensors
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.microbatches import accumulate_loss, rows_at_once
from rosa_lightning.training.recompute import MemoryTracker
from rosa_lightning.training.speed import SpeedConfig
from rosa_lightning.utils.modules import in_mode, replaced_tensors
from rosa_lightning.utils.text import one_line

_FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)
BITS: dict[Quantization, float] = {"int8": 8, "llm_int8": 8, "nf4": _FOUR_BITS, "fp4": _FOUR_BITS}
"""Bits of a quantised weight. In four bits 64 weights share a scale of 8 bits, and 256 scales one
of 32."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training step takes, line by line. The lines are largest at different times."""

    base: dict[str, int]
    """Weights and buffers of the frozen base, by dtype; quantised ones by their scheme."""
    adapter: int
    """Weights that train: the adapter's, or all."""
    gradients: int
    """Gradients of what trains, at the end of the backward pass."""
    optimizer: int
    """The optimizer's state, of all that trains."""
    activations: int
    """What the forward pass up to the head keeps for the backward pass."""
    logits: int
    """Logits, log-probabilities and their gradients: the most that they take at once."""
    peak: int
    """The most that is alive at any time of the step: the above, and all temporary tensors."""

    @property
    def weights(self) -> int:
        """All weights and buffers."""
        return sum(self.base.values()) + self.adapter


def readable_size(num_bytes: int) -> str:
    """Bytes as KiB, MiB or GiB, with three digits."""
    size, unit = num_bytes / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if size >= 1000:
            size, unit = size / 1024, larger
    return f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"


def estimate_memory(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    response_length: int,
    quantization: Quantization | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
    autocast: torch.dtype | None = None,
    active_layers: Collection[int] | None = None,
    scoring: bool = False,
    speed: SpeedConfig | None = None,
    attn_implementation: str | None = None,
    device: str = "cpu",
) -> MemoryEstimate:
    """The memory of one training step of `RoSAModule`, once the optimizer has its state.

    Rows are taken to share no prefix. The figures are of tensors: an allocator takes more, and so
    does a device, for its libraries. The attention kernel is the one that a CPU would run.

    Args:
        model: A `transformers` language model with what trains in it, as `apply_method` leaves it,
            with its weights or on the meta device, and with gradient checkpointing on if that is
            wanted. It is left as it is.
        batch_size: B.
        length: T, padding included; the batch is taken to hold some.
        response_length: Tokens of the longest response, below T.
        quantization: Take the linear layers of the base, but for the head, at the bits of this
            scheme. What the library unpacks while a layer runs is left out.
        optimizer: Makes the optimizer from what trains.
        autocast: The lower dtype of a ``-mixed`` precision.
        active_layers: Positions of the layers that train; all by default. The optimizer keeps the
            state of the others, too.
        scoring: A step in which `DynamicLayerSelection` selects: all layers and the norm weights
            that score them take gradients.
        speed: As `RoSAModule` takes it; ``auto`` is for whole batches here, and so is none.
        attn_implementation: The attention kernel that is named.
        device: The kind of device, such as cuda: on a CPU a step in bfloat16 rounds shapes up, and
            short rows attend otherwise.

    Raises:
        ValueError: Nothing trains, no such layers, no batch, or a model, a method or an optimizer
            that asks for numbers, which fake tensors do not hold.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing trains in {type(model).__name__}. Call apply_method first.")
    check_batch(batch_size, length, response_length)
    check_not_quantized(model, quantization)
    speed = speed or SpeedConfig()
    num_tokens = None if speed.microbatch_tokens == "auto" else speed.microbatch_tokens
    optimized = {name for name, p in model.named_parameters() if p.requires_grad}
    trains = _what_trains(model, active_layers, scoring)

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(empty, tensor in trains) if isinstance(tensor, nn.Parameter) else empty

    try:
        with in_mode(model, training=True), fake_tensors(), replaced_tensors(model, fake):
            named = {"attn_implementation": attn_implementation, "device": device}
            step = _Step(model, optimized, optimizer, speed, named)
            ids_BT = torch.zeros(batch_size, length, dtype=torch.int64)
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            batch: dict[str, Any] = {name: ids_BT.clone() for name in names}
            batch["num_label_positions"] = response_length
            step.run(batch, rows_at_once(batch_size, length, num_tokens), autocast)
    except Exception as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"the memory of {type(model).__name__} cannot be estimated, since a training step "
            f"fails on tensors without numbers: {type(error).__name__}: {reason}"
        ) from error
    base, saved = _base_bytes(model, quantization)
    return MemoryEstimate(
        base=base,
        adapter=_num_bytes(step.optimized),
        gradients=step.gradients,
        optimizer=step.state,
        activations=step.activations,
        logits=step.memory.peak_of_head,
        peak=step.memory.peak - saved,
    )


def check_batch(batch_size: int, length: int, response_length: int) -> None:
    """Raise ValueError where there is no row, or no response with a token before it."""
    if batch_size < 1 or not 0 < response_length < length:
        raise ValueError(
            f"batch_size={batch_size}, length={length} and response_length={response_length} make "
            "no batch. Give at least one row (data.batch_size), and a response (response_length) "
            "of at least one token that is shorter than the row (data.max_length)."
        )


def check_not_quantized(model: nn.Module, quantization: Quantization | None) -> None:
    """Raise ValueError for a base that is quantised already."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        remedy = "" if quantization is None else " Take model.quantization out."
        raise ValueError(
            f"the memory of {type(model).__name__} cannot be estimated: it is quantised already, "
            f"and a step without numbers cannot run such weights.{remedy}"
        )


def _base_bytes(model: Any, quantization: Quantization | None) -> tuple[dict[str, int], int]:
    """Bytes of the base's weights and buffers, by kind, and the bytes that quantisation saves."""
    head = model.get_output_embeddings()
    packed = {
        module.weight
        for module in model.modules()
        if quantization and isinstance(module, nn.Linear) and module is not head
    }
    sizes: dict[str, int] = {}
    saved = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.requires_grad:
            kind, size = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
            if quantization and tensor in packed:
                kind, size = quantization, round(tensor.numel() * BITS[quantization] / 8)
                saved += tensor.nbytes - size
            sizes[kind] = sizes.get(kind, 0) + size
    return sizes, saved


def _what_trains(
    model: nn.Module, active_layers: Collection[int] | None, scoring: bool
) -> set[Tensor]:
    """The parameters that take gradients."""
    trained: set[Tensor] = {p for p in model.parameters() if p.requires_grad}
    if scoring and active_layers is not None:
        raise ValueError("in a scoring step all layers take gradients. Leave active_layers out.")
    if scoring:
        return trained | {norm for layer in find_layers(model) for norm in layer.norms}
    if active_layers is None:
        return trained
    layers = find_layers(model)
    active = resolve_indices("active_layers", [*active_layers], [layer.index for layer in layers])
    inactive = [layer for number, layer in enumerate(layers) if number not in active]
    return trained - {p for layer in inactive for p in layer.candidates.values()}


class _Step:
    """One training step as `RoSAModule` and Lightning run it."""

    def __init__(
        self,
        model: Any,
        optimized: Collection[str],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        speed: SpeedConfig,
        named: dict[str, Any],
    ) -> None:
        self.model = model
        recomputes = speed.recompute_activations and not speed.compile
        speed = replace(speed, recompute_activations=recomputes)
        self.computer = LossComputer(model, speed, **named)
        self.optimized = [p for name, p in model.named_parameters() if name in optimized]
        for parameter in self.optimized:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = optimizer(self.optimized)
        self.optimizer.step()  # makes the state
        for parameter in self.optimized:
            if not parameter.requires_grad:
                parameter.grad = None
        states = self.optimizer.state.values()
        state = [v for one in states for v in one.values() if isinstance(v, Tensor)]
        self.state = _num_bytes(state)
        held = (*state, *model.parameters(), *model.buffers(), *_gradients(self.optimized))
        self.memory = MemoryTracker(held)

    def run(self, batch: dict[str, Any], num_rows: int, autocast: torch.dtype | None) -> None:
        """Forward and backward of a batch, so many rows at once, and a step of the optimizer."""
        self.memory.add(*batch.values())
        # From the third part on, parts take the same.
        num_parts = min(3, -(-len(batch["labels"]) // num_rows))
        batch = {k: v[:num_rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
        before = self.memory.now
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            self.computer.assume_supported(batch["input_ids"], batch["num_label_positions"])
        head: nn.Module = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(self._enter_head), self.memory:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = accumulate_loss([batch] * num_parts, self._part)
            self.activations = self.memory.now - before - self.memory.now_of_head
            if num_parts > 1:  # gradients of those before the last
                trained = (p for p in self.model.parameters() if p.requires_grad)
                self.activations -= _num_bytes(trained)
            # Lightning drops the gradients of the step before after the forward pass.
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.gradients = _num_bytes(_gradients(self.model.parameters()))
            self.optimizer.step()

    def _enter_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:  # not after prompts without a graph
            self.memory.at_head = True
            args[0].register_hook(self._leave_head)  # type: ignore[no-untyped-call]

    def _leave_head(self, gradient: Tensor) -> None:
        self.memory.at_head = False

    def _part(self, batch: dict[str, Any]) -> Tensor:
        """Every row with a response of the given length."""
        rows, width = batch["labels"].shape
        keep = batch["num_label_positions"]
        rows_N = torch.arange(rows).repeat_interleave(keep)
        columns_N = torch.arange(width - keep - 1, width - 1).repeat(rows)
        with self.computer.saving():
            return self.computer.loss_at(batch, rows_N, columns_N)[0] / len(rows_N)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
