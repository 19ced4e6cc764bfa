"""RoAE (RoPE-aware Attention Enhancement): settings, layers and maths of the low-rank term.

A frozen projection W with a low-rank term on some of its output rows, ``z' = W x + S (alpha / rank)
B A x``. For Q and K these are the rows of the head dimensions that RoPE rotates slowest; S scatters
into them, and all other outputs stay bit for bit as they were::

                     x (..., D)
                 ________|_________
                |                  |
         W (rows, D)           A (R, D)      trainable, Kaiming uniform
           frozen                  |
                |            * alpha / rank
                |                  |
                |              B (L, R)      trainable, zero at the start
                |                  |
      head 0    z0 z1 z2 z3 z4 z5 z6 z7      heads of 8 dimensions, RoPE pairs (i, i + 4),
                         +           +       slowest pair (3, 7): B's rows 0 and 1 are added
      head 1    z0 z1 z2 z3 z4 z5 z6 z7      here, rows 2 and 3 there, ...
                         +           +

RoPE rotates within each pair, so adding before the rotation equals adding to the rotated state.

Axes: B batch, T tokens, D input width, R rank, H heads, L adapted rows of all heads.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.models.quantization import is_quantized
from rosa_lightning.roae.rope import Dims

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
Placement = Literal["projection", "state"]


@dataclass(frozen=True, kw_only=True)
class RoAEConfig:
    """Settings of RoAE: which projections are adapted, on which dimensions and at which rank.

    Pan et al., "RoSA: Enhancing Parameter-Efficient Fine-Tuning via RoPE-aware Selective
    Adaptation in Large Language Models", AAAI-26, https://doi.org/10.1609/aaai.v40i18.38589
    """

    rank: int = 16
    """Inner width R of the low-rank term, at least 1."""
    low_freq_ratio: float = 0.25
    """Share of each head's RoPE pairs that is adapted, the slowest first, in (0, 1]."""
    alpha: float = 32.0
    """Scale of the term: it is multiplied by alpha / rank. Above 0."""
    targets: tuple[Target, ...] = ("q", "k")
    """Which projections take the term. Only q and k hold rotated dimensions; on the others every
    row takes it, which is LoRA. Layers without RoPE are not adapted."""
    layer_ratio: float = 1.0
    """Share of the layers that is adapted, the last first, in (0, 1]. The backward pass ends at the
    first adapted layer, so 0.5 saves about half of it."""
    dropout: float = 0.0
    """Dropout probability on the term's input while training, in [0, 1)."""
    dims: Dims = "low"
    """Which RoPE pairs of q and k are adapted: ``low``, the slowest, is RoAE. ``high`` (the
    fastest), ``random`` and ``all`` are controls; all but the last take as many."""
    dims_seed: int = 0
    """Chooses the ``random`` pairs, of each layer anew."""
    placement: Placement = "projection"
    """Where the term of q and k is added: right after the projection, where it folds into the
    weight, or after the norm on Q and K of models that have one."""

    def __post_init__(self) -> None:
        """Check each value; lists from a configuration file become tuples."""
        given: Any = self.targets
        if isinstance(given, list):
            object.__setattr__(self, "targets", tuple(given))
        for name, problem in self._problems():
            value = f"{getattr(self, name)!r:.60}"
            raise ValueError(f"{name}={value} {problem}. Set model.roae.{name} to another value.")

    def _problems(self) -> Iterator[tuple[str, str]]:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not (whole and 1 <= self.rank < 2**31):
            yield "rank", f"is not a whole number of at least 1 and below {2**31}; 16 is usual"
        if not (_is_number(self.low_freq_ratio) and 0 < self.low_freq_ratio <= 1):
            yield "low_freq_ratio", "is outside (0, 1]; 0.25 keeps the slowest quarter of the pairs"
        if not (_is_number(self.layer_ratio) and 0 < self.layer_ratio <= 1):
            yield "layer_ratio", "is outside (0, 1]; 0.5 adapts the upper half of the layers"
        if not (_is_number(self.alpha) and self.alpha > 0):
            yield "alpha", "is not above 0; twice the rank is usual"
        limits = torch.finfo(torch.float32)  # in which the term is computed
        if not limits.tiny <= self.scale <= limits.max:
            yield "alpha", f"scales the term by {self.scale:.3g}, which float32 cannot hold"
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            yield "dropout", "is outside [0, 1); 0 turns it off"
        known, given = get_args(Target), self.targets if isinstance(self.targets, tuple) else ()
        if not 0 < len(given) == sum(given.count(target) == 1 for target in known):
            yield "targets", f"must name each of {', '.join(known)} at most once, and one at least"
        if self.dims not in get_args(Dims):
            yield "dims", f"is unknown; {', '.join(get_args(Dims))}"
        if self.placement not in get_args(Placement):
            yield "placement", "is unknown; projection or state"

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)


