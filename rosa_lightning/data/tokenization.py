"""Token ids of whole sources, cached on disk by `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from rosa_lightning.data.encoding import Encoder, Example
from rosa_lightning.data.records import Indexed, Records, cached_table, temporary_folder
from rosa_lightning.utils.files import user_cache

if TYPE_CHECKING:
    import datasets

_SAMPLE = 1000
"""Records that are looked at where tokenizing all would take too long."""
_CHUNK = 100
"""Records of a sample that are tokenized at a time: token ids take more memory than their text."""
_FLAGS = ("too_long", "response_cut", "rewritten")
_COLUMNS = ("prompt", "response", "answer", *_FLAGS, "gaps")


class Examples(Indexed[Example]):
    """Records and their tokens: in an Arrow table, or tokenized when they are asked for."""

    def __init__(self, records: Records, encoder: Encoder, tokens: Any = None) -> None:
        super().__init__(len(records) if tokens is None else len(tokens))
        self.records, self.encoder, self.tokens = records, encoder, tokens

    def at(self, positions: NDArray[np.uint32]) -> list[Example]:
        """The examples of records at these positions."""
        if self.tokens is None:
            records = self.records.take(positions)
            if any(record.is_text for record in records):
                raise ValueError(
                    f"source {self.records.source} holds plain text among other rows. Put it into "
                    "a source of its own, or set stream: false."
                )
            return self.encoder(records)
        rows = self.tokens[positions.tolist()]
        records = self.records.take(rows["record"])
        columns = (rows[name] for name in _COLUMNS)
        return [Example(*one) for one in zip(records, *columns, strict=True)]

    def column(self, name: str) -> NDArray[Any]:
        """A column of the table."""
        column: NDArray[Any] = self.tokens.data.column(name).to_numpy()
        return column[self.positions]

    @property
    def record_numbers(self) -> NDArray[Any]:
        """Which of the records each example is of, (N,)."""
        return self.positions if self.tokens is None else self.column("record")

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

    Records that stay on disk are tokenized when they are asked for, but for plain text.
    """
    is_text = records[0].is_text
    if records.on_disk and not is_text:
        return Examples(records, encoder)
    about = encoder.fingerprint(records[0])
    if cache is None or about is None:
        path = temporary_folder() / "tokens.arrow" if records.on_disk else None
        return Examples(records, encoder, _table(records, encoder, path))
    chosen = ""
    if records.on_disk:
        chosen = hashlib.blake2b(records.positions.tobytes(), digest_size=8).hexdigest()
    content = f"{records.content} {chosen} {about}"
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    count = None if is_text else len(records)
    path = cache / f"tokens-{digest}.arrow"
    try:
        table = cached_table(path, _features(), count, partial(_table, records, encoder))
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
    lists = dict.fromkeys(("prompt", "response", "gaps"), datasets.List(number))
    own = dict.fromkeys(("answer", "length", "record"), number) | dict.fromkeys(_FLAGS, flag)
    return datasets.Features(lists | own)


def _table(records: Records, encoder: Encoder, path: Path | None = None) -> datasets.Dataset:
    """The table of tokens, one row an example."""

    def columns(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        some = records.converted(batch)
        examples = encoder(some)
        found = {name: [getattr(one, name) for one in examples] for name in _COLUMNS}
        at = {record.index: number for record, number in zip(some, numbers, strict=True)}
        found["record"] = [at[one.record.index] for one in examples]
        return {**found, "length": [one.num_tokens for one in examples]}

    rows = records.rows
    if len(records) < len(rows):
        rows = rows.select(records.positions)
    return rows.map(
        columns,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
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


def tokens_digest(examples: Sequence[Example]) -> str:
    """A digest of token ids; of those that are made when they are asked for, of a sample of 64."""
    if isinstance(examples, Examples) and examples.tokens is None:
        examples = examples[:: max(1, len(examples) // 64)]
    found = hashlib.blake2b(digest_size=8)
    for one in examples:
        tokens = (one.prompt, one.response, one.gaps, one.answer)
        found.update(repr((*tokens, one.record.answer)).encode())
    return found.hexdigest()


def cache_folder(setting: str | None) -> Path | None:
    """The folder of `data.loading.cache_dir`: None for none, `auto` for the user's cache."""
    if setting is None:
        return None
    return user_cache() if setting == "auto" else Path(os.path.expanduser(setting))
