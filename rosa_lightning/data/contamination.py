"""Which test questions stand in the training data: exact and near matches.

Exact: the same `question_key`. Near: not exact, but the word pairs of both questions overlap by a
Jaccard index of at least `NEAR`, and they hold the same numbers. Of a conversation every user's
turn is compared; plain text holds a question of at least `_LONG` words that stands in it. Word
pairs in more than a tenth of a benchmark's questions ("Please choose the correct answer to ...")
are not counted. All such overlaps are found, by prefix filtering (Bayardo et al., "Scaling Up All
Pairs Similarity Search", WWW 2007), where MinHash would estimate them.

The threshold comes from reading pairs of the LLM-Adapters files (the first 60 % of the test sets):
at 0.7, 38 of BoolQ's 1962 questions are near one of its training file, and 3 of these 38 ask
something else; between 0.5 and 0.7 there are 318 more, and 29 of 40 that were drawn ask something
else. Numbers must be the same because arithmetic sets repeat a story with others: 104 of
MultiArith's 360 questions would be near another one of them, and 2 are.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source, as_source, demo_source
from rosa_lightning.tasks.records import Record, Task
from rosa_lightning.utils.text import one_line

NEAR = 0.7
"""Jaccard index of word pairs from which on two questions are near."""
_LONG = 8
"""Words from which on a question is looked for in plain text."""
_FRAME_SHARE, _FRAME_COUNT = 0.1, 10
"""Word pairs in more questions than this share and this number frame a benchmark's questions."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """Test records found among training records; both by position, from 0."""

    exact: dict[int, tuple[int, ...]]
    """Each test record whose question is trained on, with the training records that hold it."""
    near: dict[int, tuple[int, ...]]
    """The same for near matches, of test records that have no exact one."""


def _asked(record: Record) -> list[str]:
    """What a record asks, turn by turn; the whole of a plain text."""
    if record.is_text:
        return [record.output]
    users = [turn.content for turn in record.turns if turn.role == "user"]
    return users or [f"{record.instruction} {record.input}"]


def normalized_question(record: Record) -> str:
    """All that is asked in lower case, every run of other than letters and digits one space.

    A question without any is taken as it is.
    """
    return _normalized(" ".join(_asked(record)))


def _normalized(asked: str) -> str:
    return re.sub(r"[\W_]+", " ", asked.casefold()).strip() or asked


def question_key(record: Record) -> str:
    """What questions are compared by: the normalized question.

    Without letters ("7 + 5 = ?") its signs matter; there only case and white space are levelled.
    """
    return _key(" ".join(_asked(record)))


def _key(asked: str) -> str:
    normal = _normalized(asked)
    if any(map(str.isalpha, normal)):
        return normal
    return " ".join(asked.casefold().split())


def question_keys(records: Iterable[Record]) -> frozenset[str]:
    """The questions of all records, as `question_key` gives them."""
    return frozenset(map(question_key, records))


def question_digest(record: Record) -> str:
    """What a record asks, as 16 characters, for checkpoints."""
    return digest_of(question_key(record))


