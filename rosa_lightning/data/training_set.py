"""What is trained and validated on: tokenized, split, and counted as a run goes through it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from rosa_lightning.data.batches import Batching, BatchPlanner
from rosa_lightning.data.contamination import (
    Questions,
    contaminated,
    digest_of,
    normalized_question,
)
from rosa_lightning.data.encoding import Encoder
from rosa_lightning.data.records import Records, content_digest
from rosa_lightning.data.sampling import Stop, epoch_length, shares_by_size
from rosa_lightning.data.tokenization import Examples, count_altered, tokenize
from rosa_lightning.tasks.records import Record

ENOUGH_VALIDATION = 64
"""Validation records from which on the best checkpoint is more than a matter of chance."""


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

    def named(self, names: Sequence[str]) -> dict[str, Examples]:
        """The examples by source and split."""
        found = dict[str, Examples]()
        for name, train, val in zip(names, self.train, self.val, strict=False):
            found |= {f"{name} (training)": train, f"{name} (validation)": val}
        return found

    def planner(
        self, batching: Batching, batch_size: int, tokens: int | None, max_length: int
    ) -> BatchPlanner:
        """How the training records are made into batches, by their lengths where these count."""
        planner = BatchPlanner(batching, batch_size, tokens, max_length)
        if not self.train or (batching == "random" and not tokens):
            return planner
        exact = tokens is not None or batching == "best_fit"
        if exact not in self._lengths:
            self._lengths[exact] = np.concatenate([one.lengths(exact) for one in self.train])
        return replace(planner, lengths=self._lengths[exact])

    def shares(self, weights: Sequence[float | None], temperature: float | None) -> list[float]:
        """Each source's part of the training stream, by weight or by size; they sum to 1."""
        if temperature is not None:
            return shares_by_size(self.sizes, temperature)
        pairs = zip(weights, self.sizes, strict=True)
        parts = [float(size) if weight is None else weight for weight, size in pairs]
        return [part / sum(parts) for part in parts]

    def warn_of_unused(self, names: Sequence[str], shares: Sequence[float], stop: Stop) -> None:
        """Warn of a source that gives nothing."""
        total = epoch_length(self.sizes, shares, stop)
        for name, share in zip(names, shares, strict=True):
            if round(total * share) == 0:
                rank_zero_warn(
                    f"source {name}: weight {share:.2g} of an epoch's {total} records is not one "
                    "record, so it is never trained on; raise its weight in data.sources, or "
                    "data.loading.temperature."
                )

    def summary(self, names: Sequence[str], shares: Sequence[float], stop: Stop) -> list[str]:
        """Lines for people: what each source has and gives, and what is validated on."""
        total, lines = epoch_length(self.sizes, shares, stop), []
        for name, share, examples in zip(names, shares, self.train, strict=True):
            where = ", on disk" if examples.records.on_disk else ""
            what = "pieces of text" if examples.records[0].is_text else "records"
            line = f"{name}: {len(examples):,} training {what}{where}"
            if len(names) > 1:
                times = total * share / len(examples)
                line += f", {100 * share:.3g} % of each epoch, so each is seen {times:.2g} times"
            lines.append(line)
        held = sum(map(len, self.val))
        few = " (too few to tell close checkpoints apart: raise data.val_fraction)"
        lines.append(f"{held:,} validation records{few if 0 < held < ENOUGH_VALIDATION else ''}")
        return lines


def read_training_set(
    records: Mapping[str, Records],
    tested: frozenset[str],
    encoder: Encoder,
    cache: Path | None,
    val_fraction: float,
    seed: int,
) -> TrainingSet:
    """Tokenize sources, without the questions in `tested` (`question_keys`), and split them."""
    found = TrainingSet()
    compared = [_untested(name, some, tested) for name, some in records.items()]
    masks = [mask for mask, _ in compared]
    found.left_out = sorted({digest for _, left_out in compared for digest in left_out})
    kept = [
        some if mask.all() else some.select(mask)
        for some, mask in zip(records.values(), masks, strict=True)
    ]
    validated = validation_split(kept, val_fraction, seed)
    for (name, some), rest, mask, held in zip(records.items(), kept, masks, validated, strict=True):
        whole = rest is some or some.on_disk
        found.content[name] = some.content if whole else content_digest(rest)
        examples = tokenize(some, encoder, cache)
        numbers = examples.record_numbers
        validates = np.zeros(len(some), np.bool_)
        validates[mask] = held
        examples, is_held = examples.select(mask[numbers]), validates[numbers][mask[numbers]]
        too_long = count_altered(name, examples)
        used = ~too_long if encoder.overlong == "drop" else np.ones(len(examples), np.bool_)
        found.train.append(examples.select(used & ~is_held))
        found.val.append(examples.select(used & is_held))
        if not len(found.train[-1]):
            raise ValueError(
                f"source {name}: all {len(examples)} records are longer than data.max_length="
                f"{encoder.max_length} tokens. Raise it, or set data.loading.overlong: cut."
            )
    return found


