from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.data.audit import Audit, Match, audit_records, token_lengths
from rosa_lightning.data.encoding import Encoder
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import Record
from tests.conftest import byte_tokenizer


def record(index: int, question: str, answer: str | None = "4", output: str = "") -> Record:
    output = output or (f"The answer is {answer}." if answer else "")
    return Record(question, "", output, answer, "gsm8k", "", index)


def numbered(*rows: tuple[str, str | None] | str) -> list[Record]:
    pairs = [(row, "4") if isinstance(row, str) else row for row in rows]
    return [record(number, *pair) for number, pair in enumerate(pairs, 1)]


def audit(sources, tests=None, **options) -> Audit:
    options = {"lengths": None, "max_length": 100, "decontaminate": True, **options}
    return audit_records(sources, tests or {}, **options)


def test_repetitions_are_counted_within_a_source_and_across_sources():
    found = audit({"a": numbered("one", "two", "ONE!", "one"), "b": numbered("two", "three")})
    first, second = found.sources
    assert (first.duplicates, first.elsewhere) == ((3, 4), (2,))
    assert (second.duplicates, second.elsewhere) == ((), (1,))
    assert (first.num_records, second.num_records) == (4, 2)


@given(st.lists(st.lists(st.sampled_from(["one", "One?", "two", "three"]), max_size=5), min_size=1))
def test_a_source_has_as_many_duplicates_as_records_beyond_its_questions(questions):
    sources = {str(n): numbered("own", *texts) for n, texts in enumerate(questions)}
    found = audit(sources)
    for source, texts in zip(found.sources, questions, strict=True):
        asked = Counter(text.lower().strip("?") for text in ["own", *texts])
        assert len(source.duplicates) == sum(asked.values()) - len(asked)


def test_a_question_with_different_answers_is_a_conflict_wherever_they_stand():
    found = audit(
        {
            "a": numbered(("one", "1"), ("one", "2"), ("two", "2"), ("three", None)),
            "b": numbered(("two", "3"), ("three", "3"), ("four", "1,000")),
            "c": numbered(("four", "1000.0"), ("one", "1")),
        }
    )
    assert [source.conflicting for source in found.sources] == [(1, 2, 3), (1,), (2,)]


def test_records_without_a_response_are_counted():
    empty = [record(1, "one", None), record(2, "two", "2"), record(3, "three", "3", output=" \n")]
    assert audit({"a": empty}).sources[0].empty == (1, 3)


def test_lengths_are_those_of_training(monkeypatch):
    monkeypatch.setattr("rosa_lightning.data.audit._CHUNK", 2)
    records = numbered("one", "twenty-two", "3", "x" * 900)
    lengths = token_lengths(records, Encoder(byte_tokenizer(), "plain", 8))
    expected = [len(f"{r.instruction}\n{r.output}") + 1 for r in records]
    assert lengths == expected
    assert lengths[-1] > 900  # nothing is cut
    found = audit({"a": records}, lengths=lambda _: lengths, max_length=lengths[1])
    assert found.sources[0].too_long == 1
    assert found.unit == "tokens"


@given(st.lists(st.integers(0, 500), min_size=1))
def test_a_quantile_is_the_least_length_that_its_share_does_not_exceed(lengths):
    records = numbered(*["one"] * len(lengths))
    (source,) = audit({"a": records}, lengths=lambda _: lengths).sources
    shares = {0.5: 1, 0.9: 2, 0.99: 3}
    for share, place in shares.items():
        value = source.quantiles()[place]
        assert value in lengths
        assert sum(length <= value for length in lengths) >= share * len(lengths)
        assert sum(length < value for length in lengths) < share * len(lengths)
    assert source.quantiles()[0] == min(lengths)
    assert source.quantiles()[-1] == max(lengths)


STORY = "Ada has 3 apples and Ben gives her 4 more, so how many apples has she now"


def test_contaminated_questions_name_where_they_stand():
    sources = {"a": numbered("other", STORY.upper()), "b": numbered(f"{STORY} please", STORY)}
    tests = {"first": numbered("none", STORY), "second": numbered("more")}
    found = audit(sources, tests, decontaminate=False)
    first, second = found.benchmarks
    assert first.exact == (
        Match(record=2, source="a", source_record=2),
        Match(record=2, source="b", source_record=2),
    )
    assert first.near == ()
    assert (first.questions, first.num_exact, first.num_near) == (2, 1, 0)
    assert first.sources() == ("a", "b")
    assert (second.num_exact, second.num_near, second.sources()) == (0, 0, ())
    assert [source.contaminated for source in found.sources] == [(2,), (2,)]


def test_a_question_that_comes_twice_in_a_task_of_ones_own_is_judged_by_that_task():
    task = with_own_tasks([{"name": "mood", "format": "label", "labels": ["good", "bad"]}])["mood"]
    rows = [("one", "good"), ("one", "Good"), ("two", "good"), ("two", "bad")]
    records = [
        Record(asked, "", gold, gold, "mood", "", number, task)
        for number, (asked, gold) in enumerate(rows, 1)
    ]
    assert audit({"a": records}).sources[0].conflicting == (3, 4)
