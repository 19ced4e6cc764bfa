"""Floating point operations that a training step of a partly frozen model needs, per token.

Attention's own products, which depend on the lengths of the rows, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn


def lowest_active(blocks: Iterable[nn.Module]) -> int | None:
    """Number of the first block in which something trains; None if nothing does."""
    active = (any(p.requires_grad for p in block.parameters()) for block in blocks)
    return next((number for number, trains in enumerate(active) if trains), None)


def uncounted(blocks: Iterable[nn.Module]) -> str | None:
    """Why the operations of these blocks cannot be told from their weights; None if they can."""
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
    """Operations in the blocks, forward and backward, for each token.

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
    """Operations in the frozen output head, forward and backward, for each supervised token."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else 4 * int(head.weight.numel())
