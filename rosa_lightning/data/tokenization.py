"""Records to token ids, cached on disk by `datasets`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tokenizers
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from rosa_lightning.data.prompts import STYLES, PromptStyle, StyleName
from rosa_lightning.data.records import Indexed, Records, cached_table
from rosa_lightning.models.loading import load_tokenizer
from rosa_lightning.models.vocabulary import beyond, check_ids, check_vocabulary
from rosa_lightning.tasks.records import Record, answer_start, task_of
from rosa_lightning.utils.files import user_cache

if TYPE_CHECKING:
    import datasets

Overlong = Literal["cut", "drop"]

ENCODING = 3
"""Raise it when `Encoder`, or what it calls, makes other tokens of the same record."""
_SAMPLE = 1000
"""Records that are looked at where tokenizing all would take too long."""
_CHUNK = 100
"""Records of a sample that are tokenized at a time: token ids take more memory than their text."""


@dataclass(slots=True)
class Example:
    """A record in token ids."""

    record: Record
    prompt: list[int]
    """BOS, if the tokenizer adds it, then the prompt. Never empty."""
    response: list[int]
    """The response and its stop token, unless it was cut; empty for prompts to answer."""
    answer: int = 0
    """Index in `response` of the final answer's first token; 0 if the end states no answer."""
    too_long: bool = False
    """Whether prompt and response were longer than `data.max_length`."""
    response_cut: bool = False
    rewritten: bool = False
    """Whether the chat template changes the response."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


_FLAGS = ("too_long", "response_cut", "rewritten")
_COLUMNS = ("prompt", "response", "answer", *_FLAGS)


@dataclass(frozen=True)
class Encoder:
    """Tokenizes records.

    A record beyond `max_length` loses the beginning of its prompt, but for BOS, and then the end of
    its response; `drop` leaves such records out of training.
    """

    tokenizer: Any
    """A tokenizer of `transformers`."""
    style_name: StyleName = "alpaca"
    max_length: int = 512
    overlong: Overlong = "cut"
    with_response: bool = True
    num_rows: int | None = None
    """Rows of the base's embedding, which bound token ids; None if unknown."""

    @cached_property
    def style(self) -> PromptStyle:
        """The text around the records."""
        return STYLES[self.style_name](self.tokenizer)

    @cached_property
    def bound(self) -> int | None:
        """The embedding's rows, where the tokenizer has ids beyond them."""
        return self.num_rows if beyond(self.tokenizer, self.num_rows) else None

    def __call__(self, records: Sequence[Record]) -> list[Example]:
        """The records in token ids.

        Raises ValueError for a record with a token that the base does not know.
        """
        if not self.with_response:
            prompts = zip(records, self.style.prompts(records), strict=True)
            return [self._fitted(record, prompt, []) for record, prompt in prompts]
        found = []
        encoded = zip(records, self.style.encode(records), strict=True)
        for record, (prompt, text, reply, rewritten) in encoded:
            start = answer_start(task_of(record), text, record.answer)
            answer = 0 if start is None else reply.covering(start) or 0
            found.append(self._fitted(record, prompt, reply.ids, answer, rewritten))
        return found

    def _fitted(
        self,
        record: Record,
        body: list[int],
        reply: list[int],
        answer: int = 0,
        rewritten: bool = False,
    ) -> Example:
        prefix = self.style.prefix
        if self.bound is not None:
            what = f"source {record.source}, record {record.index}"
            check_ids([*prefix, *body, *reply], self.tokenizer, self.bound, what)
        too_long = len(prefix) + len(body) + len(reply) > self.max_length
        whole = len(reply)
        if too_long:
            # At least one token stays before the response: nothing else could predict its first.
            reply = reply[: self.max_length - max(len(prefix), 1)]
            room = self.max_length - len(prefix) - len(reply)
            body = body[max(0, len(body) - room) :]
            answer = answer if answer < len(reply) else 0
        cut = len(reply) < whole
        return Example(record, prefix + body, reply, answer, too_long, cut, rewritten)

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
            *(style.prefix, style.stop_ids, self.bound),
            getattr(self.tokenizer, "split_special_tokens", False),
            style.apply(record.instruction, record.input),
            self.tokenizer.chat_template if self.style_name == "chat" else None,
            backend.to_str(),
        ]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


