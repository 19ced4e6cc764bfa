"""What is said of a comparison's data."""

import json

import pytest

from rosa_lightning.comparison.data import GENERAL_TEXT, describe_data, write_general_text
from rosa_lightning.data.audit import audit_records
from rosa_lightning.data.records import load_records
from tests.conftest import data_module


@pytest.fixture
def sources(tmp_path):
    """Training records, and test questions: one of them exact, one near, one new."""
    story = "Ada has {} red apples in a basket and {} more at home. How many?"
    asked = [story.format(n, n + 1) for n in range(6)]
    near = "Ada has 3 red apples in a basket and 4 more at home. So how many?"
    tested = [asked[0].upper(), near, "What is the capital of a country far away from here?"]
    for name, questions in (("train", asked), ("test", tested)):
        rows = [{"instruction": q, "input": "", "output": "7", "answer": "7"} for q in questions]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return {
        "sources": [{"name": "gsm8k", "path": str(tmp_path / "train.jsonl")}],
        "test_sources": [{"name": "svamp", "path": str(tmp_path / "test.jsonl")}],
    }


def test_counts_are_those_of_the_audit(sources):
    data = data_module(**sources)
    found = describe_data(data, 0)
    train, test = (
        {one.label: load_records(one, "audit", data.tasks) for one in of}
        for of in (data.sources, data.test_sources)
    )
    audit = audit_records(train, test, None, max_length=99, decontaminate=True)
    (benchmark,) = audit.benchmarks
    assert (benchmark.num_exact, benchmark.num_near) == (1, 1)
    assert found["tests"] == [{"source": "svamp", "questions": 3, "exact": 1, "near": 1}]
    left_out = len(audit.sources[0].contaminated)
    assert found["training"] == [{"source": "gsm8k", "records": 6, "left_out": left_out}]
    assert found["trained_tasks"] == ["gsm8k"]


def test_nothing_is_left_out_where_that_is_not_asked_for(sources):
    found = describe_data(data_module(**sources, decontaminate=False), 0)
    assert found["tests"][0]["exact"] == 1
    assert found["training"][0]["left_out"] == 0


def test_without_test_sources(sources):
    found = describe_data(data_module(sources=sources["sources"]), 0)
    assert found["tests"] == []


def test_general_texts_are_kept(tmp_path):
    path = tmp_path / "kept.jsonl"
    write_general_text("demo", path)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == GENERAL_TEXT.read_text().splitlines()
    assert len(texts) == 40
    given = tmp_path / "own.txt"
    given.write_text("one\ntwo\n")
    write_general_text({"path": str(given), "max_examples": 1}, path)
    assert len(path.read_text().splitlines()) == 1
