"""Records to token ids, and which of them carry loss."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import tokenizers
import transformers

from rosa_lightning.data.prompts import STYLES, PromptStyle, StyleName
from rosa_lightning.models.loading import load_tokenizer
from rosa_lightning.models.vocabulary import beyond, check_ids, check_vocabulary
from rosa_lightning.tasks.records import Record, answer_start, task_of

Overlong = Literal["cut", "drop"]
LossTurns = Literal["all", "last"]

ENCODING = 4
"""Raise it when `Encoder`, or what it calls, makes other tokens of the same record."""


@dataclass(slots=True)
class Example:
    """A record in token ids."""

    record: Record
    prompt: list[int]
    """BOS, if the tokenizer adds it, then the prompt. Never empty."""
    response: list[int]
    """The response and its stop token, unless it was cut; empty for prompts to answer. Of a
    conversation, all from the first reply with loss on."""
    answer: int = 0
    """Index in `response` of the final answer's first token; of the last reply's if the end states
    no answer."""
    too_long: bool = False
    """Whether prompt and response were longer than `data.max_length`."""
    response_cut: bool = False
    rewritten: bool = False
    """Whether the chat template changes the response."""
    gaps: list[int] = field(default_factory=list)
    """First and past the last token, in `response`, of each part without loss, in turn. The last
    one stands before the last reply."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)

    @property
    def asked(self) -> list[int]:
        """All tokens before the last reply."""
        return [*self.prompt, *self.response[: self.gaps[-1]]] if self.gaps else self.prompt

    def labels(self, without: int) -> list[int]:
        """The token ids, and `without` in place of those without loss."""
        found = [without] * len(self.prompt) + list(self.response)
        borders = [len(self.prompt) + border for border in self.gaps]
        for start, stop in zip(borders[::2], borders[1::2], strict=True):
            found[start:stop] = [without] * (stop - start)
        return found


