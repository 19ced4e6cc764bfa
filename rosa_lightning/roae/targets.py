"""Which rows of which projection take a term: what was asked for, against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rosa_lightning.roae.capture import Trace
from rosa_lightning.roae.feedforward import feed_forward, layer_of
from rosa_lightning.roae.layer import RoAEConfig, Target
from rosa_lightning.roae.probe import AttentionGeometry, Source, read_geometry
from rosa_lightning.roae.rope import PairTable, low_frequency_pairs


@dataclass(frozen=True)
class Term:
    """One low-rank term to add."""

    layer: str
    """Dotted path of the attention module of the decoder layer."""
    target: Target
    projection: str
    """Dotted path of the projection."""
    rows: tuple[int, ...]
    """The output rows that take the term, ascending."""
    num_heads: int
    in_features: int
    num_rows: int
    """All output rows of the projection."""
    table: PairTable | None = None
    """The RoPE pairs of a head, for q and k."""
    low_pairs: tuple[int, ...] = ()
    """Indices of the adapted pairs in ``table.pairs``."""
    norm: str = ""
    """Dotted path of the norm after which the term is added, if any."""
    norm_layout: str = ""

    @property
    def dims(self) -> tuple[int, ...]:
        """The adapted head dimensions, ascending."""
        pairs = self.table.pairs if self.table else ()
        return tuple(sorted(dim for i in self.low_pairs for dim in pairs[i]))


def plan_terms(model: nn.Module, config: RoAEConfig) -> tuple[list[Term], list[str]]:
    """Measure a model and choose the rows of every term.

    Returns:
        The terms, layer by layer in the order of ``config.targets``, and one line for each target
        that a layer does without.

    Raises:
        ValueError: The model cannot be measured, a target can be adapted in no layer, or a term
            cannot be added where ``config.placement`` asks for it.
    """
    return choose_terms(model, config, *read_geometry(model))


def choose_terms(
    model: nn.Module, config: RoAEConfig, layers: tuple[AttentionGeometry, ...], trace: Trace
) -> tuple[list[Term], list[str]]:
    """As `plan_terms`, on a model that `read_geometry` has measured."""
    terms, notes = possible_terms(model, config, layers, trace)
    for target in config.targets:
        if not any(term.target == target for term in terms):
            reason = next(note for note in notes if f"no term on {target}: " in note)
            raise ValueError(
                f"{type(model).__name__}: {target} can be adapted in no layer; {reason}. Take it "
                "out of model.roae.targets."
            )
    _check(model, terms, layers, config)
    return terms, notes


def possible_terms(
    model: nn.Module, config: RoAEConfig, layers: tuple[AttentionGeometry, ...], trace: Trace
) -> tuple[list[Term], list[str]]:
    """As `choose_terms`, with targets left out that no layer has, and nothing refused."""
    terms: list[Term] = []
    notes: list[str] = []
    for layer in layers:
        for target in config.targets:
            found, reason = _terms(layer, target, config, trace)
            if target in ("gate", "up", "down") and _stacked_experts(model, layer):
                reason = "its routed experts are one parameter of three axes, not projections"
            terms += found
            notes += [f"{layer.path}: no term on {target}: {reason}"] if reason else []
    return terms, notes


def _check(
    model: nn.Module, terms: list[Term], layers: tuple[AttentionGeometry, ...], config: RoAEConfig
) -> None:
    """Refuse a placement that a layer has no room for, and projections that are shared."""
    kind = type(model).__name__
    unplaced = [layer for layer in layers if "state" in layer.notes]
    if config.placement == "state" and unplaced:
        raise ValueError(
            f"{kind}: placement=state cannot be had in layer {unplaced[0].path}: "
            f"{unplaced[0].notes['state']}. Set model.roae.placement to projection."
        )
    for term in terms:
        if config.rank > term.in_features:
            raise ValueError(
                f"{kind}: rank={config.rank} is above {term.in_features}, the inputs of "
                f"{term.projection}, and no term needs as much. Lower model.roae.rank."
            )
    _check_unshared(model, {term.projection for term in terms})


def _check_unshared(model: nn.Module, projections: set[str]) -> None:
    """Refuse a projection, or a projection's weight, that stands in two places of the model."""
    wanted: set[object] = set()
    for path in projections:
        module = model.get_submodule(path)
        wanted |= {module, *module.parameters(recurse=False)}
    seen: set[object] = set()
    # A part held under two names of one module, or by two modules, shows once for each.
    for holder in model.modules():
        for name, part in (*holder._modules.items(), *holder._parameters.items()):
            if part in wanted and part in seen:
                raise ValueError(
                    f"{type(model).__name__}: the {name} of {type(holder).__name__} stands in "
                    "several places of the model, so a term on it would act in all of them."
                )
            if part is not None:
                seen.add(part)


def _terms(
    layer: AttentionGeometry, target: Target, config: RoAEConfig, trace: Trace
) -> tuple[list[Term], str]:
    """The terms of one target in one layer, or the reason why there is none."""
    widths = {leaf.path: (leaf.given.shape[-1], leaf.output.shape[-1]) for leaf in trace.leaves}
    if target in ("q", "k"):
        source = layer.sources.get(target)
        if source is None:
            return [], layer.notes.get(target, "it comes from no projection of this layer")
        return [_rotated_term(layer, target, source, widths[source.projection], config)], ""
    found = list(_plain_rows(layer, target, trace))
    terms = [
        Term(layer.path, target, path, rows or tuple(range(widths[path][1])), 1, *widths[path])
        for path, rows in found
    ]
    return terms, "" if terms else layer.notes.get(target, "no projection of that kind was seen")


def _stacked_experts(model: nn.Module, layer: AttentionGeometry) -> bool:
    """Whether the layer around an attention module holds all experts in one parameter."""
    parts = model.get_submodule(layer_of(layer.path)).named_parameters()
    return any(parameter.ndim == 3 and "weight" not in name for name, parameter in parts)


def _rotated_term(
    layer: AttentionGeometry,
    target: Target,
    source: Source,
    widths: tuple[int, int],
    config: RoAEConfig,
) -> Term:
    """The low-frequency rows of queries or keys."""
    table = layer.table
    low_pairs = low_frequency_pairs(table, config.low_freq_ratio)
    dims = tuple(sorted(dim for i in low_pairs for dim in table.pairs[i]))
    after_norm = config.placement == "state" and bool(source.norm)
    rows = source.rows_of(dims)
    if after_norm and rows != tuple(head[dim] for head in source.rows for dim in dims):
        raise ValueError(
            f"placement=state cannot be had in layer {layer.path}: {source.norm} orders the heads "
            "otherwise than its projection. Set model.roae.placement to projection."
        )
    return Term(
        layer.path,
        target,
        source.projection,
        rows,
        len(source.rows),
        *widths,
        table=table,
        low_pairs=low_pairs,
        norm=source.norm if after_norm else "",
        norm_layout=source.norm_layout if after_norm else "",
    )


def _plain_rows(
    layer: AttentionGeometry, target: Target, trace: Trace
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Projections of an unrotated target with their rows; no rows stand for all of them."""
    if target == "v" and "v" in layer.sources:
        source = layer.sources["v"]
        yield source.projection, source.rows_of(tuple(range(len(source.rows[0]))))
    elif target == "o" and layer.output:
        yield layer.output, ()
    elif target in ("gate", "up", "down"):
        yield from feed_forward(trace, layer.path).get(target, [])
