"""Which test questions stand in the training data: exact and near matches.

Pure functions of the records; nothing is drawn at random, and the training records are gone through
once, so that they may be a stream.

Exact: the same question after `normalise`. Near: not exact, but the word pairs of both overlap by
a Jaccard index of at least `NEAR`, and they hold the same numbers. Word pairs in more than a tenth
of a benchmark's questions are its frame ("Please choose the correct answer to ...") and are not
counted. All such overlaps are found, by prefix filtering (Bayardo et al., "Scaling Up All Pairs
Similarity Search", WWW 2007), where MinHash would estimate them.

The threshold comes from reading pairs of the LLM-Adapters files (the first 60 % of the test sets):

* At 0.7, 38 of BoolQ's 1962 questions are near one of its training file, and 3 of these 38 ask
  something else ("is a us passport (card) a valid form of id"). Between 0.5 and 0.7 there are 318
  more, and 29 of 40 that were drawn ask something else. With the frame counted, 501 would be near.
* The same numbers, because arithmetic sets repeat a story with others: 104 of MultiArith's 360
  questions would be near another one of them, 35 of SVAMP's 600; with this rule 2 and 6.
* No question is near one of another benchmark's training file (ARC-e and ARC-c included). Within
  test sets WinoGrande stands out, 314 of 760: it was written in pairs that differ by a few words.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rosa_lightning.data.streamed import select
from rosa_lightning.tasks.records import Record

NEAR = 0.7
"""Jaccard index of word pairs from which on two questions are near."""
_FRAME_SHARE, _FRAME_COUNT = 0.1, 10
"""Word pairs in more questions than this share and this number are a benchmark's frame."""


@dataclass(frozen=True, slots=True)
class Leakage:
    """Test records found among training records; both by position, from 0."""

    exact: dict[int, tuple[int, ...]]
    """Each test record whose question is trained on, with the training records that hold it."""
    near: dict[int, tuple[int, ...]]
    """The same for near matches, of test records that have no exact one."""


def normalise(text: str) -> str:
    """Lower case, with every run of anything but a-z and 0-9 one space, and none at the ends."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def question_key(record: Record) -> str:
    """What questions are compared by: instruction and input, normalised.

    Where that leaves not even half of the letters (another script, or "7 + 5 = ?"), different
    questions would become the same; there only case and white space are levelled.
    """
    text = f"{record.instruction} {record.input}"
    normal = normalise(text)
    kept = sum(map(str.isalpha, normal))
    return normal if 2 * kept > sum(map(str.isalpha, text)) else " ".join(text.casefold().split())


def question_keys(records: Iterable[Record]) -> frozenset[str]:
    """The questions of all records, as `question_key` gives them."""
    return frozenset(map(question_key, records))


def question_digest(record: Record) -> str:
    """What a record asks, as 16 characters: what a checkpoint remembers of a question."""
    return hashlib.blake2b(question_key(record).encode(), digest_size=8).hexdigest()


def split_leaked(
    records: Sequence[Record], test_questions: Collection[str]
) -> tuple[Sequence[Record], Sequence[Record]]:
    """The records whose question is none of `test_questions` (`question_keys`), and the others.

    Near matches stay: a question in like words may be another one, so that is for people to judge.
    """
    found = (question_key(record) in test_questions for record in records)
    is_leaked = np.fromiter(found, dtype=np.bool_, count=len(records))
    return select(records, ~is_leaked), select(records, is_leaked)


def leaked(train: Iterable[Record], test: Sequence[Record]) -> Leakage:
    """Which records of one benchmark have their question in the training data."""
    return leaked_benchmarks(train, [test])[0]


def leaked_benchmarks(
    train: Iterable[Record], benchmarks: Sequence[Sequence[Record]]
) -> list[Leakage]:
    """`leaked` for each of several benchmarks, going through the training data once."""
    keys = [[question_key(record) for record in benchmark] for benchmark in benchmarks]
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, questions in enumerate(keys):
        for position, key in enumerate(questions):
            places[key].append((number, position))
    indices = [_NearIndex(questions) for questions in keys]
    exact: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in keys]
    near: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in keys]
    for position, record in enumerate(train):
        key = question_key(record)
        for number, place in places.get(key, ()):
            exact[number][place].append(position)
        pairs, numbers = _word_pairs(key), _numbers(key)
        for index, found in zip(indices, near, strict=True):
            for place in index.near(pairs, numbers):
                found[place].append(position)
    return [
        Leakage(
            exact={place: tuple(same[place]) for place in sorted(same)},
            near={place: tuple(found[place]) for place in sorted(found) if place not in same},
        )
        for same, found in zip(exact, near, strict=True)
    ]


def _word_pairs(question: str) -> set[str]:
    """Neighbouring words; of a single word, the word."""
    words = question.split(" ")
    return {f"{a} {b}" for a, b in pairwise(words)} or {question}


def _numbers(question: str) -> set[str]:
    return {word for word in question.split(" ") if word.isdecimal()}


class _NearIndex:
    """The questions of one benchmark, to find those that are near a given one."""

    def __init__(self, questions: Sequence[str]) -> None:
        pairs = [_word_pairs(question) for question in questions]
        counts = Counter(pair for held in pairs for pair in held)
        most = max(_FRAME_COUNT, _FRAME_SHARE * len(questions))
        self.frame = {pair for pair, count in counts.items() if count > most}
        self.pairs = [held - self.frame for held in pairs]
        self.numbers = [_numbers(question) for question in questions]
        # A question that is near shares at least NEAR of these pairs, so at least one of any
        # 1 - NEAR of them and one more. The rarest are taken, as they lead to the fewest questions.
        # (1 - NEAR is a little above 0.3 in binary, so rounding down loses none.)
        self.rarest: defaultdict[str, list[int]] = defaultdict(list)
        for position, held in enumerate(self.pairs):
            ranked = sorted(held, key=lambda pair: (counts[pair], pair))
            for pair in ranked[: int((1 - NEAR) * len(held)) + 1]:
                self.rarest[pair].append(position)

    def near(self, pairs: set[str], numbers: set[str]) -> list[int]:
        """Positions of the questions near the one that has these word pairs and numbers.

        Those with the same word pairs are among them, so the same question is, too.
        """
        candidates = {place for pair in pairs & self.rarest.keys() for place in self.rarest[pair]}
        pairs = pairs - self.frame if candidates else pairs
        return [
            place
            for place in sorted(candidates)
            if self.numbers[place] == numbers and _jaccard(self.pairs[place], pairs) >= NEAR
        ]


def _jaccard(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
