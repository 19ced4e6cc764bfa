"""The figures of a comparison: validation loss against cost, and by learning rate."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rosa_lightning.comparison.plan import finished, mean_losses
from rosa_lightning.inspection.charts import STYLE, svg

Content = Mapping[str, Any]
_LABEL_INCHES = 0.17
"""Height of a label at the side of a figure."""
_ALIKE = 1.02
"""Ratio of the largest to the smallest cost up to which a figure of it says nothing."""
_WIDE = 20
"""Ratio of values from which on an axis is logarithmic."""


def figures(content: Content) -> dict[str, str]:
    """SVGs in base64, by what they show."""
    with mpl.rc_context(fname=STYLE):
        drawn = {
            "Validation loss against training time": _pareto(
                content, "train_seconds", "training time, seconds"
            ),
            "Validation loss against trainable parameters": _pareto(
                content, "trainable_parameters", "trainable parameters", may_be_alike=False
            ),
            "Validation loss by learning rate, first seed": _grid(content),
        }
        found = {title: svg(one, bbox_inches="tight") for title, one in drawn.items() if one}
        return {title: base64.b64encode(drawing).decode() for title, drawing in found.items()}


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is better than in both coordinates; lower is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def spread_out(places: Sequence[float], least: float) -> list[float]:
    """Places between 0 and 1 that lie at least so far apart, in the same order, near those given.

    Where they do not fit they are spread evenly.
    """
    if len(places) * least >= 1:
        return [(index + 0.5) / len(places) for index in range(len(places))]
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + least) if found else max(place, least / 2))
    ceiling = 1 - least / 2
    for index in reversed(range(len(found))):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - least
    return found


def _pareto(content: Content, key: str, label: str, *, may_be_alike: bool = True) -> Figure | None:
    points = {
        name: (mean(run[key] for run in finished(content["methods"][name])), loss)
        for name, loss in mean_losses(content).items()
    }
    costs = [x for x, _ in points.values()]
    if not points or (not may_be_alike and max(costs) <= _ALIKE * min(costs)):
        return None
    figure, plot = _figure(label, len(points))
    front = pareto_front(points.values())
    plot.step(*zip(*front, strict=True), where="post", color="#bbbbbb", zorder=1)
    for number, (name, point) in enumerate(points.items()):
        plot.scatter(*zip(point, strict=True), s=28, zorder=2, color=_colour(content, name, number))
    if max(costs) > _WIDE * min(costs) > 0:
        plot.set_xscale("log")
        plot.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:,.0f}"))
    _label(content, plot, points)
    return figure


def _grid(content: Content) -> Figure | None:
    tried = {}
    for name, method in content["methods"].items():
        losses = [(run["learning_rate"], run["val_loss"]) for run in method["grid"]]
        if len(sound := [(rate, loss) for rate, loss in losses if loss is not None]) > 1:
            tried[name] = sound
    if not tried:
        return None
    figure, plot = _figure("learning rate", len(tried))
    for number, (name, points) in enumerate(tried.items()):
        colour = _colour(content, name, number)
        plot.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
    plot.set_xscale("log")
    rates = sorted({rate for points in tried.values() for rate, _ in points})
    plot.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    plot.minorticks_off()
    losses = [loss for points in tried.values() for _, loss in points]
    if max(losses) > 3 * min(losses):
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    _label(content, plot, {name: points[-1] for name, points in tried.items()})
    return figure


def _colour(content: Content, name: str, number: int) -> Any:
    """A method's colour: black for the reference."""
    return "black" if name == content["reference"] else mpl.colormaps["tab20"](number % 20)


def _label(content: Content, plot: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Name points at the right side, in their order, with a line to each."""
    plot.figure.draw_without_rendering()  # which sets the limits
    to_axes = (plot.transData + plot.transAxes.inverted()).transform
    heights = {name: float(to_axes(point)[1]) for name, point in points.items()}
    order = sorted(points, key=lambda name: heights[name])
    height = plot.get_window_extent().height / plot.figure.dpi
    places = spread_out([heights[name] for name in order], _LABEL_INCHES / height)
    numbers = {name: number for number, name in enumerate(points)}
    for name, place in zip(order, places, strict=True):
        colour = _colour(content, name, numbers[name])
        plot.annotate(
            name,
            points[name],
            xytext=(1.04, place),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=8,
            fontweight="bold" if name == content["reference"] else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
            | {"shrinkA": 0, "shrinkB": 3},
        )


def _figure(label: str, num_labels: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, max(4.0, 0.9 + num_labels * 1.15 * _LABEL_INCHES)))
    figure.set_layout_engine("constrained")
    plot = figure.add_subplot()
    plot.set(xlabel=label, ylabel="validation loss, nats per response token")
    return figure, plot
