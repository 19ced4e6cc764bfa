"""Tables of text for the terminal."""

from __future__ import annotations

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def text_table(title: str | None, first: str, *numbers: str) -> Table:
    """A table of a first column of names and others of numbers, aligned to the right."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def note(text: str) -> Padding:
    """A line below a table, of which brackets are no markup."""
    return Padding(Text(text), (0, 0, 0, 1))
