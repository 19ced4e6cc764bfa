"""RoAE, RoPE-aware Attention Enhancement: a low-rank term on the low-frequency dimensions alone.

Axes: B batch, T tokens, D input width, R rank, H heads, L low-frequency dimensions of all heads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.models.quantization import is_quantized
from rosa_lightning.roae.rows import Blocks, add_to_rows, by_head, contiguous_runs

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
Placement = Literal["projection", "state"]


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
    """Which projections take the term. Only q and k hold rotated dimensions; on the others every
    row takes it, which is LoRA. Layers that rotate nothing take no term at all."""
    dropout: float = 0.0
    """Dropout probability on the term's input while training, in [0, 1)."""
    placement: Placement = "projection"
    """Where the term of q and k is added: right after the projection, where it folds into the
    weight, or after the norm on Q and K of models that have one."""

    def __post_init__(self) -> None:
        """Check each value; lists from a configuration file become tuples."""
        given: Any = self.targets
        if isinstance(given, list):
            object.__setattr__(self, "targets", tuple(given))
        is_whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not (is_whole and 1 <= self.rank < 2**31):
            raise ValueError(
                f"rank={_short(self.rank)} is not a whole number of at least 1 and below "
                f"{2**31}. Set model.roae.rank; 16 is the default."
            )
        if not (_is_number(self.low_freq_ratio) and 0 < self.low_freq_ratio <= 1):
            raise ValueError(
                f"low_freq_ratio={self.low_freq_ratio!r} is outside (0, 1]. Set "
                "model.roae.low_freq_ratio; 0.25 keeps the slowest quarter of the RoPE pairs."
            )
        if not (_is_number(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha={self.alpha!r} is not above 0. Set model.roae.alpha; twice the rank is "
                "usual."
            )
        limits = torch.finfo(torch.float32)  # in which the term is computed
        if not limits.tiny <= self.scale <= limits.max:
            raise ValueError(
                f"alpha={self.alpha!r} with rank={self.rank} scales the term by {self.scale:.3g}, "
                f"outside the range of float32 ({limits.tiny:.2g} to {limits.max:.2g}). Set "
                "model.roae.alpha; twice the rank is usual."
            )
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(
                f"dropout={self.dropout!r} is outside [0, 1). Set model.roae.dropout; 0 turns it "
                "off."
            )
        given = self.targets if isinstance(given, list | tuple) else ()
        unknown = [target for target in given if target not in get_args(Target)]
        if unknown or not given or len(set(given)) != len(given):
            raise ValueError(
                f"targets={list(given) or self.targets!r} must name each of "
                f"{', '.join(get_args(Target))} at most once, and at least one of them. Set "
                "model.roae.targets; [q, k] is usual."
            )
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement={self.placement!r} is unknown. Set model.roae.placement to projection "
                "or state."
            )

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)


def _short(value: Any) -> str:
    """A value as text, without the thousands of digits that Python would refuse to write."""
    is_long = isinstance(value, int) and abs(value) >= 10**20
    return f"{'-' if value < 0 else ''}(more than 20 digits)" if is_long else repr(value)


