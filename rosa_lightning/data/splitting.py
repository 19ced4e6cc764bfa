"""The validation split: equal questions stay on one side, whatever their order and spelling."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rosa_lightning.tasks.records import Record


def normalized_question(record: Record) -> str:
    """Instruction and input in lower case, every run of other than letters and digits one space.

    A question without any is taken as it is.
    """
    asked = f"{record.instruction} {record.input}"
    return re.sub(r"[\W_]+", " ", asked.casefold()).strip() or asked


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
