"""The charts of a run, drawn with matplotlib: curves, maps over the layers, and selected layers.

Axes: S selections or steps, L layers.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from rosa_lightning.inspection.curves import (
    CURVES,
    UPDATES,
    Chart,
    Run,
    Series,
    layer_charts,
    name_of,
)

STYLE = Path(__file__).with_name("charts.mplstyle")
MAX_LINES = 8
"""Layers up to which each has a line; more are drawn as a map over step and layer."""
PALEST = 0.85
"""How far up viridis lines are coloured; beyond that they are too pale on white."""
# Light to dark, by score; red, green, blue.
ACTIVE = np.array([[158, 202, 225], [8, 81, 156]]) / 255
FROZEN = np.array([[247, 247, 247], [200, 200, 200]]) / 255


def draw_charts(run: Run) -> dict[str, dict[str, bytes]]:
    """SVGs of all charts that the run has numbers for, by section and title."""
    drawn: dict[str, dict[str, bytes]] = {chart.section: {} for chart in CURVES}
    with mpl.rc_context(fname=STYLE):
        for title, figure in (*_selected(run), *_counts(run)):
            drawn[UPDATES][title] = svg(figure)
        for chart in (*layer_charts(run).values(), *CURVES):
            if lines := _lines(chart, run):
                drawn[chart.section][chart.title] = svg(_draw(chart, lines))
    return {section: charts for section, charts in drawn.items() if charts}


def layer_figures(run: Run) -> Iterator[tuple[str, Figure]]:
    """Pictures of the layers over the steps, each with a name for loggers.

    They are the layers that train, the scores, and of each target how far it has moved: relative
    to the frozen weight where that is known.
    """
    with mpl.rc_context(fname=STYLE):
        for _, figure in _selected(run):
            yield "layers_that_train", figure
        maps = layer_charts(run)
        for measure, chart in maps.items():
            kind, _, target = measure.partition("/")
            is_known = kind == "update_norm" and f"relative_update/{target}" in maps
            if not is_known and (lines := _lines(chart, run)):
                name = f"update_of_{target}" if target else "layer_scores"
                yield name, _draw(chart, lines)


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
    # Layers that have not moved yet would make an empty map.
    return found if not chart.layers or any(any(one.values) for one in found.values()) else {}


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
            label=f"layer {int(name)}" if chart.layers else name_of(name),
            marker="o" if few and len(series.steps) <= 50 else None,
            markersize=3.5,
        )
    axes.margins(x=0.02)
    if chart.axis == "share":
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.update_datalim([(next(iter(lines.values())).steps[0], 0)])
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if len(lines) > 1:
        beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(**(beside if len(lines) > 3 else {}))
    return figure


def _draw_map(figure: Figure, axes: Axes, chart: Chart, lines: Mapping[str, Series]) -> None:
    steps, values_SL = _table(lines.values())
    layers = [int(name) for name in lines]
    if len(steps) < 2:  # no more than a stripe
        last = [series.values[-1] for series in lines.values()]
        step = max(series.steps[-1] for series in lines.values())
        _draw_bars(axes, layers, last, f"layer, at step {step}")
        return
    log = chart.log and bool((values_SL > 0).all())
    mesh = axes.pcolormesh(
        steps,
        layers,
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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_bars(axes: Axes, layers: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.bar(layers, values, color="#4a8ac0")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")


def _table(columns: Iterable[Series]) -> tuple[list[int], NDArray[np.float64]]:
    """The steps at which every series has a value, and the values, a row for each of these."""
    held = [dict(zip(series.steps, series.values, strict=True)) for series in columns]
    steps = sorted(set.intersection(*map(set, held)))
    return steps, np.array([[column[step] for column in held] for step in steps])


def _of_layers(run: Run, measure: str) -> dict[int, Series]:
    start = f"layers/{measure}/"
    return {int(t.removeprefix(start)): one for t, one in run.items() if t.startswith(start)}


def _selected(run: Run) -> Iterator[tuple[str, Figure]]:
    """Which layers were selected when."""
    active, scores = _of_layers(run, "active"), _of_layers(run, "score")
    if active and active.keys() == scores.keys():
        steps, values = _table([*active.values(), *scores.values()])
        if steps:
            active_SL, scores_SL = np.split(values, 2, axis=1)
            figure = raster_figure(steps, list(active), active_SL > 0.5, scores_SL)
            yield "Layers that train", figure


def _counts(run: Run) -> Iterator[tuple[str, Figure]]:
    """How often each layer was selected in the whole run."""
    if counts := _of_layers(run, "selections"):
        title = "How often each layer was selected"
        figure, axes = _figure(title, "selections")
        _draw_bars(axes, [*counts], [one.values[-1] for one in counts.values()], "layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        yield title, figure


def svg(figure: Figure, **options: Any) -> bytes:
    """A figure as SVG, with options of `savefig`."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, **options)
    return file.getvalue()