def _untested(
    name: str, records: Records, tested: frozenset[str]
) -> tuple[NDArray[np.bool_], set[str]]:
    """Which records hold no test question, and digests of those that the others hold."""
    is_tested = contaminated(records, tested) if tested else np.zeros(len(records), np.bool_)
    if is_tested.all():
        raise ValueError(
            f"source {name}: the questions of all {len(records)} records stand in "
            "data.test_sources, so data.loading.decontaminate leaves none. Take the source out "
            "of data.sources, or set data.loading.decontaminate: false to train on test "
            "questions."
        )
    if not is_tested.any():
        return ~is_tested, set()
    rank_zero_info(
        f"{name}: {is_tested.sum():,} of {len(records):,} records left out, whose questions "
        "are also in data.test_sources"
    )
    held = map(Questions(tested).held_by, records.select(is_tested))
    return ~is_tested, {digest_of(key) for keys in held for key in keys}


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
    if not len(keys) or keys.min() == keys.max():
        return keys[:0]
    chosen: list[np.uint64] = []
    # The lowest keys are nearly always enough; all of them, sorted, take much more memory.
    for bound in (min(int(2 * fraction * 2**64), 2**64 - 1), 2**64 - 1):
        ordered = np.sort(keys[keys <= np.uint64(bound)])
        wanted, start = max(1, round(len(keys) * fraction)), 0
        chosen.clear()
        while wanted and start < len(ordered):
            size = int(np.searchsorted(ordered, ordered[start], side="right")) - start
            if size <= wanted:
                chosen.append(ordered[start])
                wanted -= size
            start += size
        if not wanted:
            break
    if chosen:
        return np.array(chosen)
    groups, sizes = np.unique(ordered, return_counts=True)
    return groups[[sizes.argmin()]]


def _among(keys: NDArray[np.uint64], some: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among some; in parts, as np.isin takes memory several times that of both."""
    parts = np.array_split(keys, len(keys) // 2**17 + 1)
    return np.concatenate([np.isin(part, some) for part in parts])


# --- what was trained on --------------------------------------------------------------------


class SampleCounter:
    """Counts the examples of each source that a run has trained on, resumed parts included."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.start()

    def start(self, before: Mapping[str, int] | None = None) -> None:
        """Begin anew, or from the counts of a checkpoint."""
        self._logged = 0
        self._here = torch.zeros(len(self.names), dtype=torch.long)  # on this rank
        self._before = torch.tensor([(before or {}).get(name, 0) for name in self.names])

    def add(self, source_B: Tensor) -> None:
        """Count a batch, by the sources of its examples, shape (B,)."""
        self._here += torch.bincount(source_B.cpu(), minlength=len(self.names))

    def counts(self, trainer: Trainer | None) -> dict[str, int]:
        """Examples of each source so far, on all ranks; every rank must call this."""
        here = self._here
        if trainer is not None and trainer.world_size > 1:
            strategy = trainer.strategy
            here = strategy.reduce(here.clone().to(strategy.root_device), reduce_op="sum").cpu()
        return dict(zip(self.names, (here + self._before).tolist(), strict=True))

    def log(self, trainer: Trainer) -> None:
        """Log the shares at the trainer's interval; that of an only source tells nothing."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if len(self.names) > 1 and interval and step % interval == 0 and step > self._logged:
            self._logged = step
            seen = self.counts(trainer)
            shares = {
                f"train/share/{name}": n / max(1, sum(seen.values())) for name, n in seen.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(shares, step=step)


def order_changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What of the settings that decide the order of records is not as a checkpoint says."""
    then = {"batching": "random", "content": {}, **then}  # earlier versions do not know every key
    changed = [key for key in now if key != "content" and now[key] != then.get(key, now[key])]
    told = [f"{key} was {then[key]} and is {now[key]}" for key in changed]
    for name, digest in now["content"].items():
        earlier = then["content"].get(name, "")
        # A digest of a file, which its first word tells, says nothing of one of records.
        if digest != earlier and digest.split()[:1] == earlier.split()[:1]:
            told.append(f"source {name} holds other records")
    return told
