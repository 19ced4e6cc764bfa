"""What a run has logged: its event files or its ``metrics.csv``, as series of numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rosa_lightning.utils.files import check_input, check_name, open_input, read_lines

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"
KNOWN = re.compile(r"(?:(.+?)-)??(?:train|val|test|dls|roae|throughput|memory)/")
"""A tag that this package logs, and the prefix that Lightning's loggers join to it."""


@dataclass(frozen=True)
class Series:
    """The values logged under one tag."""

    steps: tuple[int, ...]
    """Optimizer steps, ascending, each once."""
    values: tuple[float, ...]


def read_run(folder: str | Path) -> dict[str, Series]:
    """The scalars that a run's folder holds, by tag, in alphabetical order.

    Where a step was logged twice, as after a resume in the same folder, the later value counts. A
    prefix that the logger put before all tags is left out.

    Raises:
        ValueError: There is no such folder, or no scalar in it that can be read; metrics.csv is
            no table.
        OSError: An event file or metrics.csv is no regular file.
    """
    run = Path(folder)
    check_name(run)
    if not run.is_dir():
        raise ValueError(f"run={folder} is no folder. Give one like lightning_logs/version_0.")
    found: dict[str, dict[int, float]] = {}
    if (run / METRICS).exists():
        found |= _read_csv(run / METRICS)
    if any(run.glob(EVENTS)):
        found |= _read_events(run)
    found = _without_prefix(found)
    found.pop("hp_metric", None)  # a placeholder of Lightning's
    if not any(found.values()):
        raise ValueError(
            f"run={folder} holds no logged number that can be read, neither in TensorBoard's event "
            f"files nor in {METRICS}. Give a folder that a logger has written{_nearest(run)}."
        )
    return {tag: _series(found[tag]) for tag in sorted(found) if found[tag]}


def _without_prefix(found: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The tags as they were logged, without what a logger was told to put before all of them."""
    prefixes = {match[1] for tag in found if (match := KNOWN.match(tag))}
    # Several, or none before some tags: then hyphens are the project's own.
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    return found if prefix is None else {t.removeprefix(f"{prefix}-"): found[t] for t in found}


def _series(logged: Mapping[int, float]) -> Series:
    steps = tuple(sorted(logged))
    return Series(steps, tuple(logged[step] for step in steps))


def _read_events(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in run.glob("*tfevents*"):  # what the reader takes for event files
        check_input(path)
    # 0 keeps every value; a picture of each tag is more than enough.
    log = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1})
    try:
        log.Reload()
    except Exception as error:  # of protobuf and others, whatever a damaged file leads to
        raise ValueError(
            f"the event files of {run} cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]}). Take the damaged one out of the folder."
        ) from error
    tags = log.Tags()["scalars"]
    return {
        tag: {event.step: event.value for event in log.Scalars(tag) if _is_step(event.step)}
        for tag in tags
    }


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    with open_input(path) as file:
        try:
            lines = (line.decode("utf-8-sig") for line in read_lines(file, path))
            for row in csv.DictReader(lines):
                step = row.pop("step", None)
                for tag, cell in row.items():
                    # A cell is empty where its row is about other tags, and text is no number to
                    # draw. Cells beyond the header's have no tag, and stand in a list.
                    if step and cell and tag is not None:
                        with suppress(ValueError):
                            if _is_step(number := int(step)):
                                found.setdefault(tag, {})[number] = float(cell)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text. Save it in UTF-8.") from error
        except csv.Error as error:
            raise ValueError(f"{path} is no table that can be read: {error}.") from error
    return found


def _is_step(number: int) -> bool:
    """Whether a run can have so many steps; beyond, no chart can be drawn."""
    return 0 <= number < 2**53


def _nearest(run: Path) -> str:
    """A hint at the newest run further down, if there is one."""
    files = [path for pattern in (EVENTS, METRICS) for path in run.glob(f"*/**/{pattern}")]
    if not files:
        return ""
    return f", such as {max(files, key=lambda path: path.stat().st_mtime).parent}"
