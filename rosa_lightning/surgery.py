"""RoAE on a whole model: wrap the projections, freeze the base, merge; the adapter's state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from rosa_lightning.probe import read_pair_tables
from rosa_lightning.roae import RoAEConfig, RoAELinear, Target
from rosa_lightning.rope import PairTable, low_frequency_pairs

ADAPTER_WEIGHTS = ("roae_A", "roae_B")
"""Names of the trainable parameters; all others belong to the base."""


@dataclass(frozen=True)
class ProjectionReport:
    """One adapted projection."""

    name: str
    """Dotted path of the projection in the model."""
    target: Target
    table: PairTable
    """All RoPE pairs of a head in this layer."""
    low_pairs: tuple[int, ...]
    """Indices of the adapted pairs in ``table.pairs``."""
    num_heads: int
    num_parameters: int
    """Trainable parameters of the term."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The adapted head dimensions, ascending."""
        return tuple(sorted(dim for i in self.low_pairs for dim in self.table.pairs[i]))

    @property
    def border(self) -> tuple[float, float | None]:
        """Fastest adapted and slowest other frequency, radians per token; None if all adapted."""
        low = {self.table.inv_freq[i] for i in self.low_pairs}
        others = [f for i, f in enumerate(self.table.inv_freq) if i not in self.low_pairs]
        return max(low), min(others, default=None)


@dataclass(frozen=True)
class RoAEReport:
    """What `inject_roae` did."""

    projections: tuple[ProjectionReport, ...]
    """The adapted projections, in the model's order."""
    num_trainable: int
    """Trainable parameters."""
    num_total: int
    """All parameters of the adapted model."""

    def __str__(self) -> str:
        """One line for people."""
        first = self.projections[0]
        return (
            f"RoAE on {len(self.projections)} projections, {len(first.dims)} of "
            f"{first.table.head_dim} dimensions a head; {self.num_trainable:,} trainable of "
            f"{self.num_total:,} parameters ({100 * self.num_trainable / self.num_total:.2f} %)"
        )


def inject_roae(model: nn.Module, config: RoAEConfig) -> RoAEReport:
    """Freeze a causal language model and wrap its Q and K projections with RoAE, in place.

    Args:
        model: A `transformers` decoder with separate ``q_proj`` and ``k_proj`` and a rotary
            position embedding.
        config: What to add.

    Returns:
        The adapted projections with their pairs, dimensions and parameter counts.

    Raises:
        ValueError: The model is adapted already, has no attention with separate Q and K
            projections, does not rotate them, or rotates them in a way that cannot be read.
            The model is left as it was.
    """
    if any(True for _ in roae_layers(model)):
        raise ValueError(
            f"{type(model).__name__} carries RoAE already. Call merge_roae first, or load a fresh "
            "base."
        )
    tables = read_pair_tables(model)
    model.requires_grad_(False)
    reports = [
        _wrap(model, name, target, table, config)
        for name, table in tables.items()
        for target in config.targets
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(report.num_parameters for report in reports)
    return RoAEReport(tuple(reports), trainable, total)


def roae_layers(model: nn.Module) -> Iterator[tuple[str, RoAELinear]]:
    """The wrapped projections of a model, with their dotted paths."""
    for name, module in model.named_modules():
        if isinstance(module, RoAELinear):
            yield name, module


def merge_roae(model: nn.Module) -> nn.Module:
    """Fold every RoAE term into its projection, in float32, and unwrap; in place.

    Raises:
        ValueError: The model carries no RoAE.
    """
    layers = list(roae_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} carries no RoAE. Call inject_roae first.")
    for name, layer in layers:
        model.set_submodule(name, layer.merge())
    return model


def is_adapter_key(key: str) -> bool:
    """Whether a state dict's key names a RoAE weight."""
    return key.rpartition(".")[2] in ADAPTER_WEIGHTS


def check_adapter_keys(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Check that a state dict holds exactly the RoAE weights of a model, in the right shapes.

    Raises:
        ValueError: Names the weights that are missing, unknown or of another shape.
    """
    expected = {key: value for key, value in model.state_dict().items() if is_adapter_key(key)}
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is unknown" for key in given if key not in expected]
    problems += [
        f"{key} has shape {tuple(given[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"the adapter does not fit the model: {'; '.join(problems[:3])}{more}. Give the base "
            "and the model.roae settings that it was trained with."
        )


def _wrap(
    model: nn.Module, attention: str, target: Target, table: PairTable, config: RoAEConfig
) -> ProjectionReport:
    """Put a RoAE layer in the place of one projection."""
    name = f"{attention}.{target}_proj"
    base = model.get_submodule(name)
    low_pairs = low_frequency_pairs(table, config.low_freq_ratio)
    out_features, in_features = cast(Tensor, base.weight).shape
    num_heads = out_features // table.head_dim
    layer = RoAELinear(
        base,
        in_features=in_features,
        num_heads=num_heads,
        head_dims=sorted(dim for i in low_pairs for dim in table.pairs[i]),
        config=config,
        device=cast(Tensor, base.weight).device,
    )
    model.set_submodule(name, layer)
    count = layer.roae_A.numel() + layer.roae_B.numel()
    return ProjectionReport(name, target, table, low_pairs, num_heads, count)
