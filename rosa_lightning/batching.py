"""Records to token ids, and token ids to batches.

Axes: B batch, T tokens. Batches are padded on the left: all responses end in the last column.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rosa_lightning.tasks import (
    Record,
    Template,
    answer_start,
    candidates,
    prompt,
    reference,
    response,
)

Overlong = Literal["cut", "drop"]

IGNORED = -100
"""Label of a token without loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A record in token ids. Arrays of C ints: small, and cheap to send to loader workers."""

    record: Record
    """What it was made from."""
    prompt: "array[int]"
    """The tokenizer's own prefix (BOS), then the prompt. Never empty."""
    response: "array[int]"
    """The response, then EOS unless it was cut. Empty where nothing is trained on."""
    answer: int
    """Index in `response` of the final answer's first token; 0 if the end states no answer."""


@dataclass(slots=True)
class OverlongCount:
    """How many records of a source were longer than `data.max_length`."""

    total: int = 0
    """Records looked at."""
    too_long: int = 0
    """Records that were cut or dropped."""
    responses_cut: int = 0
    """Of these, records whose response lost its end."""

    def add(self, other: "OverlongCount") -> None:
        """Counts another part of the same source in."""
        self.total += other.total
        self.too_long += other.too_long
        self.responses_cut += other.responses_cut

    def message(self, source: str, max_length: int, overlong: Overlong) -> str:
        """The warning to give when there are any."""
        done = "cut" if overlong == "cut" else "left out"
        ends = f" ({self.responses_cut} of them lost the end of their response)"
        way_out = "raise it or set data.overlong: drop" if overlong == "cut" else "raise it"
        return (
            f"source {source}: {self.too_long} of {self.total} records are longer than "
            f"data.max_length={max_length} tokens and were {done}"
            f"{ends if self.responses_cut else ''}; {way_out}."
        )


# --- encoding -------------------------------------------------------------------------------


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    template: Template = "alpaca",
    max_length: int = 512,
    overlong: Overlong = "cut",
    with_response: bool = True,
) -> tuple[list[Example], OverlongCount]:
    """Token ids of all records, and how many were too long for `max_length` tokens.

    Prompt and response are tokenized apart and joined as ids, so the border between them is
    exact for tokenizers that would merge across it too. `cut` takes tokens from the beginning of
    the prompt (its prefix stays) and from the end of a response that is too long alone; `drop`
    leaves the record out. Without responses, prompts are always cut: an evaluation that left
    records out would not be one.
    """
    if not records:  # which tokenizers do not take
        return [], OverlongCount()
    prefix = prompt_prefix(tokenizer)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    prompts = tokenizer([prompt(record, template) for record in records], **options)["input_ids"]
    responses: list[list[int]] = [[]] * len(records)
    answers = [0] * len(records)
    if with_response:
        texts = [response(record) for record in records]
        encoded = tokenizer(texts, **options)
        responses = [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
        answers = [_answer_token(encoded, row, record) for row, record in enumerate(records)]
    count = OverlongCount(total=len(records))
    examples = []
    for record, body, reply, answer in zip(records, prompts, responses, answers, strict=True):
        if len(prefix) + len(body) + len(reply) > max_length:
            count.too_long += 1
            if overlong == "drop" and with_response:
                continue
            whole = len(reply)
            body, reply = _cut(body, reply, max_length, len(prefix))
            count.responses_cut += len(reply) < whole
            answer = answer if answer < len(reply) else 0
        examples.append(Example(record, array("i", prefix + body), array("i", reply), answer))
    return examples, count


def prompt_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS), mostly one or none."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    start = next((start for start in starts if full[start : start + len(bare)] == bare), 0)
    return list(full[:start])


def _answer_token(encoded: Any, row: int, record: Record) -> int:
    """The token of the response that covers the answer's first character, 0 if unknown."""
    start = answer_start(record.task, response(record), record.answer)
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


# --- collation ------------------------------------------------------------------------------


def _left_padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(len(row) for row in rows)
    padded_BT = torch.full((len(rows), width), filler, dtype=torch.int64)
    for row, ids in enumerate(rows):
        if len(ids):
            padded_BT[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
    return padded_BT


def _inputs(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    mask_BT = _left_padded([[1] * len(row) for row in rows], 0)
    return {
        "input_ids": _left_padded(rows, pad_id),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
    }


@dataclass(frozen=True)
class TrainCollator:
    """Batches to train and validate on."""

    source_names: tuple[str, ...]
    """Names that `source` indexes."""
    pad_id: int
    """Token id that fills the left."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs, `labels` and `answer_mask` (B, T); `source` and `index` (B,); `task`.

        Labels are aligned with the input ids, IGNORED off the response; the answer mask marks
        the tokens of the final answer with EOS. `num_label_positions` is the number of last
        columns outside which no row has a label.
        """
        rows = [example.prompt + example.response for example in examples]
        inputs = _inputs(rows, self.pad_id)
        labels_BT = torch.full_like(inputs["input_ids"], IGNORED)
        answer_mask_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        width = labels_BT.shape[1]
        for row, example in enumerate(examples):
            start = width - len(example.response)
            labels_BT[row, start:] = inputs["input_ids"][row, start:]
            answer_mask_BT[row, start + example.answer :] = True
        records = [example.record for example in examples]
        source = [self.source_names.index(record.source) for record in records]
        return {
            **inputs,
            "labels": labels_BT,
            "answer_mask": answer_mask_BT,
            "num_label_positions": max(len(example.response) for example in examples),
            "source": torch.tensor(source),
            "task": [record.task for record in records],
            "index": torch.tensor([record.index for record in records]),
        }


@dataclass(frozen=True)
class PromptCollator:
    """Batches to test and predict on: prompts alone."""

    pad_id: int
    """Token id that fills the left."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs (B, T); `index` (B,); lists of what the records say.

        These are `task`, `source`, `prompt`, `input`, `reference` and `candidates`.
        """
        records = [example.record for example in examples]
        return {
            **_inputs([example.prompt for example in examples], self.pad_id),
            "task": [record.task for record in records],
            "source": [record.source for record in records],
            "index": torch.tensor([record.index for record in records]),
            "prompt": [record.instruction for record in records],
            "input": [record.input for record in records],
            "reference": [reference(record) for record in records],
            "candidates": [candidates(record) for record in records],
        }
