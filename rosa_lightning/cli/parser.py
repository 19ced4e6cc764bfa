"""The parser of the command line: its errors are one line."""

import difflib
import os
import re
import sys
import traceback
from typing import Any, NoReturn

from jsonargparse import ArgumentError, get_loader
from lightning.pytorch.cli import LightningArgumentParser

from rosa_lightning.cli.configuration import ONE_SELECTION, check_groups
from rosa_lightning.cli.names import RENAMED, SUGGESTION
from rosa_lightning.cli.strict_yaml import StrictYAMLError, read_configuration
from rosa_lightning.utils.errors import ConfigurationError
from rosa_lightning.utils.text import one_line

TRACEBACK_VARIABLE = "ROSA_TRACEBACK"
"""Environment variable that, set to 1, shows the traceback of a user's error."""


class RoSAParser(LightningArgumentParser):
    """A parser whose errors are one line and name the nearest right key."""

    def __init__(self, *args: Any, **kwargs: Any):
        # What is nearly a key is an error that names it, as in a file, and no other spelling.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file that is one.

        Read once more than needed, since only here the file's name is known.
        """
        try:
            if str(path) != "-":
                read_configuration(str(getattr(path, "absolute", path)))
        except StrictYAMLError as error:
            self.error(str(error), error)
        return super().parse_path(path, *args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse the text of a configuration whose groups are mappings.

        jsonargparse would take defaults in place of a group that is something else.
        """
        try:
            check_groups(get_loader("yaml")(content))
        except ConfigurationError as error:
            self.error(str(error), error)
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error in one line and exit with status 2.

        Parsers of nested classes hand their error up instead, with what they know of their keys.
        """
        parser = getattr(ex, "subcommand_parser", None) or self
        message = short_message(message)
        if "rosa_lightning.DynamicLayerSelection" in message and "trainer.callbacks" in message:
            message = ONE_SELECTION
        unknown = unknown_key(message)
        if unknown is not None and SUGGESTION not in message:
            known = [*parser.get_defaults(skip_validation=True).keys(branches=True)]
            known += ["config", "print_config"]
            near = [key for key in (RENAMED.get(unknown),) if key in known]
            near = near or difflib.get_close_matches(unknown, known, n=1)
            message = f"{message.rstrip('.')}.{SUGGESTION} {near[0]}?" if near else message
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        if os.environ.get(TRACEBACK_VARIABLE) == "1" and ex is not None:
            traceback.print_exception(ex)
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def begin_anew(action: Any) -> None:
    """Let an option of a dictionary with a ``class_path`` drop the arguments of another class.

    jsonargparse takes those for attributes, and fails where a file or a default has set some.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and args[3] in (f"--{self.dest}", f"--{self.dest}.class_path"):
            args[1].pop(self.dest, None)
        return kind.__call__(self, *args, **kwargs)

    kind = type(action)
    action.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def short_message(message: str) -> str:
    """The telling part of a parser's message, on one line.

    For a class in a list (a callback, say) jsonargparse tells every type that it tried; the user
    needs the reason why the class that was named does not fit.
    """
    message = one_line(_without_unions(message)).replace("typing.", "")
    message = re.sub(
        r"Importing '([\w.]+)' is not allowed.*",
        r"\1 is nothing that a configuration may name.",
        message,
    )
    # A command's own keys carry its name, which no user writes.
    message = re.sub(r"(are required: )\w+\.", r"\1--", message)
    group = _GROUP.match(message)
    if group is not None:
        inner = (group[3] or "").removeprefix(" - ")
        if inner and "Unable to load config" not in inner:
            return short_message(inner)
        return f"{group[1]}: {group[2]} is neither a mapping of its settings nor a file with one."
    where = re.match(r'Parser key "([\w.]+)":', message)
    reason = _REASON.search(message)
    if where and reason:
        return f"{where[1]}: {reason[1]}"
    message = _WRONG_TYPE.sub(r"\3 is given; expected \1\2.", message)
    message = re.sub(r"expected Literal", "expected one of Literal", message)
    message = re.sub(r"Literal\[([^]]*)]", lambda found: found[1].replace("'", ""), message)
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)


_WRONG_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|(.+?))\. Got value: (.+)$")
_GROUP = re.compile(r'Parser key "([\w.]+)": Unable to load config (.+?)( - Parser key .+)?$')
_REASON = re.compile(
    r"(?:Problem with given class_path|expects a function or a callable class:|"
    r"(?=Import path \S+ does not))\s*"
    r"(.+?)(?=\s+- [A-Z]|\.? Given value|\. Got value: Namespace|$)",
    re.DOTALL,
)
"""Why a class that was named does not fit."""
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(?P<types>[^\n]*)\]\s+"
    r"Errors:(?P<errors>.*?)\s+Given value type: [^\n]*\s+Given value: (?P<value>[^\n]*)",
    re.DOTALL,
)


def _without_unions(message: str) -> str:
    """A message with what fits none of several types told in a few words, the innermost first."""
    while (start := message.rfind("Does not validate against any of the Union")) >= 0:
        found = _UNION.match(message, start)
        if found is None:
            return message
        reason = _REASON.search(found["errors"])
        types = re.sub(
            r"<class '([\w.]+)'>", lambda name: name[1].rpartition(".")[2], found["types"]
        )
        types = types.replace("NoneType", "null").replace("typing.", "")
        value = re.sub(r"NestedArg\(key='([\w.]+)'.*", r"\1 without a class_path", found["value"])
        value = value if len(value) < 80 else f"{value[:77]}..."
        short = reason[0] if reason else f"{value} is given; expected one of {types}"
        message = message[:start] + short + message[found.end() :]
    return message


def unknown_key(message: str) -> str | None:
    """The key that a parser's message calls unknown."""
    for pattern in (
        r"unrecognized arguments: --([\w.-]+)",
        r"does not accept option '([\w.]+)'",
        r"Option '([\w.]+)' is not accepted",
    ):
        if match := re.search(pattern, message):
            return match.group(1)
    return None
