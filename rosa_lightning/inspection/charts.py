"""The charts of a run, drawn with matplotlib from what it has logged."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rosa_lightning.inspection.history import Series
from rosa_lightning.inspection.raster import draw_raster
from rosa_lightning.roae.layer import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["svg", "png"]
Run = Mapping[str, Series]

STYLE: Any = {
    # Tags are no formulas, whatever signs of money they hold.
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.facecolor": "white",
    # Letters stay letters, and equal runs give equal files.
    "svg.fonttype": "none",
    "svg.hashsalt": "rosa",
}
MANY = 8
"""Layers from which on colours over step and layer are drawn, for lines would hide each other."""


PALEST = 0.85
"""How far up viridis lines are coloured; beyond that they are too pale on white."""


@dataclass(frozen=True)
class Picture:
    """A chart, drawn."""

    section: str
    """What it is about: Training, Layers, RoAE or Cost."""
    name: str
    """Name of its file, without the ending."""
    kind: Kind
    title: str
    content: bytes


@dataclass(frozen=True)
class Chart:
    """Lines over the optimizer steps, one for each tag that matches."""

    name: str
    """Name of its file."""
    title: str
    unit: str
    tags: str
    """Pattern of whole tags. Its group, if it has one, names the line."""
    layers: bool = False
    """Whether the lines are those of layers."""
    marks: bool = False
    """Whether the lines have few points, which are marked."""
    from_zero: bool = False
    """Whether the axis begins at zero."""
    share: bool = False
    """Whether the axis goes from 0 to 1."""


LOSS = Chart("loss", "Loss", "nats per response token", "((?:train|val)/loss)", from_zero=True)
ACCURACY = Chart(
    "accuracy",
    "Accuracy of answers to validation prompts",
    "share",
    "val/(accuracy.*)",
    marks=True,
    share=True,
)
RATE = Chart("learning_rate", "Learning rate", "", "train/lr", from_zero=True)
SCORES = Chart("scores", "Layer scores", "gradient norm", r"dls/score/(\d+)", layers=True)
SAVED = Chart(
    "backward_saved",
    "Layers that the backward pass skips",
    "share of all layers",
    "dls/backward_saved",
    marks=True,
    share=True,
)
COST = (
    Chart("examples", "Examples", "per second", "throughput/examples_per_s", from_zero=True),
    Chart(
        "tokens",
        "Tokens trained on",
        "per second",
        "throughput/((?:supervised_)?tokens)_per_s",
        from_zero=True,
    ),
    Chart("padding", "Padding", "share of the batches", "throughput/padding_share", share=True),
    Chart("mfu", "Model FLOPs utilisation", "share of the peak", "throughput/mfu", share=True),
    Chart("memory", "Peak memory", "MiB", "memory/peak_mib", from_zero=True),
)


def draw_charts(run: Run, kind: Kind) -> list[Picture]:
    """Draw every chart that the run has numbers for; the raster of layers is always a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "a report needs matplotlib, which is missing: pip install 'rosa-lightning[plots]'"
        ) from error

    def drawn(section: str, *charts: Chart) -> Iterator[Picture]:
        for chart in charts:
            if lines := _lines(chart, run):
                content = _save(_draw(chart, lines), kind)
                yield Picture(section, chart.name, kind, chart.title, content)

    with mpl.rc_context(STYLE):
        return [
            *drawn("Training", LOSS, ACCURACY, RATE),
            *_raster(run),
            *_counts(run, kind),
            *drawn("Layers", SCORES, SAVED),
            *drawn("RoAE", *_roae_charts(run)),
            *drawn("Cost", *COST),
        ]


def _roae_charts(run: Run) -> Iterator[Chart]:
    """Two charts for each target there may be."""
    for kind, title, unit in (
        (
            "relative_update",
            "Update of {}, relative to the frozen weight",
            "ratio of Frobenius norms",
        ),
        ("update_norm", "Update of {}", "Frobenius norm"),
    ):
        for target in get_args(Target):
            pattern = rf"roae/{kind}/(\d+)/{target}"
            name = f"{kind}_{target}"
            yield Chart(name, title.format(target), unit, pattern, layers=True, from_zero=True)