@dataclass(frozen=True)
class Encoder:
    """Tokenizes records.

    A record beyond `max_length` loses the beginning of its prompt, but for BOS, and then the end of
    its response; a conversation loses its first turns before, up to a user's turn, but for that of
    the system. `drop` leaves such records out of training. Plain text becomes as many examples as
    it takes, each of which begins with BOS or the token before.
    """

    tokenizer: Any
    """A tokenizer of `transformers`."""
    style_name: StyleName = "alpaca"
    max_length: int = 512
    overlong: Overlong = "cut"
    with_response: bool = True
    num_rows: int | None = None
    """Rows of the base's embedding, which bound token ids; None if unknown."""
    loss_turns: LossTurns = "all"
    """Whether all replies of a conversation carry loss, or the last alone."""

    @cached_property
    def style(self) -> PromptStyle:
        """The text around the records."""
        return STYLES[self.style_name](self.tokenizer)

    @cached_property
    def bound(self) -> int | None:
        """The embedding's rows, where the tokenizer has ids beyond them."""
        return self.num_rows if beyond(self.tokenizer, self.num_rows) else None

    def __call__(self, records: Sequence[Record]) -> list[Example]:
        """The records in token ids; one example each, of plain text one or more.

        Raises ValueError for a record with a token that the base does not know.
        """
        found = list[Example]()
        for is_text, some in groupby(records, lambda record: record.is_text):
            encode = self._pieces if is_text else self._examples
            found += encode(list(some))
        return found

    def _examples(self, records: Sequence[Record]) -> list[Example]:
        """The records in token ids, conversations with as many turns as fit."""
        found = self._whole(records)
        if self.with_response and self.overlong == "drop":
            return found
        long = {number: one.record for number, one in enumerate(found) if one.too_long}
        while long := {number: rest for number, one in long.items() if (rest := _shorter(one))}:
            again = self._whole([*long.values()])
            for number, example in zip(long, again, strict=True):
                found[number] = replace(example, record=records[number], too_long=True)
            long = {n: one.record for n, one in zip(long, again, strict=True) if one.too_long}
        return found

    def _whole(self, records: Sequence[Record]) -> list[Example]:
        if not self.with_response:
            prompts = zip(records, self.style.prompts(records), strict=True)
            return [self._fitted(record, prompt, []) for record, prompt in prompts]
        found = []
        for record, one in zip(records, self.style.encode(records), strict=True):
            start = answer_start(task_of(record), one.text, record.answer)
            answer = 0 if start is None else one.reply.covering(start) or 0
            earlier = one.earlier if self.loss_turns == "all" else ()
            found.append(
                self._fitted(record, one.prompt, one.reply.ids, answer, one.rewritten, earlier)
            )
        return found

    def _fitted(
        self,
        record: Record,
        body: list[int],
        reply: list[int],
        answer: int = 0,
        rewritten: bool = False,
        earlier: Sequence[tuple[int, int]] = (),
    ) -> Example:
        prefix = self.style.prefix
        self._check(record, [*prefix, *body, *reply])
        whole_body, whole_reply = len(body), len(reply)
        too_long = len(prefix) + whole_body + whole_reply > self.max_length
        if too_long:
            # At least one token stays before the response: nothing else could predict its first.
            reply = reply[: self.max_length - max(len(prefix), 1)]
            room = self.max_length - len(prefix) - len(reply)
            body = body[max(0, len(body) - room) :]
            answer = answer if answer < len(reply) else 0
        cut, least = whole_body - len(body), 0 if prefix else 1
        spans = [(max(start - cut, least), stop - cut) for start, stop in earlier]
        borders = [border for span in spans if span[0] < span[1] for border in span]
        first, *rest = (*borders, len(body))
        return Example(
            record,
            prefix + body[:first],
            body[first:] + reply,
            len(body) - first + answer,
            too_long,
            len(reply) < whole_reply,
            rewritten,
            [border - first for border in rest],
        )

    def _pieces(self, records: Sequence[Record]) -> list[Example]:
        """Examples of plain texts."""
        prefix, end = self._plain.prefix, self._plain.stop_ids
        size = self.max_length - max(len(prefix), 1)
        found = list[Example]()
        texts = self._plain.texts(self._plain.texts.mark(record.output) for record in records)
        for record, tokens in zip(records, texts, strict=True):
            ids = [*tokens.ids, *end]
            self._check(record, [*prefix, *ids])
            for start in range(0 if prefix else 1, len(ids), size):
                before = prefix or ids[start - 1 : start]
                found.append(Example(record, before, ids[start : start + size]))
        return found

    @cached_property
    def _plain(self) -> PromptStyle:
        return PromptStyle(self.tokenizer)

    def _check(self, record: Record, ids: list[int]) -> None:
        if self.bound is not None:
            what = f"source {record.source}, record {record.index}"
            check_ids(ids, self.tokenizer, self.bound, what)

    def fingerprint(self, record: Record) -> str | None:
        """A digest of all that token ids depend on beside the records; None if it is unknown.

        Of tokenizers not written in Rust it is. `record` shows what a chat template does.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        # Left by an earlier call, and undone by any that gives neither.
        backend.no_truncation()
        backend.no_padding()
        style, task = self.style, task_of(record)
        settings = [
            *(task.name, task.format, task.labels),
            *(ENCODING, tokenizers.__version__, transformers.__version__),
            *(type(self.tokenizer).__name__, self.style_name, self.max_length, self.with_response),
            *(style.prefix, style.stop_ids, self.bound, self.overlong, self.loss_turns),
            getattr(self.tokenizer, "split_special_tokens", False),
            style.apply(record.instruction, record.input),
            self.tokenizer.chat_template if self.style_name == "chat" else None,
            backend.to_str(),
        ]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _shorter(record: Record) -> Record | None:
    """A conversation without its first exchange; None for the last one."""
    turns = record.turns
    start = next((n for n, turn in enumerate(turns) if turn.role != "system"), 0)
    users = [n for n, turn in enumerate(turns) if turn.role == "user" and n > start]
    return replace(record, turns=turns[:start] + turns[users[0] :]) if users else None


def checked_tokenizer(given: Any, style: StyleName, num_rows: int | None) -> Any:
    """The tokenizer that a name or an object means, loaded and checked.

    Raises ValueError where there is none, or one without an end-of-sequence token or the prompt
    style, or one of another model.
    """
    if given is None:
        raise ValueError(
            "There is no tokenizer: data.tokenizer is not set and the model has none. "
            "Set data.tokenizer to a hub id, a folder, or tiny."
        )
    known = load_tokenizer(given, setting="data.tokenizer") if isinstance(given, str) else given
    if known.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which ends each response. Set "
            "data.tokenizer to one that has."
        )
    check_vocabulary(known, num_rows)
    _ = STYLES[style](known).stop_ids  # else refused
    return known
