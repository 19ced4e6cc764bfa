"""Texts to token ids: fields stay text, whatever special tokens they spell."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

# Private-use characters around the special tokens that a field spells.
_START, _END = "\U000f0000", "\U000f0001"


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text in token ids."""

    ids: list[int]
    starts: list[int] | None
    """Index of each token's first character in the text without marks, ascending; None where the
    tokenizer does not say."""

    def covering(self, character: int) -> int | None:
        """Index of the first token that covers a character of the text; None if unknown."""
        last = bisect_right(self.starts, character) - 1 if self.starts else -1
        return bisect_left(self.starts, self.starts[last]) if self.starts and last >= 0 else None

    def behind(self, count: int, characters: int) -> "Tokens":
        """The tokens after the first `count`, as of the text after its first `characters`."""
        starts = self.starts and [start - characters for start in self.starts[count:]]
        return Tokens(self.ids[count:], starts)


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes texts without the special tokens that a tokenizer adds by itself."""

    tokenizer: Any
    end: str = ""
    """A further token that fields do not write: it ends a turn and may not be marked as special."""

    @cached_property
    def _special(self) -> str:
        """A pattern of all special tokens, the longest first; of nothing if there are none."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= {*self.tokenizer.all_special_tokens, self.end}
        found = sorted((token for token in special if token.strip()), key=len, reverse=True)
        return "|".join(map(re.escape, found)) or "(?!)"

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        return re.compile(f"{_START}({self._special}){_END}")

    @cached_property
    def _before(self) -> list[tuple[str, list[int]]]:
        """Characters to stand before a text, one of which is mostly merged with nothing."""
        return [(one, self._encoded([one])[0].ids) for one in "\n|=~"]

    def mark(self, field: str) -> str:
        """The field, with marks around all that spells a special token."""
        return re.sub(self._special, f"{_START}\\g<0>{_END}", field)

    def unmark(self, text: str) -> str:
        """The text without marks."""
        return self._marked.sub(r"\1", text) if _START in text else text

    def __call__(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokens of texts whose fields are marked."""
        texts = list(texts)
        plain = [text for text in texts if _START not in text]
        encoded = iter(self._encoded(plain) if plain else [])
        return [self._in_parts(text) if _START in text else next(encoded) for text in texts]

    def following(self, text: str) -> Tokens:
        """Tokens of a text that follows another one, whose tokens are known."""
        return self._in_parts(text, follows=True)

    def _in_parts(self, text: str, follows: bool = False) -> Tokens:
        # Every other part spells a special token.
        parts = self._marked.split(text)
        tokens = [
            self._as_text(part) if number % 2 else self._part(part, follows or number > 0)
            for number, part in enumerate(parts)
        ]
        return _joined(tokens, parts)

    def _part(self, part: str, follows: bool = True, **options: Any) -> Tokens:
        """Tokens of a text. Of one that follows another, without the space of a first word."""
        if not part:
            return Tokens([], [])
        for before, ids in self._before if follows else ():
            (found,) = self._encoded([before + part], **options)
            if found.ids[: len(ids)] == ids:
                return found.behind(len(ids), 1)
        (found,) = self._encoded([part], **options)
        return found

    def _as_text(self, token: str) -> Tokens:
        """Tokens of the characters of a special token."""
        found = self._part(token, split_special_tokens=True)
        if self.tokenizer.convert_tokens_to_ids(token) in found.ids and len(token) > 1:
            # It is not special to the tokenizer, or also a word of its vocabulary.
            halves = (token[:1], token[1:])
            found = _joined([self._part(one, split_special_tokens=True) for one in halves], halves)
        return found

    def _encoded(self, texts: list[str], **options: Any) -> list[Tokens]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            **options,
        )
        if not encoded.is_fast:  # of the others, none tells its offsets
            return [Tokens(list(ids), None) for ids in encoded["input_ids"]]
        return [Tokens(one.ids, [start for start, _ in one.offsets]) for one in encoded.encodings]


def prompt_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS), mostly one or none."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    start = next((start for start in starts if full[start : start + len(bare)] == bare), 0)
    return list(full[:start])


def _joined(tokens: Sequence[Tokens], texts: Sequence[str]) -> Tokens:
    """Tokens of texts that follow one another."""
    ids = [one for part in tokens for one in part.ids]
    if any(part.starts is None for part in tokens):
        return Tokens(ids, None)
    offsets = zip(tokens, accumulate(map(len, texts), initial=0), strict=False)
    return Tokens(ids, [offset + start for part, offset in offsets for start in part.starts or ()])
