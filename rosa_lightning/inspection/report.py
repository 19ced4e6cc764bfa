"""The report of a run: one HTML page that needs nothing else, or a folder of pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Literal

from rosa_lightning.inspection.charts import Picture, Run, draw_charts
from rosa_lightning.inspection.history import read_run
from rosa_lightning.utils.files import (
    SETTINGS_BYTES,
    atomic_write,
    check_name,
    printable,
    read_bytes,
)

Format = Literal["html", "png"]

MIME = {"svg": "image/svg+xml", "png": "image/png"}
HEADLINES = (
    "train/loss",
    "val/loss",
    "val/accuracy",
    "test/accuracy",
    "dls/lowest_active",
    "dls/backward_saved",
    "dls/backward_share",
    "data/share/",
    "throughput/",
    "memory/peak_mib",
)
"""Tags, or their beginnings, whose numbers stand at the top of the page."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
 max-width: 1240px; margin: 2em auto; padding: 0 1.5em; }}
h1 {{ font-size: 1.5em; margin-bottom: 0; }}
h2 {{ font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }}
.path {{ color: #666; margin-top: 0; overflow-wrap: anywhere; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
 gap: 1.2em; align-items: center; }}
.charts img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .15em .9em; border-bottom: 1px solid #eee; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; overflow-wrap: anywhere; }}
th {{ color: #666; font-weight: normal; }}
details {{ margin-top: 1em; }}
summary {{ cursor: pointer; font-size: 1.1em; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: .85em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="path">{path}</p>
{body}
</body>
</html>
"""


def write_report(run: str, *, output: str | None = None, format: Format = "html") -> Path:
    """Show a run: loss, accuracy, layers that train, adapters, throughput, memory, configuration.

    Args:
        run: Folder of the run, such as lightning_logs/version_0, with TensorBoard's event files or
            the metrics.csv of CSVLogger.
        output: File to write, or with png the folder to write into; by default report.html or
            report/ in the run's folder. What an earlier report wrote there is replaced.
        format: html: one page that holds its pictures and needs no network. png: the pictures.

    Returns:
        The file or the folder.

    Raises:
        ValueError: The run is no folder, or has logged nothing; the output is of the other kind.
        ImportError: matplotlib is not installed.
    """
    folder = Path(run)
    target = folder / ("report.html" if format == "html" else "report")
    target = target if output is None else Path(output)
    check_name(target)
    _check_output(target, format)
    logged = read_run(folder)
    pictures = draw_charts(logged, "svg" if format == "html" else "png")
    if format == "html":
        atomic_write(target, printable(_page(folder, logged, pictures)).encode())
    else:
        for picture in pictures:
            atomic_write(target / f"{picture.name}.{picture.kind}", picture.content)
    return target


def _check_output(target: Path, format: Format) -> None:
    if format == "html" and target.is_dir():
        raise ValueError(f"output={target} is a folder. Name a file, such as {target}/report.html.")
    if format == "png" and target.exists() and not target.is_dir():
        raise ValueError(f"output={target} is a file; png writes several. Name a folder.")


def _page(folder: Path, run: Run, pictures: Iterable[Picture]) -> str:
    last = max(series.steps[-1] for series in run.values())
    headlines = [tag for start in HEADLINES for tag in run if tag == start or _is_under(tag, start)]
    parts = [f"<p>Logged up to optimizer step {last:,}.</p>", _table(run, headlines)]
    for section, held in groupby(pictures, key=lambda picture: picture.section):
        images = "\n".join(map(_image, held))
        parts.append(f'<h2>{section}</h2>\n<div class="charts">\n{images}\n</div>')
    parts.append("<h2>Details</h2>")
    for name in ("config.yaml", "hparams.yaml"):
        if (folder / name).is_file():
            text = read_bytes(folder / name, SETTINGS_BYTES).decode("utf-8", "replace")
            parts.append(_details(name, f"<pre>{escape(text)}</pre>"))
    parts.append(_details(f"All {len(run)} tags", _table(run, run)))
    path = folder.resolve()
    return PAGE.format(
        title=escape(f"Run {path.name}"), path=escape(str(path)), body="\n".join(parts)
    )


def _is_under(tag: str, start: str) -> bool:
    return start.endswith("/") and tag.startswith(start)


def _table(run: Run, tags: Iterable[str]) -> str:
    """A row for each tag: its values first and last, lowest and highest, and how many."""
    rows = []
    for tag in tags:
        values = run[tag].values
        numbers = [_number(v) for v in (values[0], values[-1], min(values), max(values))]
        cells = "".join(f"<td>{cell}</td>" for cell in (*numbers, f"{len(values):,}"))
        rows.append(f"<tr><td>{escape(tag)}</td>{cells}</tr>")
    names = ("tag", "first", "last", "lowest", "highest", "values")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table>\n<tr>{head}</tr>\n{chr(10).join(rows)}\n</table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode()
    return f'<img alt="{escape(picture.title)}" src="data:{MIME[picture.kind]};base64,{data}">'


def _details(summary: str, content: str) -> str:
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"
