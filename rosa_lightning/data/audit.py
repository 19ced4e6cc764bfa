"""What is in the training data: lengths, duplicates, contradictions, and test questions."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from rosa_lightning.data.contamination import Contamination, compare, question_digest
from rosa_lightning.data.tokenization import Encoder
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
        ranked = sorted(self.lengths)
        return tuple(ranked[max(0, -int(-share * len(ranked) // 1) - 1)] for share in QUANTILES)


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
            {
                "name": source.name,
                "records": source.num_records,
                "lengths": dict(zip(map(str, QUANTILES), source.quantiles(), strict=True)),
                **{key: value for key, value in asdict(source).items() if key not in _BESIDE},
            }
            for source in self.sources
        ]
        benchmarks = [
            {
                "name": benchmark.name,
                "questions": benchmark.questions,
                "contaminated_exact": benchmark.num_exact,
                "contaminated_near": benchmark.num_near,
                "exact": [asdict(match) for match in benchmark.exact],
                "near": [asdict(match) for match in benchmark.near],
            }
            for benchmark in self.benchmarks
        ]
        settings = {key: getattr(self, key) for key in ("unit", "max_length", "decontaminate")}
        return {**settings, "sources": sources, "benchmarks": benchmarks}


_BESIDE = ("name", "lengths")


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
    exact = {place for one in found_in for places in one.exact.values() for place in places}
    notes = [_noted(name, record) for name, records in sources.items() for record in records]
    repeated, elsewhere, conflicting = _compare(notes)
    empty = {place for place, note in enumerate(notes) if note.is_empty}

    audits, start = [], 0
    for name, records in sources.items():
        span = range(start, start + len(records))
        found = _lengths_in_words(records) if lengths is None else tuple(lengths(records))
        too_long = None if lengths is None else sum(length > max_length for length in found)
        groups = [
            tuple(notes[place].number for place in span if place in group)
            for group in (repeated, elsewhere, conflicting, empty, exact)
        ]
        audits.append(
            SourceAudit(
                name=name,
                lengths=found,
                too_long=too_long,
                duplicates=groups[0],
                elsewhere=groups[1],
                conflicting=groups[2],
                empty=groups[3],
                contaminated=groups[4],
            )
        )
        start += len(records)
    return Audit(
        sources=tuple(audits),
        benchmarks=tuple(
            _benchmark(name, tests[name], one, notes)
            for name, one in zip(tests, found_in, strict=True)
        ),
        unit="words" if lengths is None else "tokens",
        max_length=max_length,
        decontaminate=decontaminate,
    )


def token_lengths(records: Sequence[Record], encoder: Encoder) -> list[int]:
    """Tokens of each record as training takes them, prompt, response and end, uncut."""
    uncut = replace(encoder, max_length=2**31)
    starts = range(0, len(records), _CHUNK)
    return [one.num_tokens for start in starts for one in uncut(records[start : start + _CHUNK])]


def _lengths_in_words(records: Sequence[Record]) -> tuple[int, ...]:
    return tuple(
        len(f"{record.instruction} {record.input} {record.output}".split()) for record in records
    )


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
    return _Note(
        source=source,
        number=record.index,
        question=question_digest(record),
        task=task_of(record),
        answer=reference(record),
        is_empty=not record.output.strip(),
    )


def _compare(notes: Sequence[_Note]) -> tuple[set[int], ...]:
    """Positions of records asked before in their source, in other sources, answered otherwise."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for place, note in enumerate(notes):
        groups[note.question].append(place)
    repeated, elsewhere, conflicting = set[int](), set[int](), set[int]()
    for places in groups.values():
        if len(places) == 1:
            continue
        by_source = {notes[place].source for place in places}
        if len(by_source) > 1:
            elsewhere.update(places)
        seen = set[str]()
        for place in places:
            if notes[place].source in seen:
                repeated.add(place)
            seen.add(notes[place].source)
        answered = [place for place in places if notes[place].answer is not None]
        if any(not _agree(notes[answered[0]], notes[place]) for place in answered[1:]):
            conflicting.update(answered)
    return repeated, elsewhere, conflicting


def _agree(first: _Note, second: _Note) -> bool:
    """Whether two records have the same answer by the rules of either's task, or as numbers."""
    one, other = first.answer, second.answer
    if any(same_answer(task, one, other) for task in (first.task, second.task)):
        return True
    try:
        return abs(float(one or "") - float(other or "")) <= NUMBER_TOLERANCE
    except ValueError:
        return False


def _benchmark(
    name: str,
    test: Sequence[Record],
    found_in: Contamination,
    train: Sequence[_Note],
) -> BenchmarkAudit:
    exact, near = (
        tuple(
            Match(
                record=test[number].index, source=train[at].source, source_record=train[at].number
            )
            for number, places in found.items()
            for at in places
        )
        for found in (found_in.exact, found_in.near)
    )
    return BenchmarkAudit(name=name, questions=len(test), exact=exact, near=near)
