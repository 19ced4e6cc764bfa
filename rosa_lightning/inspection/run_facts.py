"""What the report of a run says in words: what was trained, its best checkpoint, and its tests."""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rosa_lightning.evaluation.writers import RESULTS
from rosa_lightning.inspection.curves import NAMES, Run, name_of
from rosa_lightning.inspection.run_record import RECORD
from rosa_lightning.utils.strict_json import read_object

Test = dict[str, Any]
"""The content of a ``results.json``, and its ``folder``."""


def number(value: float) -> str:
    """A number for people."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def headlines(run: Run) -> list[tuple[str, str]]:
    """Tags that have a name in words, and that name, the most important first."""
    order = {tag: place for place, tag in enumerate(NAMES)}
    # With a single task its accuracy is the accuracy.
    tags = [tag for tag in run if run[tag] != run.get(tag.rpartition("/")[0])]
    named = [(tag, name_of(tag)) for tag in tags if name_of(tag) != tag]
    return sorted(named, key=lambda one: (order.get(one[0], len(order)), one[0]))


def run_facts(folder: Path) -> list[tuple[str, str]]:
    """What `RunRecorder` kept of a run, as labels and texts; empty without its file."""
    record = read_object(folder / RECORD)
    facts: list[tuple[str, str]] = []
    # Whoever wrote the file: what is not as expected is left out.
    for label, text in _FACTS.items():
        with suppress(KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            facts.append((label, text(record)))
    return facts


def finished_tests(run: Path) -> list[Test]:
    """What tests in a run's folder and in those beside it found, the oldest first.

    Of their ``results`` only rows that can be read.
    """
    run, found = run.resolve(), list[Test]()
    paths = filter(Path.is_file, {run / RESULTS, *run.parent.glob(f"*/{RESULTS}")})
    for path in sorted(paths, key=lambda one: (one.stat().st_mtime, one)):
        test = read_object(path)
        if test.get("complete") is True:
            rows = test.get("results")
            sound = [one for one in rows if _is_sound(one)] if isinstance(rows, list) else []
            found.append({**test, "folder": path.parent, "results": sound})
    return found


def _is_sound(row: Any) -> bool:
    with suppress(KeyError, TypeError, ValueError):
        score_cells(row)
        return isinstance(row["task"], str) and isinstance(row["protocol"], str)
    return False


def score_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Task, protocol, accuracy, questions, and how many of these were trained on, as texts."""
    low, high = row["interval"]
    accuracy = f"{100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    count = row.get("contaminated")
    shown = "not known" if count is None else f"{count:,}"
    return row["task"], row["protocol"], accuracy, f"{row['n']:,}", shown


def run_tests(folder: Path) -> list[tuple[str, ...]]:
    """The tests of a run's checkpoints, the newest of each: its name, and the cells of a row."""
    folder, rows = folder.resolve(), dict[tuple[str, ...], tuple[str, ...]]()
    for test in finished_tests(folder):
        # Earlier versions named it in `model` alone.
        named = test.get("checkpoint") or str(test.get("model")).rpartition(" + ")[2]
        checkpoint = Path(os.path.realpath(str(named)))
        if test["folder"] == folder or folder in checkpoint.parents:
            for row in test["results"]:
                cells = (checkpoint.name, *score_cells(row))
                rows[cells[:3]] = cells
    return list(rows.values())


def _settings(record: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in record["settings"].items() if k not in _ELSEWHERE}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def _best(record: Mapping[str, Any]) -> str:
    best = min(record["validations"], key=lambda one: float(one["val/loss"]))
    accuracy = best.get("val/accuracy")
    shown = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
    return f"loss {number(best['val/loss'])}{shown} at step {best['step']:,}"


def _duration(record: Mapping[str, Any]) -> str:
    ends = [datetime.fromisoformat(record[name]) for name in ("started", "written")]
    training = timedelta(seconds=round(record["train_seconds"]))
    return f"{ends[1] - ends[0]}, of which {training} in training"


def _speed(record: Mapping[str, Any]) -> str:
    speed = f"{number(record['examples'] / record['train_seconds'])} examples per second"
    peak = record.get("peak_mib")
    return speed if peak is None else f"{speed}, {number(peak)} MiB at most"


def _parameters(record: Mapping[str, Any]) -> str:
    trainable, total = record["trainable_parameters"], record["total_parameters"]
    return f"{trainable:,} of {total:,} train ({100 * trainable / total:.2f} %)"


_ELSEWHERE = ("base", "method", "trainable_parameters")
"""Settings that have a line of their own."""
_FACTS = {
    "Base": lambda record: str(record["settings"]["base"]),
    "Method": lambda record: str(record["settings"]["method"]),
    "Parameters": _parameters,
    "Settings": _settings,
    "Best validation": _best,
    "Checkpoint": lambda record: record["checkpoint"] or "none",
    "Status": lambda record: f"{record['status']}, at step {record['step']:,}",
    "Started": lambda record: f"{datetime.fromisoformat(record['started']):%Y-%m-%d %H:%M %Z}",
    "Duration": _duration,
    "Speed": _speed,
}
"""Each fact of a run, from its record."""
