"""Which rows of which projection take a term: what was asked for, against what was measured."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.roae.geometry import AttentionGeometry, StateRows, read_geometry
from rosa_lightning.roae.layer import RoAEConfig, Target
from rosa_lightning.roae.rope import PairTable
from rosa_lightning.roae.tracing import Leaf, Trace, is_inside

FEED_FORWARD = ("gate", "up", "down")
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
    adapted_pairs: tuple[int, ...] = ()
    """Indices of the adapted pairs in ``table.pairs``."""
    norm: str = ""
    """Dotted path of the norm after which the term is added; empty: right after the projection."""
    norm_layout: str = ""
    """Axes of the norm's output, see `RoAENorm`."""
    is_before_norm: bool = False
    """A norm follows the term. It divides all dimensions of a head by their common length."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The adapted head dimensions, ascending; none for targets other than q and k."""
        return self.table.dims_of(self.adapted_pairs)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the term."""
        return self.rank * (self.in_features + len(self.rows))

    @property
    def frequencies(self) -> tuple[float, float]:
        """Slowest and fastest of the adapted pairs, radians per token; of q and k alone."""
        adapted = [self.table.inv_freq[i] for i in self.adapted_pairs]
        return min(adapted), max(adapted)


def select_projections(
    model: nn.Module, config: RoAEConfig, *, strict: bool = True
) -> tuple[list[AdaptedProjection], list[str]]:
    """Choose the rows of every term.

    Returns:
        The terms, layer by layer in the order of ``config.targets``, and one line for each target
        that an adapted layer does without. If not ``strict``, targets that no layer has are left
        out instead of refused, and so are other reasons why terms cannot be added.
    """
    layers, trace = read_geometry(model)
    layers = layers[-max(1, round(config.layer_ratio * len(layers))) :]
    found: list[AdaptedProjection] = []
    notes: list[str] = []
    for layer in layers:
        for target in config.targets:
            terms, reason = _terms(model, layer, target, config, trace)
            found += terms
            notes += [f"{layer.path}: no term on {target}: {reason}"] if reason else []
    # A later term on the same projection stands around an earlier one.
    paths = [term.projection for term in found]
    for i, term in enumerate(found):
        around = paths[i + 1 :].count(term.projection)
        found[i] = replace(term, name=term.projection + ".base" * around)
    if strict:
        _check_targets(model, found, notes, config)
        unplaced = next((layer for layer in layers if "state" in layer.notes), None)
        if config.placement == "state" and unplaced is not None:
            raise _no_state(unplaced, unplaced.notes["state"])
        _check_not_shared(model, {term.projection for term in found})
    return found, notes


def _terms(
    model: nn.Module, layer: AttentionGeometry, target: Target, config: RoAEConfig, trace: Trace
) -> tuple[list[AdaptedProjection], str]:
    """The terms of one target in one layer, or the reason why there is none."""
    found: list[tuple[str, Sequence[int]]] = []
    rotation: dict[str, Any] = {}
    if target in layer.sources:
        source = layer.sources[target]
        dims = tuple(range(len(source.rows[0])))
        if target != "v":
            rotation = _rotation(layer, source, config)
            dims = layer.table.dims_of(rotation["adapted_pairs"])
        found = [(source.projection, source.rows_of(dims))]
    elif target == "o" and layer.output:
        found = [(layer.output, range(trace.widths[layer.output][1]))]
    elif target in FEED_FORWARD:
        found = [row[1:] for row in feed_forward_rows(trace, layer.path) if row[0] == target]
    terms = [
        AdaptedProjection(
            name="",
            target=target,
            projection=path,
            layer=layer.path,
            rows=tuple(rows),
            in_features=trace.widths[path][0],
            num_rows=trace.widths[path][1],
            rank=config.rank,
            **rotation,
        )
        for path, rows in found
    ]
    reason = layer.notes.get(target, "no projection of that kind was seen")
    weights = model.get_submodule(layer_of(layer.path)).named_parameters()
    if target in FEED_FORWARD and any(p.ndim == 3 and "weight" not in n for n, p in weights):
        return terms, "its routed experts are one parameter of three axes, not projections"
    return terms, "" if terms else reason


def _rotation(layer: AttentionGeometry, source: StateRows, config: RoAEConfig) -> dict[str, Any]:
    """The fields of `AdaptedProjection` that only queries and keys have."""
    seed = f"{config.dims_seed} {layer.path}"  # the same pairs in q and k
    pairs = layer.table.select_pairs(config.dims, config.low_freq_ratio, seed)
    dims = layer.table.dims_of(pairs)
    found = {"num_heads": len(source.rows), "table": layer.table, "adapted_pairs": pairs}
    if config.placement == "projection" or not source.norm:
        return {**found, "is_before_norm": bool(source.norm)}
    if source.rows_of(dims) != tuple(head[dim] for head in source.rows for dim in dims):
        raise _no_state(layer, f"{source.norm} orders the heads otherwise than its projection")
    return {**found, "norm": source.norm, "norm_layout": source.norm_layout}


def _no_state(layer: AttentionGeometry, reason: str) -> ValueError:
    return ValueError(
        f"placement=state cannot be had in layer {layer.path}: {reason}. Set model.roae.placement "
        "to projection."
    )


def _check_targets(
    model: nn.Module, terms: Sequence[AdaptedProjection], notes: Sequence[str], config: RoAEConfig
) -> None:
    """Refuse targets that no layer has, and a rank above a projection's inputs."""
    kind = type(model).__name__
    for target in config.targets:
        if not any(term.target == target for term in terms):
            reason = next(note for note in notes if f"no term on {target}: " in note)
            raise ValueError(
                f"{kind}: {target} can be adapted in no layer; {reason}. Take it out of "
                "model.roae.targets."
            )
    for term in terms:
        if config.rank > term.in_features:
            raise ValueError(
                f"{kind}: rank={config.rank} is above {term.in_features}, the inputs of "
                f"{term.projection}, and no term needs as much. Lower model.roae.rank."
            )


