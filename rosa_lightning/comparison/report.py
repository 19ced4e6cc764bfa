"""A comparison as tables for the terminal and as one HTML page with figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Group, RenderableType

from rosa_lightning.comparison.figures import figures
from rosa_lightning.comparison.plan import finished, mean_losses
from rosa_lightning.comparison.statistics import difference, spread
from rosa_lightning.comparison.verdict import verdict
from rosa_lightning.inspection.page import write_page
from rosa_lightning.utils.tables import note, text_table

Content = Mapping[str, Any]
"""Of ``comparison.json``."""


@dataclass(frozen=True)
class Section:
    """A table of texts, with the method's name in the first column, and what is said of it."""

    title: str
    heading: tuple[str, ...]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
    explanation: str = ""
    """Of its columns; the page alone has it."""


def sections(content: Content) -> list[Section]:
    """The tables of a comparison; those without a row are left out."""
    found = [quality(content), cost(content), forgotten(content), accuracy(content)]
    return [section for section in (*found, contamination(content)) if section.rows]


def ranked(content: Content) -> list[str]:
    """The methods, the best validation loss first; those without one last."""
    losses = mean_losses(content)
    return sorted(content["methods"], key=lambda name: losses.get(name, math.inf))


def quality(content: Content) -> Section:
    """Validation loss of each method, and its difference from the reference."""
    return Section(
        "Methods, by validation loss",
        ("Method", "Rate", "Val. loss", "against reference (95 %)", "p (Holm)"),
        [[name, *_quality(content, name)] for name in ranked(content)],
        explanation=(
            "Against the reference: difference of the validation loss over the seeds, with its "
            "95 % interval (paired t-test); negative is better. Holm: corrected for the number of "
            "methods. Edge: the best rate is the lowest or the highest that was tried."
        ),
    )


def _quality(content: Content, name: str) -> list[str]:
    method, runs = content["methods"][name], finished(content["methods"][name])
    if not runs:
        failed = [run["status"] for run in (*method["grid"], *method["runs"])]
        return ["", (failed or ["not run yet"])[-1], "", ""]
    losses = [run["val_loss"] for run in runs]
    tests = (one for one in content["tests"] if one["method"] == name)
    test = next((one for one in tests if one["metric"] == "val_loss"), None)
    against = "reference" if name == content["reference"] else ""
    return [
        f"{method['learning_rate']:.3g}" + (" (edge)" if method["at_edge"] else ""),
        f"{mean(losses):.4f}" + (f" ± {spread(losses):.4f}" if len(losses) > 1 else ""),
        against if test is None else difference(test, "val_loss"),
        "" if test is None else f"{test['p_holm']:.3g}",
    ]


def cost(content: Content) -> Section:
    """What each method takes."""
    rows = []
    for name in ranked(content):
        method, runs = content["methods"][name], finished(content["methods"][name])
        cells = [name, f"{method['trainable_parameters']:,}"]
        if runs:
            keys = ("train_seconds", "examples_per_s", "backward_share")
            seconds, speed, share = (mean(run[key] for run in runs) for key in keys)
            peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
            peak = f"{max(peaks):,.0f}" if peaks else ""
            steps = f"{mean(run['steps'] for run in runs):,.0f}"
            cells += [steps, f"{seconds:,.0f}", f"{speed:.2f}", peak, f"{share:.2f}"]
        rows.append(cells + [""] * (7 - len(cells)))
    heading = ("Trainable", "Steps", "Seconds", "Examples/s", "Peak MiB", "Backward")
    explanation = (
        "Seconds: of training, without start-up and validations. Backward: mean share of the "
        "layers that the backward pass goes through."
    )
    return Section("Cost", ("Method", *heading), rows, explanation=explanation)


def forgotten(content: Content) -> Section:
    """How each method changed the loss on general text, and the accuracy on other tasks."""
    found = content.get("forgetting", {})
    metrics = sorted({metric for changes in found.values() for metric in changes})
    heading, rows, notes = ["Method"], [], []
    for metric in metrics:
        protocol = metric.partition("/")[2]
        one = next(changes[metric] for changes in found.values() if metric in changes)
        if metric == "text_loss":
            heading.append("General text,\nnats (95 %)")
            base = f"{one['base']:.4f} nats per token over {one['n']:,} texts"
        else:
            heading.append(f"Untrained tasks,\n{protocol}, points (95 %)")
            base = f"{100 * one['base']:.1f} % of {one['n']:,} questions ({protocol})"
        notes.append(f"The base: {base}.")
    for name in ranked(content):
        if changes := found.get(name):
            shown = {metric: difference(change, metric) for metric, change in changes.items()}
            rows.append([name, *(shown.get(metric, "") for metric in metrics)])
    explanation = (
        "Changes against the base, with 95 % intervals, paired by text or question (bootstrap); "
        "not corrected for the number of methods. Untrained tasks: test sources whose task is none "
        "of the training data's."
    )
    return Section("Forgetting", tuple(heading), rows, tuple(notes), explanation)


