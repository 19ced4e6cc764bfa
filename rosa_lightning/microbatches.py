"""A batch taken in parts, one after another, whose activations are never alive together.

The gradients of all parts but the last are taken as soon as their loss is known, and handed on when
the backward pass comes. So whoever calls for it, Lightning or DDP, sees one loss and one backward
pass.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rosa_lightning.batching import IGNORED
from rosa_lightning.packing import is_packed_batch, num_rows

MicrobatchTokens = int | Literal["auto"] | None
"""Most tokens of a part; ``auto`` for what `busy_tokens` says; None for batches as they are."""

_FEW = 2048
_LARGE = 2e9
"""From so many weights on, a pass over a part of few tokens takes an accelerator longer (8 TFLOP
forward, as much backward) than it takes to launch the kernels."""
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels")
_BOUNDS = ("num_label_positions", "num_shared")
"""What is said of all rows of a padded batch and so of any of them."""


def check_microbatch_tokens(num_tokens: MicrobatchTokens) -> None:
    """Check the setting.

    Raises:
        ValueError: It is a number below 1.
    """
    if isinstance(num_tokens, int) and num_tokens < 1:
        raise ValueError(
            f"microbatch_tokens={num_tokens} is below 1. Set model.microbatch_tokens to a number "
            "of tokens, 2048 say, to auto, or to null for batches as they are."
        )


def busy_tokens(model: nn.Module, device: str) -> int | None:
    """Tokens enough to keep a device busy, so that more at once make nothing faster.

    Args:
        model: The base; weights may be missing.
        device: Type of the device, such as cpu or cuda.

    Returns:
        A number of tokens; None for small models on an accelerator, which would wait for kernels
        to be launched.
    """
    if device == "cpu" or sum(weight.numel() for weight in model.parameters()) >= _LARGE:
        return _FEW
    return None


def rows_at_once(batch_size: int, width: int, num_tokens: int | None) -> int:
    """Rows of the largest part of a padded batch."""
    if num_tokens is None or batch_size * width <= num_tokens:
        return batch_size
    num_parts = -(-batch_size // max(1, num_tokens // width))
    return -(-batch_size // num_parts)


def microbatches(batch: dict[str, Any], num_tokens: int) -> list[dict[str, Any]]:
    """A batch in parts of at most so many tokens, padding included, or of one row.

    Padded rows of like length come together, and a part is as wide as its longest row. Parts that
    carry no loss are left out.

    Args:
        batch: As `TrainCollator` or `PackedCollator` makes it.
        num_tokens: At least 1.

    Returns:
        Batches with what a loss is computed from; the given one alone, if it is no larger.
    """
    if batch["labels"].numel() <= num_tokens or num_rows(batch) == 1:
        return [batch]
    parts = (_packed if is_packed_batch(batch) else _padded)(batch, num_tokens)
    return [part for part in parts if (part["labels"][:, 1:] != IGNORED).any()] or [batch]


def _padded(batch: dict[str, Any], num_tokens: int) -> list[dict[str, Any]]:
    rows, width = batch["labels"].shape
    size = rows_at_once(rows, width, num_tokens)
    lengths_B, order_B = batch["attention_mask"].sum(1).sort(stable=True)
    groups = torch.tensor_split(order_B, -(-rows // size))
    ends = torch.tensor([len(group) for group in groups]).cumsum(0) - 1
    longest = lengths_B[ends.to(lengths_B.device)].tolist()
    common: dict[str, Any] = {name: batch[name] for name in _BOUNDS if name in batch}
    return [
        {**common, **{name: batch[name][group, width - length :] for name in _PER_TOKEN}}
        for group, length in zip(groups, longest, strict=True)
    ]


def _packed(batch: dict[str, Any], num_tokens: int) -> list[dict[str, Any]]:
    groups: list[list[int]] = []
    for length in batch["row_lengths"].tolist():
        if not groups or sum(groups[-1]) + length > num_tokens:
            groups.append([])
        groups[-1].append(length)
    sizes = [sum(group) for group in groups]
    columns = zip(*(batch[name].split(sizes, dim=1) for name in _PER_TOKEN), strict=True)
    return [
        {
            **dict(zip(_PER_TOKEN, tensors, strict=True)),
            "row_lengths": batch["row_lengths"].new_tensor(group),
        }
        for group, tensors in zip(groups, columns, strict=True)
    ]


def sum_of_parts(
    parts: Sequence[dict[str, Any]], loss: Callable[[dict[str, Any]], Tensor]
) -> Tensor:
    """Sum of the parts' losses, without the graphs of any but the last.

    Its gradients are those of all parts, and exact for every leaf that any of them reached. It can
    be differentiated once.

    Args:
        parts: At least one.
        loss: Of one part, a scalar.
    """
    *firsts, last = parts
    total: Tensor | None = None
    gradients: dict[Tensor, Tensor] = {}
    for part in firsts:
        one = loss(part)
        for leaf, gradient in _gradients(one).items():
            known = gradients.get(leaf)
            gradients[leaf] = gradient if known is None else known + gradient
        total = one.detach() if total is None else total + one.detach()
    end = loss(last)
    if total is None:
        return end
    known_total: Tensor = _Known.apply(total, [*gradients.values()], *gradients)  # type: ignore[no-untyped-call]
    return end + known_total


def _gradients(loss: Tensor) -> dict[Tensor, Tensor]:
    """Gradients of all leaves that a loss depends on; its graph is gone afterwards."""
    leaves = _leaves(loss)
    if not leaves:
        return {}
    # As the backward pass is run, outside.
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {leaf: one for leaf, one in zip(leaves, found, strict=True) if one is not None}


def _leaves(loss: Tensor) -> list[Tensor]:
    """What gradients of a loss end in, each once: parameters, whoever they belong to."""
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.append(cast(Any, node).variable)
        waiting += [following for following, _ in node.next_functions]
    return found


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * scale for gradient in ctx.saved_tensors)
