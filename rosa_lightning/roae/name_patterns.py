"""Regular expressions over names of modules, matched in bounded time.

PEFT matches the patterns of an adapter's configuration by `re`, which takes exponential time for
some of them; an adapter of a stranger would hang its reader. Here all ways to match are followed at
once: where a name may stand is a set of positions, kept as the bits of a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from operator import or_
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_NAME = 512
"""Characters of the longest name."""
_MOST_WORK = 10**6
"""Characters of the patterns times names."""
_PLAIN = re.compile(r"[\w.-]+")
_MOST_PLAIN = 2 * 10**7
"""Plain patterns times names."""

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: lambda one: one.isdecimal(),
    codes.CATEGORY_NOT_DIGIT: lambda one: not one.isdecimal(),
    codes.CATEGORY_WORD: lambda one: one.isalnum() or one == "_",
    codes.CATEGORY_NOT_WORD: lambda one: not (one.isalnum() or one == "_"),
    codes.CATEGORY_SPACE: lambda one: one.isspace(),
    codes.CATEGORY_NOT_SPACE: lambda one: not one.isspace(),
}


def check_patterns(patterns: Mapping[str, Any] | None, num_names: int) -> None:
    """Check that patterns can be matched against so many names in seconds.

    Raises:
        ValueError: They cannot, or one is no regular expression or uses what is not followed here:
            names a pattern.
    """
    plain = [pattern for pattern in patterns or {} if _PLAIN.fullmatch(pattern)]
    others = [pattern for pattern in patterns or {} if not _PLAIN.fullmatch(pattern)]
    work = sum(map(len, others)) * num_names
    if work > _MOST_WORK or len(plain) * num_names > _MOST_PLAIN:
        first = max(others or plain, key=len)
        raise ValueError(
            f"has {len(plain) + len(others)} patterns, such as {first[:60]!r}, for {num_names} "
            "modules, which would take too long to match. Name modules in them."
        )
    for pattern in others:
        _tree(pattern)


def matches(pattern: str, name: str) -> bool:
    r"""Whether PEFT's pattern is that of a module: ``re.match(rf"(.*\.)?({pattern})$", name)``.

    Raises:
        ValueError: As `check_patterns`, or for a name that is too long.
    """
    if len(name) > MOST_NAME:
        raise ValueError(f"is asked for a module of a name of {len(name)} characters.")
    if _PLAIN.fullmatch(pattern):
        end = name.removesuffix("\n")[-len(pattern) :]
        before = name.removesuffix("\n")[: -len(pattern)]
        fits = len(end) == len(pattern) and (not before or before.endswith("."))
        fits = fits and "\n" not in before
        # A dot stands for any character, as in every regular expression.
        return fits and (
            end == pattern
            or all(a == b or (a == "." and b != "\n") for a, b in zip(pattern, end, strict=True))
        )
    return bool(_Walk(name).ends(_tree(pattern), 1))


@lru_cache(maxsize=1024)
def _tree(pattern: str) -> Any:
    try:
        tree = parser.parse(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"has {pattern[:60]!r}, no regular expression: {error}.") from error
    if len(pattern) > MOST_NAME or tree.state.flags != re.UNICODE or not _is_simple(tree):
        raise ValueError(
            f"has the pattern {pattern[:60]!r}, which is longer than {MOST_NAME} characters, "
            "repeats a repetition, looks around or refers back. Name the modules instead."
        )
    return tree


def _is_simple(tree: Any, *, in_repeat: bool = False) -> bool:
    """Whether `_walk` follows all of a tree, and no repetition stands within another."""
    for kind, what in tree:
        if kind in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            continue
        if kind is codes.AT and what in _BORDERS:
            continue
        if kind is codes.SUBPATTERN and not what[1] and not what[2]:
            parts = [what[3]]
        elif kind is codes.BRANCH:
            parts = what[1]
        elif kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            repeats = what[1] > 1
            if repeats and in_repeat:
                return False
            if not _is_simple(what[2], in_repeat=in_repeat or repeats):
                return False
            continue
        else:
            return False
        if not all(_is_simple(part, in_repeat=in_repeat) for part in parts):
            return False
    return True


_BORDERS: dict[Any, Callable[[str], int]] = {
    codes.AT_BEGINNING: lambda name: 1,
    codes.AT_BEGINNING_STRING: lambda name: 1,
    codes.AT_END: lambda name: 1 << len(name) | 1 << len(name.removesuffix("\n")),
    codes.AT_END_STRING: lambda name: 1 << len(name),
}
"""The positions at which each holds."""


class _Walk:
    """Follows trees over one name, all ways at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._standing: dict[int, int] = {}  # by leaf

    def ends(self, tree: Any, places: int) -> int:
        """Where a match of a tree may end that begins at one of these positions."""
        for node in tree:
            kind, what = node
            if not places:
                return 0
            if kind is codes.AT:
                places &= _BORDERS[what](self.name)
            elif kind is codes.SUBPATTERN:
                places = self.ends(what[3], places)
            elif kind is codes.BRANCH:
                places = reduce(or_, [self.ends(part, places) for part in what[1]])
            elif kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
                least, most, part = what
                places = self._repeated(least, most, part, places)
            else:
                places = (places & self._taken(node)) << 1
        return places

    def _repeated(self, least: int, most: int, tree: Any, places: int) -> int:
        """A name has so few positions that the counts, of any size, matter no more after some."""
        for _ in range(min(least, len(self.name) + 1)):
            places = self.ends(tree, places)
        for _ in range(min(most - least, len(self.name) + 1)):
            places |= self.ends(tree, places)
        return places

    def _taken(self, leaf: Any) -> int:
        """The positions at which a character stands that a leaf takes."""
        if id(leaf) not in self._standing:
            kind, what = leaf
            bits = (1 << place for place, one in enumerate(self.name) if _takes(kind, what, one))
            self._standing[id(leaf)] = sum(bits)
        return self._standing[id(leaf)]


def _takes(kind: Any, what: Any, one: str) -> bool:
    if kind is codes.ANY:
        return one != "\n"
    if kind is codes.LITERAL:
        return bool(ord(one) == what)
    if kind is codes.NOT_LITERAL:
        return bool(ord(one) != what)
    negated = what[0][0] is codes.NEGATE
    found = False
    for part, value in what[negated:]:
        if part is codes.RANGE:
            found |= value[0] <= ord(one) <= value[1]
        elif part is codes.CATEGORY:
            found |= _CATEGORIES[value](one)
        else:
            found |= ord(one) == value
    return found is not negated
