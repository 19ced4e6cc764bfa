"""The pair table of a rotary position embedding, measured by rotating unit vectors.

This reads any layout (half-split, interleaved, partial) and any scaling of frequencies.
Axes: N unit vectors, T positions, D head dimension.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

Dims = Literal["low", "high", "random", "all"]

_TOLERANCE = 1e-2
"""Share of a unit vector that may be lost to rounding before a rotation is called unreadable; some
models keep their sines and cosines in bfloat16, which has eight bits."""


@dataclass(frozen=True)
class PairTable:
    """Which dimensions of a head RoPE turns together, and how fast.

    RoFormer (Su et al., 2021), section 3.2.2: pair i turns by ``t * inv_freq_i`` at token t.
    """

    head_dim: int
    """D, the number of dimensions of one head."""
    pairs: tuple[tuple[int, int], ...]
    """The two dimensions of each pair, smaller one first, in the order of the first."""
    inv_freq: tuple[float, ...]
    """Radians per token of each pair, above zero, in the order of ``pairs``."""

    @property
    def rotated_dims(self) -> tuple[int, ...]:
        """All dimensions that are rotated at all, ascending."""
        return self.dims_of(range(len(self.pairs)))

    def dims_of(self, pairs: Iterable[int]) -> tuple[int, ...]:
        """The dimensions of the pairs with these indices, ascending."""
        return tuple(sorted(dim for i in pairs for dim in self.pairs[i]))

    def low_frequency_pairs(self, ratio: float) -> tuple[int, ...]:
        """Indices of the ``max(1, round(ratio * pairs))`` slowest pairs, ascending.

        Of pairs of equal frequency the later come first, as in a table sorted downwards.
        """
        count = max(1, round(ratio * len(self.pairs)))
        slowest_first = sorted(range(len(self.pairs)), key=lambda i: (self.inv_freq[i], -i))
        return tuple(sorted(slowest_first[:count]))

    def select_pairs(self, dims: Dims, ratio: float, seed: str = "") -> tuple[int, ...]:
        """Indices of the pairs that a choice of dimensions names, ascending.

        As many as `low_frequency_pairs`, but for ``all``: the slowest, the fastest, or a draw that
        ``seed`` decides.
        """
        everything = tuple(range(len(self.pairs)))
        low = self.low_frequency_pairs(ratio)
        if dims == "low" or not everything:
            return low
        if dims == "high":
            fastest_first = sorted(everything, key=lambda i: (-self.inv_freq[i], i))
            return tuple(sorted(fastest_first[: len(low)]))
        if dims == "random":
            return tuple(sorted(Random(seed).sample(everything, len(low))))
        return everything


def read_pair_table(rotate: Callable[[Tensor], Tensor], head_dim: int) -> PairTable:
    """Measure the pair table of a rotation; empty where nothing is rotated.

    ``rotate`` takes float32 states (D, 2, D): unit vector n at positions 0 and 1. A common factor
    on all dimensions (YaRN's attention factor) is allowed. ValueError if it does something else
    than turning pairs of dimensions.
    """
    x_NTD = torch.eye(head_dim)[:, None, :].expand(head_dim, 2, head_dim).contiguous()
    y_NTD = rotate(x_NTD).to(torch.float64)
    start_ND, turned_ND = y_NTD[:, 0], y_NTD[:, 1]
    scale_N = start_ND.diagonal()
    if not torch.allclose(start_ND, torch.diag(scale_N), atol=_TOLERANCE) or (scale_N <= 0).any():
        raise ValueError("position 0 is not left in place by the rotation.")
    turned_ND = turned_ND / scale_N[:, None]
    off_ND = turned_ND - torch.diag(turned_ND.diagonal())

    # A dimension that is not rotated comes back exactly; the slowest pair still moves by its sine.
    # Plain numbers from here on: asking tensors one by one takes most of the time.
    moves_N, largest_N = off_ND.any(1).tolist(), off_ND.abs().argmax(1).tolist()
    off, sums_N = off_ND.tolist(), off_ND.abs().sum(1).tolist()
    cosines_N = turned_ND.diagonal().tolist()
    partner = {n: largest_N[n] for n in range(head_dim) if moves_N[n]}
    pairs, inv_freq = [], []
    for n, m in sorted(partner.items()):
        if partner.get(m) != n:
            raise ValueError(f"dimension {n} turns into {m}, but {m} does not turn into {n}.")
        sine, cosine = off[n][m], cosines_N[n]
        if abs(sine**2 + cosine**2 - 1) > _TOLERANCE or sums_N[n] - abs(sine) > 1e-4:
            raise ValueError(f"dimensions {n} and {m} are not turned as a pair.")
        if n < m:
            pairs.append((n, m))
            inv_freq.append(math.atan2(abs(sine), cosine))
    return PairTable(head_dim, tuple(pairs), tuple(inv_freq))
