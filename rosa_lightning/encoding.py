"""Records to token ids, ready to train on or to answer."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rosa_lightning.streamed import Streamed
from rosa_lightning.tasks import Record, answer_start, task_of
from rosa_lightning.templates import (
    Ending,
    Template,
    chat_prefix,
    ending,
    prompt_text,
    response_text,
)

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
    """How many records of a source were longer than `data.max_length`."""

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

    def add(self, other: "OverlongCount") -> None:
        """Counts another part of the same source in."""
        self.total += other.total
        self.too_long += other.too_long
        self.responses_cut += other.responses_cut
        self.sampled |= other.sampled
        self.first = other.first if self.first is None else self.first

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


@dataclass(frozen=True)
class Encoder:
    """Records to examples.

    Prompt and response are tokenized apart and joined as ids, so the border between them is
    exact for tokenizers that would merge across it too. `cut` takes tokens from the beginning of
    the prompt (its prefix stays) and from the end of a response that is too long alone; `drop`
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

    @cached_property
    def _prefix(self) -> list[int]:
        if self.template == "chat":
            return chat_prefix(self.tokenizer)
        return prompt_prefix(self.tokenizer)

    @cached_property
    def _ending(self) -> Ending:
        return ending(self.tokenizer, self.template)

    def __call__(self, records: Sequence[Record]) -> tuple[list[Example], OverlongCount]:
        """The examples, and how many records were too long."""
        count = OverlongCount(total=len(records))
        examples = []
        for record, body, reply, answer in self._tokenized(records):
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

    def _tokenized(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[Record, list[int], list[int], int]]:
        """Each record with the ids of its prompt and response, and its answer's first token."""
        # Some at a time: a tokenizer's own results take over a hundred bytes a token.
        for start in range(0, len(records), _RECORDS_AT_A_TIME):
            yield from self._tokenized_at_once(records[start : start + _RECORDS_AT_A_TIME])

    def _tokenized_at_once(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[Record, list[int], list[int], int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        asked = [prompt_text(record, self.template, self.tokenizer) for record in records]
        prompts = self.tokenizer(asked, **options)["input_ids"]
        if self.template == "chat":  # the prefix is in the text
            prompts = [ids[len(self._prefix) :] for ids in prompts]
        if not self.with_response:
            yield from ((record, ids, [], 0) for record, ids in zip(records, prompts, strict=True))
            return
        texts = [response_text(record, self.template) for record in records]
        encoded = self.tokenizer([text + self._ending.text for text in texts], **options)
        for row, record in enumerate(records):
            reply = [*encoded["input_ids"][row], self._ending.stop]
            yield record, prompts[row], reply, _answer_token(encoded, row, record, texts[row])


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


def prompt_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS), mostly one or none."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    start = next((start for start in starts if full[start : start + len(bare)] == bare), 0)
    return list(full[:start])


def _answer_token(encoded: Any, row: int, record: Record, text: str) -> int:
    """The token of the response that covers the answer's first character, 0 if unknown."""
    start = answer_start(task_of(record), text, record.answer)
    if start is None or not encoded.is_fast:  # slow tokenizers do not know their offsets
        return 0
    return encoded[row].char_to_token(start) or 0


def _cut(
    body: list[int], reply: list[int], max_length: int, prefix: int
) -> tuple[list[int], list[int]]:
    # At least one token stays before the response: nothing else could predict its first.
    reply = reply[: max_length - max(prefix, 1)]
    room = max_length - prefix - len(reply)
    return body[len(body) - room :] if room < len(body) else body, reply