@dataclass(frozen=True)
class RowBlocks:
    """Some output rows of a projection, as the same runs in each of several blocks of equal height.

    So a view and a few slices reach them, without an index or a dense scatter.
    """

    start: int
    count: int
    stride: int
    runs: tuple[tuple[int, int], ...]
    """Half-open runs of rows within a block."""

    @classmethod
    def find(cls, rows: Sequence[int], num_rows: int, num_heads: int = 1) -> Self:
        """Ascending rows, out of ``num_rows``, as blocks; ``num_heads`` blocks are tried first."""
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
                    return cls(start, count, stride, contiguous_runs(first))
        raise AssertionError("one block always holds all rows")

    @property
    def width(self) -> int:
        """How many rows of a block there are."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def rows(self) -> list[int]:
        """The rows, ascending."""
        dims = [dim for run in self.runs for dim in range(*run)]
        return [self.start + i * self.stride + dim for i in range(self.count) for dim in dims]

    def view(self, z: Tensor) -> Tensor:
        """(..., rows) seen as (..., count, stride)."""
        blocks = z.narrow(-1, self.start, self.count * self.stride)
        return blocks.view(*z.shape[:-1], self.count, self.stride)

    def take(self, z: Tensor) -> Tensor:
        """These rows of ``z`` (..., rows), in shape (..., L); a view where they are one run."""
        blocks = self.view(z)
        parts = [blocks[..., start:stop] for start, stop in self.runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).flatten(-2)

    def add(
        self, z: Tensor, x_BTR: Tensor, B_LR: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Add ``scale * x_BTR B_LR^T`` in place to these rows of ``z`` (..., rows); return ``z``.

        The product is computed in the dtype of ``x_BTR`` (..., R), which is A's product with the
        input. Without ``B_LR`` ``scale * x_BTR`` (..., L) itself is added.
        """
        given = z, x_BTR, B_LR
        tensors = (tensor for tensor in given if tensor is not None)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            # Without a backward pass the compiler would look into the function, and break off.
            return _add(*given, scale, self)
        out: Tensor = _AddTerm.apply(*given, scale, self)  # type: ignore[no-untyped-call]
        return out


def _add(z: Tensor, x_BTR: Tensor, B_LR: Tensor | None, scale: float, blocks: RowBlocks) -> Tensor:
    # First of all z: the compiler passes arguments in the order of their use, and autograd takes
    # the first for what is changed in place.
    z_blocks = blocks.view(z)
    low_rows = x_BTR
    if B_LR is not None:
        B_LR = B_LR.to(x_BTR.dtype)
        if len(B_LR) == z.shape[-1] and z.dtype == x_BTR.dtype and z.is_contiguous():
            flat = z.view(-1, len(B_LR)), x_BTR.reshape(-1, B_LR.shape[1])
            flat[0].addmm_(flat[1], B_LR.T, alpha=scale)
            return z
        low_rows = F.linear(x_BTR, B_LR)
    low_blocks = low_rows.to(z.dtype).view(*z_blocks.shape[:-1], blocks.width)
    column = 0
    for start, stop in blocks.runs:  # not by torch.split, whose parts the compiler mixes up
        width = stop - start
        z_blocks[..., start:stop].add_(low_blocks[..., column : column + width], alpha=scale)
        column += width
    return z


