"""Prompt styles: the text around a record, its token ids, and the tokens that end a response.

A new style is a subclass of `PromptStyle` with an entry in `STYLES`. What a record's fields say
stays text: a special token that one spells (``</s>`` in a record about HTML) is encoded as the
characters that it is, while special tokens that a chat template writes are encoded as such.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from rosa_lightning.models.kv_cache import common_start
from rosa_lightning.tasks.records import Record

StyleName = Literal["alpaca", "chat", "plain"]

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


# --- styles ---------------------------------------------------------------------------------


class EncodedRecord(NamedTuple):
    """A prompt and its response in token ids."""

    prompt: list[int]
    """All tokens before the response, without the style's prefix."""
    text: str
    """The response as the style writes it."""
    reply: Tokens
    """The response and the token that ends it."""
    rewritten: bool = False
    """Whether the style changes the response, outer white space aside."""


class PromptStyle:
    """The instruction and its input, each on a line of its own (`plain`).

    Prompt and response are tokenized apart and joined as ids, so the border between them is exact
    for tokenizers that would merge across it too. Special tokens that a field spells are encoded
    as text.
    """

    next_prompt: tuple[str, ...] = ()
    """What a model writes when it has answered and makes up the next instruction."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def texts(self) -> TextTokenizer:
        """Encodes text in which fields are marked."""
        return TextTokenizer(self.tokenizer)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens at the beginning that a prompt keeps when it is cut: BOS, if any."""
        return prompt_prefix(self.tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response; it is trained to end with the first.

        Raises ValueError where the tokenizer does not have this style.
        """
        return [self.tokenizer.eos_token_id]

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        return f"{instruction}\n{context}\n" if context else f"{instruction}\n"

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, without the prefix."""
        mark = self.texts.mark
        found = self.texts(self.apply(mark(one.instruction), mark(one.input)) for one in records)
        return [tokens.ids for tokens in found]

    def encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Prompts and responses in token ids."""
        replies = self.texts(self.texts.mark(record.output) for record in records)
        for record, prompt, reply in zip(records, self.prompts(records), replies, strict=True):
            yield EncodedRecord(
                prompt, record.output, Tokens([*reply.ids, *self.stop_ids], reply.starts)
            )

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt; `end` adds the token that ends it."""
        (found,) = self.texts([self.texts.mark(text)])
        return [*found.ids, *self.stop_ids] if end else found.ids


class AlpacaStyle(PromptStyle):
    """Alpaca's instruction template, as LLM-Adapters' `generate_prompt` words it (`alpaca`)."""

    next_prompt = ("### Instruction:",)
    _BEFORE = "Below is an instruction that describes a task"
    _WRITE = "Write a response that appropriately completes the request.\n\n"

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        asked = f"### Instruction:\n{instruction}\n\n"
        if not context:
            return f"{self._BEFORE}. {self._WRITE}{asked}### Response:\n"
        paired = f"{self._BEFORE}, paired with an input that provides further context. "
        return f"{paired}{self._WRITE}{asked}### Input:\n{context}\n\n### Response:\n"


_ASKED, _REPLY = "ROSA-ASKED", "ROSA-REPLY"
"""Stand for the user's and the assistant's text where their surroundings are looked at."""
_REPLIES = (
    *(_REPLY, "an", "It is", "The", "To", "Yes", "true", "We", "I", "A", "B", "So", "Let"),
    *("42", "(A)", '"so"', "'so'", "-1", "$x$", "\\(x\\)", "*", "# A", "<a>", "[1]", "{a}", "="),
    *("é", "Я", "λ", "ש", "ع", "अ", "한", "あ", "是", "🙂"),
)
"""Replies that begin in different ways: a tokenizer may merge some with what stands before."""
_MOST_MERGED = 16
"""Characters before a reply that may be merged with it."""
_OPTIONS: dict[str, Any] = {
    # Read by templates of models that can think first: the records' responses do not.
    "enable_thinking": False,
    # Llama 3's templates write today's date by default: a run that is resumed tomorrow must see
    # the same tokens. This is the date of the older ones.
    "date_string": "26 Jul 2024",
}


class _Ending(NamedTuple):
    """What follows a reply."""

    text: str
    """Text before the stop token, mostly none."""
    stop: int
    token: str = ""
    """The stop token as the template writes it; empty where it is added to that."""


class _Border(NamedTuple):
    """Where prompts end."""

    behind: list[int]
    """Tokens behind it if the reply is `_REPLY`."""
    merged: int
    """Characters behind it that stand before the reply, as some replies are merged with them."""


class ChatStyle(PromptStyle):
    """The tokenizer's own chat template: a user's message and the assistant's reply (`chat`).

    A conversation is rendered and tokenized as a whole, so that its ids are those of
    `apply_chat_template`; `add_generation_prompt` is not looked at. The prompt is the tokens that
    stand before the reply whatever the reply is: the space of "[/INST] Yes" belongs to the reply's
    first token. A reply that is merged with the end of its prompt is tokenized by itself, as the
    prompt of an evaluation does not know of the merge. Nothing behind the first special token after
    the reply is trained on.
    """

    @cached_property
    def texts(self) -> TextTokenizer:
        """Encodes text in which fields are marked."""
        return TextTokenizer(self.tokenizer, self._ending.token)

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens at the beginning that a prompt keeps when it is cut: BOS, if any."""
        (found,) = self._until_border([self._around(_ASKED)[0]])
        own, bos = prompt_prefix(self.tokenizer), [self.tokenizer.bos_token_id]
        return next((start for start in (own, bos) if start and start == found[: len(start)]), [])

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the template's end of a turn, and EOS."""
        return list(dict.fromkeys([self._ending.stop, self.tokenizer.eos_token_id]))

    def apply(self, instruction: str, context: str) -> str:
        """The text before the response."""
        asked = self.texts.mark(_question(instruction, context))
        return self.texts.unmark(self._around(asked)[0])

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Token ids of the prompts, without the prefix."""
        users = [self.texts.mark(_question(one.instruction, one.input)) for one in records]
        found = self._until_border([self._around(user)[0] for user in users])
        return [prompt[len(self.prefix) :] for prompt in found]

    def encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Prompts and responses in token ids; white space around a response is the template's."""
        users = [_question(one.instruction, one.input) for one in records]
        yield from self._conversations(users, [one.output.strip() for one in records])

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt; `end` adds the token that ends it."""
        (encoded,) = self._conversations(["Q"], [text], end=end)
        return encoded.reply.ids

    def _conversations(
        self, users: Sequence[str], replies: Sequence[str], *, end: bool = True
    ) -> Iterator[EncodedRecord]:
        """Questions and replies, which are not marked yet, as turns."""
        texts = self.texts
        users, replies = ([*map(texts.mark, some)] for some in (users, replies))
        around = [self._around(user) for user in users]
        written = [self._written(*one) for one in zip(users, replies, around, strict=True)]
        befores = [before for before, _ in around]
        ending = self._ending.text + self._ending.token if end else ""
        added = [] if self._ending.token or not end else [self._ending.stop]
        prompts = self._until_border(befores)
        rows = zip(befores, written, strict=True)
        wholes = texts(before + reply + ending for before, (reply, _) in rows)
        for before, prompt, (reply, rewritten), whole in zip(
            befores, prompts, written, wholes, strict=True
        ):
            if whole.ids[: len(prompt)] == prompt:
                tokens = whole.behind(len(prompt), len(texts.unmark(before)))
            else:
                merged = before[len(before) - self._border.merged :]
                tokens = texts.following(merged + reply + ending).behind(0, len(merged))
            tokens.ids.extend(added)
            yield EncodedRecord(prompt[len(self.prefix) :], texts.unmark(reply), tokens, rewritten)

    @cached_property
    def _ending(self) -> _Ending:
        """The first special token after a reply; EOS for a template that writes none there."""
        after = self._surroundings[1]
        special = {self.tokenizer.eos_token: self.tokenizer.eos_token_id}
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.content.strip():  # some tokenizers add runs of spaces
                special[token.content] = number
        starts = [(after.index(token), -len(token), token) for token in special if token in after]
        if not starts:
            return _Ending("", self.tokenizer.eos_token_id)
        start, _, first = min(starts)
        return _Ending(after[:start], special[first], first)

    @cached_property
    def _surroundings(self) -> tuple[str, str]:
        """The text before and after the reply `_REPLY` to `_ASKED`."""
        text, other = (self._rendered(_ASKED, reply) for reply in _REPLIES[:2])
        before, _, after = text.partition(_REPLY)
        is_framed = other.startswith(before) and other.endswith(after)
        if not is_framed or text.count(_REPLY) != 1 or _ASKED not in before:
            raise ValueError(
                "The tokenizer's chat template does not write each message once and as it is, in "
                "the same text whatever it says, so what to train on cannot be told. Set "
                "data.prompt_style: alpaca, or data.tokenizer to one with another chat template."
            )
        return before, after

    @cached_property
    def _border(self) -> _Border:
        before, after = self._surroundings
        written = {reply: self._rendered(_ASKED, reply) for reply in _REPLIES}
        intact = [reply for reply in _REPLIES if written[reply] == before + reply + after]
        starts = [tokens.ids for tokens in self.texts(before + reply for reply in intact)]
        # An unknown word may be the same token whatever it is.
        size = min(len(common_start(starts)), min(map(len, starts)) - 1)
        (found,) = self.texts([before + _REPLY])
        shorter = (before[: len(before) - count] for count in range(_MOST_MERGED))
        merged = [tokens.ids == found.ids[:size] for tokens in self.texts(shorter)]
        return _Border(found.ids[size:], merged.index(True) if True in merged else 0)

    def _until_border(self, befores: Sequence[str]) -> list[list[int]]:
        """Token ids up to the border, of texts that stand before replies."""
        behind, merged = self._border
        wholes = self.texts(before + _REPLY for before in befores)
        found = []
        for before, whole in zip(befores, wholes, strict=True):
            if whole.ids[-len(behind) :] == behind:
                found.append(whole.ids[: -len(behind)])
            else:  # what is asked is merged with what stands close to the reply
                found.append(self.texts([before[: len(before) - merged]])[0].ids)
        return found

    def _around(self, user: str) -> tuple[str, str]:
        before, _, after = self._rendered(user, _REPLY).rpartition(_REPLY)
        return before, after

    def _written(self, user: str, reply: str, around: tuple[str, str]) -> tuple[str, bool]:
        """What the template makes of a reply, and whether that is another text."""
        before, after = around
        text = self._rendered(user, reply)
        inside = text.removeprefix(before).removesuffix(after)
        if before + inside + after == text and (inside or not reply):
            return inside, inside.strip() != reply.strip()
        # In another place than that of other replies, which is where a model is asked for it.
        return reply, True

    def _rendered(self, user: str, reply: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "data.prompt_style is chat, but the tokenizer has no chat template. Set "
                "data.prompt_style: alpaca or plain, or data.tokenizer to that of a chat model."
            )
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, **_OPTIONS)
        except Exception as error:  # Jinja's, or whatever a template raises
            raise ValueError(
                f"The tokenizer's chat template cannot be used: {' '.join(str(error).split())}. "
                "Set data.prompt_style: alpaca or plain."
            ) from error
        return text


def _question(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


STYLES: dict[str, type[PromptStyle]] = {
    "alpaca": AlpacaStyle,
    "chat": ChatStyle,
    "plain": PromptStyle,
}
