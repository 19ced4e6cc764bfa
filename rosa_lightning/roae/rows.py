"""Some of a projection's output rows, as equal blocks, and the addition to them alone.

The low-frequency dimensions of all heads stand at the same places of equal blocks, fused with other
rows or not. So a view and a few slices reach them, without an index or a dense scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Blocks:
    """Some rows, as the same runs in each of several blocks of equal height."""

    start: int
    count: int
    stride: int
    runs: Runs
    """Half-open runs of rows within a block."""

    def view(self, z: Tensor) -> Tensor:
        """(..., rows) seen as (..., count, stride)."""
        return by_head(z.narrow(-1, self.start, self.count * self.stride), self.count)


def find_blocks(rows: Sequence[int], num_rows: int, num_heads: int = 1) -> Blocks:
    """Ascending rows of a projection as equal blocks.

    Args:
        rows: The rows to find, without repetition.
        num_rows: All rows of the projection.
        num_heads: The number of blocks to try first.
    """
    for count in (num_heads, *range(len(rows), 0, -1)):
        if len(rows) % count:
            continue
        size = len(rows) // count
        stride = rows[size] - rows[0] if count > 1 else num_rows
        if any(rows[i + size] - rows[i] != stride for i in range(len(rows) - size)):
            continue
        for start in (rows[0] // stride * stride, num_rows - count * stride):
            first = [row - start for row in rows[:size]]
            if 0 <= start <= num_rows - count * stride and 0 <= first[0] <= first[-1] < stride:
                return Blocks(start, count, stride, contiguous_runs(first))
    raise AssertionError("one block always holds all rows")


def contiguous_runs(dims: Sequence[int]) -> Runs:
    """Ascending dimensions as half-open runs: [2, 3, 6] gives ((2, 4), (6, 7))."""
    runs: list[tuple[int, int]] = []
    for dim in dims:
        if runs and runs[-1][1] == dim:
            runs[-1] = (runs[-1][0], dim + 1)
        else:
            runs.append((dim, dim + 1))
    return tuple(runs)


def spans(dims: Sequence[int]) -> str:
    """Ascending dimensions as text: 6-7, 14-15."""
    runs = contiguous_runs(dims)
    return ", ".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in runs)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """(..., num_heads * n) seen as (..., num_heads, n)."""
    return x.view(*x.shape[:-1], num_heads, -1)


def add_to_rows(z: Tensor, low: Tensor, blocks: Blocks) -> Tensor:
    """Add ``low`` in place to some of the rows of ``z``, ordered by block, and return ``z``."""
    if not (torch.is_grad_enabled() and (z.requires_grad or low.requires_grad)):
        # Without a backward pass the compiler would look into the function, and break off.
        return _add(z, low, blocks)
    out: Tensor = AddToRows.apply(z, low, blocks)  # type: ignore[no-untyped-call]
    return out


def _add(z: Tensor, low: Tensor, blocks: Blocks) -> Tensor:
    z_blocks, low_blocks = blocks.view(z), by_head(low, blocks.count)
    column = 0
    for start, stop in blocks.runs:
        width = stop - start
        z_blocks[..., start:stop].add_(low_blocks[..., column : column + width])
        column += width
    return z


class AddToRows(torch.autograd.Function):
    """Add ``low`` in place to some rows of ``z``, and return ``z``.

    Written by hand because autograd's own slice assignment copies the whole gradient once a slice.
    In place is safe: a projection saves its input for the backward pass, never its output.

    Inputs are z (..., rows), low (..., L) ordered by block, then by row, and the blocks. The
    gradient passes to z as it is, and its part on those rows to ``low``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, low: Tensor, blocks: Blocks) -> Tensor:
        """Write these rows, and no others."""
        ctx.mark_dirty(z)
        ctx.blocks = blocks
        return _add(z, low, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient of z is the gradient of the sum; that of ``low`` is gathered from it."""
        blocks = ctx.blocks.view(grad)
        low = torch.cat([blocks[..., start:stop] for start, stop in ctx.blocks.runs], dim=-1)
        return grad, low.flatten(-2), None
