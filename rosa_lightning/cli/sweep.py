"""RoAE tried on every causal language model of the installed `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rosa_lightning.cli.small import build_small, causal_models
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig, spans


@dataclass(frozen=True)
class ModelResult:
    """What became of one causal language model."""

    name: str
    """Class name of its configuration."""
    model: str
    """Class name of the model."""
    outcome: Literal["adapted", "refused", "unbuildable"]
    reason: str = ""
    """Why it was refused or cannot be built here."""
    num_layers: int = 0
    """Attention layers that take a term."""
    num_pairs: int = 0
    """Rotated pairs of a head in the first of them."""
    head_dim: int = 0
    low_dims: tuple[int, ...] = ()
    """The adapted dimensions of a head in the first of them."""
    projections: tuple[str, ...] = ()
    """Names of the adapted projections in the first of them."""
    notes: tuple[str, ...] = ()
    """What layers do without."""


def sweep_models(config: RoAEConfig | None = None) -> list[ModelResult]:
    """Build every causal language model small, and adapt it.

    Args:
        config: What to add; rank 2 on q and k if not given.

    Returns:
        One result a model, in the order of `transformers`.
    """
    config = config or RoAEConfig(rank=2)
    return [try_model(name, config) for name in causal_models()]


_TITLES = {"adapted": "adapted", "refused": "refused", "unbuildable": "not built here"}


def sweep_tables(results: Sequence[ModelResult]) -> Group:
    """What became of every model, for `rich` to print: three tables, and a line of counts."""
    from transformers import __version__

    groups = {title: [r for r in results if r.outcome == o] for o, title in _TITLES.items()}
    adapted, refused, unbuildable = groups.values()
    tables = [_adapted_table(adapted), _reason_table(refused), _reason_table(unbuildable)]
    for table, (title, group) in zip(tables, groups.items(), strict=True):
        table.title = f"{title}: {len(group)}"
    counts = ", ".join(f"{len(group)} {title}" for title, group in groups.items())
    return Group(*tables, f"{len(results)} classes of transformers {__version__}: {counts}")


def _adapted_table(results: Sequence[ModelResult]) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE)
    table.add_column("Model", overflow="fold")
    table.add_column("Layers", justify="right")
    table.add_column("Pairs", justify="right")
    table.add_column("Dimensions")
    table.add_column("Projections")
    for result in results:
        table.add_row(
            result.name.removesuffix("Config"),
            str(result.num_layers),
            str(result.num_pairs),
            f"{spans(result.low_dims)} of {result.head_dim}",
            ", ".join(result.projections),
        )
    return table


def _reason_table(results: Sequence[ModelResult]) -> Table:
    """Models of the same reason share a row."""
    table = Table(title_justify="left", box=box.SIMPLE)
    table.add_column("Models", ratio=2)
    table.add_column("Reason", ratio=3)
    models: dict[str, list[str]] = {}
    for result in results:
        reason = result.reason.removeprefix(result.model).lstrip(": ")
        models.setdefault(reason, []).append(result.name.removesuffix("Config"))
    for reason, names in models.items():
        # As `Text`: brackets in an error are no markup.
        table.add_row(", ".join(names), Text(reason))
    return table


def try_model(name: str, config: RoAEConfig) -> ModelResult:
    """Build one model small by the class name of its configuration, and adapt it."""
    _, model_name = causal_models()[name]
    try:
        model = build_small(name)
    except Exception as error:
        return ModelResult(name, model_name, "unbuildable", _one_line(error))
    try:
        report = inject_roae(model, config)
    except ValueError as error:
        return ModelResult(name, model_name, "refused", _one_line(error))
    first = report.projections[0]
    layers = {projection.layer for projection in report.projections}
    return ModelResult(
        name,
        model_name,
        "adapted",
        num_layers=len(layers),
        num_pairs=len(first.table.pairs),
        head_dim=first.table.head_dim,
        low_dims=first.dims,
        projections=tuple(
            dict.fromkeys(
                projection.projection.removeprefix(f"{first.layer}.")
                for projection in report.projections
                if projection.layer == first.layer
            )
        ),
        notes=report.notes,
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:200]}"
