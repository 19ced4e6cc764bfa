"""What RoAE adapts in each layer of a model, and what a training step takes: tables to print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from rosa_lightning.dls.layers import find_layers
from rosa_lightning.dls.selector import SelectionConfig
from rosa_lightning.inspection.memory import MemoryEstimate, estimate_memory, readable_size
from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import spans
from rosa_lightning.roae.targets import AdaptedProjection
from rosa_lightning.utils.tables import note, text_table

_HALF = SelectionConfig()


@dataclass(frozen=True)
class LayerSummary:
    """What layers that are alike have in common; paths are those inside the layer."""

    stack: str
    """Dotted path of the list of layers."""
    terms: tuple[AdaptedProjection, ...]
    projection_sizes: tuple[int, ...]
    """Parameters of each term's projection, with all terms on it."""
    notes: tuple[str, ...]
    """What the layer does without, and why."""
    trainable: int
    total: int


def summarize(model: nn.Module) -> dict[LayerSummary, list[int]]:
    """The kinds of layers of a model with RoAE, and the indices of the layers of each.

    Raises:
        ValueError: The model carries no RoAE.
    """
    report = roae_report(model)
    kinds: dict[LayerSummary, list[int]] = {}
    for stack in dict.fromkeys(_stack(term.layer) for term in report.projections):
        for index, (name, block) in enumerate(model.get_submodule(stack).named_children()):
            inside = f"{stack}.{name}."
            terms = [p for p in report.projections if f"{p.layer}.".startswith(inside)]
            kind = LayerSummary(
                stack=stack,
                terms=tuple(_inside(term, inside) for term in terms),
                projection_sizes=tuple(
                    _count(model.get_submodule(term.projection)) for term in terms
                ),
                notes=tuple(n.replace(inside, "") for n in report.notes if n.startswith(inside)),
                trainable=sum(term.num_parameters for term in terms),
                total=_count(block),
            )
            kinds.setdefault(kind, []).append(index)
    return kinds


def _stack(path: str) -> str:
    """The list of layers that a module stands in."""
    return re.split(r"\.\d+(?:\.|$)", path, maxsplit=1)[0]


def _inside(term: AdaptedProjection, prefix: str) -> AdaptedProjection:
    paths = ("name", "projection", "layer", "norm")
    return replace(term, **{name: getattr(term, name).removeprefix(prefix) for name in paths})


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_tables(model: nn.Module) -> Group:
    """What RoAE adapts in each layer, for `rich` to print; layers that are alike share a table."""
    kinds, report = summarize(model), roae_report(model)
    parts: list[RenderableType] = []
    for kind, indices in kinds.items():
        parts += [*_describe(kind, indices), ""]
    table = _parameter_table(type(model).__name__)
    inside = sum(kind.total * len(indices) for kind, indices in kinds.items())
    num_layers = sum(map(len, kinds.values()))
    table.add_row(f"{num_layers} layers", *_cells(report.num_trainable, inside))
    table.add_row("other parts", *_cells(0, report.num_total - inside))
    table.add_row("model", *_cells(report.num_trainable, report.num_total), style="bold")
    return Group(*parts, table)


def _describe(kind: LayerSummary, indices: Sequence[int]) -> Iterable[RenderableType]:
    title = f"{kind.stack} {spans(indices)}"
    if not kind.terms:
        title += f": no term, as no attention is rotated; {kind.total:,} parameters a layer"
    yield Text(title, style="bold")
    if kind.terms:
        table = _parameter_table("Target", "Projection", "Heads")
        for term, total in zip(kind.terms, kind.projection_sizes, strict=True):
            heads = str(term.num_heads) if term.dims else ""
            cells = _cells(term.num_parameters, total)
            table.add_row(term.target, term.projection, heads, *cells)
        # The projections above are parts of it, so their totals do not add up to it.
        table.add_row("", "one layer", "", *_cells(kind.trainable, kind.total), style="bold")
        yield table
    lines: dict[str, list[str]] = {}
    for term in kind.terms:
        if term.dims:
            after = f" (after {term.norm})" if term.norm else ""
            lines.setdefault(_rotation(term), []).append(term.target + after)
    yield from (note(f"{_join(targets)}: {rotation}") for rotation, targets in lines.items())
    reasons: dict[str, list[str]] = {}
    for text in kind.notes:
        _, target, reason = re.split(": (?:no term on )?", text, maxsplit=2)
        reasons.setdefault(reason, []).append(target)
    yield from (note(f"no term on {_join(t)}: {reason}") for reason, t in reasons.items())


def _rotation(term: AdaptedProjection) -> str:
    """The adapted pairs and their frequencies."""
    slowest, (fastest, other) = min(term.table.inv_freq), term.border
    border = "" if other is None else f", next {other:.2g}"
    both = dict.fromkeys([f"{slowest:.2g}", f"{fastest:.2g}"])
    return (
        f"{len(term.low_pairs)} of {len(term.table.pairs)} pairs, dimensions {spans(term.dims)} of "
        f"{term.table.head_dim}; {' to '.join(both)} radians a token{border}"
    )


def _join(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _parameter_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "Heads" else "left")
    for column in ("Trainable", "Total", "%"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(trainable: int, total: int) -> tuple[str, str, str]:
    return f"{trainable:,}", f"{total:,}", f"{100 * trainable / max(total, 1):.2f}"


def compare_memory(
    model: nn.Module, *, selection: SelectionConfig | None = _HALF, **step: Any
) -> dict[str, MemoryEstimate | str]:
    """What Dynamic Layer Selection saves: estimates of three kinds of training step.

    Args:
        model: As for `estimate_memory`.
        selection: How layers are selected; None selects nothing. The highest num_active layers, or
            those of policy fixed, train in the second kind of step: the most that selection can
            save. The last kind, in which it selects, comes once an interval and takes the memory
            of all layers again.
        step: The other arguments of `estimate_memory`.

    Returns:
        An estimate for each kind of step, or the reason why there is none.
    """
    kinds: dict[str, dict[str, Any]] = {"all layers": {}}
    estimates: dict[str, MemoryEstimate | str] = {}
    try:
        if selection is not None:
            layers = [layer.index for layer in find_layers(model)]
            count, _, fixed = selection.resolve(layers)
            active = [layers[index] for index in fixed] or layers[-count:]
            kind = f"{'fixed ' * bool(fixed)}layer{'s' * (len(active) > 1)} {spans(active)}"
            kinds |= {kind: {"active_layers": active}}
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
    table = text_table(None, "Memory of a step", *found)
    rows: dict[str, list[str]] = {}
    for estimate in found.values():
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
