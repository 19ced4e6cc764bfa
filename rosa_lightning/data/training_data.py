"""The training sources of `ReasoningDataModule`: settings, token ids, shares, and reports."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rosa_lightning.data.grouping import Batching
from rosa_lightning.data.prompts import Template
from rosa_lightning.data.sampling import Stop, epoch_length, shares_by_size
from rosa_lightning.data.sources import Source
from rosa_lightning.data.streamed import Streamed
from rosa_lightning.data.token_cache import encode_cached
from rosa_lightning.data.tokenization import Encoder, Example, Overlong
from rosa_lightning.tasks.records import Record

Encoded = list[Sequence[Example]]
"""Examples, a sequence a source."""

_LEAST = {"batch_size": 1, "max_length": 8, "num_workers": 0, "val_generate": 0}
_CHOICES = {
    "batching": get_args(Batching),
    "template": get_args(Template),
    "overlong": get_args(Overlong),
    "stop": get_args(Stop),
}
CHECKED = (*_LEAST, *_CHOICES, "temperature", "seed", "tokens_per_batch", "val_fraction")
"""The settings that `check_settings` looks at."""


def check_settings(**settings: Any) -> None:
    """Check settings of `ReasoningDataModule`, by their names.

    Raises:
        ValueError: One is out of bounds, or two do not go together.
    """
    for key, least in _LEAST.items():
        if settings[key] < least:
            raise ValueError(
                f"{key}={settings[key]} is below {least}. Set data.{key} to at least {least}."
            )
    for key, choices in _CHOICES.items():
        if settings[key] not in choices:
            raise ValueError(
                f"{key}={settings[key]!r} is none of {', '.join(choices)}. Set data.{key}."
            )
    if not -(2**63) <= settings["seed"] < 2**63:
        raise ValueError(f"seed={settings['seed']} has more than 64 bits. Set another data.seed.")
    _check_temperature(settings["temperature"])
    tokens, longest = settings["tokens_per_batch"], settings["max_length"]
    if tokens is not None and tokens < longest:
        raise ValueError(
            f"tokens_per_batch={tokens} is below max_length={longest}, so some record may fit "
            "into no batch. Raise data.tokens_per_batch, or lower data.max_length."
        )
    if not 0 <= settings["val_fraction"] < 1:
        raise ValueError(
            f"val_fraction={settings['val_fraction']} is outside [0, 1). Set data.val_fraction; "
            "0.02 holds out 2 of 100 records, 0 none."
        )


def _check_temperature(temperature: Any) -> None:
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (is_number and temperature > 0):
        raise ValueError(
            f"temperature={temperature!r} is no number above 0. Set data.temperature; 1 mixes "
            "by size, 3 draws the shares together, null leaves them to the weights."
        )


def content_digest(records: Sequence[Record]) -> str:
    """Tells what a source holds from anything else; empty where that is not known.

    One of records in memory says nothing of the same records on disk, and begins otherwise.
    """
    if isinstance(records, Streamed):
        return records.digest
    content = hashlib.blake2b(digest_size=8)
    for record in records:
        texts = (record.instruction, record.input, record.output, record.answer or "")
        content.update("\0".join(texts).encode() + b"\1")
    return f"records {content.hexdigest()}"


def other_content(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Sources whose content is known to be another than it was."""
    return [
        name
        for name, digest in now.items()
        if name in then and digest != then[name] and digest.split()[:1] == then[name].split()[:1]
    ]


def encode_sources(
    names: Sequence[str],
    train: Sequence[Sequence[Record]],
    held: Sequence[Sequence[Record]],
    encoder: Encoder,
    cache: Path | None,
) -> tuple[Encoded, Encoded]:
    """The sources' records as token ids; warns of those that are too long.

    Args:
        names: A name for each source.
        train: Each source's records to train on.
        held: Those held out of them to validate on.
        encoder: Makes token ids of a record.
        cache: Folder that keeps them from run to run, if any.

    Raises:
        ValueError: All records of a source to train on are too long.
    """
    encoded: tuple[Encoded, Encoded] = [], []
    for name, to_train, to_hold in zip(names, train, held, strict=True):
        examples, count = encode_cached(to_train, encoder, cache)
        held_examples, held_count = encode_cached(to_hold, encoder, cache)
        count.add(held_count)
        if not len(examples):
            raise ValueError(
                f"source {name}: all {count.total} records are longer than data.max_length="
                f"{encoder.max_length} tokens. Raise it, or set data.overlong: cut."
            )
        if count.too_long:
            rank_zero_warn(count.message(name, encoder.max_length, encoder.overlong))
        if count.rewritten:
            rank_zero_warn(count.rewritten_message(name))
        encoded[0].append(examples)
        encoded[1].append(held_examples)
    return encoded


def shares_of(
    sources: Sequence[Source], sizes: Sequence[int], temperature: float | None
) -> list[float]:
    """Each source's part of the training stream; they sum to 1."""
    if temperature is not None:
        return shares_by_size(sizes, temperature)
    weights = [
        float(size) if source.weight is None else source.weight
        for source, size in zip(sources, sizes, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def report_mixture(
    names: Sequence[str], train: Encoded, val: Encoded, shares: Sequence[float], stop: Stop
) -> None:
    """Say how much each source has and gives, and warn of one that gives nothing."""
    sizes = [len(examples) for examples in train]
    total = epoch_length(sizes, shares, stop)
    for name, share, size, examples in zip(names, shares, sizes, train, strict=True):
        if round(total * share) == 0:
            rank_zero_warn(
                f"source {name}: weight {share:.2g} of an epoch's {total} records is not one "
                "record, so it is never trained on; raise its weight in data.sources, or "
                "data.temperature."
            )
        where = " on disk" if isinstance(examples, Streamed) else ""
        rank_zero_info(
            f"{name}: {size} records{where}, weight {share:.3g}, seen "
            f"{total * share / size:.2g} times an epoch"
        )
    if held := sum(map(len, val)):
        rank_zero_info(f"held out to validate on: {held} records")
