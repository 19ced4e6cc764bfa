"""Data files of strangers: read as they are, or an error of one line; no hang, nothing ignored."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rosa_lightning.cli.main import main
from rosa_lightning.data import rows as source_rows
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.tasks.records import Record
from rosa_lightning.utils.errors import explain
from tests.conftest import byte_tokenizer, data_module
from tests.hostile import KINDS, limited, put

ROW = {"instruction": "What is 2 + 2?", "input": "", "output": "It is 4.", "answer": "4"}


def message(path: Path, purpose: Any = "train", error: type[Exception] = ValueError, **fields: Any):
    """The one line that says what is wrong with a file."""
    with limited(), pytest.raises(error) as caught:
        list(load_records(Source(path=str(path), **fields), purpose))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def table(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


# What stands where a file is expected.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.txt"])
@pytest.mark.parametrize("stream", [None, True])
def test_what_is_no_file_is_named_at_once(tmp_path, kind, name, stream):
    if stream and name == "a.json":
        return
    path = put(kind, tmp_path / name)
    for purpose in ("train", "test", "predict", "audit"):
        if name != "a.txt" or purpose == "predict":
            assert f"{path} is {kind}" in message(path, purpose, OSError, stream=stream)


def test_a_file_with_holes_that_is_larger_than_the_memory_is_refused(tmp_path):
    for name in ("a.json", "a.jsonl"):
        path = tmp_path / name
        path.touch()
        os.truncate(path, 2**43 - 2**20)
        assert name in message(path, "test" if name == "a.json" else "train")


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl"))
    path.write_text(json.dumps(ROW) + "\n")
    for stream in (False, True):
        (record,) = load_records(Source(path=str(path), stream=stream))
        assert record.instruction == ROW["instruction"]


def test_a_name_that_is_not_utf_8_is_shown_or_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"x\xff")
    lines(Path(f"{name}.jsonl"), "red")
    data = ["--model.base", "tiny", "--data.sources", f"{name}.jsonl"]
    assert main(["audit", *data, "--output", f"{name}.json"]) == 0
    assert "x\\udcff" in capsys.readouterr().out
    assert Path(f"{name}.json").exists()
    options = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    assert main(["fit", *data, *options, "--trainer.default_root_dir", name]) == 1
    (error,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error"))
    assert "x\\udcff/lightning_logs" in error
    assert "Rename" in error


# JSON.

HALF = '{"instruction": "a", "output": "b\\ud800", "answer": "c"}'


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (HALF, "record 2: field 'output' holds \\ud800, half of a character"),
        (HALF.replace('"a"', '"\\udfff"'), "record 2: field 'instruction' holds \\udfff"),
        (
            HALF.replace("b\\ud800", "").replace('"c"', '"\\udc00"'),
            "record 2: field 'answer' holds",
        ),
        ('{"question": "\\ud800?", "answer": "#### 1"}', "record 2: field 'question' holds"),
        ('{"question": "?", "answer": "\\ud800 #### 1"}', "record 2: field 'answer' holds"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "gives 'output' twice"),
        ('{"instruction": "a", "output": "b", "answer": NaN}', "record 2: field 'answer' is nan"),
        ('{"instruction": "a", "output": "b", "answer": 1e999}', "record 2: field 'answer' is inf"),
        ('{"a": ' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ('{"answer": ' + "7" * 5000 + "}", "an integer of more digits"),
    ],
)
def test_json_that_cannot_be_kept_is_refused_with_its_place(tmp_path, row, words):
    fine = json.dumps(ROW)
    (tmp_path / "a.jsonl").write_text(f"{fine}\n{row}\n")
    (tmp_path / "a.json").write_text(f"[{fine}, {row}]")
    for stream in (False, True):
        assert words in message(tmp_path / "a.jsonl", stream=stream)
        assert "2" in message(tmp_path / "a.jsonl", stream=stream)
    assert words in message(tmp_path / "a.json")


@pytest.mark.parametrize("field", ["goal", "sol2"])
def test_fields_of_a_benchmark_are_refused_by_name(tmp_path, field):
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps({**row, field: "\ud800"}))
    assert f"record 1: field '{field}' holds \\ud800" in message(path)
    path.write_text(json.dumps({**row, field: None}))
    assert f"field '{field}' is nothing" in message(path)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("hellaswag", {"activity_label": "a", "ctx": "b", "endings": "cde", "label": "0"}),
        ("arc_easy", {"question": "a", "choices": {"text": "bc", "label": "AB"}, "answerKey": "A"}),
        ("aqua", {"question": "a", "options": "AB", "rationale": None, "correct": "A"}),
        ("multiarith", {"question": 5, "final_ans": "1"}),
    ],
)
def test_a_value_of_another_type_is_never_taken_for_one_of_the_right_type(tmp_path, task, row):
    path = tmp_path / f"{task}.jsonl"
    path.write_text(json.dumps(row))
    assert f"record 1 is no row of {task}" in message(path)


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_text_in_another_code_is_told_to_be_saved_in_utf_8(tmp_path, code):
    (tmp_path / "a.txt").write_bytes("How? é\n".encode(code))
    assert "Save it in UTF-8" in message(tmp_path / "a.txt", "predict")


# Parquet.


@pytest.mark.parametrize("stream", [False, True])
def test_parquet_without_columns_or_with_one_twice_is_named(tmp_path, stream):
    empty = table(tmp_path / "empty.parquet", {})
    assert "empty.parquet has no columns" in message(empty, stream=stream)
    columns = [pyarrow.array(["a"])] * 3
    twice = pyarrow.Table.from_arrays(columns, ["instruction", "output", "output"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    found = message(tmp_path / "twice.parquet", stream=stream)
    assert "twice.parquet has two columns named 'output'" in found


@pytest.mark.parametrize("purpose", ["train", "test", "predict", "audit"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_small_parquet_that_decodes_to_more_than_the_memory_is_refused(
    tmp_path, purpose, stream, monkeypatch
):
    monkeypatch.setattr(source_rows, "_MOST_DECODED", 2**22)
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 5_000, pyarrow.int32()), ["long " * 1_000]
    )
    columns = {"instruction": text, "output": text, "answer": text}
    path = table(tmp_path / "bomb.parquet", columns, compression="zstd", store_schema=False)
    assert path.stat().st_size < 5_000  # of 75 MB
    assert "bomb.parquet has" in (found := message(path, purpose, stream=stream))
    assert "decodes to more than 4,194,304" in found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([b"a"]),
        pyarrow.array([1.5]),
        pyarrow.array([["a"]]),
        pyarrow.array([{"a": 1}]),
        pyarrow.array([0], pyarrow.timestamp("s")),
        pyarrow.array([1]).cast(pyarrow.decimal128(20)),
        pyarrow.array([b"\xff"]).view(pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_columns_that_are_no_text_are_named(tmp_path, values, stream):
    path = table(tmp_path / "a.parquet", {**{k: [v] for k, v in ROW.items()}, "output": values})
    found = message(path, stream=stream)
    assert "field 'output' is" in found or "cannot be read as Parquet" in found or "UTF-8" in found


# Streamed files that change.


def lines(path: Path, words: str) -> Path:
    rows = [{**ROW, "output": f"{words} {number}"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("stream", [False, True])
def test_going_on_with_a_file_that_was_edited_at_equal_length_warns(tmp_path, suffix, stream):
    path = tmp_path / f"a{suffix}"

    def module(words: str, stream: bool) -> Any:
        rows = [{**ROW, "output": f"{words} {number}"} for number in range(20)]
        write(path, rows)
        source = {"path": str(path), "stream": stream}
        data = data_module(sources=[source], tokenizer=byte_tokenizer(), batch_size=2)
        data.setup("fit")
        return data

    saved = module("red", stream).state_dict()
    module("red", stream).load_state_dict(saved)
    module("sea", not stream).load_state_dict(saved)  # what is not known is not said
    with pytest.warns(UserWarning, match="differ from the checkpoint's: source a holds other rec"):
        module("sea", stream).load_state_dict(saved)
    del saved["order"]["content"]  # of an earlier version
    module("sea", stream).load_state_dict(saved)


# Anything at all.

TASKS = [
    {"name": "mood", "format": "label", "labels": ["good", "bad"], "prompt": "Mood of {text}?"}
]
SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda n: {**ROW, "instruction": f"Say {n}.", "output": f"It is {n}."},
    "gsm8k": lambda n: {"question": f"How many are {n}?", "answer": f"They are {n}.\n#### {n}"},
    "piqa": lambda n: {"goal": f"Goal {n}", "sol1": "a", "sol2": "b", "label": n % 2},
    "arc_easy": lambda n: {
        "question": f"Which is {n}?",
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "answerKey": "AB"[n % 2],
    },
    "mood": lambda n: {"text": f"line {n}", "answer": n % 2},
}
VALUES = [
    *(None, True, 0, -1, 7, 2**70, 0.5, -0.0, float("nan"), float("inf"), 1e300),
    *("", " ", "\n", "\0", "\ud800", "\ufeff", "\u2028", "\x1b[2J", "{x}", "{", "####", "#### 7"),
    *("é" * 300, "word " * 3_000, "(A) " * 2_000, "<eos>", "[INST]", "it is 1.", "nan", "1_000"),
    *([], ["a"], [["a", None]], {}, {"text": ["a"]}, {"text": "ab", "label": "AB"}),
]
BYTES = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n\n", b"\xe2\x80\xa8", b"\\ud800"),
    *(b"NaN", b"1e999", b"9" * 5_000, b"[" * 3_000, b'{"a":' * 3_000, b'"', b"\\", b"{}", b"null"),
    *(b"[", b"]", b",", b'"output": 1,', b"PAR1", b"\xff\xff\xff\x7f", b"\x1f\x8b"),
]


def changed_rows(rows: list[Any], draw: random.Random) -> None:
    """Put something odd in the place of a value, a name or a row."""
    number = draw.randrange(len(rows))
    row, value = rows[number], draw.choice(VALUES)
    match draw.randrange(5):
        case 0:
            rows[number] = value
        case 1:
            del row[draw.choice(list(row))]
        case 2:
            row[draw.choice(["id", "output", "question", "\ud800", "", "a" * 99])] = value
        case 3:
            rows[number] = {draw.choice(["text", "Question", "instruction"]): value}
        case _:
            row[draw.choice(list(row))] = value


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut a file, put something into it, turn bits over, or write it in another code."""
    start, stop = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    match draw.randrange(6):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[stop:]
        case 2:
            return draw.choice(BYTES) + content
        case 3 if content:
            flipped = bytearray(content)
            for _ in range(draw.randrange(1, 9)):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            return bytes(flipped)
        case 4:
            return content.decode("latin-1").encode(draw.choice(["utf-16", "utf-8", "utf-32-be"]))
        case _:
            return content[:start] + draw.choice(BYTES) + content[start:]


