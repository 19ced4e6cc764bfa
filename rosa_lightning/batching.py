"""Records to token ids, token ids to batches, and the order in which records are trained on.

Axes: B batch, T tokens. Batches are padded on the left: all responses end in the last column.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rosa_lightning.tasks import Record, Template, answer_start, prompt, reference, response

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
        """Inputs (B, T); lists `task`, `source`, `prompt` and `reference`; `index` (B,)."""
        records = [example.record for example in examples]
        return {
            **_inputs([example.prompt for example in examples], self.pad_id),
            "task": [record.task for record in records],
            "source": [record.source for record in records],
            "index": torch.tensor([record.index for record in records]),
            "prompt": [record.instruction for record in records],
            "reference": [reference(record) for record in records],
        }


# --- order ----------------------------------------------------------------------------------


def epoch_counts(weights: Sequence[float], total: int) -> list[int]:
    """`total` records shared out by weight, by largest remainder: each within 1 of its share."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _generator(*parts: int | str) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _within_source(size: int, start: int, count: int, seed: int, name: str) -> Tensor:
    """Records `start` to `start + count` of an endless row of permutations of `size` records."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    first, last = start // size, (start + count - 1) // size
    rounds = [
        torch.randperm(size, generator=_generator(seed, "records", name, number))
        for number in range(first, last + 1)
    ]
    return torch.cat(rounds)[start - first * size :][:count]


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], names: Sequence[str], seed: int, epoch: int
) -> Tensor:
    """The order of one epoch, as positions in the sources laid end to end.

    Record j of a source with `count` records in the epoch stands at time (j + u) / count with u
    drawn from [0, 1): at any time each source is within one record of its share, so every prefix
    of the order is mixed as the whole is. Epoch e takes each source's records from where epoch
    e - 1 left off, and no record comes again before all of its source have come. Nothing but the
    arguments decides; no global generator is read.
    """
    times, positions = [], []
    offset = 0
    for size, count, name in zip(sizes, counts, names, strict=True):
        generator = _generator(seed, "times", name, epoch)
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        times.append((torch.arange(count, dtype=torch.float64) + jitter) / max(count, 1))
        positions.append(offset + _within_source(size, epoch * count, count, seed, name))
        offset += size
    return torch.cat(positions)[torch.argsort(torch.cat(times), stable=True)]


class MixtureSampler(DistributedSampler[int]):
    """This rank's share of `epoch_order`: every `num_replicas`-th record, from `rank` on.

    An epoch is rounded up to a multiple of the ranks, with the next records of the mixture, so
    that all ranks have the same number of batches. Lightning puts a sampler of its own around
    any sampler but a `DistributedSampler`, which this is.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            range(sum(sizes)),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=False,
            seed=seed,
        )
        self.sizes, self.names = tuple(sizes), tuple(names)
        self.counts = epoch_counts(weights, self.total_size)
        self._start = 0

    def seek(self, epoch: int, start: int) -> None:
        """The next pass begins at this rank's record `start` of `epoch`."""
        self.epoch, self._start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: when resuming, Lightning calls it after the iterator was made."""

    def __iter__(self) -> Iterator[int]:
        """Positions in the sources laid end to end."""
        order = epoch_order(self.sizes, self.counts, self.names, self.seed, self.epoch)
        mine: list[int] = order[self.rank :: self.num_replicas][self._start :].tolist()
        return iter(mine)


class ResumableLoader(DataLoader[Example]):
    """A `DataLoader` over a `MixtureSampler` that saves its place and goes on from there.

    A pass has `len(loader)` batches. It begins where the last one ended, so that passes which
    the trainer cuts short (`limit_train_batches`) still go through all records.
    """

    _epoch = 0
    _batch = 0

    def seek(self, batch: int) -> None:
        """The next pass begins at this batch, counted from the beginning of the training."""
        self._epoch, self._batch = divmod(batch, len(self))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches; those that workers have prepared ahead do not count as seen."""
        if not isinstance(self.sampler, MixtureSampler):
            # Trainer(overfit_batches=...) has put in a sequential sampler.
            yield from super().__iter__()
            return
        remaining = len(self)
        while remaining:
            self._epoch += self._batch // len(self)
            self._batch %= len(self)
            self.sampler.seek(self._epoch, self._batch * (self.batch_size or 1))
            for batch in super().__iter__():
                # Counted before it is handed out: a checkpoint saved after its step has it done.
                self._batch += 1
                remaining -= 1
                yield batch
                if not remaining:
                    break

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a saved place."""
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]
