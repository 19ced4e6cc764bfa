"""The parser of the command line: its errors are one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from typing import Any, NoReturn

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

TRACEBACK_VARIABLE = "ROSA_TRACEBACK"
"""Environment variable that, set to 1, shows the traceback of a user's error."""

SUGGESTION = " Did you mean"


class RoSAParser(LightningArgumentParser):
    """A parser whose errors are one line and name the nearest right key."""

    def __init__(self, *args: Any, **kwargs: Any):
        # What is nearly a key is an error that names it, as in a file, and no other spelling.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error in one line and exit with status 2.

        Parsers of nested classes hand their error up instead, with what they know of their keys.
        """
        parser = getattr(ex, "subcommand_parser", None) or self
        message = short_message(message)
        unknown = unknown_key(message)
        if unknown is not None and SUGGESTION not in message:
            known = [action.dest for action in parser._actions]
            near = difflib.get_close_matches(unknown, known, n=1)
            message = f"{message.rstrip('.')}.{SUGGESTION} {near[0]}?" if near else message
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        if os.environ.get(TRACEBACK_VARIABLE) == "1" and ex is not None:
            traceback.print_exception(ex)
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def one_line(message: str) -> str:
    """A message on one line, without runs of blanks."""
    return re.sub(r"\s+", " ", message).strip()


def short_message(message: str) -> str:
    """The telling part of a parser's message, on one line.

    For a class in a list (a callback, say) jsonargparse tells every type that it tried; the user
    needs the reason why the class that was named does not fit.
    """
    message = one_line(message).replace("typing.", "")
    # A command's own keys carry its name, which no user writes.
    message = re.sub(r"(are required: )\w+\.", r"\1--", message)
    where = re.match(r'Parser key "([\w.]+)":', message)
    reason = re.search(
        r"(?:Problem with given class_path|expects a function or a callable class:) "
        r"(.+?)(?= - [A-Z]|\.? Given value|\. Got value: Namespace|$)",
        message,
    )
    return f"{where[1]}: {reason[1]}" if where and reason else message


def unknown_key(message: str) -> str | None:
    """The key that a parser's message calls unknown."""
    for pattern in (
        r"unrecognized arguments: --([\w.]+)",
        r"does not accept option '([\w.]+)'",
        r"Option '([\w.]+)' is not accepted",
    ):
        if match := re.search(pattern, message):
            return match.group(1)
    return None
