"""What an evaluation came to: scores of tasks, their averages, a table and ``results.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rosa_lightning.tasks.records import TASKS
from rosa_lightning.utils.files import atomic_write

_PACKAGES = ("rosa-lightning", "torch", "transformers", "lightning", "torchmetrics")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One task under one protocol."""

    protocol: str
    task: str
    group: str
    """``commonsense``, ``arithmetic`` or ``other``."""
    accuracy: float
    """Share of right answers."""
    interval: tuple[float, float]
    """95 % interval of the accuracy (Wilson)."""
    format_failure_rate: float | None
    """Share of texts that state no answer, each counted as wrong; None where none is written."""
    n: int
    """Records."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """Several tasks under one protocol."""

    protocol: str
    group: str
    """A group of tasks, or ``all``."""
    num_tasks: int
    macro_accuracy: float
    """Mean of the tasks' accuracies: what papers call the average."""
    micro_accuracy: float
    """Share of right answers over the records of all tasks."""
    n: int


def scores_of(protocol: str, values: Mapping[str, Any]) -> list[Score]:
    """The score of each task that has any record, in the order of `TASKS`.

    Args:
        protocol: What found the answers.
        values: What a collection of `TaskAccuracy`, `AccuracyInterval`, `TaskCount` and, where
            texts were written, `FormatFailures` computes.
    """
    names = [name.removeprefix("n/") for name in values if name.startswith("n/")]
    order = {name: place for place, name in enumerate(TASKS)}
    written = "format_failures" in values
    scores = []
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        n = int(values[f"n/{name}"])
        low, high = values[f"interval/{name}"].tolist()
        failed = round(float(values[f"format_failures/{name}"]) * n) if written else None
        scores.append(
            Score(
                protocol=protocol,
                task=name,
                group=TASKS[name].group if name in TASKS else "other",
                # Counts, got back from their shares in single precision, are exact.
                accuracy=round(float(values[f"accuracy/{name}"]) * n) / n,
                interval=(low, high),
                format_failure_rate=None if failed is None else failed / n,
                n=n,
            )
        )
    return scores


def averages(scores: Iterable[Score]) -> list[Average]:
    """Averages of each protocol: over each group that papers average, and over all tasks."""
    found: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        for group in dict.fromkeys([score.group, "all"]):
            if group != "other":
                found.setdefault((score.protocol, group), []).append(score)
    return [
        Average(
            protocol=protocol,
            group=group,
            num_tasks=len(own),
            macro_accuracy=sum(score.accuracy for score in own) / len(own),
            micro_accuracy=sum(score.accuracy * score.n for score in own)
            / sum(score.n for score in own),
            n=sum(score.n for score in own),
        )
        for (protocol, group), own in sorted(found.items(), key=lambda item: item[0][1] == "all")
    ]


def versions() -> dict[str, str]:
    """The releases that results may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def write_results(
    path: Path,
    scores: Sequence[Score],
    leaked: Mapping[str, int] | None,
    **about: Any,
) -> None:
    """Write ``results.json``.

    Args:
        path: The file.
        scores: Of all tasks and protocols.
        leaked: Records of each task whose question stands in the training data; None if unknown.
        **about: What else to say of the evaluation, as plain values.
    """
    rows = [
        {**asdict(score), "leaked": None if leaked is None else leaked.get(score.task, 0)}
        for score in scores
    ]
    content = {
        **about,
        "versions": versions(),
        "results": rows,
        "averages": [asdict(average) for average in averages(scores)],
    }
    # Names of files may hold bytes that are not UTF-8, which JSON can spell.
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode(errors="backslashreplace"))


def results_table(
    title: str, scores: Sequence[Score], leaked: Mapping[str, int] | None, notes: Sequence[str]
) -> Group:
    """The scores for `rich` to print: a row a task, and columns of its own for each protocol.

    Args:
        title: What was evaluated.
        scores: Of all tasks and protocols.
        leaked: As for `write_results`.
        notes: Lines to put below.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("Task", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("Leaked", justify="right")
    protocols = {score.protocol: False for score in scores}
    protocols |= {s.protocol: True for s in scores if s.format_failure_rate is not None}
    for protocol, writes in protocols.items():
        table.add_column(f"{protocol}, % (95 %)", justify="right", no_wrap=True)
        if writes:
            table.add_column("no answer, %", justify="right")
    for task in dict.fromkeys(score.task for score in scores):
        own = {score.protocol: score for score in scores if score.task == task}
        count = None if leaked is None else leaked.get(task, 0)
        cells = [c for name, writes in protocols.items() for c in _cells(own.get(name), writes)]
        mark = "*" if count else ""
        n = next(iter(own.values())).n
        table.add_row(f"{task}{mark}", str(n), "?" if count is None else str(count), *cells)
    table.add_section()
    for row in _average_rows(scores, protocols):
        table.add_row(*row, style="bold")
    below = [*notes]
    if leaked is None or any(leaked.values()):
        below.insert(0, _leak_note(leaked))
    return Group(table, *(Text(line) for line in below))


def _leak_note(leaked: Mapping[str, int] | None) -> str:
    if leaked is None:
        return "Leaked: unknown, for the training data could not be read."
    return (
        "* Questions of this benchmark stand in the training data: a model trained on these may "
        "have seen the answers."
    )


def _cells(score: Score | None, writes: bool) -> list[str]:
    if score is None:
        return ["-"] * (1 + writes)
    low, high = score.interval
    cells = [f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"]
    return cells + [f"{100 * (score.format_failure_rate or 0):.1f}"] * writes


def _average_rows(scores: Sequence[Score], protocols: Mapping[str, bool]) -> Iterable[list[str]]:
    """Averages over several tasks; none of a protocol that leaves out one of them."""
    found = averages(scores)
    for group in dict.fromkeys(average.group for average in found):
        tasks = {score.task for score in scores if group in (score.group, "all")}
        own = {
            average.protocol: average
            for average in found
            if average.group == group and average.num_tasks == len(tasks) > 1
        }
        for kind in ("macro", "micro") if own else ():
            cells = [
                cell
                for name, writes in protocols.items()
                for cell in (
                    f"{100 * getattr(own[name], f'{kind}_accuracy'):.1f}" if name in own else "-",
                    *[""] * writes,
                )
            ]
            yield [f"{group}, {kind}", str(next(iter(own.values())).n), "", *cells]