def digest_of(key: str) -> str:
    """A `question_key` as 16 characters."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


class Questions:
    """Test questions (`question_keys`), to be found in training records."""

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = keys
        self._by_start: defaultdict[str, list[str]] = defaultdict(list)
        for key in keys:
            if len(words := key.split(" ")) >= _LONG:
                self._by_start[" ".join(words[:_LONG])].append(key)

    def held_by(self, record: Record) -> set[str]:
        """Those that a record asks, in any turn, and those that a plain text holds."""
        if not record.is_text:
            asked = _asked(record)
            return {key for key in map(_key, {*asked, " ".join(asked)}) if key in self.keys}
        text = normalized_question(record)
        words = text.split(" ")
        starts = (" ".join(words[n : n + _LONG]) for n in range(len(words)))
        found = {key for start in starts for key in self._by_start.get(start, ())}
        return {key for key in found if f" {key} " in f" {text} "}


def contaminated(records: Sequence[Record], questions: Collection[str]) -> NDArray[np.bool_]:
    """Which records hold one of these questions (`question_keys`); near matches do not count."""
    known = Questions(questions)
    found = (bool(known.held_by(record)) for record in records)
    return np.fromiter(found, dtype=np.bool_, count=len(records))


def compare(train: Iterable[Record], benchmarks: Sequence[Sequence[Record]]) -> list[Contamination]:
    """Which records of each benchmark have their question in the training data, read once."""
    keys = [[question_key(record) for record in benchmark] for benchmark in benchmarks]
    indices = [_QuestionIndex(questions) for questions in keys]
    known = Questions({key for questions in keys for key in questions})
    exact: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in keys]
    near: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in keys]
    for position, record in enumerate(train):
        turns = [] if record.is_text else [*map(_key, _asked(record))]
        parts = [(_word_pairs(key), _numbers(key)) for key in turns]
        held = known.held_by(record)
        for index, same, alike in zip(indices, exact, near, strict=True):
            for key in held & index.same.keys():
                for tested in index.same[key]:
                    same[tested].append(position)
            for tested in {one for part in parts for one in index.near(*part)}:
                alike[tested].append(position)
    return [
        Contamination(
            exact={tested: tuple(same[tested]) for tested in sorted(same)},
            near={tested: tuple(alike[tested]) for tested in sorted(alike) if tested not in same},
        )
        for same, alike in zip(exact, near, strict=True)
    ]


def _word_pairs(question: str) -> set[str]:
    """Neighbouring words; of a single word, the word."""
    words = question.split(" ")
    return {f"{a} {b}" for a, b in pairwise(words)} or {question}


def _numbers(question: str) -> set[str]:
    return {word for word in question.split(" ") if word.isdecimal()}


class _QuestionIndex:
    """The questions of one benchmark, to find those that equal a given one, or are near it."""

    def __init__(self, questions: Sequence[str]) -> None:
        self.same: defaultdict[str, list[int]] = defaultdict(list)
        for position, question in enumerate(questions):
            self.same[question].append(position)
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
        """Positions of the questions near the one that has these word pairs and numbers."""
        shared = pairs & self.rarest.keys()
        candidates = {position for pair in shared for position in self.rarest[pair]}
        pairs = pairs - self.frame if candidates else pairs
        return [
            position
            for position in sorted(candidates)
            if self.numbers[position] == numbers and _jaccard(self.pairs[position], pairs) >= NEAR
        ]


def _jaccard(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def check_hub(data_set: str) -> None:
    """Raise OSError where the hub cannot be reached: at once, and not after the retries of a load.

    With HF_HUB_OFFLINE set, what is cached is loaded without a request.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return
    try:
        HfApi().dataset_info(data_set, timeout=5)
    except Exception as error:  # of its own and of its HTTP client, without a common base
        raise OSError(
            f"{data_set} cannot be reached ({one_line(error, 80)}), so it was not searched for "
            "test questions. With HF_HUB_OFFLINE=1 a cached copy is searched."
        ) from error


# --- what a training was of -----------------------------------------------------------------


def questions_of(sources: Sequence[Source], tasks: Mapping[str, Task]) -> frozenset[str]:
    """The questions of test sources, but for hub data sets that cannot be reached.

    Raises OSError or ValueError for a file that cannot be read.
    """
    found: frozenset[str] = frozenset()
    for source in sources:
        try:
            found |= question_keys(load_records(replace(source, max_examples=None), "audit", tasks))
        except OSError as error:
            if not source.hub:
                raise
            rank_zero_warn(
                f"The training data are not compared with test source {source.label}, and may "
                f"hold its questions: {error} Or set data.loading.decontaminate: false."
            )
    return found


def training_of(sources: Sequence[Source], seed: int, left_out: list[str]) -> dict[str, Any]:
    """What a training reads, for its checkpoints."""
    return {
        "sources": [
            asdict(replace(source, path=source.path and str(Path(source.path).resolve())))
            for source in sources
        ],
        "seed": seed,
        "left_out": left_out,
    }


def trained_questions(
    trainings: Sequence[dict[str, Any]], test: Sequence[Record], tasks: Mapping[str, Task]
) -> tuple[list[Record], list[str]]:
    """The test records whose question was trained on, and the sources that were read for them."""
    found, compared = set[int](), dict[str, None]()
    for training in trainings:
        sources = [as_source(fields, tasks) for fields in training["sources"]]
        for source in filter(lambda one: one.hub, sources):
            check_hub(str(source.hub))
        train = (
            record
            for source in sources
            for record in load_records(source, "audit", tasks, training["seed"])
        )
        left_out = frozenset(training["left_out"])
        exact = compare(train, [test])[0].exact
        found |= {position for position in exact if question_digest(test[position]) not in left_out}
        demo = demo_source("train").path
        compared |= {"demo" if s.path == demo else s.location: None for s in sources}
    return [test[position] for position in sorted(found)], list(compared)
