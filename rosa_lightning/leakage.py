"""Test questions that stand in training data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rosa_lightning.tasks import Record


@dataclass(frozen=True)
class Leakage:
    """Test records found among training records; both by position, from 0."""

    exact: dict[int, tuple[int, ...]]
    """Each test record whose question is trained on, with the training records that hold it."""


def normalise(text: str) -> str:
    """Lower case, and one space for every run of anything but a-z and 0-9."""
    return re.sub("[^a-z0-9]+", " ", text.lower()).strip()


def leaked(train: Iterable[Record], test: Sequence[Record]) -> Leakage:
    """Which test records have their question in the training data."""
    places: dict[str, list[int]] = {_question(record): [] for record in test}
    for position, record in enumerate(train):
        if (question := _question(record)) in places:
            places[question].append(position)
    found = ((position, places[_question(record)]) for position, record in enumerate(test))
    return Leakage(exact={position: tuple(held) for position, held in found if held})


def _question(record: Record) -> str:
    return normalise(f"{record.instruction} {record.input}")