def _lines(chart: Chart, run: Run) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for tag, series in run.items():
        match = re.fullmatch(chart.tags, tag)
        # The accuracy on an only task is the accuracy.
        if match and (chart.layers or series not in found.values()):
            found[match[1] if match.groups() else ""] = series
    return found


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, ylabel=unit)
    return figure, axes


def _draw(chart: Chart, lines: Mapping[str, Series]) -> Figure:
    figure, axes = _figure(chart.title, chart.unit)
    if chart.layers and len(lines) > MANY:
        _draw_map(figure, axes, chart, lines)
    else:
        _draw_lines(axes, chart, lines)
    axes.set_xlabel("optimizer step")
    return figure


def _draw_lines(axes: Axes, chart: Chart, lines: Mapping[str, Series]) -> None:
    import matplotlib as mpl

    shades = mpl.colormaps["viridis" if chart.layers else "tab10" if len(lines) <= 10 else "tab20"]
    for index, (name, series) in enumerate(lines.items()):
        few = chart.marks or name.startswith("val/") or len(series.steps) == 1
        axes.plot(
            series.steps,
            series.values,
            color=shades(PALEST * index / max(1, len(lines) - 1) if chart.layers else index),
            label=f"layer {int(name)}" if chart.layers else name,
            marker="o" if few and len(series.steps) <= 50 else None,
            markersize=3.5,
        )
    axes.margins(x=0.02)
    if chart.share:
        axes.set_ylim(-0.02, 1.02)
    elif chart.from_zero:
        axes.update_datalim([(next(iter(lines.values())).steps[0], 0)])
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(**(beside if len(lines) > 3 else {}))


def _draw_map(figure: Figure, axes: Axes, chart: Chart, lines: Mapping[str, Series]) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator

    steps, values_SL = _table(lines.values())
    if not steps:
        return
    log = not chart.from_zero and bool((values_SL > 0).all())
    mesh = axes.pcolormesh(
        steps,
        [int(name) for name in lines],
        values_SL.T,
        norm=LogNorm() if log else Normalize(0),
        shading="nearest",
        rasterized=True,  # a picture within the picture, not a shape for each value
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


def _raster(run: Run) -> Iterator[Picture]:
    """Which layers were active when."""
    active, scores = _by_layer(run, "active"), _by_layer(run, "score")
    if active and active.keys() == scores.keys():
        steps, values = _table([*active.values(), *scores.values()])
        if not steps:
            return
        active_SL, scores_SL = np.split(values, 2, axis=1)
        raster = draw_raster(steps, list(active), active_SL > 0.5, scores_SL)
        file = io.BytesIO()
        Image.fromarray(raster).save(file, "PNG")
        yield Picture("Layers", "active_layers", "png", "Layers that train", file.getvalue())


def _counts(run: Run, kind: Kind) -> Iterator[Picture]:
    """How often each layer was selected: in all, or else as far as the folder tells."""
    from matplotlib.ticker import MaxNLocator

    whole, active = _by_layer(run, "selection_count"), _by_layer(run, "active")
    counts = {layer: series.values[-1] for layer, series in whole.items()}
    counts = counts or {layer: sum(series.values) for layer, series in active.items()}
    if counts:
        title = "How often each layer was selected"
        figure, axes = _figure(title, "selections")
        axes.bar(list(counts), list(counts.values()), color="#4a8ac0")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        yield Picture("Layers", "selection_counts", kind, title, _save(figure, kind))


def _by_layer(run: Run, name: str) -> dict[int, Series]:
    found = {re.fullmatch(rf"dls/{name}/(\d+)", tag): series for tag, series in run.items()}
    return {int(match[1]): series for match, series in found.items() if match}


def _save(figure: Figure, kind: Kind) -> bytes:
    file = io.BytesIO()
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
    figure.savefig(file, format=kind, **options)
    return file.getvalue()
