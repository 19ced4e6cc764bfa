"""The memory that a training step takes, read from a step on tensors that hold no numbers.

The adapted model itself runs forward and backward, and the optimizer steps, under torch's
`FakeTensorMode`: operations give shapes and data types alone, and the storages that are alive are
counted. So whatever the architecture, the attention kernel, the data types and gradient
checkpointing do to memory is in the figures; there are no formulas.

Axes: B batch, T tokens, K last positions that predict the response, N of all rows together, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from rosa_lightning.dls.layers import find_layers
from rosa_lightning.dls.policies import resolve_indices
from rosa_lightning.inspection.live import LiveBytes
from rosa_lightning.inspection.packed import PackedLinear
from rosa_lightning.models.meta import fake_tensors, replaced_tensors
from rosa_lightning.roae.inject import is_adapter_key, roae_report
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.microbatches import accumulate_loss, rows_at_once
from rosa_lightning.utils.modules import in_mode


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training step takes, line by line. The lines are largest at different times."""

    base: dict[str, int]
    """Weights and buffers of the frozen base, by data type; packed ones by their scheme."""
    adapter: int
    """RoAE weights."""
    gradients: int
    """Gradients of what trains, at the end of the backward pass."""
    optimizer: int
    """The optimizer's state, of all adapters."""
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

    def describe(self) -> str:
        """One line for each line of the estimate, for people."""
        parts = ", ".join(f"{kind} {readable_size(size)}" for kind, size in self.base.items())
        lines = {
            "weights": f"{readable_size(self.weights)} (base: {parts}; "
            f"adapter: {readable_size(self.adapter)})",
            **{name: readable_size(getattr(self, name)) for name in LINES[1:]},
        }
        return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


LINES = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
"""Names of the estimate's lines."""


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
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
    autocast: torch.dtype | None = None,
    active_layers: Collection[int] | None = None,
    scoring: bool = False,
    loss_chunk: int | None = None,
    recompute_activations: bool = True,
    microbatch_tokens: int | None = None,
) -> MemoryEstimate:
    """The memory of one training step of `RoSAModule`, once the optimizer has its state.

    Of what the module leaves out, the head and the last feed-forward block are run on responses
    alone here too. Rows are taken to begin with nothing in common, so that a step whose rows do
    takes less.

    The figures are of tensors. An allocator takes more, by rounding and by fragments, and so does
    a device, for its libraries. The attention kernel is the one that a CPU would run.

    Args:
        model: A `transformers` language model with RoAE, with its weights or on the meta device,
            quantised by `pack_on_paper` or not, and with gradient checkpointing on if that is
            wanted. It is left as it is.
        batch_size: B.
        length: T, padding included; the batch is taken to hold some.
        response_length: Tokens of the longest response, below T.
        optimizer: Makes the optimizer from the adapters.
        autocast: The lower data type of a ``-mixed`` precision.
        active_layers: Positions of the layers that train, as `DynamicLayerSelection` counts them;
            all if not given. The optimizer keeps the state of the others, too.
        scoring: A step in which `DynamicLayerSelection` selects: all layers take gradients, and
            so do the norm weights that score them.
        loss_chunk: As `RoSAModule` takes it.
        recompute_activations: As `RoSAModule` takes it.
        microbatch_tokens: As `RoSAModule` takes it, but for ``auto``, which depends on the device.

    Raises:
        ValueError: The model carries no RoAE, there are no such layers, the batch makes no sense,
            or the model or the optimizer asks for numbers, which fake tensors do not hold.
    """
    roae_report(model)
    check_batch(batch_size, length, response_length)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            f"the memory of {type(model).__name__} cannot be estimated, since its weights are "
            "quantized, which a step without numbers cannot run."
        )
    trains = _what_trains(model, active_layers, scoring)

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(empty, tensor in trains) if isinstance(tensor, nn.Parameter) else empty

    try:
        with in_mode(model, training=True), fake_tensors(), replaced_tensors(model, fake):
            step = _Step(model, optimizer, loss_chunk, recompute_activations)
            rows = rows_at_once(batch_size, length, microbatch_tokens)
            step.run(_batch(batch_size, length, response_length), rows, autocast)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the memory of {type(model).__name__} cannot be estimated, since a training step "
            f"fails on tensors without numbers: {type(error).__name__}: {reason}"
        ) from error
    return MemoryEstimate(
        base=_base_bytes(model),
        adapter=_num_bytes(step.adapters),
        gradients=step.gradients,
        optimizer=step.state,
        activations=step.activations,
        logits=step.live.peak_of_head,
        peak=step.live.peak,
    )


