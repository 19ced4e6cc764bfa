"""What is in the training data: lengths, duplicates, contradictions, and test questions."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from rosa_lightning.data.contamination import compare, question_digest
from rosa_lightning.data.encoding import Encoder
from rosa_lightning.tasks.records import (
    NUMBER_TOLERANCE,
    Record,
    Task,
    reference,
    same_answer,
    task_of,
)

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
"""Shares of the records that are at most as long as a quantile says."""
_CHUNK = 1000
"""Records that are tokenized at a time, so that memory stays small."""


@dataclass(frozen=True, kw_only=True)
class SourceAudit:
    """One training source. Records go by their number in it, counted from 1."""

    name: str
    lengths: tuple[int, ...]
    """Of every record, prompt and response together."""
    too_long: int | None
    """Records longer than ``data.max_length``; None where lengths are not in tokens."""
    duplicates: tuple[int, ...]
    """Records whose question stands further up in the source, too."""
    elsewhere: tuple[int, ...]
    """Records whose question stands in another source, too."""
    conflicting: tuple[int, ...]
    """Records whose question has another answer somewhere in the mixture."""
    empty: tuple[int, ...]
    """Records without a response to train on, which training refuses."""
    contaminated: tuple[int, ...]
    """Records whose question is a test question, which ``data.loading.decontaminate`` leaves
    out."""

    @property
    def num_records(self) -> int:
        """All records of the source."""
        return len(self.lengths)

    def quantiles(self) -> tuple[int, ...]:
        """Lengths at `QUANTILES`, each that of a record."""
        found = np.quantile(self.lengths, QUANTILES, method="inverted_cdf")
        return tuple(found.astype(int).tolist())


@dataclass(frozen=True, kw_only=True)
class Match:
    """A test record, and a training record that asks the same or nearly."""

    record: int
    source: str
    source_record: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkAudit:
    """One test source against all training sources."""

    name: str
    questions: int
    """Its records; one that comes twice counts twice."""
    exact: tuple[Match, ...]
    near: tuple[Match, ...]
    """Of records without an exact match."""

    @property
    def num_exact(self) -> int:
        """Questions that are trained on."""
        return len({match.record for match in self.exact})

    @property
    def num_near(self) -> int:
        """Questions that are not trained on, but one like them is."""
        return len({match.record for match in self.near})

    def sources(self) -> tuple[str, ...]:
        """Training sources that hold any of them, the exact ones first."""
        return tuple(dict.fromkeys(match.source for match in (*self.exact, *self.near)))


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A training mixture, and the benchmarks it is tested on."""

    sources: tuple[SourceAudit, ...]
    benchmarks: tuple[BenchmarkAudit, ...]
    unit: str
    """What lengths count: ``tokens``, or ``words`` where there is no tokenizer."""
    max_length: int
    decontaminate: bool

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON; lengths as quantiles."""
        sources = [
            asdict(source)
            | {"records": source.num_records}
            | {"lengths": dict(zip(map(str, QUANTILES), source.quantiles(), strict=True))}
            for source in self.sources
        ]
        benchmarks = [
            asdict(one) | {"contaminated_exact": one.num_exact, "contaminated_near": one.num_near}
            for one in self.benchmarks
        ]
        return {**vars(self), "sources": sources, "benchmarks": benchmarks}


def audit_records(
    sources: Mapping[str, Sequence[Record]],
    tests: Mapping[str, Sequence[Record]],
    lengths: Callable[[Sequence[Record]], Sequence[int]] | None,
    *,
    max_length: int,
    decontaminate: bool,
) -> Audit:
    """Look at training sources by themselves, at each other, and at test sources.

    Args:
        sources: Training records by the name of their source.
        tests: Test records by the name of theirs; may be empty.
        lengths: Gives the records' lengths in tokens; without it they are counted in words.
        max_length: Most tokens of a record.
        decontaminate: Whether training leaves test questions out; for the report alone.
    """
    # Gone through, never held: they may be more than memory has room for.
    found_in = compare(chain.from_iterable(sources.values()), list(tests.values()))
    notes = [_noted(name, record) for name, records in sources.items() for record in records]
    groups = _compare(notes)
    groups["empty"] = {position for position, note in enumerate(notes) if note.is_empty}
    groups["contaminated"] = {
        position for one in found_in for positions in one.exact.values() for position in positions
    }
    audits, start = [], 0
    for name, records in sources.items():
        span = range(start, start + len(records))
        start += len(records)
        found = tuple(map(_words, records) if lengths is None else lengths(records))
        numbers = {
            key: tuple(notes[position].number for position in span if position in group)
            for key, group in groups.items()
        }
        too_long = None if lengths is None else sum(length > max_length for length in found)
        audits.append(SourceAudit(name=name, lengths=found, too_long=too_long, **numbers))
    benchmarks = [
        BenchmarkAudit(
            name=name,
            questions=len(test),
            exact=_matches(test, one.exact, notes),
            near=_matches(test, one.near, notes),
        )
        for (name, test), one in zip(tests.items(), found_in, strict=True)
    ]
    return Audit(
        sources=tuple(audits),
        benchmarks=tuple(benchmarks),
        unit="words" if lengths is None else "tokens",
        max_length=max_length,
        decontaminate=decontaminate,
    )


def token_lengths(records: Sequence[Record], encoder: Encoder) -> list[int]:
    """Tokens of each record as training takes them, prompt, response and end, uncut."""
    uncut = replace(encoder, max_length=2**31)
    starts = range(0, len(records), _CHUNK)
    return [one.num_tokens for start in starts for one in uncut(records[start : start + _CHUNK])]


def _words(record: Record) -> int:
    return len(f"{record.instruction} {record.input} {record.output}".split())


class _Note(NamedTuple):
    """What is kept of a training record."""

    source: str
    number: int
    question: str
    """A digest: equal for equal questions."""
    task: Task
    answer: str | None
    is_empty: bool
    """Whether there is nothing to train on."""


def _noted(source: str, record: Record) -> _Note:
    about = (question_digest(record), task_of(record), reference(record))
    return _Note(source, record.index, *about, not record.output.strip())


def _compare(notes: Sequence[_Note]) -> dict[str, set[int]]:
    """Positions of records asked before in their source, in other sources, answered otherwise."""
    by_question: defaultdict[str, list[int]] = defaultdict(list)
    for position, note in enumerate(notes):
        by_question[note.question].append(position)
    duplicates, elsewhere, conflicting = set[int](), set[int](), set[int]()
    for positions in by_question.values():
        first_in: dict[str, int] = {}
        for position in positions:
            if first_in.setdefault(notes[position].source, position) != position:
                duplicates.add(position)
        if len(first_in) > 1:
            elsewhere.update(positions)
        answered = [position for position in positions if notes[position].answer is not None]
        if any(not _agree(notes[answered[0]], notes[position]) for position in answered[1:]):
            conflicting.update(answered)
    return {"duplicates": duplicates, "elsewhere": elsewhere, "conflicting": conflicting}


def _agree(first: _Note, second: _Note) -> bool:
    """Whether two records have the same answer by the rules of either's task, or as numbers."""
    one, other = first.answer, second.answer
    if any(same_answer(task, one, other) for task in (first.task, second.task)):
        return True
    try:
        return abs(float(one or "") - float(other or "")) <= NUMBER_TOLERANCE
    except ValueError:
        return False


def _matches(
    test: Sequence[Record], found: Mapping[int, tuple[int, ...]], train: Sequence[_Note]
) -> tuple[Match, ...]:
    return tuple(
        Match(record=test[number].index, source=train[at].source, source_record=train[at].number)
        for number, positions in found.items()
        for at in positions
    )
