"""An audit of training data as tables to print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rosa_lightning.data.audit import Audit, BenchmarkAudit

_BINS = 12
"""Most rows of a histogram; the last one holds all that is longer."""
_BAR = 40
"""Columns of its longest bar."""


def audit_tables(audit: Audit) -> Group:
    """The audit for `rich` to print: lengths, contents, leakage."""
    parts: list[RenderableType] = [_length_table(audit), "", _histogram(audit), ""]
    if audit.unit == "words":
        note = "There is no tokenizer, so lengths are in words: set model.base or data.tokenizer."
        parts += [_note(note), ""]
    parts += [_content_table(audit), ""]
    if audit.benchmarks:
        parts += [_leakage_table(audit.benchmarks), "", *map(_note, _leakage_notes(audit))]
    else:
        parts.append("No leakage was looked for: data.test_sources names no benchmark.")
    return Group(*parts)


def edges(lengths: Sequence[int], most: int = _BINS) -> list[int]:
    """Borders of at most `most` bins of one width, 1, 2 or 5 times a power of ten, from 0 on.

    The bins hold the shortest 99 of 100 lengths; one more, without an end, holds the rest.
    """
    ranked = sorted(lengths)
    reach = ranked[(len(ranked) * 99 - 1) // 100]
    width = next(
        width
        for power in range(20)
        for width in (10**power, 2 * 10**power, 5 * 10**power)
        if (most - 1) * width > reach
    )
    return [width * number for number in range(reach // width + 2)]


def _length_table(audit: Audit) -> Table:
    limit = [f"over {audit.max_length:,}"] if audit.unit == "tokens" else []
    names = ("Records", "median", "90 %", "99 %", "longest", *limit)
    table = _table(f"Lengths in {audit.unit}", "Source", *names)
    for source in audit.sources:
        numbers = [source.num_records, *source.quantiles()[1:]]  # the histogram shows the shortest
        numbers += [] if source.too_long is None else [source.too_long]
        table.add_row(source.name, *map(_count, numbers))
    return table


def _histogram(audit: Audit) -> Table:
    """How many records of all sources are of which length."""
    lengths = [length for source in audit.sources for length in source.lengths]
    borders = edges(lengths)
    rows = [
        (f"{low:,}-{high - 1:,}", sum(low <= length < high for length in lengths))
        for low, high in pairwise(borders)
    ]
    rows.append((f"{borders[-1]:,} on", sum(length >= borders[-1] for length in lengths)))
    filled = [number for number, (_, count) in enumerate(rows) if count]
    most = max(count for _, count in rows)
    grid = Table.grid(padding=(0, 2, 0, 1))
    for _ in range(2):
        grid.add_column(justify="right", no_wrap=True)
    for name, count in rows[filled[0] : filled[-1] + 1]:
        grid.add_row(name, _count(count), Bar(most, 0, count, width=_BAR, color="cyan"))
    return grid


def _content_table(audit: Audit) -> Table:
    table = _table(
        "Contents", "Source", "Records", "duplicates", "in others", "conflicting", "empty"
    )
    for source in audit.sources:
        groups = (source.duplicates, source.elsewhere, source.conflicting, source.empty)
        table.add_row(
            source.name, _count(source.num_records), *(_count(len(group)) for group in groups)
        )
    return table


def _leakage_table(benchmarks: Iterable[BenchmarkAudit]) -> Table:
    table = _table(
        "Test questions in the training data",
        "Benchmark", "Questions", "exact", "near",
    )  # fmt: skip
    table.add_column("in", style="dim", overflow="fold")
    for benchmark in benchmarks:
        exact, near = benchmark.num_exact, benchmark.num_near
        table.add_row(
            benchmark.name,
            _count(benchmark.questions),
            Text(_count(exact), style="bold red" if exact else ""),
            Text(_count(near), style="yellow" if near else ""),
            ", ".join(benchmark.sources()),
        )
    return table


def _leakage_notes(audit: Audit) -> Iterable[str]:
    yield "near: not exact, but much the same words, and the same numbers"
    held = [
        f"{len(source.contaminated):,} of {source.num_records:,} records of {source.name}"
        for source in audit.sources
        if source.contaminated
    ]
    if held:
        what = "leaves out" if audit.decontaminate else "trains on"
        setting = str(audit.decontaminate).lower()
        yield f"data.loading.decontaminate: {setting} {what} (exact) {', '.join(held)}"


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
    )  # fmt: skip
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _note(text: str) -> Padding:
    return Padding(Text(text), (0, 0, 0, 1))


def _count(number: int) -> str:
    return f"{number:,}"