def _check_not_shared(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a projection, or a weight of one, that several modules hold, or one by two names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = [*modules.items(), *model.named_parameters(remove_duplicate=False)]
    held = {(modules[path.rpartition(".")[0]], path.rpartition(".")[2], p) for path, p in parts}
    counts = Counter(part for *_, part in held)
    for path in paths:
        for name, part in (("", modules[path]), *modules[path].named_parameters(recurse=False)):
            if counts[part] > 1:
                raise ValueError(
                    f"{type(model).__name__}: {f'{path}.{name}'.rstrip('.')} stands in several "
                    "places of the model, so a term on it would act in all of them."
                )


def layer_of(path: str) -> str:
    """The decoder layer that a module stands in: its path up to the last number."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def feed_forward_rows(trace: Trace, attention: str) -> list[tuple[str, str, Sequence[int]]]:
    """Gate, up and down: target, projection and rows, in the layer around an attention module.

    What goes into the activation is the gate; what shares the gate's input and is multiplied with
    it is up; what takes their product back to the layer's width is down. Where nothing is
    multiplied, what goes into the activation is called up. Mixtures of experts show their shared
    experts only: routed ones are one parameter for all experts, or run on some tokens alone.
    """
    layer, outside = layer_of(attention), [call.path for call in trace.attentions]
    inside = [leaf for leaf in trace.leaves if is_inside(leaf.path, layer)]
    leaves = [leaf for leaf in inside if not any(is_inside(leaf.path, path) for path in outside)]
    activated = [leaf.given for leaf in leaves if _is_activation(leaf)]
    blocks: dict[str, dict[str, Leaf]] = {}
    for leaf in leaves:
        if leaf.is_projection:
            blocks.setdefault(leaf.path.rpartition(".")[0], {})[leaf.path] = leaf
    return [row for block in blocks.values() for row in _read_block(block, activated)]


def _read_block(
    block: dict[str, Leaf], activated: list[Tensor]
) -> list[tuple[str, str, Sequence[int]]]:
    """The rows of one feed-forward block; none if its activation is no module."""
    rows = {path: _activated_rows(leaf.output, activated) for path, leaf in block.items()}
    gates = [path for path in block if rows[path]]
    if len(gates) != 1:
        return []
    path, gate = gates[0], rows[gates[0]]
    leaf = block[path]
    others = {name: other for name, other in block.items() if name != path}
    ups: list[tuple[str, Sequence[int]]] = [
        (name, range(len(gate)))
        for name, other in others.items()
        if other.given is leaf.given and other.output.shape[-1] == len(gate)
    ]
    rest = sorted(set(range(leaf.output.shape[-1])) - set(gate))
    ups += [(path, rest)] if rest else []
    if len(ups) > 1:
        return []
    width = leaf.given.shape[-1]
    downs = [
        ("down", name, range(width))
        for name, other in others.items()
        if (other.given.shape[-1], other.output.shape[-1]) == (len(gate), width)
        and other.given is not leaf.given
    ]
    return [("gate", path, gate), ("up", *ups[0]), *downs] if ups else [("up", path, gate), *downs]


def _is_activation(leaf: Leaf) -> bool:
    """A module without weights that changes its input; dropout at rest does not."""
    return (
        not any(True for _ in leaf.module.parameters())
        and leaf.given.is_floating_point()
        and leaf.output.shape == leaf.given.shape
        and not torch.equal(leaf.output, leaf.given)
    )


def _activated_rows(output: Tensor, activated: list[Tensor]) -> range:
    """The rows of a projection's output that are an activation's input: all, or one half."""
    width = output.shape[-1]
    halves = (range(width), range(width // 2), range(width // 2, width))
    for rows in (*halves, range(0, width, 2), range(1, width, 2)):
        part = output[..., rows.start : rows.stop : rows.step]
        if any(part.shape == given.shape and torch.equal(part, given) for given in activated):
            return rows
    return range(0)
