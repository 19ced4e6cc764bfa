"""What a comparison says of its data: test questions in the training data, and general texts."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from rosa_lightning.data.contamination import compare, contaminated, questions_of
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import as_source
from rosa_lightning.inspection.text_loss import read_texts
from rosa_lightning.utils.files import atomic_write

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")
"""Paragraphs on many subjects, written for this package: ``comparison.general_text: demo``."""


def describe_data(data: ReasoningDataModule, seed: int) -> dict[str, Any]:
    """Which tasks are trained on, and how many test questions stand in the training data.

    ``seed`` chooses the records of sources with max_examples.

    Returns:
        ``trained_tasks``; ``tests``: for each test source its ``questions``, and how many of them
        stand in the training data, ``exact`` or ``near``, as ``audit`` counts them; ``training``:
        for each source its ``records``, and how many are ``left_out`` for that.

    Raises:
        OSError, ValueError: A source cannot be read.
    """
    train = {s.label: load_records(s, "audit", data.tasks, seed) for s in data.sources}
    tests = {s.label: load_records(s, "audit", data.tasks, seed) for s in data.test_sources}
    found = compare(chain.from_iterable(train.values()), list(tests.values())) if tests else []
    does = data.loading.decontaminate and bool(tests)
    asked = questions_of(data.test_sources, data.tasks) if does else frozenset()
    return {
        "trained_tasks": sorted({source.benchmark for source in data.sources}),
        "tests": [
            {"source": name, "questions": len(held), "exact": len(one.exact), "near": len(one.near)}
            for (name, held), one in zip(tests.items(), found, strict=True)
        ],
        "training": [
            {
                "source": name,
                "records": len(held),
                "left_out": int(contaminated(held, asked).sum()) if does else 0,
            }
            for name, held in train.items()
        ],
    }


def write_general_text(given: str | dict[str, Any], path: Path) -> None:
    """Keep the texts of ``comparison.general_text`` as a file that every run reads."""
    source = as_source(str(GENERAL_TEXT) if given == "demo" else given)
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in read_texts(source)]
    atomic_write(path, "".join(rows).encode())
