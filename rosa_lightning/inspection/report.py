"""The report of a run: one HTML page of charts and tables, made from what the run has logged."""

import base64
import csv
import re
from contextlib import suppress
from pathlib import Path

from rosa_lightning.inspection.charts import draw_charts
from rosa_lightning.inspection.curves import Run, as_run
from rosa_lightning.inspection.layer_log import LAYERS, Logged, layer_series, read_rows
from rosa_lightning.inspection.page import write_page
from rosa_lightning.inspection.run_facts import headlines, number, run_facts, run_tests
from rosa_lightning.utils.files import (
    SETTINGS_BYTES,
    check_input,
    check_name,
    open_input,
    read_bytes,
    read_lines,
)

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"
KNOWN = re.compile(r"(?:(.+?)-)??(?:train|val|test|weights)/")
"""A tag that this package logs, and the prefix that Lightning's loggers join to it."""


def write_report(run: str, *, output: str | None = None) -> Path:
    """Show a run: settings, best checkpoint, tests, and curves of loss, accuracy, speed and layers.

    Args:
        run: Folder of the run, such as lightning_logs/version_0, with TensorBoard's event files or
            the metrics.csv of CSVLogger; of a folder of runs, the newest that has logged something.
        output: HTML file to write; by default report.html in the run's folder. It holds its
            pictures and needs no network. An earlier report is replaced.
    """
    folder, logged = _find_run(Path(run))
    target = folder / "report.html" if output is None else Path(output)
    check_name(target)
    if target.is_dir():
        raise ValueError(f"output={target} is a folder. Name a file, such as {target}/report.html.")
    write_page(
        target,
        Path(__file__).with_name("report.html"),
        path=folder.resolve(),
        run=logged,
        facts=run_facts(folder),
        tests=run_tests(folder),
        headlines=headlines(logged),
        charts={
            section: {title: base64.b64encode(svg).decode() for title, svg in charts.items()}
            for section, charts in draw_charts(logged).items()
        },
        config=_text(folder / "config.yaml"),
        number=number,
        zip=zip,
    )
    return target


def _text(path: Path) -> str:
    """A file as text; empty without one."""
    return read_bytes(path, SETTINGS_BYTES).decode("utf-8", "replace") if path.is_file() else ""


def _find_run(folder: Path) -> tuple[Path, Run]:
    """A folder and what was logged there, or else the newest one in it that has something."""
    try:
        return folder, read_run(folder)
    except ValueError:
        files = [path for name in (EVENTS, METRICS, LAYERS) for path in folder.glob(f"*/**/{name}")]
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(ValueError):
                return path.parent, read_run(path.parent)
        raise


def read_run(folder: str | Path) -> Run:
    """The numbers that a run's folder holds, by tag, in alphabetical order.

    Where a step was logged twice, as after a resume in the same folder, the later value counts. A
    prefix that the logger put before all tags is left out.

    Raises:
        ValueError: There is no such folder, or no scalar in it that can be read.
        OSError: An event file or metrics.csv is no regular file.
    """
    run = Path(folder)
    check_name(run)
    if not run.is_dir():
        raise ValueError(f"run={folder} is no folder. Give one like lightning_logs/version_0.")
    found = _read_csv(run / METRICS) if (run / METRICS).exists() else {}
    if any(run.glob(EVENTS)):
        found |= _read_events(run)
    # Where several prefixes stand before tags, or none before some, hyphens are the project's own.
    prefixes = {match[1] for tag in found if (match := KNOWN.match(tag))}
    prefix = f"{next(iter(prefixes))}-" if len(prefixes) == 1 and None not in prefixes else ""
    found = {tag.removeprefix(prefix): logged for tag, logged in found.items() if logged}
    found.pop("hp_metric", None)  # a placeholder of Lightning's
    if (run / LAYERS).exists():
        found |= layer_series(read_rows(run / LAYERS))
    if not found:
        raise ValueError(
            f"run={folder} holds no logged number that can be read, neither in TensorBoard's event "
            f"files nor in {METRICS}. Give a folder that a logger has written."
        )
    return as_run(found)


def _read_events(run: Path) -> Logged:
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
    return {
        tag: {event.step: event.value for event in log.Scalars(tag) if _is_step(event.step)}
        for tag in log.Tags()["scalars"]
    }


def _read_csv(path: Path) -> Logged:
    found: Logged = {}
    with open_input(path) as file:
        try:
            lines = (line.decode("utf-8-sig") for line in read_lines(file, path))
            for row in csv.DictReader(lines):
                step = row.pop("step", None)
                for tag, cell in row.items():
                    # Cells are empty or text in rows about other tags. Those beyond the header
                    # have no tag, and stand in a list.
                    with suppress(ValueError, TypeError):
                        if tag is not None and _is_step(number := int(step)):
                            found.setdefault(tag, {})[number] = float(cell)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text. Save it in UTF-8.") from error
        except csv.Error as error:
            raise ValueError(f"{path} is no table that can be read: {error}.") from error
    return found


def _is_step(number: int) -> bool:
    """Whether a run can have so many steps; beyond, no chart can be drawn."""
    return 0 <= number < 2**53
