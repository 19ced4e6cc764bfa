"""Training data without the test sets' questions, and the questions that were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rosa_lightning.data.leakage import leaked, question_digest, question_keys, split_leaked
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source, as_source, demo_source
from rosa_lightning.tasks.records import Record, Task


def questions_of(sources: Sequence[Source], tasks: Mapping[str, Task]) -> frozenset[str]:
    """What test sources ask, as `question_keys` gives it, but for hubs that cannot be reached.

    Raises:
        OSError: A file cannot be read.
        ValueError: A record makes no sense.
    """
    found: frozenset[str] = frozenset()
    for source in sources:
        try:
            whole = replace(source, max_examples=None)
            found |= question_keys(load_records(whole, "audit", tasks))
        except OSError as error:
            if not source.hub:
                raise
            rank_zero_warn(
                f"The training data are not compared with test source {source.label}, and may "
                f"hold its questions: {error} Or set data.decontaminate: false."
            )
    return found


def without_leaked(
    records: Sequence[Sequence[Record]], names: Sequence[str], tested: frozenset[str]
) -> tuple[list[Sequence[Record]], list[str]]:
    """Each source's records without those that ask what is tested.

    Args:
        records: A sequence for each source.
        names: The sources' names.
        tested: What `questions_of` found.

    Returns:
        What is left of each source, and the digests of the questions that were left out.

    Raises:
        ValueError: Nothing is left of a source.
    """
    parts = [split_leaked(source, tested) for source in records]
    left_out = sorted({question_digest(record) for _, dropped in parts for record in dropped})
    kept = [part for part, _ in parts]
    for name, before, after in zip(names, records, kept, strict=True):
        if not len(after):
            raise ValueError(
                f"source {name}: the questions of all {len(before)} records stand in "
                "data.test_sources, so data.decontaminate leaves none. Take the source out of "
                "data.sources, or set data.decontaminate: false to train on test questions."
            )
        if len(after) < len(before):
            rank_zero_info(
                f"{name}: {len(before) - len(after)} of {len(before)} records left out, as "
                "their questions stand in data.test_sources"
            )
    return kept, left_out


def training_of(sources: Sequence[Source], seed: int, left_out: list[str]) -> dict[str, Any]:
    """What a training reads, for a checkpoint to remember."""
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
    """The test records whose question was trained on, and the sources looked through for them.

    Args:
        trainings: What `training_of` made of each.
        test: The test records.
        tasks: The tasks that sources may name.

    Raises:
        OSError: A source of a training cannot be read.
        ValueError: A record of it makes no sense.
    """
    found, places = set[int](), dict[str, None]()
    for training in trainings:
        sources = [as_source(fields, tasks) for fields in training["sources"]]
        train = (
            record
            for source in sources
            for record in load_records(source, "audit", tasks, training["seed"])
        )
        left_out = frozenset(training["left_out"])
        exact = leaked(train, test).exact
        found |= {place for place in exact if question_digest(test[place]) not in left_out}
        demo = demo_source("train").path
        places |= {"demo" if s.path == demo else s.place: None for s in sources}
    return [test[place] for place in sorted(found)], list(places)
