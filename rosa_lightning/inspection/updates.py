"""How far adapters have moved: norms of what they change in the weights, by layer.

Axes: R rank, D input width, L rows that take the term.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.adapters.methods import FullFinetuning, adapted_module, trained_otherwise
from rosa_lightning.models.quantization import is_quantized
from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.roae.targets import layer_of


@dataclass(frozen=True)
class Update:
    """What a method changes in the weight of one target in one decoder layer."""

    layer: int
    """Number of the decoder layer."""
    target: str
    """Of RoAE its target, of PEFT the module's path inside the layer."""
    norm: Callable[[], Tensor]
    """Gives the Frobenius norm of the change now, a scalar."""
    base_norm: float | None
    """Frobenius norm of the frozen weight that is changed, or of its rows that are; None where no
    plain weight holds them: the base is quantised, or RoAE's terms are added after a norm."""


def find_updates(root: nn.Module) -> list[Update]:
    """The updates of the adapted model in a module, by layer, then target; empty without a method.

    Raises:
        ValueError: They cannot be had; says why.
    """
    updates: list[Update] = []
    for model in root.modules():
        method = trained_otherwise(model)
        if isinstance(method, FullFinetuning):
            raise ValueError("full fine-tuning keeps no copy of the base to compare with")
        if method is not None:
            updates += _of_peft(model)
            continue
        try:
            projections = roae_report(model).projections
        except ValueError:  # carries no RoAE
            continue
        grouped: dict[tuple[int, str], list[RoAELinear]] = {}
        for projection in projections:
            term: Any = model.get_submodule(projection.name)
            # FSDP1 stands around it, FSDP2 shards its weights.
            if not isinstance(term, RoAELinear) or not all(map(_is_plain, term.parameters(False))):
                raise ValueError(_IN_SHARDS)
            number = int(layer_of(projection.layer).rpartition(".")[2] or 0)
            grouped.setdefault((number, projection.target), []).append(term)
        updates += [
            Update(layer, target, partial(_norm_of_terms, terms), _base_norm(terms))
            for (layer, target), terms in grouped.items()
        ]
    return sorted(updates, key=lambda update: update.layer)


_IN_SHARDS = "the strategy keeps adapter weights in shards"


@dataclass(frozen=True)
class Measure:
    """How far a target has moved."""

    by_layer: dict[int, float]
    total: float
    """Of all layers together."""
    is_headline: bool
    """Whether no other measure of the target tells more."""


def measure_updates(updates: Sequence[Update]) -> dict[str, Measure]:
    """Norms of the updates by tag, ``update_norm/<target>`` and ``relative_update/<target>``.

    They take one transfer from the device.
    """
    found: dict[str, Measure] = {}
    norms = torch.stack([update.norm() for update in updates]).tolist() if updates else []
    for target in dict.fromkeys(update.target for update in updates):
        own = [(u, norm) for u, norm in zip(updates, norms, strict=True) if u.target == target]
        known = [(update.layer, norm, update.base_norm) for update, norm in own if update.base_norm]
        total = math.hypot(*(norm for _, norm in own))
        by_layer = {update.layer: norm for update, norm in own}
        found[f"update_norm/{target}"] = Measure(by_layer, total, not known)
        if known:
            relative = {layer: norm / base for layer, norm, base in known}
            moved, frozen = (math.hypot(*(one[i] for one in known)) for i in (1, 2))
            found[f"relative_update/{target}"] = Measure(relative, moved / frozen, True)
    return found


# RoAE.


def _norm_of_terms(terms: Sequence[RoAELinear]) -> Tensor:
    norms = torch.stack([update_norm(term) for term in terms])
    return norms.square().sum().sqrt()


@torch.no_grad()
def update_norm(term: RoAELinear) -> Tensor:
    """Frobenius norm of ``scale * B A``, a scalar.

    ``||B A||^2 = sum((B^T B) * (A A^T))`` takes two R x R products and never the L x D one.
    """
    a_RD, b_LR = _wide(term.roae_A), _wide(term.roae_B)
    square = ((b_LR.T @ b_LR) * (a_RD @ a_RD.T)).sum()
    # Rounding can leave a little less than nothing.
    return term.scale * square.clamp(min=0).sqrt()


@torch.no_grad()
def _base_norm(terms: Sequence[RoAELinear]) -> float | None:
    if any(term.defer or not _is_plain(term.weight) for term in terms):
        return None
    return math.hypot(*(float(_wide(t.weight[t.rows.to(t.weight.device)]).norm()) for t in terms))


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is the whole matrix in numbers of its own: not sharded, not quantised."""
    return type(weight.data) is Tensor and weight.ndim == 2 and weight.is_floating_point()


def _wide(weight: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return weight.float() if weight.device.type == "mps" else weight.double()


# PEFT.


def _of_peft(model: nn.Module) -> Iterator[Update]:
    """An update for each adapted module inside the layers that PEFT can merge."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any(type(parameter.data) is not Tensor for _, parameter in trained):
        raise ValueError(_IN_SHARDS)
    for path in dict.fromkeys(adapted_module(name) for name, _ in trained):
        layer = layer_of(path)
        module = model.get_submodule(path)
        if not layer or not isinstance(module, BaseTunerLayer):
            continue  # embedding and head; modules that are trained as they are
        base: Any = module.get_base_layer()
        if is_quantized(base):
            raise ValueError("the base is quantised, and PEFT merges into plain weights alone")
        target, number = path.removeprefix(f"{layer}."), int(layer.rpartition(".")[2])
        base_norm = float(base.weight.detach().float().norm())
        yield Update(number, target, partial(_norm_of_merging, module), base_norm)


@torch.no_grad()
def _norm_of_merging(layer: Any) -> Tensor:
    """The norm of what merging changes; in a copy, since undoing it would be inexact."""
    twin: Any = copy.deepcopy(layer).float()
    before: Tensor = twin.get_base_layer().weight.clone()
    twin.merge()
    after: Tensor = twin.get_base_layer().weight
    return (after - before).square().sum().sqrt()
