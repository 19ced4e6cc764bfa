"""How far each RoAE term has moved its projection.

Axes: R rank, D input width, L rows that take the term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.roae.targets import AdaptedProjection, layer_of


@dataclass(frozen=True)
class Update:
    """What the terms of one target add in one decoder layer; usually it is one term."""

    layer: int
    """Number of the decoder layer."""
    target: str
    terms: tuple[RoAELinear, ...]
    base_norm: float | None
    """Frobenius norm of the frozen rows that take the terms; None where no plain weight holds them:
    the base is quantised, or the terms are added after a norm."""


def find_updates(root: nn.Module) -> list[Update]:
    """The updates of the adapted model in a module, by layer, then target; empty without RoAE.

    Raises:
        ValueError: A sharded strategy keeps the adapters in pieces, whose norms no rank knows.
    """
    grouped: dict[tuple[int, str], list[RoAELinear]] = {}
    for report, term in _terms(root):
        number = int(layer_of(report.layer).rpartition(".")[2] or 0)
        grouped.setdefault((number, report.target), []).append(term)
    if not all(_is_plain(p) for terms in grouped.values() for t in terms for p in _weights(t)):
        raise ValueError("the strategy keeps adapter weights in shards")
    return [
        Update(layer, target, tuple(terms), _base_norm(terms))
        for (layer, target), terms in sorted(grouped.items(), key=lambda item: item[0][0])
    ]


def update_norms(updates: Sequence[Update]) -> list[float]:
    """Frobenius norm of what each update adds to the weight, in one transfer from the device."""
    squares = [torch.stack([update_norm(t) ** 2 for t in update.terms]) for update in updates]
    norms: list[float] = torch.stack([square.sum().sqrt() for square in squares]).tolist()
    return norms


@torch.no_grad()
def update_norm(term: RoAELinear) -> Tensor:
    """Frobenius norm of ``scale * B A``, a scalar.

    ``||B A||^2 = sum((B^T B) * (A A^T))`` takes two R x R products and never the L x D one.
    """
    a_RD, b_LR = (_wide(weight) for weight in _weights(term))
    square = ((b_LR.T @ b_LR) * (a_RD @ a_RD.T)).sum()
    # Rounding can leave a little less than nothing.
    return term.scale * square.clamp(min=0).sqrt()


def _terms(root: nn.Module) -> Iterator[tuple[AdaptedProjection, RoAELinear]]:
    for module in root.modules():
        try:
            reports = roae_report(module).projections
        except ValueError:  # carries no RoAE
            continue
        for report in reports:
            term = module.get_submodule(report.name)
            if not isinstance(term, RoAELinear):  # FSDP1 stands around it
                raise ValueError("the strategy keeps adapter weights in shards")
            yield report, term


@torch.no_grad()
def _base_norm(terms: Sequence[RoAELinear]) -> float | None:
    weights = [term.weight for term in terms]
    if any(term.defer for term in terms) or not all(_is_plain(weight) for weight in weights):
        return None
    pairs = zip(terms, weights, strict=True)
    return math.hypot(*(float(_wide(w[t.rows.to(w.device)]).norm()) for t, w in pairs))


def _weights(term: RoAELinear) -> tuple[Tensor, Tensor]:
    return term.roae_A, term.roae_B


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is the whole matrix in numbers of its own: not sharded, not quantised."""
    return type(weight.data) is Tensor and weight.ndim == 2 and weight.is_floating_point()


def _wide(weight: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return weight.float() if weight.device.type == "mps" else weight.double()