def accuracy(content: Content) -> Section:
    """Accuracy of the base and of every method by protocol and task."""
    found: dict[str, dict[str, list[float]]] = {}
    tested = {"base": [content["base"]]} if content.get("base") else {}
    tested |= {name: finished(content["methods"][name]) for name in ranked(content)}
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
    return Section("Accuracy", ("Method", *columns), rows)


def contamination(content: Content) -> Section:
    """How many test questions stand in the training data, and what was left out for it."""
    data = content.get("data", {})
    rows = [
        [one["source"], *(f"{one[key]:,}" for key in ("questions", "exact", "near"))]
        for one in data.get("tests", [])
    ]
    left_out = [
        f"{one['left_out']:,} of {one['records']:,} records of {one['source']}"
        for one in data.get("training", [])
    ]
    line = f"Left out of training, since they ask a test question: {', '.join(left_out)}."
    explanation = (
        "Exact: the same question but for case and punctuation. Near: much the same words and the "
        "same numbers; training keeps these."
    )
    heading = ("Test source", "Questions", "exact", "near")
    return Section("Test questions in the training data", heading, rows, (line,), explanation)


def paired_accuracy(content: Content) -> Section:
    """Paired tests of accuracy and of the loss on general text, against the reference."""
    place = {name: number for number, name in enumerate(ranked(content))}
    tests = [test for test in content["tests"] if test["metric"] != "val_loss"]
    rows = []
    for test in sorted(tests, key=lambda one: (one["metric"], place[one["method"]])):
        shown = difference(test, test["metric"])
        p_values = [f"{test[key]:.3g}" for key in ("p", "p_holm")]
        rows.append([test["method"], test["metric"], f"{test['n']:,}", shown, *p_values])
    heading = ("Method", "of", "questions", "difference (95 %)", "p", "p (Holm)")
    explanation = (
        f"Against {content['reference']}, by bootstrap over questions or texts: accuracy in "
        "percentage points, text_loss in nats per token."
    )
    title = "Paired tests of accuracy and general text"
    return Section(title, heading, rows, explanation=explanation)


def by_rate(content: Content) -> Section:
    """Validation loss at all learning rates that were tried."""
    grids = {name: content["methods"][name]["grid"] for name in ranked(content)}
    rates = sorted({run["learning_rate"] for grid in grids.values() for run in grid})
    rows = []
    for name, grid in grids.items():
        losses = {run["learning_rate"]: run for run in grid}
        cells = [_loss_of(losses[rate]) if rate in losses else "" for rate in rates]
        rows.append([name, *cells])
    heading = ("Method", *(f"{rate:.3g}" for rate in rates))
    return Section("Validation loss by learning rate, first seed", heading, rows)


def _loss_of(run: Content) -> str:
    return str(run["status"]) if run["val_loss"] is None else f"{run['val_loss']:.4f}"


def comparison_tables(content: Content) -> Group:
    """The comparison for the terminal."""
    parts: list[RenderableType] = []
    for section in sections(content):
        if section.title != "Accuracy" or len(section.heading) <= 8:  # the page has them all
            table = text_table(section.title, *section.heading)
            for row in section.rows:
                table.add_row(*row)
            parts += [table, *map(note, section.notes)]
    return Group(*parts)


def write_report(content: Content, path: Path) -> Path:
    """Write the comparison as one HTML page that needs nothing else, and return its path."""
    failed = [
        (name, run.get("learning_rate"), run["seed"], run.get("error") or run["status"])
        for name, method in content["methods"].items()
        for run in [*method["grid"], *method["runs"]]
        if run["status"] != "finished"
    ]
    details = [section for section in (paired_accuracy(content), by_rate(content)) if section.rows]
    write_page(
        path,
        Path(__file__).with_name("report.html"),
        path=path.absolute().parent,
        content=content,
        verdict=verdict(content),
        sections=sections(content),
        details=details,
        figures=figures(content),
        failed=list(dict.fromkeys(failed)),
    )
    return path
