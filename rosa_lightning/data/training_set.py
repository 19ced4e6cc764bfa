"""What is trained and validated on: sources without test questions, tokenized and split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from rosa_lightning.data.contamination import (
    contaminated,
    normalized_question,
    question_digest,
)
from rosa_lightning.data.records import Records, content_digest
from rosa_lightning.data.sampling import epoch_length, shares_by_size
from rosa_lightning.data.settings import LoadingConfig
from rosa_lightning.data.sources import Source
from rosa_lightning.data.tokenization import Encoder, Examples, count_altered, tokenize
from rosa_lightning.tasks.records import Record


@dataclass
class TrainingSet:
    """Examples of each source."""

    train: list[Examples] = field(default_factory=list)
    val: list[Examples] = field(default_factory=list)
    content: dict[str, str] = field(default_factory=dict)
    """Digests of the sources, by name."""
    left_out: list[str] = field(default_factory=list)
    """Digests of the test questions that were left out."""
    _lengths: dict[bool, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Training records of each source."""
        return [len(examples) for examples in self.train]

    def lengths(self, exact: bool) -> NDArray[np.int32]:
        """Tokens of all training records, sources laid end to end; exact or estimated."""
        if exact not in self._lengths:
            self._lengths[exact] = np.concatenate([one.lengths(exact) for one in self.train])
        return self._lengths[exact]

    def shares(self, sources: Sequence[Source], temperature: float | None) -> list[float]:
        """Each source's part of the training stream; they sum to 1."""
        if temperature is not None:
            return shares_by_size(self.sizes, temperature)
        pairs = zip(sources, self.sizes, strict=True)
        weights = [float(n) if one.weight is None else one.weight for one, n in pairs]
        return [weight / sum(weights) for weight in weights]

    def report(self, sources: Sequence[Source], loading: LoadingConfig) -> None:
        """Say how much each source has and gives, and warn of one that gives nothing."""
        shares = self.shares(sources, loading.temperature)
        total = epoch_length(self.sizes, shares, loading.stop)
        for source, share, examples in zip(sources, shares, self.train, strict=True):
            if round(total * share) == 0:
                rank_zero_warn(
                    f"source {source.label}: weight {share:.2g} of an epoch's {total} records is "
                    "not one record, so it is never trained on; raise its weight in data.sources, "
                    "or data.loading.temperature."
                )
            where = " on disk" if examples.records.on_disk else ""
            rank_zero_info(
                f"{source.label}: {len(examples)} records{where}, weight {share:.3g}, seen "
                f"{total * share / len(examples):.2g} times an epoch"
            )
        if held := sum(map(len, self.val)):
            rank_zero_info(f"validation split: {held} records")


def read_training_set(
    records: Mapping[str, Records],
    tested: frozenset[str],
    encoder: Encoder,
    cache: Path | None,
    val_fraction: float,
    seed: int,
) -> TrainingSet:
    """Tokenize sources and split them.

    Args:
        records: The sources' records by name.
        tested: Questions to leave out, as `question_keys` gives them.
        encoder: Makes token ids.
        cache: Folder that keeps them, if any.
        val_fraction: Part of each source to validate on.
        seed: Chooses that part.
    """
    found, left_out, kept, masks = TrainingSet(), set[str](), [], []
    for name, some in records.items():
        leaked = contaminated(some, tested) if tested else np.zeros(len(some), np.bool_)
        if leaked.any():
            left_out |= set(map(question_digest, some.select(leaked)))
            rank_zero_info(
                f"{name}: {leaked.sum()} of {len(some)} records left out, as their questions "
                "stand in data.test_sources"
            )
        if leaked.all():
            raise ValueError(
                f"source {name}: the questions of all {len(some)} records stand in "
                "data.test_sources, so data.loading.decontaminate leaves none. Take the source out "
                "of data.sources, or set data.loading.decontaminate: false to train on test "
                "questions."
            )
        masks.append(~leaked)
        kept.append(some.select(~leaked) if leaked.any() else some)
    found.left_out = sorted(left_out)
    validated = validation_split(kept, val_fraction, seed)
    for (name, some), rest, mask, held in zip(records.items(), kept, masks, validated, strict=True):
        whole = rest is some or some.on_disk
        found.content[name] = some.content if whole else content_digest(rest)
        examples = tokenize(some, encoder, cache).select(mask)
        too_long = count_altered(name, examples)
        used = ~too_long if encoder.overlong == "drop" else np.ones(len(examples), np.bool_)
        found.train.append(examples.select(used & ~held))
        found.val.append(examples.select(used & held))
        if not len(found.train[-1]):
            raise ValueError(
                f"source {name}: all {len(examples)} records are longer than data.max_length="
                f"{encoder.max_length} tokens. Raise it, or set data.loading.overlong: cut."
            )
    return found


# --- the validation split -------------------------------------------------------------------


def validation_split(
    records: Sequence[Sequence[Record]], fraction: float, seed: int
) -> list[NDArray[np.bool_]]:
    """Which records of each source are validated on.

    A hash of question and seed decides, so the order in a file does not matter and equal questions,
    in one source or in several, stand on one side. Each source with two or more different questions
    gives `fraction` of its records, at least one, and keeps at least one. All records are read
    once; of each, 8 bytes stay in memory.
    """
    keys = [
        np.fromiter((_split_key(record, seed) for record in source), np.uint64, len(source))
        for source in records
    ]
    held: NDArray[np.uint64] = np.empty(0, np.uint64)
    if fraction > 0:
        held = np.unique(np.concatenate([held, *(_chosen(each, fraction) for each in keys)]))
    for each in keys:
        if len(each) and _among(each, held).all():  # nothing would be left to train on
            held = held[held != each.max()]
    return [_among(each, held) for each in keys]


def _split_key(record: Record, seed: int) -> int:
    text = f"{seed}\0{normalized_question(record)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big")


def _chosen(keys: NDArray[np.uint64], fraction: float) -> NDArray[np.uint64]:
    """Keys that select as nearly `fraction` of the records as whole groups allow."""
    groups, sizes = np.unique(keys, return_counts=True)
    if len(groups) < 2:
        return groups[:0]
    wanted = max(1, round(len(keys) * fraction))
    chosen = []
    for number in range(len(groups)):
        if sizes[number] <= wanted:
            chosen.append(number)
            wanted -= int(sizes[number])
        if not wanted:
            break
    return groups[chosen] if chosen else groups[[sizes.argmin()]]


def _among(keys: NDArray[np.uint64], some: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among some that are sorted; in less memory than np.isin takes."""
    if not len(some):
        return np.zeros(len(keys), dtype=np.bool_)
    places = np.searchsorted(some, keys)
    found: NDArray[np.bool_] = some[np.minimum(places, len(some) - 1, out=places)] == keys
    return found