class RoAELinear(nn.Module):
    """A frozen projection with a trainable low-rank term on some of its output rows.

    ``z' = W x (+ b) + (alpha / rank) * S_low(B (A x))``, where S_low scatters into the rows that
    are low-frequency RoPE dimensions of a head. All other outputs stay bit for bit as they were.
    Since RoPE acts inside each pair, this equals adding to the rotated state.

    The term's weights are float32 whatever the base's dtype. It is computed in float32, or in the
    autocast dtype inside autocast, and cast to the base's output dtype when it is added.

    Args:
        base: The projection, any module from (..., D) to (..., rows), a `RoAELinear` included.
        in_features: D.
        num_heads: H, in how many blocks of equal height the rows stand; usually the heads.
        head_dims: The rows of a block that take the term, ascending, the same for every block;
            usually low-frequency dimensions.
        config: Rank, scale and dropout.
        start: The first row of the first block.
        stride: Rows of a block; all rows by the number of blocks if not given.
        defer: Leave the output as it is and keep the term for a `RoAENorm`.
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
        start: int = 0,
        stride: int | None = None,
        defer: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.num_heads = num_heads
        self.head_dims = tuple(head_dims)
        self.start = start
        self.stride = self.weight.shape[0] // num_heads if stride is None else stride
        self.scale = config.scale
        # Of bitsandbytes come views made inside its own backward rules; autograd lets nobody change
        # those in place.
        self.copies_output = is_quantized(base)
        self.deferred: Tensor | None = None
        self.defer = defer
        self.dropout = nn.Dropout(config.dropout)
        num_rows = num_heads * len(self.head_dims)
        # float32 by name: Lightning's -true precisions change the default dtype around this call.
        factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.roae_A = nn.Parameter(torch.empty(config.rank, in_features, **factory))
        self.roae_B = nn.Parameter(torch.zeros(num_rows, config.rank, **factory))
        # The usual start of LoRA (Hu et al., 2021): A as a linear layer, B zero.
        nn.init.kaiming_uniform_(self.roae_A, a=math.sqrt(5))
        self.blocks = Blocks(start, num_heads, self.stride, contiguous_runs(self.head_dims))

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
        """Project and add the term; (..., D) to (..., rows)."""
        z: Tensor = self.base(x_BTD)
        if self.defer:
            self.deferred = self.low_rank(x_BTD)
            return z
        z = z.clone() if self.copies_output else z
        return add_to_rows(z, self.low_rank(x_BTD).to(z.dtype), self.blocks)

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
        starts = self.start + torch.arange(self.num_heads)[:, None] * self.stride
        return (starts + torch.tensor(self.head_dims)).flatten()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold the term into the projection's weight, in float32, and return the projection.

        Raises:
            ValueError: `check_mergeable` says why.
        """
        self.check_mergeable()
        weight, rows = self.weight, self.rows.to(self.weight.device)
        delta = self.scale * (self.roae_B.float() @ self.roae_A.float())
        folded = weight[rows].float() + delta.to(weight.device)
        weight[rows] = folded.to(weight.dtype)
        return self.base

    def check_mergeable(self, *, dequantize: bool = False) -> None:
        """Check that the projection's weight can take the term.

        Args:
            dequantize: A quantised weight is going to be dequantised first.

        Raises:
            ValueError: The term is added after a norm, so no weight can take it, or the weight is
                quantised, and the sum would be rounded to its few bits.
        """
        if self.defer:
            raise ValueError(
                "placement=state adds the term after a norm on Q and K, which no weight can hold. "
                "Train with model.roae.placement=projection to merge."
            )
        if is_quantized(self.base) and not dequantize:
            raise ValueError(
                "the base is quantised, and rounding the sum to so few bits would lose much of "
                "what was trained. Call merge_roae(model, dequantize=True) for a plain model, or "
                "load the base without model.quantization and merge into that."
            )

    def extra_repr(self) -> str:
        """What the printed module shows."""
        rank = self.roae_A.shape[0]
        return f"rank={rank}, heads={self.num_heads}, low_dims={len(self.head_dims)}"


class RoAENorm(nn.Module):
    """A norm on Q or K that adds the deferred term of the projection before it.

    Args:
        base: The norm, whatever it takes besides its input.
        source: The projection's layer, made with ``defer=True``.
        layout: Axes of the norm's output after the batch: ``THD``, ``HTD`` or ``T(HD)``.
        num_heads: H.
        head_dim: D.
        head_dims: Dimensions of a head that take the term, ascending.
    """

    def __init__(
        self,
        base: nn.Module,
        source: RoAELinear,
        *,
        layout: str,
        num_heads: int,
        head_dim: int,
        head_dims: Sequence[int],
    ) -> None:
        super().__init__()
        self.base = base
        # In a tuple, so that the projection's weights are not registered twice.
        self.source = (source,)
        self.layout = layout
        self.num_heads = num_heads
        self.blocks = Blocks(0, num_heads, head_dim, contiguous_runs(head_dims))

    @property
    def weight(self) -> Tensor:
        """The norm's weight, for model code that asks for its dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Norm, then add the term."""
        out: Tensor = self.base(*args, **kwargs)
        low, self.source[0].deferred = self.source[0].deferred, None
        assert low is not None, "the projection runs before its norm"
        low = low.to(out.dtype)
        if self.layout == "T(HD)":
            return add_to_rows(out, low, self.blocks)
        if self.layout == "THD":
            return add_to_rows(out.flatten(-2), low, self.blocks).view(out.shape)
        flat = add_to_rows(out.transpose(1, 2).flatten(-2), low, self.blocks)
        return by_head(flat, self.num_heads).transpose(1, 2)
