"""HTML pages that need nothing else: one head and style for all reports."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from rosa_lightning.utils.files import atomic_write, printable


def write_page(path: Path, template: Path, /, **values: Any) -> None:
    """Write a page from a template that extends ``page.html``; text among the values is escaped."""
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    page = Environment(loader=loader, autoescape=True, trim_blocks=True)
    atomic_write(path, printable(page.get_template(template.name).render(values)).encode())
