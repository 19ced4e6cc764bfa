"""JSON: of what comes from elsewhere, what cannot be kept without loss is an error of one line."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rosa_lightning.utils.files import atomic_write, open_input, read_lines, read_text


class JSONError(ValueError):
    """What is wrong with a text, as the end of a sentence about it."""

    def __init__(self, reason: str, *, extra_data: bool = False) -> None:
        super().__init__(reason)
        self.extra_data = extra_data
        """Whether a value is there, and more after it."""


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JSONError: It is no JSON, is nested too deeply, holds an integer too long to read, or an
            object that gives a name twice, of which all values but one would be ignored.
    """
    with _told():
        return _DECODER.decode(text)


def is_list(text: str) -> bool:
    """Whether a JSON text begins as a list."""
    return _START.match(text) is not None


def items(text: str) -> Iterator[Any]:
    """The items of a JSON list, each read when it is its turn, so that not all are held.

    JSONError as `parse`, after the items before it.
    """
    with _told():
        start = _START.match(text)
        if start is None:
            raise JSONError("is no list")
        position, end = start.end(), _END.match(text, start.end())
        while end is None:
            item, position = _DECODER.raw_decode(text, position)
            yield item
            if (end := _END.match(text, position)) is None:
                if (comma := _COMMA.match(text, position)) is None:
                    raise json.JSONDecodeError(
                        "Expecting ',' delimiter", text, _after_space(text, position)
                    )
                position = comma.end()
        if end.end() < len(text):
            raise json.JSONDecodeError("Extra data", text, end.end())


@contextmanager
def _told() -> Iterator[None]:
    """What the decoder says, as `JSONError`."""
    try:
        yield
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise JSONError(
            f"is not JSON: {where}: {error.msg}", extra_data=error.msg == "Extra data"
        ) from error
    except RecursionError as error:
        raise JSONError("is nested too deeply to be read") from error
    except JSONError:
        raise
    except ValueError as error:  # of int(): Python bounds the digits
        raise JSONError("holds an integer of more digits than can be read") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        found = parse(read_text(path))
        return found if isinstance(found, dict) else {}
    return {}


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of one a line, without lines that are none, such as one cut off."""
    with open_input(path) as file:
        for line in read_lines(file, path):
            with suppress(ValueError):
                found = parse(line.decode("utf-8", "replace"))
                if isinstance(found, dict):
                    yield found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a file, in folders that are made; errors as `atomic_write`."""
    atomic_write(path, json.dumps(content, indent=1).encode())


def half_character(text: str) -> str | None:
    r"""The first half of a surrogate pair without its other half, as ``\ud83d``, or None.

    JSON can spell it and UTF-8 cannot, so no tokenizer and no file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise JSONError(f"gives {name[:40]!r} twice in one object")
            seen.add(name)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE, _START, _COMMA, _END = (
    re.compile(f"[ \t\n\r]*{mark}[ \t\n\r]*") for mark in ("", r"\[", ",", r"\]")
)


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position
