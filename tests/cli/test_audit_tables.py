from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rosa_lightning.cli.audit_tables import audit_tables, edges
from rosa_lightning.data.audit import Audit
from tests.data.test_audit import STORY, audit, numbered


def printed(found: Audit, width: int = 80) -> list[str]:
    """Lines as printed, runs of blanks as one."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(audit_tables(found))
    assert all(len(line) <= width for line in stream.getvalue().splitlines())
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_bins_have_one_round_width_and_hold_99_of_100_lengths(lengths):
    borders = edges(lengths)
    width = borders[1]
    assert borders == list(range(0, borders[-1] + 1, width))
    assert str(width).rstrip("0") in {"1", "2", "5"}
    assert len(borders) <= 12
    assert sum(length < borders[-1] for length in lengths) >= 0.99 * len(lengths)


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_a_source_and_a_line_a_benchmark(width):
    sources = {
        "commonsense_170k": numbered(*(f"question {n} {'word ' * n}" for n in range(200))),
        "math_10k": numbered(STORY, (STORY, "5"), "question 1 word"),
    }
    tests = {"arc_challenge": numbered("other"), "gsm8k": numbered(STORY, f"{STORY} please")}
    lengths = {"lengths": lambda records: [1000 + n for n, _ in enumerate(records)]}
    lines = printed(audit(sources, tests, **lengths, max_length=1100), width)
    assert "Source Records median 90 % 99 % longest over 1,100" in lines
    assert "commonsense_170k 200 1,099 1,179 1,197 1,199 99" in lines
    assert "math_10k 3 1,001 1,002 1,002 1,002 0" in lines
    assert "math_10k 3 1 1 2 0" in lines
    assert "arc_challenge 1 0 0" in lines
    assert "gsm8k 2 1 1 math_10k" in lines
    assert "data.loading.decontaminate: true leaves out (exact) 2 of 3 records of math_10k" in lines


def test_what_training_keeps_is_said():
    lines = printed(audit({"a": numbered("one")}, {"b": numbered("one")}, decontaminate=False))
    assert "data.loading.decontaminate: false trains on (exact) 1 of 1 records of a" in lines


def test_without_leaks_without_benchmarks_and_without_tokens_the_tables_say_so():
    lines = printed(audit({"a": numbered("one")}, {"b": numbered("two")}))
    assert not any("data.loading.decontaminate" in line for line in lines)
    lines = printed(audit({"a": numbered("one")}))
    assert "No leakage was looked for: data.test_sources names no benchmark." in lines
    assert any("lengths are in words: set model.base" in line for line in lines)
    assert not any("over" in line for line in lines)


def test_the_histogram_counts_every_record():
    lengths = [*[10] * 5, *[95] * 120, 4000]
    lines = printed(audit({"a": numbered(*["one"] * 126)}, lengths=lambda _: lengths))
    rows = {line.split()[0]: line.split() for line in lines if "█" in line or "on" in line.split()}
    assert rows["10-19"][1] == "5"
    assert rows["90-99"][1] == "120"
    assert rows["100"][:3] == ["100", "on", "1"]
