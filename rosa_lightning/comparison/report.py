"""A comparison as a table for the terminal and as one HTML page with figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from rosa_lightning.comparison.statistics import spread
from rosa_lightning.inspection.charts import STYLE
from rosa_lightning.utils.files import atomic_write
from rosa_lightning.utils.tables import text_table

Content = Mapping[str, Any]
"""Of ``comparison.json``."""
_COLUMNS = (
    *("Trainable", "Rate", "Val. loss", "against reference", "p (Holm)"),
    *("Seconds", "Examples/s", "Peak MiB", "Backward"),
)


def finished(method: Content) -> list[dict[str, Any]]:
    """The runs of a method, one for each seed, that came to their end."""
    return [run for run in method["runs"] if run["status"] == "finished"]


def table_rows(content: Content) -> list[list[str]]:
    """A row of text for each method, the best validation loss first; failed ones last."""
    methods = content["methods"]

    def loss(name: str) -> float:
        losses = [run["val_loss"] for run in finished(methods[name])]
        return mean(losses) if losses else float("inf")

    return [[name, *_cells(content, name)] for name in sorted(methods, key=loss)]


def _cells(content: Content, name: str) -> list[str]:
    method, runs = content["methods"][name], finished(content["methods"][name])
    if not runs:
        failed = [*method["grid"], *method["runs"]]
        reasons = [run.get("error") or run["status"] for run in failed]
        known = [f"{method['trainable_parameters']:,}", "", (reasons or ["not run yet"])[-1]]
        return known + [""] * (len(_COLUMNS) - len(known))
    rate = f"{method['learning_rate']:.3g}" + (" (edge)" if method["at_edge"] else "")
    losses = [run["val_loss"] for run in runs]
    shown = f"{mean(losses):.4f}" + (f" ± {spread(losses):.4f}" if len(losses) > 1 else "")
    test = next(
        (t for t in content["tests"] if t["method"] == name and t["metric"] == "val_loss"), None
    )
    against = "reference" if name == content["reference"] else ""
    if test is not None:
        against = f"{test['mean']:+.4f} ({test['low']:+.4f} to {test['high']:+.4f})"
    means = {
        key: mean(run[key] for run in runs)
        for key in ("train_seconds", "examples_per_s", "backward_share")
    }
    peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
    return [
        f"{method['trainable_parameters']:,}",
        rate,
        shown,
        against,
        "" if test is None else f"{test['p_holm']:.3g}",
        f"{means['train_seconds']:,.0f}",
        f"{means['examples_per_s']:.2f}",
        f"{max(peaks):,.0f}" if peaks else "",
        f"{means['backward_share']:.2f}",
    ]


def task_rows(content: Content) -> tuple[list[str], list[list[str]]]:
    """Accuracy of the base and of every method by protocol and task; the heading, and the rows."""
    found: dict[str, dict[str, list[float]]] = {}
    tested = {"base": [content["base"]]} if content.get("base") else {}
    tested |= {name: finished(method) for name, method in content["methods"].items()}
    for name, runs in tested.items():
        for run in runs:
            for task in run.get("tasks", []):
                column = f"{task['task']} ({task['protocol']}, n={task['n']})"
                found.setdefault(name, {}).setdefault(column, []).append(task["accuracy"])
    columns = [*dict.fromkeys(column for row in found.values() for column in row)]
    rows = [
        [name, *(f"{100 * mean(row[c]):.1f} %" if c in row else "" for c in columns)]
        for name, row in found.items()
    ]
    return ["Method", *columns], rows


def comparison_table(content: Content) -> Table:
    """The comparison for the terminal."""
    table = text_table("Methods, by validation loss", "Method", *_COLUMNS)
    for row in table_rows(content):
        table.add_row(*row)
    return table


def write_report(content: Content, path: Path) -> None:
    """Write the comparison as one HTML page that needs nothing else."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    heading, tasks = task_rows(content)
    failed = [
        (name, run.get("learning_rate"), run["seed"], run.get("error") or run["status"])
        for name, method in content["methods"].items()
        for run in [*method["grid"], *method["runs"]]
        if run["status"] != "finished"
    ]
    text = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(page)
        .render(
            content=content,
            columns=["Method", *_COLUMNS],
            rows=table_rows(content),
            heading=heading,
            tasks=tasks,
            tests=[t for t in content["tests"] if t["metric"] != "val_loss"],
            figures=figures(content),
            failed=failed,
        )
    )
    atomic_write(path, text.encode())


def figures(content: Content) -> dict[str, str]:
    """SVGs in base64, by what they show."""
    drawn = {
        "Validation loss against training time": _pareto(content, "train_seconds", "seconds"),
        "Validation loss against trainable parameters": _pareto(
            content, "trainable_parameters", "trainable parameters"
        ),
        "Validation loss by learning rate, first seed": _grid(content),
    }
    return {title: _svg(figure) for title, figure in drawn.items() if figure is not None}


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is better than in both coordinates; lower is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _pareto(content: Content, key: str, label: str) -> Figure | None:
    points = {
        name: (mean(run[key] for run in runs), mean(run["val_loss"] for run in runs))
        for name, method in content["methods"].items()
        if (runs := finished(method))
    }
    if not points:
        return None
    figure, plot = _figure(label)
    front = pareto_front(points.values())
    plot.step(*zip(*front, strict=True), where="post", color="#bbbbbb", zorder=1)
    for name, (x, y) in points.items():
        plot.scatter([x], [y], s=28, zorder=2)
        plot.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    return figure


def _grid(content: Content) -> Figure | None:
    figure, plot = _figure("learning rate")
    drawn = False
    for name, method in content["methods"].items():
        tried = [(run["learning_rate"], run["val_loss"]) for run in method["grid"]]
        sound = [(rate, loss) for rate, loss in tried if loss is not None]
        if len(sound) > 1:
            plot.plot(*zip(*sound, strict=True), marker="o", label=name)
            drawn = True
    if not drawn:
        return None
    plot.set_xscale("log")
    plot.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    plot.legend(fontsize=8, ncols=2)
    return figure


def _figure(label: str) -> tuple[Figure, Any]:
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        plot = figure.add_subplot()
        plot.set(xlabel=label, ylabel="validation loss, nats per response token")
    return figure, plot


def _svg(figure: Figure) -> str:
    written = io.BytesIO()
    with mpl.rc_context(fname=STYLE):
        figure.savefig(written, format="svg")
    return base64.b64encode(written.getvalue()).decode()
