"""What RoAE adapts in a model and what a training step takes, as data and as tables to print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from rosa_lightning.dls.layers import find_layers
from rosa_lightning.dls.policies import resolve_num_active
from rosa_lightning.inspection.memory import MemoryEstimate, estimate_memory, readable_size
from rosa_lightning.roae.inject import is_adapter_key, roae_report
from rosa_lightning.roae.layer import spans
from rosa_lightning.roae.targets import AdaptedProjection


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One decoder layer."""

    stack: str
    """Dotted path of the list of layers."""
    index: int
    """Position in that list."""
    terms: tuple[AdaptedProjection, ...]
    """Their paths are those inside the layer, so that layers that are alike have equal terms."""
    projection_sizes: tuple[int, ...]
    """Parameters of each term's projection, with all terms on it."""
    notes: tuple[str, ...]
    """What the layer does without, and why."""
    trainable: int
    total: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for layers that differ in nothing but their position."""
        return self.stack, self.terms, self.notes, self.trainable, self.total


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model with RoAE, layer by layer."""

    model: str
    """Class name."""
    layers: tuple[LayerSummary, ...]
    trainable: int
    total: int


def summarize(model: nn.Module) -> ModelSummary:
    """What was adapted in each layer of a model, with its weights or on the meta device.

    Raises:
        ValueError: The model carries no RoAE.
    """
    report = roae_report(model)
    stacks = dict.fromkeys(_place(projection.layer)[0] for projection in report.projections)
    layers = []
    for stack in stacks:
        for index, (name, block) in enumerate(model.get_submodule(stack).named_children()):
            inside = f"{stack}.{name}."
            terms = [p for p in report.projections if f"{p.layer}.".startswith(inside)]
            # Notes name their layer in front, and projections further on.
            notes = [n.replace(inside, "") for n in report.notes if n.startswith(inside)]
            layers.append(
                LayerSummary(
                    stack=stack,
                    index=index,
                    terms=tuple(_inside(term, inside) for term in terms),
                    projection_sizes=tuple(
                        _count(model.get_submodule(term.projection)) for term in terms
                    ),
                    notes=tuple(notes),
                    trainable=_count(block, adapters=True),
                    total=_count(block),
                )
            )
    return ModelSummary(
        model=type(model).__name__,
        layers=tuple(layers),
        trainable=report.num_trainable,
        total=report.num_total,
    )


def _place(path: str) -> tuple[str, str]:
    """The list of layers that a module stands in, and its layer's name there."""
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:number]), parts[number]


def _inside(term: AdaptedProjection, prefix: str) -> AdaptedProjection:
    paths = ("name", "projection", "layer", "norm")
    return replace(term, **{name: getattr(term, name).removeprefix(prefix) for name in paths})


def _rotation(term: AdaptedProjection) -> str:
    """The adapted pairs and their frequencies, for people."""
    slowest, (fastest, other) = min(term.table.inv_freq), term.border
    border = "" if other is None else f", next {other:.2g}"
    both = dict.fromkeys([f"{slowest:.2g}", f"{fastest:.2g}"])
    return (
        f"{len(term.low_pairs)} of {len(term.table.pairs)} pairs, dimensions {spans(term.dims)} of "
        f"{term.table.head_dim}; {' to '.join(both)} radians a token{border}"
    )


def _count(module: nn.Module, adapters: bool = False) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if is_adapter_key(name) or not adapters)


def summary_tables(summary: ModelSummary) -> Group:
    """The summary for `rich` to print, layers that are alike taken together."""
    kinds: dict[tuple[Any, ...], list[LayerSummary]] = {}
    for layer in summary.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    parts: list[RenderableType] = []
    for layers in kinds.values():
        parts += [*_describe_kind(layers), ""]
    return Group(*parts, _totals(summary))


def _describe_kind(layers: Sequence[LayerSummary]) -> Iterable[RenderableType]:
    first = layers[0]
    title = f"{first.stack} {spans([layer.index for layer in layers])}"
    if not first.terms:
        title += f": no term, as no attention is rotated; {first.total:,} parameters a layer"
    yield Text(title, style="bold")
    if first.terms:
        yield _term_table(first)
    by_rotation: dict[str, list[str]] = {}
    for term in first.terms:
        if term.dims:
            after = f" (after {term.norm})" if term.norm else ""
            by_rotation.setdefault(_rotation(term), []).append(term.target + after)
    for rotation, targets in by_rotation.items():
        yield _indented(f"{', '.join(dict.fromkeys(targets))}: {rotation}")
    by_reason: dict[str, list[str]] = {}
    for note in first.notes:
        _, target, reason = re.split(": (?:no term on )?", note, maxsplit=2)
        by_reason.setdefault(reason, []).append(target)
    for reason, targets in by_reason.items():
        yield _indented(f"no term on {', '.join(targets)}: {reason}")


