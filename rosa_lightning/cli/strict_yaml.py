"""YAML of a configuration, read strictly: each key once, of bounded size, and text throughout."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from rosa_lightning.utils.errors import ConfigurationError
from rosa_lightning.utils.files import printable

_MAX_BYTES = 4 * 2**20
"""Largest configuration file."""
_MAX_ALIASED = 10_000
"""Most values that aliases may add to those that are written out."""
_MAX_DEPTH = 64
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value", "timestamp")
"""What values of a configuration are; the other tags of YAML would make objects."""
_load_yaml = get_loader("yaml")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictYAMLError(yaml.YAMLError, ConfigurationError):
    """YAML that a configuration may not be; the message is one line."""


def read_configuration(path: str | Path) -> str:
    """The text of a configuration file.

    Raises:
        StrictYAMLError: It cannot be read, is larger than 4 MiB, no UTF-8, empty, or no mapping of
            keys; or what `check_yaml` refuses. Names the file.
    """
    name = printable(path).replace("\0", "\\0")
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise StrictYAMLError(f"the configuration {name} cannot be read: {reason}.") from error
    if len(content) > _MAX_BYTES:
        raise StrictYAMLError(
            f"the configuration {name} is larger than {_MAX_BYTES // 2**20} MiB. Name data by its "
            "path instead of writing it there."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise StrictYAMLError(
            f"the configuration {name} is not UTF-8: line {line} holds the byte "
            f"0x{content[error.start]:02x}. Save it as UTF-8."
        ) from error
    root = check_yaml(text, name)
    if not (isinstance(root, yaml.MappingNode) and root.value):
        found = "is empty" if root is None else "holds no keys"
        raise StrictYAMLError(
            f"the configuration {name} {found}; expected keys such as model, data and trainer."
        )
    return text


def check_yaml(text: str, where: str = "") -> yaml.Node | None:
    """Check YAML before values are made of it; returns the root of the document.

    Raises:
        StrictYAMLError: A syntax error, a key that stands twice, aliases that stand for too many
            values or for themselves, nesting beyond 64, or a tag that makes objects. Begins with
            ``where``, a file's name, say.
    """
    before = f"{where}, " if where else ""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _check(root, (), [], set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise StrictYAMLError(f"{before}{line}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise StrictYAMLError(f"{before}{' '.join(reason.split())}") from error
    return root


def _check(node: yaml.Node, keys: tuple[str, ...], visits: list[int], nodes: set[int]) -> None:
    """Check a node and those in it; visits are one for each time that an alias leads to a node."""
    visits.append(1)
    nodes.add(id(node))
    line, name = f"line {node.start_mark.line + 1}: ", ".".join(keys[:3]) or "it"
    if len(keys) > _MAX_DEPTH:
        raise StrictYAMLError(f"{line}{name} is nested deeper than {_MAX_DEPTH}.")
    if len(visits) - len(nodes) > _MAX_ALIASED:
        raise StrictYAMLError(
            f"{line}aliases make more than {_MAX_ALIASED:,} values of {name}. Write out what is "
            "needed."
        )
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise StrictYAMLError(f"{line}{name} has the tag {node.tag}. Leave it out.")
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _check(value, (*keys, str(number)), visits, nodes)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = f"line {key.start_mark.line + 1}: "
            if not isinstance(key, yaml.ScalarNode):
                raise StrictYAMLError(f"{line}a key is a list or a mapping; expected a name.")
            own = (*keys, key.value)
            if key.value in lines and key.value != "<<":
                raise StrictYAMLError(
                    f"{line}the key {'.'.join(own)} stands a second time, after line "
                    f"{lines[key.value]}. Keep one of them."
                )
            lines[key.value] = key.start_mark.line + 1
            _check(value, own, visits, nodes)


def load_yaml(text: str) -> Any:
    """Values of YAML that passes `check_yaml`."""
    check_yaml(text)
    return _load_yaml(text)
