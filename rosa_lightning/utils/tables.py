"""Tables of text for the terminal."""

from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def text_table(title: str | None, *columns: str, names: int = 1) -> Table:
    """A table whose first columns are names, and the others numbers, aligned to the right."""
    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "pad_edge": False}
    table = Table(title=title, box=box.SIMPLE_HEAD, **style)
    for number, name in enumerate(columns):
        if number < names:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right")
    return table


def note(text: str) -> Padding:
    """A line below a table, of which brackets are no markup."""
    return Padding(Text(text), (0, 0, 0, 1))