def _term_table(layer: LayerSummary) -> Table:
    table = _parameter_table("Target", "Projection", "Heads")
    for term, total in zip(layer.terms, layer.projection_sizes, strict=True):
        heads = str(term.num_heads) if term.dims else ""
        table.add_row(term.target, term.projection, heads, *_counts(term.num_parameters, total))
    # The projections above are parts of it, so their totals do not add up to it.
    table.add_row("", "one layer", "", *_counts(layer.trainable, layer.total), style="bold")
    return table


def _indented(text: str) -> Padding:
    return Padding(Text(text), (0, 0, 0, 1))


def _totals(summary: ModelSummary) -> Table:
    table = _parameter_table(summary.model)
    inside = sum(layer.total for layer in summary.layers)
    table.add_row(f"{len(summary.layers)} layers", *_counts(summary.trainable, inside))
    table.add_row("other parts", *_counts(0, summary.total - inside))
    table.add_row("model", *_counts(summary.trainable, summary.total), style="bold")
    return table


def _parameter_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Any = "right" if column == "Heads" else "left"
        table.add_column(column, overflow="fold", justify=justify)
    for column in ("Trainable", "Total", "%"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _counts(trainable: int, total: int) -> tuple[str, str, str]:
    return f"{trainable:,}", f"{total:,}", f"{100 * trainable / max(total, 1):.2f}"


def compare_memory(
    model: nn.Module, *, num_active: int | float = 0.5, **step: Any
) -> dict[str, MemoryEstimate | str]:
    """What Dynamic Layer Selection saves: estimates of three kinds of training step.

    Args:
        model: As for `estimate_memory`.
        num_active: Layers that train at a time, a count or a share; the highest ones here, which
            is the most that selection can save. The last kind of step, in which it selects, comes
            once an interval and takes the memory of all layers again.
        step: The other arguments of `estimate_memory`.

    Returns:
        An estimate for each kind of step, or the reason why there is none.
    """
    kinds: dict[str, dict[str, Any]] = {"all layers": {}}
    estimates: dict[str, MemoryEstimate | str] = {}
    try:
        positions = [layer.index for layer in find_layers(model)]
        active = positions[-resolve_num_active(num_active, len(positions)) :]
        word = "layers" if len(active) > 1 else "layer"
        kinds |= {f"{word} {spans(active)}": {"active_layers": active}}
        kinds |= {"selecting": {"scoring": True}}
    except ValueError as error:
        estimates["selecting"] = str(error)
    for kind, arguments in kinds.items():
        try:
            estimates[kind] = estimate_memory(model, **step, **arguments)
        except ValueError as error:
            estimates[kind] = str(error)
    return estimates


def memory_table(estimates: Mapping[str, MemoryEstimate | str]) -> Group:
    """Estimates side by side, for `rich` to print; below, why one is missing."""
    found = {kind: one for kind, one in estimates.items() if isinstance(one, MemoryEstimate)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Memory of a step")
    rows: dict[str, list[str]] = {}
    for kind, estimate in found.items():
        table.add_column(kind, justify="right")
        sizes = {f"weights, {dtype}": size for dtype, size in estimate.base.items()}
        names = ("adapter", "gradients", "optimizer", "activations", "logits", "peak")
        for name, size in {**sizes, **{name: getattr(estimate, name) for name in names}}.items():
            rows.setdefault(name, []).append(readable_size(size))
    for name, cells in rows.items():
        table.add_row(name, *cells, style="bold" if name == "peak" else None)
    missing: dict[str, list[str]] = {}
    for kind, reason in estimates.items():
        if isinstance(reason, str):
            missing.setdefault(reason, []).append(kind)
    lines = [Text(f"{', '.join(kinds)}: {reason}") for reason, kinds in missing.items()]
    return Group(*([table] if found else []), *lines)