def write(path: Path, rows: list[Any]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".txt":
        texts = [str(value) for row in rows for value in (row or {"": 0}).values()]
        path.write_text("\n".join(texts), errors="surrogatepass")
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def rows_of(path: Path) -> list[Any]:
    """The rows as plain readers find them."""
    if path.suffix == ".parquet":
        rows: list[Any] = parquet.read_table(path).to_pylist()
        return rows
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        return list(json.loads(text))
    texts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    return texts if path.suffix == ".txt" else [json.loads(line) for line in texts]


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)
    elif value is not None:
        yield str(value)


def make(folder: Path, draw: random.Random, purpose: str) -> Path | None:
    """A file with something odd in it; None where the library that should write it refuses."""
    schema = draw.choice(list(SCHEMAS))
    suffixes = [".json", ".jsonl", ".parquet", *([".txt"] if purpose == "predict" else [])]
    path = folder / f"{schema}{draw.choice(suffixes)}"
    rows: list[Any] = [SCHEMAS[schema](n) for n in range(1, 7)]
    try:
        if draw.random() < 0.6:
            changed_rows(rows, draw)
        write(path, rows)
    except (pyarrow.ArrowException, ValueError, AttributeError, TypeError, OverflowError):
        return None  # a column of several types, say
    if draw.random() < 0.5:
        path.write_bytes(changed_bytes(path.read_bytes(), draw))
    return path


