"""Records to token ids, ready to train on or to answer."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from rosa_lightning.data.chat import ChatFormat
from rosa_lightning.data.prompts import Template, marked_prompt, question, response_text
from rosa_lightning.data.streamed import Streamed
from rosa_lightning.data.text_tokens import TextTokenizer, Tokens, prompt_prefix
from rosa_lightning.models.vocabulary import beyond, check_ids
from rosa_lightning.tasks.records import Record, answer_start, task_of

Overlong = Literal["cut", "drop"]

_RECORDS_AT_A_TIME = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """A record in token ids. Arrays of C ints: small, and cheap to send to loader workers."""

    record: Record
    """What it was made from."""
    prompt: "array[int]"
    """The tokenizer's own prefix (BOS), then the prompt. Never empty."""
    response: "array[int]"
    """The response, then the stop token unless it was cut. Empty where nothing is trained on."""
    answer: int
    """Index in `response` of the final answer's first token; 0 if the end states no answer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(slots=True)
class OverlongCount:
    """How many records of a source were longer than `data.max_length`, or otherwise altered."""

    total: int = 0
    """Records looked at."""
    too_long: int = 0
    """Records that were cut or dropped."""
    responses_cut: int = 0
    """Of these, records whose response lost its end."""
    sampled: bool = False
    """Whether only a sample was looked at."""
    first: int | None = None
    """Number of the first record that was too long."""
    rewritten: int = 0
    """Records whose response the chat template rewrites."""
    first_rewritten: int | None = None
    """Number of the first of these."""

    def add(self, other: "OverlongCount") -> None:
        """Counts another part of the same source in."""
        self.total += other.total
        self.too_long += other.too_long
        self.responses_cut += other.responses_cut
        self.sampled |= other.sampled
        self.first = other.first if self.first is None else self.first
        self.rewritten += other.rewritten
        if self.first_rewritten is None:
            self.first_rewritten = other.first_rewritten

    def prompts_message(self, source: str, max_length: int) -> str:
        """The warning to give where prompts to answer were cut."""
        return (
            f"source {source}: {self.too_long} of {self.total} prompts, record {self.first} first, "
            f"are longer than data.max_length={max_length} tokens and lost their beginning; raise "
            "it."
        )

    def message(self, source: str, max_length: int, overlong: Overlong) -> str:
        """The warning to give when there are any."""
        done = "cut" if overlong == "cut" else "left out"
        ends = f" ({self.responses_cut} of them lost the end of their response)"
        way_out = "raise it or set data.overlong: drop" if overlong == "cut" else "raise it"
        looked_at, are = (" looked at", "such are") if self.sampled else ("", "were")
        return (
            f"source {source}: {self.too_long} of {self.total} records{looked_at} are longer than "
            f"data.max_length={max_length} tokens and {are} {done}"
            f"{ends if self.responses_cut else ''}; {way_out}."
        )

    def rewritten_message(self, source: str) -> str:
        """The warning to give where a chat template rewrites responses."""
        looked_at = " looked at" if self.sampled else ""
        return (
            f"source {source}: the chat template rewrites {self.rewritten} of {self.total} "
            f"responses{looked_at}, record {self.first_rewritten} first, as some leave out the "
            "reasoning; what it writes is trained on. Set data.template: alpaca to train on "
            "responses as they are."
        )


class _Encoded(NamedTuple):
    """A record in token ids, before it is cut."""

    record: Record
    body: list[int]
    """The prompt, without the encoder's prefix."""
    reply: list[int]
    """The response with its stop token."""
    answer: int
    """The answer's first token in it, 0 if unknown."""
    rewritten: bool
    """Whether the chat template has another text of the response."""


