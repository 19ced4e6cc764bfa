"""Which rows of which projection take a term: what was asked for, against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.roae.geometry import AttentionGeometry, StateRows, read_geometry
from rosa_lightning.roae.layer import RoAEConfig, Target, spans
from rosa_lightning.roae.rope import PairTable
from rosa_lightning.roae.tracing import Leaf, Trace, is_inside

_NO_PAIRS = PairTable(0, (), ())


@dataclass(frozen=True, kw_only=True)
class AdaptedProjection:
    """One low-rank term on some output rows of one projection."""

    name: str
    """Dotted path of the RoAE layer in the adapted model: the projection's own path, or below it
    where a fused projection takes several terms."""
    target: Target
    projection: str
    """Dotted path of the projection in the base, as it is without RoAE."""
    layer: str = ""
    """Dotted path of the decoder layer's attention module."""
    rows: tuple[int, ...] = ()
    """The output rows of the projection that take the term, ascending."""
    num_rows: int = 0
    """All output rows of the projection."""
    in_features: int = 0
    rank: int = 0
    num_heads: int = 1
    table: PairTable = _NO_PAIRS
    """All RoPE pairs of a head in this layer; empty for targets other than q and k."""
    low_pairs: tuple[int, ...] = ()
    """Indices of the adapted pairs in ``table.pairs``."""
    norm: str = ""
    """Dotted path of the norm after which the term is added; empty: right after the projection."""
    norm_layout: str = ""
    """Axes of the norm's output, see `RoAENorm`."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The adapted head dimensions, ascending; none for targets other than q and k."""
        return self.table.dims_of(self.low_pairs)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the term."""
        return self.rank * (self.in_features + len(self.rows))

    @property
    def border(self) -> tuple[float | None, float | None]:
        """Fastest adapted and slowest other frequency, radians per token; None if there is none."""
        low = [self.table.inv_freq[i] for i in self.low_pairs]
        others = [f for i, f in enumerate(self.table.inv_freq) if i not in self.low_pairs]
        return max(low, default=None), min(others, default=None)

    def __str__(self) -> str:
        """One line for people."""
        where = f"{self.name} ({self.target}{', after ' + self.norm if self.norm else ''})"
        if not self.low_pairs:
            return f"{where}: all {len(self.rows)} rows; {self.num_parameters:,} parameters"
        low, other = ("-" if f is None else f"{f:.3g}" for f in self.border)
        return (
            f"{where}: {len(self.low_pairs)} of {len(self.table.pairs)} pairs, dimensions "
            f"{spans(self.dims)} of {self.table.head_dim} in {self.num_heads} heads, up to {low} "
            f"radians a token (next {other}); {self.num_parameters:,} parameters"
        )


def select_projections(
    model: nn.Module,
    config: RoAEConfig,
    *,
    strict: bool = True,
) -> tuple[list[AdaptedProjection], list[str]]:
    """Choose the rows of every term.

    Returns:
        The terms, layer by layer in the order of ``config.targets``, and one line for each target
        that a layer does without. If not ``strict``, targets that no layer has are left out
        instead of refused, and so are other reasons why terms cannot be added.
    """
    layers, trace = read_geometry(model)
    found: list[AdaptedProjection] = []
    notes: list[str] = []
    for layer in layers:
        for target in config.targets:
            terms, reason = _terms(layer, target, config, trace)
            if target in ("gate", "up", "down") and _stacked_experts(model, layer):
                reason = "its routed experts are one parameter of three axes, not projections"
            found += terms
            notes += [f"{layer.path}: no term on {target}: {reason}"] if reason else []
    # A later term on the same projection stands around an earlier one.
    paths = [term.projection for term in found]
    named = [
        replace(term, name=term.projection + ".base" * paths[i + 1 :].count(term.projection))
        for i, term in enumerate(found)
    ]
    if strict:
        _check(model, named, notes, layers, config)
    return named, notes


def _terms(
    layer: AttentionGeometry, target: Target, config: RoAEConfig, trace: Trace
) -> tuple[list[AdaptedProjection], str]:
    """The terms of one target in one layer, or the reason why there is none."""
    found: list[tuple[str, tuple[int, ...]]] = []
    rotation: dict[str, Any] = {}
    if target in layer.sources:
        source = layer.sources[target]
        dims = tuple(range(len(source.rows[0])))
        if target != "v":
            rotation = _rotation(layer, source, config)
            dims = layer.table.dims_of(rotation["low_pairs"])
        found = [(source.projection, source.rows_of(dims))]
    elif target == "o" and layer.output:
        found = [(layer.output, tuple(range(trace.widths[layer.output][1])))]
    elif target in ("gate", "up", "down"):
        found = feed_forward_rows(trace, layer.path).get(target, [])
    terms = [
        AdaptedProjection(
            name="",
            target=target,
            projection=path,
            layer=layer.path,
            rows=rows,
            in_features=trace.widths[path][0],
            num_rows=trace.widths[path][1],
            rank=config.rank,
            **rotation,
        )
        for path, rows in found
    ]
    return terms, "" if terms else layer.notes.get(target, "no projection of that kind was seen")


def _rotation(layer: AttentionGeometry, source: StateRows, config: RoAEConfig) -> dict[str, Any]:
    """The fields of `AdaptedProjection` that only queries and keys have."""
    low_pairs = layer.table.low_frequency_pairs(config.low_freq_ratio)
    dims = layer.table.dims_of(low_pairs)
    found = {"num_heads": len(source.rows), "table": layer.table, "low_pairs": low_pairs}
    if config.placement == "projection" or not source.norm:
        return found
    if source.rows_of(dims) != tuple(head[dim] for head in source.rows for dim in dims):
        raise ValueError(
            f"placement=state cannot be had in layer {layer.path}: {source.norm} orders the heads "
            "otherwise than its projection. Set model.roae.placement to projection."
        )
    return {**found, "norm": source.norm, "norm_layout": source.norm_layout}


def _stacked_experts(model: nn.Module, layer: AttentionGeometry) -> bool:
    """Whether the layer around an attention module holds all experts in one parameter."""
    parts = model.get_submodule(layer_of(layer.path)).named_parameters()
    return any(parameter.ndim == 3 and "weight" not in name for name, parameter in parts)


def _check(
    model: nn.Module,
    terms: Sequence[AdaptedProjection],
    notes: Sequence[str],
    layers: Sequence[AttentionGeometry],
    config: RoAEConfig,
) -> None:
    """Refuse targets and placements that the model has no room for, and shared projections."""
    kind = type(model).__name__
    for target in config.targets:
        if not any(term.target == target for term in terms):
            reason = next(note for note in notes if f"no term on {target}: " in note)
            raise ValueError(
                f"{kind}: {target} can be adapted in no layer; {reason}. Take it out of "
                "model.roae.targets."
            )
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
    wanted: set[object] = set()
    for path in {term.projection for term in terms}:
        module = model.get_submodule(path)
        wanted |= {module, *module.parameters(recurse=False)}
    seen: set[object] = set()
    # A part held under two names of one module, or by two modules, shows once for each.
    for holder in model.modules():
        parts: list[tuple[str, object]] = [
            *(
                (name, module)
                for name, module in holder.named_modules(remove_duplicate=False)
                if name and "." not in name
            ),
            *holder.named_parameters(recurse=False, remove_duplicate=False),
        ]
        for name, part in parts:
            if part in wanted and part in seen:
                raise ValueError(
                    f"{kind}: the {name} of {type(holder).__name__} stands in several places of "
                    "the model, so a term on it would act in all of them."
                )
            seen.add(part)


def layer_of(path: str) -> str:
    """The decoder layer that a module stands in: its path up to the last number."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def feed_forward_rows(trace: Trace, attention: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Projections with their gate, up and down rows, in the layer around an attention module.

    What goes into the activation is the gate; what shares the gate's input and is multiplied with
    it is up; what takes their product back to the layer's width is down. Where nothing is
    multiplied, what goes into the activation is called up. Mixtures of experts show their shared
    experts only: routed ones are one parameter for all experts, or run on some tokens alone.
    """
    layer = layer_of(attention)
    attentions = [call.path for call in trace.attentions]
    leaves = [
        leaf
        for leaf in trace.leaves
        if is_inside(leaf.path, layer) and not any(is_inside(leaf.path, a) for a in attentions)
    ]
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.path.rpartition(".")[0], []).append(leaf)
    activated = [leaf.given for leaf in leaves if _is_activation(leaf)]
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for group in groups.values():
        for target, path, rows in _read_group(group, activated):
            found.setdefault(target, []).append((path, rows))
    return found


def _read_group(
    group: list[Leaf], activated: list[Tensor]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The rows of one feed-forward block; nothing if its activation is no module."""
    projections = {leaf.path: leaf for leaf in group if leaf.is_projection}
    gates = {
        path: rows
        for path, leaf in projections.items()
        if (rows := _activated_rows(leaf.output, activated))
    }
    if len(gates) != 1:
        return
    (path, gate), *_ = gates.items()
    leaf = projections[path]
    others = [other for other in projections.values() if other.path != path]
    ups = [
        (other.path, tuple(range(len(gate))))
        for other in others
        if other.given is leaf.given and other.output.shape[-1] == len(gate)
    ]
    rest = tuple(sorted(set(range(leaf.output.shape[-1])) - set(gate)))
    ups += [(path, rest)] if rest else []
    if len(ups) > 1:
        return
    yield from [("gate", path, gate), ("up", *ups[0])] if ups else [("up", path, gate)]
    for other in others:
        widths = other.given.shape[-1], other.output.shape[-1]
        if widths == (len(gate), leaf.given.shape[-1]) and other.given is not leaf.given:
            yield "down", other.path, tuple(range(widths[1]))


def _is_activation(leaf: Leaf) -> bool:
    """A module without weights that changes its input; dropout at rest does not."""
    return (
        not any(True for _ in leaf.module.parameters())
        and leaf.given.is_floating_point()
        and leaf.output.shape == leaf.given.shape
        and not torch.equal(leaf.output, leaf.given)
    )


def _activated_rows(output: Tensor, activated: list[Tensor]) -> tuple[int, ...]:
    """The rows of a projection's output that are an activation's input: all, or one half."""
    width = output.shape[-1]
    halves = [range(width), range(width // 2), range(width // 2, width)]
    halves += [range(0, width, 2), range(1, width, 2)]
    for rows in halves:
        part = output[..., rows.start : rows.stop : rows.step]
        if any(part.shape == given.shape and torch.equal(part, given) for given in activated):
            return tuple(rows)
    return ()