def refused(error: Exception, path: Path) -> str:
    """Check that an error is the user's, and says in one line where to look."""
    said = explain(error)
    assert said is not None, f"{type(error).__name__}: {error}"
    assert "\n" not in said, said
    assert len(said) < 2_000, f"{len(said)} characters"
    assert path.name in said or path.stem in said, said
    return "refused"


def compare(record: Record, row: Any, schema: str) -> None:
    """Check that all values of a row that the schema has stand in the record."""
    if isinstance(row, str):
        assert record.instruction == row
        return
    if "instruction" in row and schema != "mood":
        row = {name: row.get(name) for name in ROW}
    else:
        row = {name: row[name] for name in row if name in SCHEMAS[schema](1)}
    said = f"{record.instruction}\0{record.input}\0{record.output}\0{record.answer}"
    for name, value in row.items():
        if name in ("label", "answerKey") or (schema, name) == ("mood", "answer"):
            continue  # a label's number or letter, which stands for the label
        for text in texts_in(value["text"] if name == "choices" else value):
            found = text.strip() in said or text.lower() in said
            assert found, f"{name}={text[:60]!r} is in no part of the record"


def try_one(folder: Path, number: int) -> str:
    """Read a changed file as a training, a test or a prediction does; what became of it."""
    draw = random.Random(number)
    purpose = draw.choice(["fit", "test", "predict"])
    path = make(folder, draw, purpose)
    if path is None:
        return "not written"
    stream = purpose == "fit" and path.suffix != ".json" and draw.random() < 0.5
    key = {"fit": "sources"}.get(purpose, f"{purpose}_sources")
    data = data_module(
        **{key: [{"path": str(path), "stream": True} if stream else {"path": str(path)}]},
        tasks=TASKS,
        tokenizer=byte_tokenizer(),
        val_fraction=0,
        batch_size=2,
        max_length=draw.choice([16, 4096]),
        overlong=draw.choice(["cut", "drop"]),
        prompt_style=draw.choice(["alpaca", "plain"]),
        cache_dir=draw.choice([None, str(folder / "cache")]),
    )
    with limited(60), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prompts that are cut
        try:
            data.setup(purpose)
            for _ in data.train_dataloader() if stream else ():
                pass
        except Exception as error:
            return refused(error, path)
    (source,) = getattr(data, key)
    kind: Any = "train" if purpose == "fit" else purpose
    records, rows = list(load_records(source, kind, data.tasks)), rows_of(path)
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        compare(record, row, path.stem)
    return "read"


def outcomes(folder: Path, numbers: range) -> list[str]:
    """What became of each case; a failure names its case."""
    done = []
    for number in numbers:
        try:
            done.append(try_one(folder, number))
        except AssertionError as error:
            error.add_note(f"case {number}")
            raise
    return done


def test_a_changed_file_is_read_whole_or_refused_in_one_line(tmp_path):
    assert {"read", "refused"} <= set(outcomes(tmp_path, range(40)))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_hundreds_of_changed_files_are_read_whole_or_refused_in_one_line(tmp_path, part):
    start = 1_000 + 60 * part  # some are refused by the library that should write them
    done = outcomes(tmp_path, range(start, start + 60))
    assert 60 - done.count("not written") >= 30
