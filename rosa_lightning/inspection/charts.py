"""The charts of a run, drawn with matplotlib: curves, maps over the layers, and selected layers.

Axes: S selections or steps, L layers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from rosa_lightning.roae.layer import Target

STYLE = Path(__file__).with_name("charts.mplstyle")
MAX_LINES = 8
"""Layers up to which each has a line; more are drawn as a map over step and layer."""
PALEST = 0.85
"""How far up viridis lines are coloured; beyond that they are too pale on white."""
# Light to dark, by score; red, green, blue.
ACTIVE = np.array([[158, 202, 225], [8, 81, 156]]) / 255
FROZEN = np.array([[247, 247, 247], [200, 200, 200]]) / 255


@dataclass(frozen=True)
class Series:
    """The values logged under one tag."""

    steps: tuple[int, ...]
    """Optimizer steps, ascending, each once."""
    values: tuple[float, ...]


Run = Mapping[str, Series]


@dataclass(frozen=True)
class Chart:
    """Lines over the optimizer steps, one for each tag that matches."""

    section: str
    title: str
    unit: str
    tags: str
    """Pattern of whole tags. Its group, if it has one, names the line."""
    axis: str = "free"
    """``free``, ``from zero``, or ``share`` for 0 to 1."""
    layers: bool = False
    """Whether there is a line for each layer."""


UPDATES = {
    "relative_update": ("Update of {}, relative to the frozen weight", "ratio of Frobenius norms"),
    "update_norm": ("Update of {}", "Frobenius norm"),
}
CURVES = (
    Chart("Training", "Loss", "nats per response token", "((?:train|val)/loss)", "from zero"),
    Chart("Training", "Accuracy of validation answers", "share", "(val/accuracy.*)", "share"),
    Chart("Training", "Learning rate", "", "train/lr", "from zero"),
    Chart("Layers", "Layer scores", "gradient norm", r"dls/score/(\d+)", layers=True),
    Chart(
        *("Layers", "Layers that the backward pass skips", "share of all layers"),
        *("dls/backward_saved", "share"),
    ),
    Chart("Layers", "Lowest layer that trains", "layer", "dls/lowest_active", "from zero"),
    Chart("Layers", "Mean share of a full backward pass so far", "", "dls/backward_share", "share"),
    Chart("Cost", "Examples", "per second", "throughput/examples_per_s", "from zero"),
    Chart(
        *("Cost", "Tokens trained on", "per second"),
        *("throughput/((?:supervised_)?tokens)_per_s", "from zero"),
    ),
    Chart("Cost", "Padding", "share of the batches", "throughput/padding_share", "share"),
    Chart("Cost", "Model FLOPs utilisation", "share of the peak", "throughput/mfu", "share"),
    Chart("Cost", "Peak memory", "MiB", "memory/peak_mib", "from zero"),
)


def update_charts(updates: Iterable[tuple[str, str]]) -> list[Chart]:
    """Charts of how far adapters have moved: of each kind (``roae``, ``peft``) and target."""
    names = {"roae": "RoAE", "peft": "PEFT"}
    order = {target: position for position, target in enumerate(get_args(Target))}
    known = sorted(set(updates), key=lambda one: (one[0], order.get(one[1], len(order)), one[1]))
    return [
        Chart(
            *(names[kind], title.format(target), unit),
            *(rf"{kind}/{measure}/(\d+)/{re.escape(target)}", "from zero"),
            layers=True,
        )
        for kind in names
        for measure, (title, unit) in UPDATES.items()
        for own, target in known
        if own == kind
    ]


_SECTIONS = ("Training", "Layers", "RoAE", "PEFT", "Cost")
_UPDATE = re.compile(r"(roae|peft)/update_norm/\d+/(.+)")


def draw_charts(run: Run) -> dict[str, dict[str, bytes]]:
    """SVGs of all charts that the run has numbers for, by section and title."""
    drawn: dict[str, dict[str, bytes]] = {name: {} for name in _SECTIONS}
    updates = [(match[1], match[2]) for tag in run if (match := _UPDATE.fullmatch(tag))]
    with mpl.rc_context(fname=STYLE):
        for title, figure in _selections(run):
            drawn["Layers"][title] = _svg(figure)
        for chart in (*CURVES, *update_charts(updates)):
            if lines := _lines(chart, run):
                drawn.setdefault(chart.section, {})[chart.title] = _svg(_draw(chart, lines))
    return {section: charts for section, charts in drawn.items() if charts}


def raster_figure(
    steps: Sequence[int],
    layers: Sequence[int],
    active_SL: NDArray[np.bool_],
    scores_SL: NDArray[np.float64],
) -> Figure:
    """Which layers were active when: a column for each selection, the lowest layer at the bottom.

    Active layers are blue, others grey, both darker the nearer a layer's score is to the highest
    of its selection.

    Steps are the optimizer's, ascending; layers are numbers, ascending; scores are at least zero.
    """
    with mpl.rc_context(fname=STYLE):
        height = float(np.clip(1.5 + 0.16 * len(layers), 3.1, 7))
        figure = Figure(figsize=(6.2, height), layout="constrained")
        plot = figure.add_subplot()
        plot.imshow(raster_colours(active_SL, scores_SL), aspect="auto", origin="lower")
        plot.set(title="Layers that train", xlabel="optimizer step of the selection")
        plot.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        plot.xaxis.set_major_formatter(_labels(steps))
        plot.set_ylabel("layer")
        plot.yaxis.set_major_locator(MaxNLocator(12, integer=True))
        plot.yaxis.set_major_formatter(_labels(layers))
        plot.grid(visible=False)
        if len(layers) <= 40:  # white lines between layers
            plot.hlines(np.arange(0.5, len(layers) - 1), *plot.get_xlim(), "white", linewidth=0.8)
        kinds = {"active": ACTIVE, "frozen (darker: higher score)": FROZEN}
        handles = [Patch(fc=c.mean(0), ec="#888888", label=label) for label, c in kinds.items()]
        plot.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def raster_colours(
    active_SL: NDArray[np.bool_], scores_SL: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Red, green and blue of each cell, 0 to 1, shape (L, S, 3); what is no score is light."""
    scores_SL = np.nan_to_num(scores_SL, posinf=0.0)
    highest = scores_SL.max(1, keepdims=True)
    share_SL1 = (scores_SL / np.where(highest > 0, highest, 1))[..., None]
    active, frozen = (light + share_SL1 * (dark - light) for light, dark in (ACTIVE, FROZEN))
    mixed: NDArray[np.float64] = np.where(active_SL[..., None], active, frozen)
    return mixed.transpose(1, 0, 2)


