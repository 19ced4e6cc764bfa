"""Take a batch in parts whose activations are never alive together, as one loss.

The gradients of all parts but the last are computed as soon as their loss is known, and passed on
in the backward pass. So Lightning and DDP see one loss and one backward pass.

What depends on the rows that run together sees those of a part: a dropout's draws, the outliers of
``llm_int8``, a rotation that follows the longest row (``dynamic``, ``longrope``).

Axes: B rows, T tokens, P tokens of a shared prefix that is computed once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from rosa_lightning.data.collators import IGNORE_INDEX, is_packed_batch
from rosa_lightning.models.quantization import num_parameters

_FEW = 2048
"""Tokens of a part under ``auto``."""
_LARGE = 2e9
"""Weights of a base that takes an accelerator longer to run over so many tokens (8 TFLOP forward,
as much backward) than to launch the kernels."""
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels")
Row = TypeVar("Row")
"""What is known of a row: its length, or more."""
_BOUNDS = ("num_label_positions", "num_shared")
"""What holds for all rows of a padded batch and so for any of them."""


def default_microbatch_tokens(model: nn.Module, device: str) -> int | None:
    """Tokens enough to keep a device busy, so that more at once make nothing faster.

    None for small models on an accelerator (``cuda``, say), which would wait for kernel launches.
    """
    return _FEW if device == "cpu" or num_parameters(model) >= _LARGE else None


def rows_at_once(batch_size: int, width: int, num_tokens: int | None) -> int:
    """Rows of the largest part of a batch whose rows are all equally long."""
    if num_tokens is None:
        return batch_size
    return max(map(len, _groups([width] * batch_size, sum, num_tokens)))


def microbatches(
    batch: dict[str, Any], num_tokens: int, num_shared: int = 0
) -> list[dict[str, Any]]:
    """A batch in as few parts as hold at most so many tokens, padding included, or one row.

    Padded rows of like length come together, and a part is as wide as its longest row. Parts
    without labels are left out. `num_shared` tokens of padded rows are computed once in each part,
    and so are `shared_lengths` of packed ones, if the batch has them.
    """
    is_packed = is_packed_batch(batch)
    rows, width = (1, batch["labels"].numel()) if is_packed else batch["labels"].shape
    if num_shared + rows * (width - num_shared) <= num_tokens:
        return [batch]
    parts = _packed(batch, num_tokens) if is_packed else _padded(batch, num_tokens, num_shared)
    if len(parts) == 1:
        return [batch]
    return [part for part in parts if (part["labels"][:, 1:] != IGNORE_INDEX).any()] or [batch]


def _padded(batch: dict[str, Any], num_tokens: int, num_shared: int) -> list[dict[str, Any]]:
    lengths_B, order_B = batch["attention_mask"].sum(1).sort(descending=True, stable=True)

    def size(group: Sequence[int]) -> int:
        return num_shared + len(group) * (group[0] - num_shared)

    groups = _groups(lengths_B.tolist(), size, num_tokens)
    width = batch["labels"].shape[1]
    common: dict[str, Any] = {name: batch[name] for name in _BOUNDS if name in batch}
    return [
        {**common, **{name: batch[name][rows, width - group[0] :] for name in _PER_TOKEN}}
        for rows, group in zip(order_B.split([*map(len, groups)]), groups, strict=True)
    ]


def _packed(batch: dict[str, Any], num_tokens: int) -> list[dict[str, Any]]:
    lengths: list[int] = batch["row_lengths"].tolist()
    known = batch.get("shared_lengths")
    shared: list[int] = [0] * len(lengths) if known is None else known.tolist()
    rows = [*zip(lengths, shared, strict=True)]

    def size(group: Sequence[tuple[int, int]]) -> int:
        return group[0][1] + sum(length - shared for length, shared in group)

    groups = _groups(rows, size, num_tokens)
    sizes = [sum(length for length, _ in group) for group in groups]
    parts = {name: batch[name].split(sizes, dim=1) for name in _PER_TOKEN}
    parts["row_lengths"] = batch["row_lengths"].split([*map(len, groups)])
    found = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    for part, group in zip(found, groups, strict=True):
        part["shared_lengths"] = torch.tensor([0, *(shared for _, shared in group[1:])])
    return found


def _groups(
    rows: Sequence[Row], size: Callable[[Sequence[Row]], int], most: int
) -> list[list[Row]]:
    """Rows in groups, in their order: as few as can be, and the largest as small as can be."""

    def filled(most: int) -> list[list[Row]]:
        groups: list[list[Row]] = []
        for row in rows:
            if groups and size([*groups[-1], row]) <= most:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    fewest = len(filled(most))
    return filled(bisect_left(range(most), True, key=lambda less: len(filled(less)) <= fewest))


def accumulate_loss(
    parts: Sequence[dict[str, Any]], loss: Callable[[dict[str, Any]], Tensor]
) -> Tensor:
    """Sum of the parts' losses (at least one part), with the graph of the last part alone.

    Its gradients are those of all parts for every leaf that any of them reached; for other tensors,
    and for graphs that parts have in common, those of the last part. It can be differentiated once.
    """
    *early, last = parts
    if not early:
        return loss(last)
    # Weak, as some leaves are of a part's graph: the output of a frozen embedding, say.
    gradients: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
    known = [_add_gradients(loss(part), gradients) for part in early]
    last_loss = loss(last)
    return last_loss + _with_gradients(torch.stack(known).sum(), gradients)


def sum_at_once(
    states_ND: Tensor, starts: Sequence[int], loss: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Sum of losses of slices of some states, of which one has a graph at a time.

    The gradients are taken here, so nothing is computed again in the backward pass. They are of all
    leaves that any loss reaches and of the states. It can be differentiated once.
    """
    gradients: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
    known, of_states = [], []
    for start, end in zip(starts, [*starts[1:], len(states_ND)], strict=True):
        own = states_ND[start:end].detach().requires_grad_(states_ND.requires_grad)
        known.append(_add_gradients(loss(own, start), gradients))
        of_states += [gradients.pop(own)] if own in gradients else []
    if of_states:
        gradients[states_ND] = torch.cat(of_states)
    return _with_gradients(torch.stack(known).sum(), gradients)


def _with_gradients(number: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    found: Tensor = PrecomputedGradient.apply(  # type: ignore[no-untyped-call]
        number, [*gradients.values()], *gradients
    )
    return found


def _add_gradients(loss: Tensor, gradients: MutableMapping[Tensor, Tensor]) -> Tensor:
    """Add the gradients of all leaves that a loss depends on; returns it without its graph."""
    leaves = _leaves(loss)
    if not leaves:
        return loss.detach()
    # As a backward pass is run, outside of autocast.
    with torch.autocast(loss.device.type, enabled=False):
        try:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            error.add_note(
                "The batch is taken in parts, each with a backward pass of its own. Set "
                "model.speed.microbatch_tokens to null, if this comes of it."
            )
            raise
    for leaf, gradient in zip(leaves, found, strict=True):
        if gradient is not None:
            known = gradients.get(leaf)
            gradients[leaf] = gradient if known is None else known + gradient
    return loss.detach()


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves of a loss's graph, each once."""
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                found.append(cast(Any, node).variable)
            waiting += [following for following, _ in node.next_functions]
    return found


class PrecomputedGradient(torch.autograd.Function):
    """A scalar whose gradients are known already, one for each leaf, of the leaf's shape."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        """Keep the gradients."""
        ctx.save_for_backward(*gradients)
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scale them."""
        # Not in place: a graph that is retained is run again.
        return None, None, *(gradient * scale for gradient in ctx.saved_tensors)
