"""Scores of tasks, their averages, the printed table and ``results.json``."""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from rosa_lightning.evaluation.metrics import wilson_interval
from rosa_lightning.tasks.records import TASKS
from rosa_lightning.utils.files import atomic_write
from rosa_lightning.utils.tables import text_table

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
    """Share of texts that state no answer, each counted as wrong; None for ``likelihood``."""
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


def scores_of(protocol: str, counts: Mapping[str, tuple[int, int, int]]) -> list[Score]:
    """The score of each task in the order of `TASKS`, from what `TaskCounts` computes."""
    order = {name: place for place, name in enumerate(TASKS)}
    return [
        Score(
            protocol=protocol,
            task=task,
            group=TASKS[task].group if task in TASKS else "other",
            accuracy=correct / n,
            interval=wilson_interval(correct, n),
            format_failure_rate=failed / n if protocol == "generate" else None,
            n=n,
        )
        for task, (n, correct, failed) in sorted(
            counts.items(), key=lambda item: (order.get(item[0], len(order)), item[0])
        )
    ]


def averages(scores: Iterable[Score]) -> list[Average]:
    """Averages of each protocol: over each group that papers average, and over all tasks."""
    found: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        for group in {score.group: None, "all": None}:
            if group != "other":
                found.setdefault((score.protocol, group), []).append(score)
    in_order = sorted(found.items(), key=lambda item: item[0][1] == "all")
    return [_average(protocol, group, own) for (protocol, group), own in in_order]


def _average(protocol: str, group: str, scores: Sequence[Score]) -> Average:
    n = sum(score.n for score in scores)
    return Average(
        protocol=protocol,
        group=group,
        num_tasks=len(scores),
        macro_accuracy=sum(score.accuracy for score in scores) / len(scores),
        micro_accuracy=sum(score.accuracy * score.n for score in scores) / n,
        n=n,
    )


def versions() -> dict[str, str]:
    """The releases that results may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


Counts = Mapping[str, int]
"""Records of each task whose question stands in the training data."""


def write_results(
    path: Path, scores: Sequence[Score], contaminated: Counts | None, **about: Any
) -> None:
    """Write ``results.json``: the scores, ``about`` the evaluation; None is unknown."""
    rows: list[dict[str, Any]] = []
    for score in scores:
        count = None if contaminated is None else contaminated.get(score.task, 0)
        rows.append({**asdict(score), "contaminated": count})
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
    title: str, scores: Sequence[Score], contaminated: Counts | None, notes: Sequence[str]
) -> Group:
    """The scores for `rich` to print: a row for each task, columns for each protocol; notes below.

    ``contaminated`` is None where the training data are not known.
    """
    protocols = list(dict.fromkeys(score.protocol for score in scores))
    columns = ["n", "Contaminated"]
    for protocol in protocols:
        columns += [f"{protocol}, % (95 %)", *_failures_of(protocol, "no answer, %")]
    table = text_table(title, "Task", *columns)
    for task in dict.fromkeys(score.task for score in scores):
        own = {score.protocol: score for score in scores if score.task == task}
        count = "?" if contaminated is None else str(contaminated.get(task, 0))
        mark = "" if count in ("?", "0") else "*"
        cells = [cell for protocol in protocols for cell in _cells(protocol, own.get(protocol))]
        table.add_row(f"{task}{mark}", str(next(iter(own.values())).n), count, *cells)
    table.add_section()
    for row in _average_rows(scores, protocols):
        table.add_row(*row, style="bold")
    if contaminated is None:
        notes = ["Contaminated: unknown, since the training data could not be read.", *notes]
    elif any(contaminated.values()):
        mark = (
            "* Questions of this benchmark are also in the training data: a model trained on these "
            "may have seen the answers."
        )
        notes = [mark, *notes]
    return Group(table, *(Text(line) for line in notes))


def _failures_of(protocol: str, cell: str) -> list[str]:
    """A cell of the column of format failures, which `generate` alone has."""
    return [cell] if protocol == "generate" else []


def _cells(protocol: str, score: Score | None) -> list[str]:
    if score is None:
        return ["-", *_failures_of(protocol, "-")]
    low, high = score.interval
    accuracy = f"{100 * score.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    return [accuracy, *_failures_of(protocol, f"{100 * (score.format_failure_rate or 0):.1f}")]


def _average_rows(scores: Sequence[Score], protocols: Sequence[str]) -> Iterator[list[str]]:
    """Averages over several tasks; none of a protocol that leaves out one of them."""
    found = averages(scores)
    for group in dict.fromkeys(average.group for average in found):
        num_tasks = len({score.task for score in scores if group in (score.group, "all")})
        own = {a.protocol: a for a in found if a.group == group and a.num_tasks == num_tasks > 1}
        for kind in ("macro", "micro") if own else ():
            row = [f"{group}, {kind}", str(next(iter(own.values())).n), ""]
            for name in protocols:
                share = getattr(own.get(name), f"{kind}_accuracy", None)
                row.append("-" if share is None else f"{100 * share:.1f}")
                row += _failures_of(name, "")
            yield row
