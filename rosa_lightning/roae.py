"""RoAE, RoPE-aware Attention Enhancement: a low-rank term on the low-frequency dimensions alone.

Axes: B batch, T tokens, D input width, R rank, H heads, L low-frequency dimensions of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = Literal["q", "k"]
Placement = Literal["projection"]
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class RoAEConfig:
    """What RoAE adds, and where."""

    rank: int = 16
    """Inner width R of the low-rank term, at least 1."""
    low_freq_ratio: float = 0.25
    """Share of each head's RoPE pairs that is adapted, the slowest first, in (0, 1]."""
    alpha: float = 32.0
    """Scale of the term: it is multiplied by alpha / rank. Above 0."""
    targets: tuple[Target, ...] = ("q", "k")
    """Which projections take the term."""
    dropout: float = 0.0
    """Dropout probability on the term's input while training, in [0, 1)."""
    placement: Placement = "projection"
    """Where the term is added: right after the projection, before any norm on Q and K."""

    def __post_init__(self) -> None:
        """Check each value; lists from a configuration file become tuples."""
        object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"rank={self.rank!r} is not a whole number of at least 1. Set model.roae.rank; "
                "16 is the default."
            )
        if not 0 < self.low_freq_ratio <= 1:
            raise ValueError(
                f"low_freq_ratio={self.low_freq_ratio} is outside (0, 1]. Set "
                "model.roae.low_freq_ratio; 0.25 keeps the slowest quarter of the RoPE pairs."
            )
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(
                f"alpha={self.alpha} is not above 0. Set model.roae.alpha; twice the rank is usual."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout} is outside [0, 1). Set model.roae.dropout; 0 turns it off."
            )
        unknown = [target for target in self.targets if target not in get_args(Target)]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(
                f"targets={list(self.targets)} must name each of q and k at most once, and at "
                "least one of them. Set model.roae.targets; [q, k] is the default."
            )
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement={self.placement!r} is unknown. Set model.roae.placement to projection."
            )

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank


class RoAELinear(nn.Module):
    """A frozen projection with a trainable low-rank term on some of its output rows.

    ``z' = W x (+ b) + (alpha / rank) * S_low(B (A x))``, where S_low scatters into the rows that
    are low-frequency RoPE dimensions of a head. All other outputs stay bit for bit as they were.
    Since RoPE acts inside each pair, this equals adding to the rotated state.

    The term's weights are float32 whatever the base's dtype. It is computed in float32, or in the
    autocast dtype inside autocast, and cast to the base's output dtype when it is added.

    Args:
        base: The projection, any module from (..., D) to (..., num_heads * head_dim).
        in_features: D.
        num_heads: H, how many heads the output holds, one after the other.
        head_dims: Low-frequency dimensions of a head, ascending, the same for every head.
        config: Rank, scale and dropout.
        device: Where to make the new weights.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        in_features: int,
        num_heads: int,
        head_dims: Sequence[int],
        config: RoAEConfig,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.num_heads = num_heads
        self.head_dims = tuple(head_dims)
        self.runs = contiguous_runs(head_dims)
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        num_rows = num_heads * len(self.head_dims)
        # float32 by name: Lightning's -true precisions change the default dtype around this call.
        factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.roae_A = nn.Parameter(torch.empty(config.rank, in_features, **factory))
        self.roae_B = nn.Parameter(torch.zeros(num_rows, config.rank, **factory))
        # The usual start of LoRA (Hu et al., 2021): A as a linear layer, B zero.
        nn.init.kaiming_uniform_(self.roae_A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The frozen projection's weight, for model code that asks for its dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen projection's bias."""
        return getattr(self.base, "bias", None)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Project and add the term; (..., D) to (..., num_heads * head_dim)."""
        z = self.base(x_BTD)
        low = self.low_rank(x_BTD).to(z.dtype)
        out: Tensor = AddToRuns.apply(z, low, self.num_heads, self.runs)  # type: ignore[no-untyped-call]
        return out

    def low_rank(self, x_BTD: Tensor) -> Tensor:
        """The scaled term alone, (..., D) to (..., L)."""
        x_BTD = self.dropout(x_BTD)
        if not torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.to(self.roae_A.dtype)
        # Scaling the thin inner product costs R numbers a token instead of L.
        return F.linear(F.linear(x_BTD, self.roae_A) * self.scale, self.roae_B)

    @property
    def rows(self) -> Tensor:
        """Output rows that the term is added to, in the order of B's rows; shape (L,)."""
        head_dim = self.weight.shape[0] // self.num_heads
        starts = torch.arange(self.num_heads)[:, None] * head_dim
        return (starts + torch.tensor(self.head_dims)).flatten()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold the term into the projection's weight, in float32, and return the projection."""
        weight, rows = self.weight, self.rows.to(self.weight.device)
        delta = self.scale * (self.roae_B.float() @ self.roae_A.float())
        folded = weight[rows].float() + delta.to(weight.device)
        weight[rows] = folded.to(weight.dtype)
        return self.base

    def extra_repr(self) -> str:
        """What the printed module shows."""
        rank = self.roae_A.shape[0]
        return f"rank={rank}, heads={self.num_heads}, low_dims={len(self.head_dims)}"


def contiguous_runs(dims: Sequence[int]) -> Runs:
    """Ascending dimensions as half-open runs: [2, 3, 6] gives ((2, 4), (6, 7))."""
    runs: list[tuple[int, int]] = []
    for dim in dims:
        if runs and runs[-1][1] == dim:
            runs[-1] = (runs[-1][0], dim + 1)
        else:
            runs.append((dim, dim + 1))
    return tuple(runs)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """(..., num_heads * n) seen as (..., num_heads, n)."""
    return x.view(*x.shape[:-1], num_heads, -1)


class AddToRuns(torch.autograd.Function):
    """Add ``low`` in place to some dimensions of every head of ``z``, and return ``z``.

    Written by hand because autograd's own slice assignment copies the whole gradient once a slice.
    In place is safe: a projection saves its input for the backward pass, never its output.

    Inputs are z (..., H * head_dim), low (..., L) ordered by head, then by dimension, H, and the
    dimensions of a head as half-open runs. The gradient passes to z as it is, and its
    low-frequency part to ``low``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, low: Tensor, num_heads: int, runs: Runs) -> Tensor:
        """Write the low-frequency outputs, and no others."""
        ctx.mark_dirty(z)
        ctx.num_heads, ctx.runs = num_heads, runs
        z_heads, low_heads = by_head(z, num_heads), by_head(low, num_heads)
        column = 0
        for start, stop in runs:
            width = stop - start
            z_heads[..., start:stop].add_(low_heads[..., column : column + width])
            column += width
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradient of z is the gradient of the sum; that of ``low`` is gathered from it."""
        heads = grad.reshape(*grad.shape[:-1], ctx.num_heads, -1)
        low = torch.cat([heads[..., start:stop] for start, stop in ctx.runs], dim=-1)
        return grad, low.flatten(-2), None, None
