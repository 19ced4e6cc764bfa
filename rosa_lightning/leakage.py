"""Test questions that stand in training data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rosa_lightning.tasks import Record


@dataclass(frozen=True)
class Leakage:
    """What was found of each test record, in their order."""

    exact: tuple[bool, ...]
    """Whether the same question stands in the training data, after normalising."""


def normalize(text: str) -> str:
    """Lower case, and one space for every run of anything but a-z and 0-9."""
    return re.sub("[^a-z0-9]+", " ", text.lower()).strip()


def leaked(train: Iterable[Record], test: Sequence[Record]) -> Leakage:
    """Which test records are asked in the training data too."""
    asked = {_question(record) for record in train}
    return Leakage(exact=tuple(_question(record) in asked for record in test))


def _question(record: Record) -> str:
    return normalize(f"{record.instruction} {record.input}")