def check_batch(batch_size: int, length: int, response_length: int) -> None:
    """Check that there is a batch of such sizes.

    Raises:
        ValueError: There is no row, or a response that is empty or leaves no token before it.
    """
    if batch_size < 1 or not 0 < response_length < length:
        raise ValueError(
            f"batch_size={batch_size}, length={length} and response_length={response_length} make "
            "no batch. Give at least one row (data.batch_size), and a response (response_length) "
            "of at least one token that is shorter than the row (data.max_length)."
        )


def _base_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the base's weights and buffers, by kind."""
    packed = {
        tensor: module.scheme
        for module in model.modules()
        if isinstance(module, PackedLinear)
        for tensor in module.buffers(recurse=False)
    }
    sizes: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_adapter_key(name):
            kind = packed.get(tensor, str(tensor.dtype).removeprefix("torch."))
            sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    return sizes


def _what_trains(
    model: nn.Module, active_layers: Collection[int] | None, scoring: bool
) -> set[Tensor]:
    """The parameters that take gradients."""
    adapters: set[Tensor] = {p for name, p in model.named_parameters() if is_adapter_key(name)}
    if scoring and active_layers is not None:
        raise ValueError("in a scoring step all layers take gradients. Leave active_layers out.")
    if scoring:
        return adapters | {norm for layer in find_layers(model) for norm in layer.norms}
    if active_layers is None:
        return adapters
    layers = find_layers(model)
    active = resolve_indices("active_layers", [*active_layers], [layer.index for layer in layers])
    inactive = [layer for number, layer in enumerate(layers) if number not in active]
    return adapters - {p for layer in inactive for p in layer.candidates.values()}


def _batch(batch_size: int, length: int, response_length: int) -> dict[str, Any]:
    """What the data module's collator makes."""
    ids_BT = torch.zeros(batch_size, length, dtype=torch.int64)
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    return {**{name: ids_BT.clone() for name in names}, "num_label_positions": response_length}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Step:
    """One training step as `RoSAModule` and Lightning run it."""

    def __init__(
        self,
        model: Any,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        loss_chunk: int | None,
        recompute_activations: bool,
    ) -> None:
        self.model = model
        self.computer = LossComputer(
            model, loss_chunk=loss_chunk, recompute_activations=recompute_activations
        )
        self.adapters = [p for name, p in model.named_parameters() if is_adapter_key(name)]
        for adapter in self.adapters:
            adapter.grad = torch.zeros_like(adapter)
        self.optimizer = optimizer(self.adapters)
        self.optimizer.step()  # makes the state
        for adapter in self.adapters:
            if not adapter.requires_grad:
                adapter.grad = None
        state = [v for v in tree_leaves(dict(self.optimizer.state)) if isinstance(v, Tensor)]
        self.state = _num_bytes(state)
        self.activations = 0
        self.gradients = 0
        self.live = LiveBytes(
            (*state, *model.parameters(), *model.buffers(), *(_gradients(self.adapters)))
        )

    def run(self, batch: dict[str, Any], num_rows: int, autocast: torch.dtype | None) -> None:
        """Forward and backward of a batch, so many rows at once, and a step of the optimizer."""
        head: nn.Module = self.model.get_output_embeddings()
        for tensor in batch.values():
            if isinstance(tensor, Tensor):
                self.live.add(tensor)
        # From the third part on, parts take the same.
        num_parts = min(3, -(-len(batch["labels"]) // num_rows))
        batch = {k: v[:num_rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
        before = self.live.now
        self.computer.assume_supported(batch["input_ids"])

        def enter_head(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.live.at_head = True
            args[0].register_hook(leave_head)  # type: ignore[no-untyped-call]

        def leave_head(gradient: Tensor) -> None:
            self.live.at_head = False

        handle = head.register_forward_pre_hook(enter_head)
        try:
            with self.live:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = accumulate_loss([batch] * num_parts, self._part)
                self.activations = self.live.now - before - self.live.now_of_head
                if num_parts > 1:  # gradients of those before the last
                    trained = (p for p in self.model.parameters() if p.requires_grad)
                    self.activations -= _num_bytes(trained)
                # Lightning drops the gradients of the step before after the forward pass.
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.gradients = _num_bytes(_gradients(self.model.parameters()))
                self.optimizer.step()
        finally:
            handle.remove()

    def _part(self, batch: dict[str, Any]) -> Tensor:
        """Every row with a response of the given length."""
        rows, width = batch["labels"].shape
        keep = batch["num_label_positions"]
        positions_BK = torch.arange(rows * width).view(rows, width)[:, -keep - 1 : -1]
        rows_N, columns_N = positions_BK.flatten() // width, positions_BK.flatten() % width
        with self.computer.recomputing():
            return self.computer.loss_at(batch, rows_N, columns_N)[0] / len(rows_N)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
