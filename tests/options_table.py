"""Option tables of docs/configuration.md, made from signatures and docstrings.

    python -m tests.options_table

A table stands between `<!-- options: PREFIX CLASS -->` and `<!-- end -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser
from docstring_parser.common import DocstringParam

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MARKED = re.compile(r"(<!-- options: (\S*) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def described(kind: Any) -> dict[str, str]:
    """What the docstrings of a class or function say of each parameter."""
    found = {}
    classes = [one for one in getattr(kind, "__mro__", [kind]) if "rosa" in one.__module__]
    for part in (part for one in classes for part in (one, vars(one).get("__init__", one))):
        for meta in docstring_parser.parse_from_object(part).meta:
            if isinstance(meta, DocstringParam) and meta.args[0] in ("param", "attribute"):
                found.setdefault(meta.arg_name, " ".join((meta.description or "").split()))
    return found


def shown(default: Any) -> str:
    """A default as YAML has it."""
    return "" if default is inspect.Parameter.empty else f"`{json.dumps(default)}`".replace('"', "")


def escaped(text: str) -> str:
    """A docstring's text for a table in Markdown: patterns such as *lora* stay as they are."""
    parts = text.replace("``", "`").replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("*", "\\*") for i, part in enumerate(parts))


def rows(prefix: str, kind: Any, group: Any = None) -> list[str]:
    """A row for each parameter; those of a group follow under the group's name."""
    texts, found = described(kind), []
    for name, parameter in inspect.signature(kind).parameters.items():
        key = f"{prefix}.{name}" if prefix else name
        default = parameter.default if group is None else getattr(group, name)
        if default is not parameter.empty and group is None and dataclasses.is_dataclass(kind):
            field = kind.__dataclass_fields__[name]
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
        if dataclasses.is_dataclass(default):
            found += rows(key, type(default), default)
        elif name not in ("context", "optimizer"):
            found.append(f"| `{key}` | {shown(default)} | {escaped(texts[name])} |")
    return found


def table(match: re.Match[str]) -> str:
    """A marked table, made anew."""
    module, _, name = match[3].rpartition(".")
    kind = getattr(import_module(f"rosa_lightning.{module}".rstrip(".")), name)
    prefix = "" if match[2] == "-" else match[2]
    lines = ["| key | default | meaning |", "|---|---|---|", *rows(prefix, kind)]
    return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[4]


def generated(page: str) -> str:
    """The page with all of its tables made anew."""
    return MARKED.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text()))