class Examples(Indexed[Example]):
    """Records and their tokens: in an Arrow table, or tokenized when they are asked for."""

    def __init__(self, records: Records, encoder: Encoder, tokens: Any = None) -> None:
        super().__init__(len(records))
        self.records, self.encoder, self.tokens = records, encoder, tokens

    def at(self, positions: NDArray[np.uint32]) -> list[Example]:
        """The examples of records at these positions."""
        records = self.records.take(positions)
        if self.tokens is None:
            return self.encoder(records)
        rows = self.tokens[positions.tolist()]
        columns = (rows[name] for name in _COLUMNS)
        return [Example(*one) for one in zip(records, *columns, strict=True)]

    def column(self, name: str) -> NDArray[Any]:
        """A column of the table."""
        column: NDArray[Any] = self.tokens.data.column(name).to_numpy()
        return column[self.positions]

    def sampled(self) -> NDArray[np.int64]:
        """Indices of examples, evenly spread, that stand for all."""
        return np.linspace(0, len(self) - 1, min(len(self), _SAMPLE)).astype(np.int64)

    def lengths(self, exact: bool = True) -> NDArray[np.int32]:
        """Tokens of each example, prompt and response.

        Those of examples that are tokenized when they are asked for are estimated, unless `exact`:
        by a line through a sample, from the bytes of the texts.
        """
        if self.tokens is not None:
            return self.column("length").astype(np.int32)
        sample = np.arange(len(self)) if exact else self.sampled()
        chunks = np.array_split(sample, len(sample) // _CHUNK + 1)
        counts = (one.num_tokens for chunk in chunks for one in self.take(chunk))
        known = np.fromiter(counts, np.int32, len(sample))
        if exact:
            return known
        sizes = self.records.sizes()[self.positions]
        if np.ptp(sizes[sample]) == 0:
            return np.full(len(self), round(known.mean()), np.int32)
        slope, start = np.polyfit(sizes[sample], known, 1)
        # No record is longer than data.max_length, which the longest of a sample comes near.
        for part in np.array_split(sizes, len(sizes) // 2**17 + 1):  # in place: views
            part[:] = np.clip(start + slope * part, 1, known.max())
        return sizes


def tokenize(records: Records, encoder: Encoder, cache: Path | None) -> Examples:
    """Token ids of a source's records, from the cache folder if they are there.

    Records that stay on disk are tokenized when they are asked for.
    """
    if records.on_disk:
        return Examples(records, encoder)
    about = encoder.fingerprint(records[0])
    if cache is None or about is None:
        return Examples(records, encoder, _table(records, encoder))
    digest = hashlib.blake2b(f"{records.content} {about}".encode(), digest_size=16).hexdigest()
    path = cache / f"tokens-{digest}.arrow"
    try:
        table = cached_table(path, _features(), len(records), partial(_table, records, encoder))
        return Examples(records, encoder, table)
    except (OSError, ValueError) as error:
        # `datasets` raises ValueError when it closes a file that it could not write.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
    rank_zero_warn(
        f"tokenised data cannot be kept in {cache}: {reason}. Set data.loading.cache_dir to a "
        "folder that can be written to, or to null."
    )
    return Examples(records, encoder, _table(records, encoder))


def _features() -> datasets.Features:
    import datasets

    number, flag = datasets.Value("int32"), datasets.Value("bool")
    ids = dict.fromkeys(("prompt", "response"), datasets.List(number))
    own = {"answer": number} | dict.fromkeys(_FLAGS, flag) | {"length": number}
    return datasets.Features(ids | own)


def _table(records: Records, encoder: Encoder, path: Path | None = None) -> datasets.Dataset:
    """The table of tokens, one row a record."""

    def columns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples = encoder(records.converted(batch))
        found = {name: [getattr(one, name) for one in examples] for name in _COLUMNS}
        return {**found, "length": [one.num_tokens for one in examples]}

    return records.rows.map(
        columns,
        batched=True,
        remove_columns=records.rows.column_names,
        features=_features(),
        cache_file_name=path and os.fspath(path),
        new_fingerprint="tokens",
        desc="Tokenizing",
    )


def count_altered(name: str, examples: Examples) -> NDArray[np.bool_]:
    """Warn of records of a source that are too long, or rewritten by a chat template.

    Returns:
        Which are too long, (N,); of examples that are tokenized when they are asked for, unless
        such ones are dropped, only among a sample.
    """
    encoder, too_long = examples.encoder, np.zeros(len(examples), np.bool_)
    drops = encoder.overlong == "drop"
    if examples.tokens is not None:
        indices = np.arange(len(examples))
        flags = np.stack([examples.column(flag) for flag in _FLAGS])
    else:
        indices = np.arange(len(examples)) if drops else examples.sampled()
        flags = np.empty((len(_FLAGS), len(indices)), np.bool_)
        for start in range(0, len(indices), _CHUNK):
            some = examples.take(indices[start : start + _CHUNK])
            rows = [[getattr(one, flag) for flag in _FLAGS] for one in some]
            flags[:, start : start + _CHUNK] = np.transpose(rows)
    too_long[indices] = flags[0]
    num_long, num_cut, num_rewritten = flags.sum(1)
    of = f"of {len(indices)}{' sampled' if len(indices) < len(examples) else ''}"
    if num_long:
        done = "are left out" if drops else f"are cut, {num_cut} at the end of their response"
        rank_zero_warn(
            f"source {name}: {num_long} {of} records are longer than data.max_length="
            f"{encoder.max_length} tokens and {done}; raise it"
            f"{'' if drops else ' or set data.loading.overlong: drop'}."
        )
    if num_rewritten:
        first = examples[int(indices[flags[2].argmax()])].record.index
        rank_zero_warn(
            f"source {name}: the chat template rewrites {num_rewritten} {of} responses, record "
            f"{first} first, as some leave out the reasoning; what it writes is trained on. Set "
            "data.prompt_style: alpaca to train on responses as they are."
        )
    return too_long


def count_cut_prompts(name: str, examples: Sequence[Example], encoder: Encoder) -> int:
    """How many prompts of a test or predict source lost their beginning; warns of them."""
    too_long = [one.record.index for one in examples if one.too_long]
    if too_long:
        rank_zero_warn(
            f"source {name}: {len(too_long)} of {len(examples)} prompts, record {too_long[0]} "
            f"first, are longer than data.max_length={encoder.max_length} tokens and lost their "
            "beginning; raise it."
        )
    return len(too_long)


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


def tokens_digest(examples: Sequence[Example]) -> str:
    """A digest of token ids; of those that are made when they are asked for, of a sample of 64."""
    if isinstance(examples, Examples) and examples.tokens is None:
        examples = examples[:: max(1, len(examples) // 64)]
    found = hashlib.blake2b(digest_size=8)
    for one in examples:
        found.update(repr((one.prompt, one.response, one.answer, one.record.answer)).encode())
    return found.hexdigest()


def cache_folder(setting: str | None) -> Path | None:
    """The folder of `data.loading.cache_dir`: None for none, `auto` for the user's cache."""
    if setting is None:
        return None
    return user_cache() if setting == "auto" else Path(os.path.expanduser(setting))