class _AddTerm(torch.autograd.Function):
    """`RowBlocks.add` with its gradient: autograd's own slice assignment copies it once a slice.

    In place is safe: a projection saves its input for the backward pass, never its output.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, x_BTR: Tensor, B_LR: Tensor | None, scale: float, blocks: RowBlocks
    ) -> Tensor:
        out = _add(z, x_BTR, B_LR, scale, blocks)  # the first to use any of them, see there
        ctx.mark_dirty(z)
        # Of a frozen B the gradient of x alone is needed.
        ctx.save_for_backward(x_BTR if ctx.needs_input_grad[2] else None, B_LR)
        ctx.scale, ctx.blocks, ctx.dtype = scale, blocks, x_BTR.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_BTR, B_LR = ctx.saved_tensors
        of_x = ctx.blocks.take(grad).to(ctx.dtype)
        of_B = None
        if x_BTR is not None:
            flat = of_x.reshape(-1, len(B_LR)), x_BTR.reshape(-1, B_LR.shape[1])
            of_B = ctx.scale * (flat[0].T @ flat[1]).to(B_LR.dtype)
        if B_LR is not None:
            of_x = of_x @ B_LR.to(ctx.dtype)
        return grad, ctx.scale * of_x, of_B, None, None


def contiguous_runs(dims: Sequence[int]) -> tuple[tuple[int, int], ...]:
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


class RoAELinear(nn.Module):
    """A frozen projection with a trainable low-rank term on some of its output rows.

    The term's weights are float32 whatever the base's dtype. It is computed in float32, or in the
    autocast dtype inside autocast, and cast to the base's output dtype when it is added.

    Args:
        base: The projection, any module from (..., D) to (..., rows), a `RoAELinear` included.
        in_features: D.
        blocks: The rows that take the term.
        defer: Leave the output as it is and keep the term for a `RoAENorm`.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        in_features: int,
        blocks: RowBlocks,
        config: RoAEConfig,
        defer: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.blocks = blocks
        self.scale = config.scale
        # bitsandbytes returns views made inside its own backward rules, which autograd lets nobody
        # change in place.
        self.copies_output = is_quantized(base)
        self.deferred: Tensor | None = None
        self.defer = defer
        self.dropout = nn.Dropout(config.dropout)
        # float32 by name: Lightning's -true precisions change the default dtype around this call.
        factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.roae_A = nn.Parameter(torch.empty(config.rank, in_features, **factory))
        self.roae_B = nn.Parameter(torch.zeros(len(blocks.rows), config.rank, **factory))
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
        """Project and add the term; (..., D) to (..., rows)."""
        z: Tensor = self.base(x_BTD)
        x_BTR = self.reduced(x_BTD)
        if self.defer:
            self.deferred = F.linear(x_BTR, self.roae_B)
            return z
        z = z.clone() if self.copies_output else z
        return self.blocks.add(z, x_BTR, self.roae_B, self.scale)

    def reduced(self, x_BTD: Tensor) -> Tensor:
        """A's product with the input, (..., D) to (..., R)."""
        x_BTD = self.dropout(x_BTD)
        if not torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.to(self.roae_A.dtype)
        return F.linear(x_BTD, self.roae_A)

    @property
    def rows(self) -> Tensor:
        """Output rows that the term is added to, in the order of B's rows; shape (L,)."""
        return torch.tensor(self.blocks.rows)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold the term into the projection's weight, in float32, and return the projection."""
        self.check_mergeable()
        weight, rows = self.weight, self.rows.to(self.weight.device)
        delta = self.scale * (self.roae_B.float() @ self.roae_A.float())
        folded = weight[rows].float() + delta.to(weight.device)
        weight[rows] = folded.to(weight.dtype)
        return self.base

    def check_mergeable(self, *, dequantize: bool = False) -> None:
        """Refuse a term added after a norm, or on a weight that stays quantised."""
        if self.defer:
            raise ValueError(
                "placement=state adds the term after a norm on Q and K, which neither a weight nor "
                "a LoRA can hold. Export with format rosa, or train with "
                "model.roae.placement=projection."
            )
        if is_quantized(self.base) and not dequantize:
            raise ValueError(
                "the base is quantised, and rounding the sum to so few bits would lose much of "
                "what was trained. Merge with dequantize=True (on the command line: --dequantize "
                "true), export with format peft or rosa, or load the base without "
                "model.quantization and merge into that."
            )

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"rank={self.roae_A.shape[0]}, rows={spans(self.blocks.rows)}"


class RoAENorm(nn.Module):
    """A norm on Q or K that adds the deferred term of the projection before it.

    ``source`` is the projection's layer, made with ``defer=True``; ``layout`` names the axes of the
    norm's output after the batch: ``THD``, ``HTD`` or ``T(HD)``; ``blocks`` are the head dimensions
    that take the term, a block for each head.
    """

    def __init__(
        self, base: nn.Module, source: RoAELinear, *, layout: str, blocks: RowBlocks
    ) -> None:
        super().__init__()
        self.base = base
        # In a tuple, so that the projection's weights are not registered twice.
        self.source = (source,)
        self.layout = layout
        self.blocks = blocks

    @property
    def weight(self) -> Tensor:
        """The norm's weight, for model code that asks for its dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Norm, then add the term."""
        out: Tensor = self.base(*args, **kwargs)
        low_rows, self.source[0].deferred = self.source[0].deferred, None
        assert low_rows is not None, "the projection runs before its norm"
        add = partial(self.blocks.add, x_BTR=low_rows, scale=self.source[0].scale)
        if self.layout == "T(HD)":
            return add(out)
        if self.layout == "THD":
            return add(out.flatten(-2)).view(out.shape)
        flat = add(out.transpose(1, 2).flatten(-2))
        return flat.view(*flat.shape[:-1], self.blocks.count, -1).transpose(1, 2)