@dataclass(frozen=True)
class Encoder:
    """Records to examples.

    Prompt and response of `alpaca` and `plain` are tokenized apart and joined as ids, so the border
    between them is exact for tokenizers that would merge across it too; conversations as
    `ChatFormat` has it. `cut` takes tokens from the beginning of the prompt (its prefix stays) and
    from the end of a response that is too long alone; `drop`
    leaves the record out. Without responses, prompts are always cut: an evaluation that left
    records out would not be one.
    """

    tokenizer: Any
    """A tokenizer of `transformers`."""
    template: Template = "alpaca"
    """Text around the instruction."""
    max_length: int = 512
    """Longest record in tokens."""
    overlong: Overlong = "cut"
    """What becomes of longer ones."""
    with_response: bool = True
    """Whether responses are encoded too."""
    num_rows: int | None = None
    """Rows of the base's embedding, which all ids must have; None where it is not known."""

    @cached_property
    def bound(self) -> int | None:
        """The rows, where the tokenizer has ids beyond them."""
        return self.num_rows if beyond(self.tokenizer, self.num_rows) else None

    @cached_property
    def chat(self) -> ChatFormat | None:
        """How conversations are written, under `chat`."""
        return ChatFormat(self.tokenizer) if self.template == "chat" else None

    @cached_property
    def _texts(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer)

    @cached_property
    def _prefix(self) -> list[int]:
        return self.chat.prefix if self.chat else prompt_prefix(self.tokenizer)

    def __call__(self, records: Sequence[Record]) -> tuple[list[Example], OverlongCount]:
        """The examples, and how many records were too long.

        Raises ValueError for a record with a token that the base does not know.
        """
        count = OverlongCount(total=len(records))
        examples = []
        for record, body, reply, answer, rewritten in self._encoded(records):
            if self.bound is not None:
                what = f"source {record.source}, record {record.index}"
                check_ids([*self._prefix, *body, *reply], self.tokenizer, self.bound, what)
            if rewritten:
                count.rewritten += 1
                count.first_rewritten = count.first_rewritten or record.index
            if len(self._prefix) + len(body) + len(reply) > self.max_length:
                count.too_long += 1
                count.first = record.index if count.first is None else count.first
                if self.overlong == "drop" and self.with_response:
                    continue
                whole = len(reply)
                body, reply = _cut(body, reply, self.max_length, len(self._prefix))
                count.responses_cut += len(reply) < whole
                answer = answer if answer < len(reply) else 0
            ids = array("i", self._prefix + body)
            examples.append(Example(record, ids, array("i", reply), answer))
        return examples, count

    def one(self, record: Record) -> Example:
        """The example of one record, which must not be dropped."""
        (example,), _ = self([record])
        return example

    def response(self, text: str, *, end: bool = False) -> list[int]:
        """Token ids of a response as they follow a prompt, with what ends it or without."""
        if self.chat:
            (turn,) = self.chat.turns(["Q"], [text], end=end)
            return turn.reply.ids
        (found,) = self._texts([self._texts.mark(text)])
        return [*found.ids, self.tokenizer.eos_token_id] if end else found.ids

    def _encoded(self, records: Sequence[Record]) -> Iterator[_Encoded]:
        # Some at a time: a tokenizer's own results take over a hundred bytes a token.
        for start in range(0, len(records), _RECORDS_AT_A_TIME):
            some = records[start : start + _RECORDS_AT_A_TIME]
            yield from self._conversations(self.chat, some) if self.chat else self._apart(some)

    def _conversations(self, chat: ChatFormat, records: Sequence[Record]) -> Iterator[_Encoded]:
        users, skipped = [question(record) for record in records], len(self._prefix)
        if not self.with_response:
            for record, prompt in zip(records, chat.prompts(users), strict=True):
                yield _Encoded(record, prompt[skipped:], [], 0, False)
            return
        turns = chat.turns(users, [response_text(record, "chat") for record in records])
        for record, (prompt, text, reply, rewritten) in zip(records, turns, strict=True):
            answer = _answer_token(record, text, reply)
            yield _Encoded(record, prompt[skipped:], reply.ids, answer, rewritten)

    def _apart(self, records: Sequence[Record]) -> Iterator[_Encoded]:
        texts = self._texts
        prompts = texts(marked_prompt(record, self.template, texts) for record in records)
        if not self.with_response:
            for record, prompt in zip(records, prompts, strict=True):
                yield _Encoded(record, prompt.ids, [], 0, False)
            return
        replies = texts(texts.mark(response_text(record, self.template)) for record in records)
        stop = self.tokenizer.eos_token_id
        for record, prompt, reply in zip(records, prompts, replies, strict=True):
            answer = _answer_token(record, response_text(record, self.template), reply)
            yield _Encoded(record, prompt.ids, [*reply.ids, stop], answer, False)


def encode(
    records: Sequence[Record], tokenizer: Any, **options: Any
) -> tuple[list[Example], OverlongCount]:
    """Token ids of all records, and how many were too long; options are the `Encoder`'s."""
    return Encoder(tokenizer, **options)(records)


def encode_all(
    records: Sequence[Record], encoder: Encoder
) -> tuple[Sequence[Example], OverlongCount]:
    """The examples of a source; those of streamed records are made when they are asked for.

    Which streamed records `drop` leaves out is found by encoding all of them once. What `cut`
    cuts is counted in a sample.
    """
    if not isinstance(records, Streamed):
        return encoder(records)
    count = OverlongCount()
    if encoder.overlong == "drop":
        fits = np.zeros(len(records), dtype=np.bool_)
        for start in range(0, len(records), _RECORDS_AT_A_TIME):
            some = list(records[start : start + _RECORDS_AT_A_TIME])
            kept, counted = encoder(some)
            count.add(counted)
            numbers = {example.record.index for example in kept}
            fits[start : start + len(some)] = [record.index in numbers for record in some]
        records = records.select(fits)
    else:
        sample = np.linspace(0, len(records) - 1, min(len(records), _RECORDS_AT_A_TIME))
        _, count = encoder(list(records.select(sample.astype(np.int64))))
        count.sampled = True
    return records.map(replace(encoder, overlong="cut").one), count


def _answer_token(record: Record, text: str, response: Tokens) -> int:
    """The token of the response that covers the answer's first character, 0 if unknown."""
    start = answer_start(task_of(record), text, record.answer)
    return 0 if start is None else response.covering(start) or 0


def _cut(
    body: list[int], reply: list[int], max_length: int, prefix: int
) -> tuple[list[int], list[int]]:
    # At least one token stays before the response: nothing else could predict its first.
    reply = reply[: max_length - max(prefix, 1)]
    room = max_length - prefix - len(reply)
    return body[len(body) - room :] if room < len(body) else body, reply


def tokens_digest(examples: Sequence[Example]) -> str:
    """A digest of the token ids and answers of examples; of those on disk, of a sample of 64."""
    step = max(1, len(examples) // 64) if isinstance(examples, Streamed) else 1
    digest = hashlib.blake2b(digest_size=8)
    for place in range(0, len(examples), step):
        one = examples[place]
        about = (len(one.prompt), len(one.response), one.answer, one.record.answer)
        digest.update(repr(about).encode(errors="replace"))
        digest.update(one.prompt.tobytes())
        digest.update(one.response.tobytes())
    return digest.hexdigest()
