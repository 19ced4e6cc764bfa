from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rosa_lightning.cli.audit import audit_tables, shown_example
from rosa_lightning.data.encoding import Example
from rosa_lightning.models.loading import load_tokenizer
from rosa_lightning.tasks.records import Record
from tests.cli.test_commands import run
from tests.data.test_audit import STORY, audit, numbered


@pytest.fixture(autouse=True)
def _in_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def leaky(tmp_path) -> list[str]:
    """The arguments of an audit: one record of three is leaked, and one has no output."""
    rows = [("Say 1.", "1"), ("Say 2.", "2"), ("Say 3.", "")]
    train = [{"instruction": asked, "output": output} for asked, output in rows]
    Path("mine.json").write_text(json.dumps(train))
    Path("gsm8k.json").write_text(json.dumps([{"instruction": "say 2", "answer": "2"}]))
    data = {"sources": [{"path": "mine.json"}], "test_sources": [{"path": "gsm8k.json"}]}
    Path("audit.yaml").write_text(yaml.safe_dump({"data": data}))
    return ["--config", "audit.yaml"]


def words(printed: str) -> list[str]:
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_audit_needs_no_weights_and_writes_its_figures(leaky, base_folder, capsys):
    shutil.copytree(base_folder, "shell", ignore=shutil.ignore_patterns("*.safetensors"))
    more = ["--model.base", "shell", "--output", "deep/audit.json"]
    status, printed, errors = run(capsys, "audit", *leaky, *more)
    assert (status, errors) == (0, [])
    assert "Lengths in tokens" in printed
    assert "gsm8k 1 1 0 mine" in words(printed)
    assert printed.endswith("\ndeep/audit.json\n")
    figures = json.loads(Path("deep/audit.json").read_text())
    (source,), (benchmark,) = figures["sources"], figures["benchmarks"]
    assert (source["records"], source["empty"], source["contaminated"]) == (3, [3], [2])
    names = ("questions", "contaminated_exact", "contaminated_near")
    assert [benchmark[name] for name in names] == [1, 1, 0]
    assert benchmark["exact"] == [{"record": 1, "source": "mine", "source_record": 2}]
    assert [path.name for path in Path("deep").iterdir()] == ["audit.json"]


def test_audit_shows_what_records_became(leaky, capsys):
    status, printed, _ = run(capsys, "audit", *leaky, "--model.base", "tiny", "--show", "2")
    assert status == 0
    lines = words(printed)
    assert "mine, record 2: 2 of" in printed
    assert "record 3" not in printed
    assert not {"Ġ", "Ċ"} & {*printed}
    shown = [line for line in lines if line.startswith("loss")]
    assert shown == ["loss 1<|end|>", "loss 2<|end|>"]
    assert "2 tokens 1|<|end|>" in lines
    assert "\x1b" not in printed
    status, _, errors = run(capsys, "audit", *leaky, "--show", "1")
    assert status != 0
    assert errors == ["error: show needs a tokenizer. Set model.base or data.tokenizer."]


def test_what_carries_loss_is_coloured_on_a_terminal():
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    record = Record("one", "", "two", None, "text", "a", 1)
    example = Example(record, ids, [*ids, *ids], gaps=[len(ids), len(ids) + 1])
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=60).print(shown_example(example, tokenizer))
    green = re.findall(r"\x1b\[32m *(\w+)", stream.getvalue())
    assert green.count("loss") == 2
    assert "\x1b[2m" in stream.getvalue()


def test_an_audit_that_cannot_be_made_ends_in_one_line(leaky, capsys):
    status, _, errors = run(capsys, "audit", *leaky, "--output", "audit.txt")
    assert status in (1, 2)
    assert len(errors) == 1
    assert "output=audit.txt is not the name of a JSON file" in errors[0]


def printed_audit(found, width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(audit_tables(found))
    assert all(len(line) <= width for line in stream.getvalue().splitlines())
    return words(stream.getvalue())


def test_an_audit_has_a_line_a_source_and_a_line_a_benchmark():
    sources = {
        "commonsense_170k": numbered(*(f"question {n} {'word ' * n}" for n in range(200))),
        "math_10k": numbered(STORY, (STORY, "5"), "question 1 word"),
    }
    tests = {"arc_challenge": numbered("other"), "gsm8k": numbered(STORY, f"{STORY} please")}
    lengths = {"lengths": lambda records: [1000 + n for n, _ in enumerate(records)]}
    lines = printed_audit(audit(sources, tests, **lengths, max_length=1100))
    assert "Source Records median 90 % 99 % longest over 1,100" in lines
    assert "commonsense_170k 200 1,099 1,179 1,197 1,199 99" in lines
    assert "math_10k 3 1,001 1,002 1,002 1,002 0" in lines
    assert "math_10k 3 1 1 2 0" in lines
    assert "arc_challenge 1 0 0" in lines
    assert "gsm8k 2 1 1 math_10k" in lines
    assert "data.loading.decontaminate: true leaves out (exact) 2 of 3 records of math_10k" in lines
    one = numbered("one")
    lines = printed_audit(audit({"a": one}, {"b": one}, decontaminate=False))
    assert "data.loading.decontaminate: false trains on (exact) 1 of 1 records of a" in lines
    lines = printed_audit(audit({"a": one}))
    assert "No contamination was looked for: data.test_sources names no benchmark." in lines
    assert any("lengths are in words: set model.base" in line for line in lines)
