"""What the report of a run says in words: what was trained, its best checkpoint, and its tests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rosa_lightning.evaluation.writers import RESULTS
from rosa_lightning.inspection.curves import NAMES, Run, name_of
from rosa_lightning.inspection.run_record import RECORD
from rosa_lightning.utils.files import SETTINGS_BYTES, read_bytes
from rosa_lightning.utils.strict_json import parse


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
    record = _read(folder / RECORD)
    facts: list[tuple[str, str]] = []
    # Whoever wrote the file: what is not as expected is left out.
    for label, text in _FACTS.items():
        with suppress(KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            facts.append((label, text(record)))
    return facts


def run_tests(folder: Path) -> list[dict[str, str]]:
    """The tests of a run's checkpoints, in its folder or in one beside it: a row for each task."""
    rows: list[dict[str, str]] = []
    folder = folder.resolve()
    for path in sorted({folder / RESULTS, *folder.parent.glob(f"*/{RESULTS}")}):
        results = _read(path)
        checkpoint = str(results.get("model")).rpartition(" + ")[2]
        is_own = path.parent == folder or folder in Path(checkpoint).resolve().parents
        if is_own and results.get("complete") is True:
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                rows += [_test_row(Path(checkpoint).name, one) for one in results["results"]]
    return rows


def _test_row(checkpoint: str, score: Mapping[str, Any]) -> dict[str, str]:
    low, high = score["interval"]
    contaminated = score.get("contaminated")
    return {
        "checkpoint": checkpoint,
        "task": str(score["task"]),
        "protocol": str(score["protocol"]),
        "accuracy, % (95 %)": (
            f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        ),
        "records": f"{score['n']:,}",
        "contaminated": "unknown" if contaminated is None else f"{contaminated:,}",
    }


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = parse(read_bytes(path, SETTINGS_BYTES).decode())
        return found if isinstance(found, dict) else {}
    return {}


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