def _labels(numbers: Sequence[int]) -> FuncFormatter:
    """Labels an axis of positions with the numbers that stand there."""

    def label(position: float, _: Any) -> str:
        index = round(position)
        return str(numbers[index]) if index == position and 0 <= index < len(numbers) else ""

    return FuncFormatter(label)


def _lines(chart: Chart, run: Run) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for tag, series in run.items():
        match = re.fullmatch(chart.tags, tag)
        # With a single task its accuracy is the accuracy.
        if match and (chart.layers or series not in found.values()):
            found[match[1] if match.groups() else ""] = series
    return found


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, ylabel=unit, xlabel="optimizer step")
    return figure, axes


def _draw(chart: Chart, lines: Mapping[str, Series]) -> Figure:
    figure, axes = _figure(chart.title, chart.unit)
    if chart.layers and len(lines) > MAX_LINES:
        _draw_map(figure, axes, chart, lines)
        return figure
    shades = mpl.colormaps["viridis" if chart.layers else "tab10" if len(lines) <= 10 else "tab20"]
    for index, (name, series) in enumerate(lines.items()):
        few = name.startswith("val/") or len(series.steps) == 1
        axes.plot(
            series.steps,
            series.values,
            color=shades(PALEST * index / max(1, len(lines) - 1) if chart.layers else index),
            label=f"layer {int(name)}" if chart.layers else name,
            marker="o" if few and len(series.steps) <= 50 else None,
            markersize=3.5,
        )
    axes.margins(x=0.02)
    if chart.axis == "share":
        axes.set_ylim(-0.02, 1.02)
    elif chart.axis == "from zero":
        axes.update_datalim([(next(iter(lines.values())).steps[0], 0)])
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(**(beside if len(lines) > 3 else {}))
    return figure


def _draw_map(figure: Figure, axes: Axes, chart: Chart, lines: Mapping[str, Series]) -> None:
    steps, values_SL = _table(lines.values())
    if not steps:
        return
    log = chart.axis == "free" and bool((values_SL > 0).all())
    mesh = axes.pcolormesh(
        steps,
        [int(name) for name in lines],
        values_SL.T,
        norm=LogNorm() if log else Normalize(0),
        shading="nearest",
        rasterized=True,  # not a shape for each value
    )
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    ticks = LogLocator(subs=(1, 2, 5)) if log else None
    # The usual labels of a logarithmic axis are formulas.
    bar = figure.colorbar(mesh, ax=axes, label=chart.unit, aspect=30, ticks=ticks, format="%g")
    bar.minorticks_off()


def _table(columns: Iterable[Series]) -> tuple[list[int], NDArray[np.float64]]:
    """The steps at which every series has a value, and the values, a row for each of these."""
    held = [dict(zip(series.steps, series.values, strict=True)) for series in columns]
    steps = sorted(set.intersection(*map(set, held)))
    return steps, np.array([[column[step] for column in held] for step in steps])


def _selections(run: Run) -> Iterator[tuple[str, Figure]]:
    """Which layers were selected when, and how often."""
    active, scores, counts = (
        {
            int(tag.rpartition("/")[2]): series
            for tag, series in run.items()
            if re.fullmatch(rf"dls/{name}/\d+", tag)
        }
        for name in ("active", "score", "selection_count")
    )
    if active and active.keys() == scores.keys():
        steps, values = _table([*active.values(), *scores.values()])
        if steps:
            active_SL, scores_SL = np.split(values, 2, axis=1)
            figure = raster_figure(steps, list(active), active_SL > 0.5, scores_SL)
            yield "Layers that train", figure
    # In the whole run, if it logged that; else as far as the folder tells.
    totals = {layer: series.values[-1] for layer, series in counts.items()}
    totals = totals or {layer: sum(series.values) for layer, series in active.items()}
    if totals:
        title = "How often each layer was selected"
        figure, axes = _figure(title, "selections")
        axes.bar(list(totals), list(totals.values()), color="#4a8ac0")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        yield title, figure


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
