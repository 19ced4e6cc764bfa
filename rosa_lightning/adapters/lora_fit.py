"""Whether a LoRA does what RoAE can on a model, and under which settings.

``known`` below are the terms of all targets of the model at ``low_freq_ratio`` 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from torch import nn

from rosa_lightning.adapters.peft_format import LoraFiles, LoraModule
from rosa_lightning.roae.geometry import AttentionGeometry, StateRows
from rosa_lightning.roae.layer import RoAEConfig, Target
from rosa_lightning.roae.rope import PairTable
from rosa_lightning.roae.targets import AdaptedProjection

Modules = Mapping[str, LoraModule]
Layers = Sequence[AttentionGeometry]


def needed_columns(term: AdaptedProjection, module: LoraModule) -> list[int]:
    """The columns of B that are not zero on a term's rows, ascending."""
    columns: list[int] = module.B[list(term.rows)].any(0).nonzero().flatten().tolist()
    return columns


def check_modules(model: nn.Module, modules: Modules, known: Sequence[AdaptedProjection]) -> None:
    """Check that the LoRA is one for this model, on projections that RoAE knows.

    Raises:
        ValueError: Names the first module that the model has not, has in another shape, or has in
            a place where RoAE has no target.
    """
    kind = type(model).__name__
    paths = dict(model.named_modules())
    terms = {term.projection: term for term in known}
    for path, module in modules.items():
        if path not in paths:
            raise ValueError(
                f"the LoRA is for another model than this {kind}, which has no {path}. Give the "
                "base that it was trained on."
            )
        if path in terms:
            shape = module.B.shape[0], module.A.shape[1]
            expected = terms[path].num_rows, terms[path].in_features
            if shape != expected:
                raise ValueError(
                    f"the LoRA is for another model than this {kind}: it changes {path} as a "
                    f"weight of shape {shape}, and that has shape {expected}. Give the base that "
                    "it was trained on."
                )
        elif module.B.any():
            raise ValueError(
                f"the LoRA changes {path}, which is no target of RoAE: these are "
                f"{', '.join(get_args(Target))} of layers that rotate Q and K."
            )


def check_rows(
    modules: Modules,
    terms: Sequence[AdaptedProjection],
    layers: Layers,
    known: Sequence[AdaptedProjection],
    config: RoAEConfig,
) -> None:
    """Check that B is zero on all rows but those of the terms.

    Raises:
        ValueError: Names the first row that is not, or a term that stands after a norm.
    """
    for term in terms:
        if term.norm:
            raise ValueError(
                f"placement=state adds terms after {term.norm}, and LoRA stands before any norm. "
                "Set model.roae.placement to projection."
            )
    for path, module in modules.items():
        held = {row for term in terms if term.projection == path for row in term.rows}
        for row in module.B.any(1).nonzero().flatten().tolist():
            if row not in held:
                reason = _why_not(path, row, modules, layers, known, config)
                raise ValueError(f"the LoRA changes row {row} of {path}, {reason}")


def _why_not(
    path: str,
    row: int,
    modules: Modules,
    layers: Layers,
    known: Sequence[AdaptedProjection],
    config: RoAEConfig,
) -> str:
    """What a row is, why RoAE leaves it as it is under these settings, and how to mend that."""
    for layer, target, source in _rotated(layers):
        for head, rows in enumerate(source.rows):
            if source.projection != path or row not in rows:
                continue
            dim = rows.index(row)
            what = f"dimension {dim} of {target} head {head}"
            if dim not in layer.table.rotated_dims:
                return f"{what}, which RoPE does not turn, so that RoAE cannot hold it."
            if target in config.targets:
                return (
                    f"{what}, and low_freq_ratio={config.low_freq_ratio} adapts slower ones alone. "
                    f"Set model.roae.low_freq_ratio to {smallest_ratio(modules, layers)}."
                )
    for term in known:
        if term.projection == path and row in term.rows:
            return f"a row of {term.target}. Add {term.target} to model.roae.targets."
    return "a row of no target of RoAE."


def narrowest_config(
    files: LoraFiles, modules: Modules, layers: Layers, known: Sequence[AdaptedProjection]
) -> RoAEConfig:
    """The settings of the smallest RoAE that holds a LoRA.

    Where its B is zero everywhere, all targets that it stands on and the default
    ``low_freq_ratio``.

    Raises:
        ValueError: It stands on no target of RoAE.
    """
    terms = [term for term in known if term.projection in modules]
    ranks = [len(needed_columns(term, modules[term.projection])) for term in terms]
    changed = [term for term, rank in zip(terms, ranks, strict=True) if rank] or terms
    if not changed:
        raise ValueError(f"the LoRA changes nothing, and {next(iter(modules))} is no RoAE target.")
    rank = max(ranks) or max(module.A.shape[0] for module in modules.values())
    # The scale of most modules, so that few are folded.
    ((scale, _),) = Counter(module.scale for module in modules.values()).most_common(1)
    return RoAEConfig(
        rank=rank,
        low_freq_ratio=smallest_ratio(modules, layers) or RoAEConfig.low_freq_ratio,
        alpha=scale * rank,
        targets=tuple(t for t in get_args(Target) if any(term.target == t for term in changed)),
        dropout=files.config.get("lora_dropout") or 0.0,
    )


def smallest_ratio(modules: Modules, layers: Layers) -> float:
    """The smallest share of the pairs that holds all rotated rows that are not zero; 0 if none."""
    smallest = 0.0
    for layer, _, source in _rotated(layers):
        if source.projection in modules:
            changed = modules[source.projection].B.any(1).tolist()
            dims = {
                dim
                for dim in layer.table.rotated_dims
                if any(changed[rows[dim]] for rows in source.rows)
            }
            smallest = max(smallest, _ratio_of(layer.table, dims))
    return smallest


def _ratio_of(table: PairTable, dims: set[int]) -> float:
    """The smallest share of a table's pairs, slowest first, that holds rotated dimensions."""
    for count in range(len(table.pairs) + 1):
        ratio = count / len(table.pairs)
        if dims <= set(table.dims_of(table.low_frequency_pairs(ratio)) if count else ()):
            return ratio
    raise AssertionError("all pairs hold all rotated dimensions")


def _rotated(layers: Layers) -> Iterator[tuple[AttentionGeometry, Target, StateRows]]:
    """The projections of the queries and keys of each layer."""
    for layer in layers:
        if "q" in layer.sources:
            yield layer, "q", layer.sources["q"]
        if "k" in layer.sources:
            yield layer, "k", layer.sources["k"]
