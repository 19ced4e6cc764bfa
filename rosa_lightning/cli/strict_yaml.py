"""YAML of a configuration, read strictly: each key once, of bounded size, and text throughout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rosa_lightning.utils.errors import ConfigurationError

MAX_BYTES = 4 * 2**20
"""Largest configuration file."""
_MAX_ALIASED = 10_000
"""Most values that aliases may add to those that are written out."""
_MAX_DEPTH = 64
_MAX_DIGITS = 1000
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value", "timestamp")
"""What values of a configuration are; the other tags of YAML would make objects."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictYAMLError(yaml.YAMLError, ConfigurationError):
    """YAML that a configuration may not be; the message is one line."""


def read_configuration(path: str | Path) -> str:
    """The text of a configuration file.

    Raises:
        StrictYAMLError: It cannot be read, is larger than 4 MiB, no UTF-8, empty, or no mapping of
            keys; or what `check_yaml` refuses. Names the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise StrictYAMLError(f"the configuration {_name(path)} cannot be read: {reason}.") from (
            error
        )
    if len(content) > MAX_BYTES:
        raise StrictYAMLError(
            f"the configuration {_name(path)} is larger than {MAX_BYTES // 2**20} MiB. Name data "
            "by its path instead of writing it there."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise StrictYAMLError(
            f"the configuration {_name(path)} is not UTF-8: line {line} holds the byte "
            f"0x{content[error.start]:02x}. Save it as UTF-8."
        ) from error
    check_yaml(text, _name(path), needs_keys=True)
    return text


def check_yaml(text: str, where: str = "", *, needs_keys: bool = False) -> None:
    """Check YAML before values are made of it.

    Args:
        text: The YAML.
        where: What messages call it; a file's name, say.
        needs_keys: Whether it must be a mapping that is not empty.

    Raises:
        StrictYAMLError: A syntax error, a key that stands twice, aliases that stand for too many
            values or for themselves, nesting beyond 64, a NUL, or no keys where they are needed.
    """
    before = f"{where}, " if where else ""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise StrictYAMLError(f"{before}{line}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise StrictYAMLError(f"{before}{' '.join(reason.split())}") from error
    if needs_keys and not (isinstance(root, yaml.MappingNode) and root.value):
        found = "is empty" if root is None else "holds no keys"
        raise StrictYAMLError(
            f"the configuration {where} {found}; expected keys such as model, data and trainer."
        )
    if root is not None:
        _Check(before).visit(root, (), 0)


class _Check:
    """One pass over the nodes of a document; a node that an alias shares is visited once."""

    def __init__(self, before: str):
        self.before = before
        self.sizes: dict[int, int | None] = {}  # values that a node stands for; None: under way
        self.written = 0

    def visit(self, node: yaml.Node, keys: tuple[str, ...], depth: int) -> int:
        """Check a node and those in it; how many values it stands for."""
        known = self.sizes.get(id(node), 0)
        if known:
            return known
        if known is None:
            self._refuse(node, f"{_dotted(keys)} holds an alias of itself. Write it out.")
        if depth > _MAX_DEPTH:
            self._refuse(node, f"{_dotted(keys[:3])} is nested deeper than {_MAX_DEPTH}.")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            self._refuse(node, f"{_dotted(keys)} has the tag {node.tag}. Leave it out.")
        self.sizes[id(node)] = None
        self.written += 1
        size = 1
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node, keys)
        elif isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            self._refuse(node, f"{_dotted(keys)} holds a NUL character, which no name has.")
        elif node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
            self._refuse(node, f"{_dotted(keys)} has more than {_MAX_DIGITS} digits.")
        for inner, inner_keys in _inner(node, keys):
            size += self.visit(inner, inner_keys, depth + 1)
            if size > _MAX_ALIASED + self.written:
                self._refuse(
                    node,
                    f"aliases make more than {_MAX_ALIASED:,} values of {_dotted(inner_keys)}. "
                    "Write out what is needed.",
                )
        self.sizes[id(node)] = size
        return size

    def _check_keys(self, node: yaml.MappingNode, keys: tuple[str, ...]) -> None:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key is a list or a mapping; expected a name.")
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = (key.tag, key.value)
            if name in lines:
                self._refuse(
                    key,
                    f"the key {_dotted((*keys, key.value))} stands a second time, after line "
                    f"{lines[name]}. Keep one of them.",
                )
            lines[name] = line

    def _refuse(self, node: yaml.Node, reason: str) -> None:
        raise StrictYAMLError(f"{self.before}line {node.start_mark.line + 1}: {reason}")


def _inner(node: yaml.Node, keys: tuple[str, ...]) -> Iterator[tuple[yaml.Node, tuple[str, ...]]]:
    """The nodes in a node, with the keys that lead to them."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield value, (*keys, key.value)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield value, (*keys, str(number))


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join(keys) or "it"


def _name(path: str | Path) -> str:
    """A file's name that can be printed."""
    return str(path).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
