"""Numbers of each layer, in a file of the run: as scalars they would bury a logger's own page."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rosa_lightning.utils.files import writing
from rosa_lightning.utils.strict_json import read_objects

LAYERS = "layers.jsonl"
"""A line for each step and measure: ``{"step": 20, "tag": "score", "values": {"0": 1.5}}``."""
Row = dict[str, Any]
Logged = dict[str, dict[int, float]]


def append_rows(path: Path, step: int, measures: Mapping[str, Mapping[int, float]]) -> None:
    """Add what was measured in an optimizer step, by tag and number of the layer.

    Tags are ``score``, ``active``, ``selections``, ``update_norm/<target>`` and
    ``relative_update/<target>``.
    """
    rows = [
        {"step": step, "tag": tag, "values": {str(k): v for k, v in values.items()}}
        for tag, values in measures.items()
    ]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The lines of a file, without those that are none, such as one that was cut off."""
    return [row for row in read_objects(path) if row.keys() == {"step", "tag", "values"}]


def layer_series(rows: Iterable[Row]) -> Logged:
    """Values by tag, ``layers/<tag>/<layer>``, and step; what is no number of a layer is left out.

    Of a step that stands there twice, as after a resume in the same folder, the later value counts.
    """
    found: Logged = {}
    for row in rows:
        with suppress(ValueError, TypeError, AttributeError):
            step = int(row["step"])
            for layer, value in row["values"].items():
                found.setdefault(f"layers/{row['tag']}/{int(layer):02d}", {})[step] = float(value)
    return found
