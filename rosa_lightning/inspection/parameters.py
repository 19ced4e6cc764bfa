"""What trains in each layer of a model, and what a training step takes: tables to print."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from rosa_lightning.adapters.methods import (
    MethodReport,
    adapted_module,
    method_report,
    trained_otherwise,
)
from rosa_lightning.dls.layers import find_layers, outermost_lists
from rosa_lightning.dls.selector import SelectionConfig
from rosa_lightning.inspection.memory import MemoryEstimate, estimate_memory, readable_size
from rosa_lightning.roae.inject import RoAEReport, roae_layers, roae_report
from rosa_lightning.roae.layer import spans
from rosa_lightning.roae.targets import AdaptedProjection
from rosa_lightning.utils.tables import note, text_table

_HALF = SelectionConfig()
_NUMBERS = ("Trainable", "Total", "%")


@dataclass(frozen=True)
class LayerSummary:
    """What layers that are alike have in common; paths are those inside the layer."""

    stack: str
    """Dotted path of the list of layers."""
    projections: tuple[AdaptedProjection, ...]
    projection_sizes: tuple[int, ...]
    """Parameters of each projection, with all that is added to it."""
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
    lists = outermost_lists(model, lambda stack: any(True for _ in roae_layers(stack)))
    kinds: dict[LayerSummary, list[int]] = {}
    for stack, layers in lists.items():
        for index, layer in enumerate(layers):
            inside = f"{stack}.{index}."
            own = [p for p in report.projections if f"{p.layer}.".startswith(inside)]
            kind = LayerSummary(
                stack=stack,
                projections=tuple(_inside(projection, inside) for projection in own),
                projection_sizes=tuple(_count(model.get_submodule(p.projection)) for p in own),
                notes=tuple(n.replace(inside, "") for n in report.notes if n.startswith(inside)),
                trainable=sum(projection.num_parameters for projection in own),
                total=_count(layer),
            )
            kinds.setdefault(kind, []).append(index)
    return kinds


def _inside(projection: AdaptedProjection, prefix: str) -> AdaptedProjection:
    paths = ("name", "projection", "layer", "norm")
    return replace(
        projection, **{name: getattr(projection, name).removeprefix(prefix) for name in paths}
    )


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def parameter_tables(model: nn.Module) -> Group:
    """What trains in each layer, for `rich` to print; layers that are alike share a table.

    Raises:
        ValueError: No method was put on the model.
    """
    if trained_otherwise(model) is not None:
        return _module_tables(model)
    kinds, report = summarize(model), roae_report(model)
    parts: list[RenderableType] = []
    for kind, indices in kinds.items():
        parts += [*_describe(kind, indices), ""]
    return Group(*parts, _model_table(model, kinds, report))


def _model_table(
    model: nn.Module, kinds: Mapping[Any, list[int]], report: RoAEReport | MethodReport
) -> Table:
    """The whole model, from its kinds of layers."""
    table = text_table(None, type(model).__name__, *_NUMBERS)
    total = sum(kind.total * len(indices) for kind, indices in kinds.items())
    trainable = sum(kind.trainable * len(indices) for kind, indices in kinds.items())
    table.add_row(f"{sum(map(len, kinds.values()))} layers", *_cells(trainable, total))
    rest = report.num_trainable - trainable, report.num_total - total
    table.add_row("other parts", *_cells(*rest))
    table.add_row("model", *_cells(report.num_trainable, report.num_total), style="bold")
    return table


@dataclass(frozen=True)
class ModuleSummary:
    """What layers that are alike have in common, where something other than RoAE trains."""

    stack: str
    """Dotted path of the list of layers."""
    modules: tuple[tuple[str, int, int], ...]
    """Path inside the layer, trainable and all parameters of each module in which some train."""
    trainable: int
    total: int


def _module_tables(model: nn.Module) -> Group:
    """The modules of each kind of layers in which something trains."""
    lists = outermost_lists(model, lambda stack: _count(stack, trained=True) > 0)
    kinds: dict[ModuleSummary, list[int]] = {}
    for stack, layers in lists.items():
        for index, layer in enumerate(layers):
            trained = [name for name, p in layer.named_parameters() if p.requires_grad]
            modules = tuple(
                (path, _count(module := layer.get_submodule(path), trained=True), _count(module))
                for path in dict.fromkeys(map(adapted_module, trained))
            )
            kind = ModuleSummary(stack, modules, _count(layer, trained=True), _count(layer))
            kinds.setdefault(kind, []).append(index)
    parts: list[RenderableType] = []
    for kind, indices in kinds.items():
        title = f"{kind.stack} {spans(indices)}"
        if not kind.modules:
            parts += [Text(f"{title}: nothing trains; {kind.total:,} parameters a layer"), ""]
            continue
        table = text_table(None, "Module", *_NUMBERS)
        for path, *numbers in kind.modules:
            table.add_row(path, *_cells(*numbers))
        table.add_row("one layer", *_cells(kind.trainable, kind.total), style="bold")
        parts += [Text(title, style="bold"), table, ""]
    return Group(*parts, _model_table(model, kinds, method_report(model)))


def _describe(kind: LayerSummary, indices: Sequence[int]) -> Iterable[RenderableType]:
    title = f"{kind.stack} {spans(indices)}"
    if not kind.projections:
        title += f": no term, as no attention is rotated; {kind.total:,} parameters a layer"
    yield Text(title, style="bold")
    rotations: dict[str, list[str]] = {}
    if kind.projections:
        table = text_table(None, "Target", "Projection", "Heads", *_NUMBERS, names=2)
        for projection, total in zip(kind.projections, kind.projection_sizes, strict=True):
            heads = str(projection.num_heads) if projection.dims else ""
            cells = _cells(projection.num_parameters, total)
            table.add_row(projection.target, projection.projection, heads, *cells)
            if projection.dims:
                after = f" (after {projection.norm})" if projection.norm else ""
                targets = rotations.setdefault(_rotation(projection), [])
                targets.append(projection.target + after)
        # The projections above are parts of it, so their totals do not add up to it.
        table.add_row("", "one layer", "", *_cells(kind.trainable, kind.total), style="bold")
        yield table
    yield from (note(f"{_join(targets)}: {rotation}") for rotation, targets in rotations.items())
    reasons: dict[str, list[str]] = {}
    for text in kind.notes:
        _, target, reason = re.split(": (?:no term on )?", text, maxsplit=2)
        reasons.setdefault(reason, []).append(target)
    yield from (note(f"no term on {_join(t)}: {reason}") for reason, t in reasons.items())


def _rotation(projection: AdaptedProjection) -> str:
    """The adapted pairs and their frequencies."""
    table = projection.table
    turns = sorted(2 * math.pi / f if f else math.inf for f in projection.frequencies)
    both = dict.fromkeys(f"{tokens:,.0f}" if tokens < 1e6 else f"{tokens:.2g}" for tokens in turns)
    return (
        f"{len(projection.adapted_pairs)} of {len(table.pairs)} RoPE pairs, dimensions "
        f"{spans(projection.dims)} of {table.head_dim}, which turn once in {' to '.join(both)} "
        "tokens"
    )


def _join(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _cells(trainable: int, total: int) -> tuple[str, str, str]:
    return f"{trainable:,}", f"{total:,}", f"{100 * trainable / max(total, 1):.2f}"


def compare_memory(
    model: nn.Module, *, selection: SelectionConfig | None = _HALF, **step: Any
) -> dict[str, MemoryEstimate | str]:
    """What Dynamic Layer Selection saves: an estimate, or why there is none, by kind of step.

    Args:
        model: As for `estimate_memory`.
        selection: How layers are selected; None selects nothing. The highest num_active layers, or
            those of policy fixed, train in the second kind of step: the most that selection can
            save. The last kind, in which it selects, comes once an interval and takes the memory
            of all layers again.
        step: The other arguments of `estimate_memory`.
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
            name = "trained weights" if name == "adapter" else name
            rows.setdefault(name, []).append(readable_size(size))
    for name, cells in rows.items():
        table.add_row(name, *cells, style="bold" if name == "peak" else None)
    missing: dict[str, list[str]] = {}
    for kind, reason in estimates.items():
        if isinstance(reason, str):
            missing.setdefault(reason, []).append(kind)
    lines = [Text(f"{', '.join(kinds)}: {reason}") for reason, kinds in missing.items()]
    return Group(*([table] if found else []), *lines)
