"""Tables of docs/speed.md, docs/memory.md and the README, made from docs/results/speed.json.

    python -m tests.speed_table

A table stands between `<!-- speed: NAME -->` and `<!-- end -->`. `tests/benchmarks/speed.py` writes
the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "memory.md"]
FIGURES = ROOT / "docs" / "results" / "speed.json"
MARKED = re.compile(r"(<!-- speed: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
IN_README = ("RoAE", "RoAE, upper half", "RoAE+", "RoAE+, upper half")
Rows = Iterator[list[str]]


def some(content: dict[str, Any], kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What a section is of, and its rows."""
    for section, found in content.items():
        if section.startswith(f"{kind}/"):
            for name, row in found["rows"].items():
                yield section.partition("/")[2].replace("/", ", "), name, row


def middle(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f}" if values else ""


def training(content: dict[str, Any]) -> Rows:
    yield ["task, precision", "training", "examples/s", "times HF", "time, LoRA here", "peak MiB"]
    for about, name, row in some(content, "training"):
        rates = [middle(row[key]) for key in ("examples_per_s", "over_hf", "time_of_lora_here")]
        yield [about, name, *rates, f"{row['peak_mib']:,.0f} ({row['memory_of_hf']:.2f})"]


def limit(content: dict[str, Any]) -> Rows:
    yield ["precision", "training", "a step, s", "its products, s", "step over products"]
    for about, name, row in some(content, "limit"):
        times = [middle(row["step_seconds"], 3), f"{row['products_seconds']:.3f}"]
        yield [about, name, *times, middle(row["over_products"])]


def evaluation(content: dict[str, Any]) -> Rows:
    yield ["protocol, questions", "tool", "items/s", "ours over it", "same answers"]
    for about, name, row in some(content, "evaluation"):
        speed = [middle(row["items_per_s"]), middle(row["ours_over_it"])]
        yield [about, name, *speed, f"{row['same_answers']:.0%}"]


def start(content: dict[str, Any]) -> Rows:
    yield ["what", "tool", "seconds", "peak MiB"]
    for about, name, row in some(content, "start"):
        yield [about, name, middle(row["seconds"], 1), middle(row.get("peak_mib", []), 0)]


def memory(content: dict[str, Any]) -> Rows:
    rows = content["memory"]["rows"] if "memory" in content else {}
    steps = list(next(iter(rows.values()))["peak_mib"]) if rows else []
    yield [
        "peak MiB after",
        *(f"{step} step{'s' * (step != '1')}" for step in steps),
        "last / step 10",
    ]
    for name, row in rows.items():
        peaks = row["peak_mib"]
        growth = peaks[steps[-1]] / peaks["10"]
        yield [name, *(f"{peaks[step]:,.0f}" for step in steps), f"{growth:.2f}"]


def bars(content: dict[str, Any]) -> Rows:
    yield ["section", "figure", "measured", "bar", "met"]
    for section, found in content.items():
        for one in found["figures"]:
            value = median(one["values"])
            met = value <= one["bar"] if one["at_most"] else value >= one["bar"]
            bar = f"at {'most' if one['at_most'] else 'least'} {one['bar']:g}"
            # As many digits as tell it from a bar that it misses.
            digits = 2 if met or round(value, 2) != one["bar"] else 3
            yield [section, one["name"], f"{value:.{digits}f}", bar, "yes" if met else "no"]


def readme(content: dict[str, Any]) -> Rows:
    found: dict[str, dict[str, list[str]]] = {name: {} for name in IN_README}
    for about, name, row in some(content, "training"):
        task, _, precision = about.partition(", ")
        if name in found and precision == "bf16-mixed":
            found[name][task] = [f"{middle(row['over_hf'])} x", f"{row['memory_of_hf']:.2f} x"]
    tasks = list(found[IN_README[0]])
    yield ["", *(f"{task}: {what}" for task in tasks for what in ("speed", "memory"))]
    for name, figures in found.items():
        if figures:
            yield [name, *(cell for task in tasks for cell in figures[task])]


def machines(content: dict[str, Any]) -> Rows:
    yield ["machine", "versions", "sections"]
    found: dict[tuple[str, str], list[str]] = {}
    for section, one in content.items():
        versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        found.setdefault((one["machine"], versions), []).append(section)
    for about, sections in found.items():
        yield [*about, ", ".join(sections)]


TABLES = {
    table.__name__: table
    for table in (training, limit, evaluation, start, memory, bars, readme, machines)
}


def generated(page: str) -> str:
    """The page with all of its tables made anew."""
    content = json.loads(FIGURES.read_text())

    def table(match: re.Match[str]) -> str:
        heading, *rows = TABLES[match[2]](content)
        lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
        lines.insert(1, "|---" * len(heading) + "|")
        told = lines if rows else ["No figures yet."]
        return match[1] + "\n" + "\n".join(told) + "\n\n" + match[3]

    return MARKED.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(generated(path.read_text()))
