"""Files and hub data sets read into records, and the held-out split."""

import gzip
import json
from dataclasses import replace

import pyarrow
import pytest

from rosa_lightning.data import rows
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source, as_source
from rosa_lightning.tasks.records import TASKS, Record

ROW = {"instruction": "What is 2 + 2?", "input": "", "output": "It is 4.", "answer": "4"}


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path; rows go as JSON or as JSON lines by the file's name."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, "utf-8")
        elif name.endswith(".json"):
            path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        else:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
            path.write_text("".join(lines), "utf-8")
        return str(path)

    return write


def load(path, purpose="train", **fields):
    return list(load_records(Source(path=path, **fields), purpose))


def message(path, purpose="train", error=ValueError, **fields):
    with pytest.raises(error) as caught:
        load(path, purpose, **fields)
    text = str(caught.value)
    assert "\n" not in text
    return text


def record(instruction, source="s", index=1):
    return Record(instruction, "", "output", None, "text", source, index)


# What a source is.


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"pth": "a"}, TypeError, ["'pth'", "did you mean path?", "weight"]),
        ({}, ValueError, ["neither path nor hub", "exactly one"]),
        ({"path": "a", "hub": "b/c"}, ValueError, ["both path and hub"]),
        ({"path": "a.json", "weight": -1}, ValueError, ["a has weight -1", "at least 0"]),
        ({"path": "a.json", "task": "bolq"}, ValueError, ["'bolq'", "did you mean boolq?"]),
        ({"path": "a.json", "max_examples": 0}, ValueError, ["a has max_examples 0", "at least 1"]),
        ({"path": "a.json", "max_examples": True}, ValueError, ["max_examples True"]),
        ({"path": "a.json", "stream": True}, ValueError, ["a has stream: true", ".jsonl"]),
        (7, TypeError, ["7", "expected its fields"]),
    ],
)
def test_wrong_source_is_an_error_that_says_how_to_mend_it(fields, error, words):
    with pytest.raises(error) as caught:
        as_source(fields)
    assert all(word in str(caught.value) for word in words)


# Files that are as they should be.


@pytest.mark.parametrize("name", ["boolq.json", "boolq.jsonl"])
def test_records_of_json_files(write, name):
    rows = [ROW, {**ROW, "input": "Add.", "answer": 4.0}]
    assert load(write(name, rows)) == [
        Record("What is 2 + 2?", "", "It is 4.", "4", "boolq", "boolq", 1),
        Record("What is 2 + 2?", "Add.", "It is 4.", "4.0", "boolq", "boolq", 2),
    ]


def test_records_of_parquet_files(tmp_path):
    import datasets

    path = str(tmp_path / "svamp.parquet")
    datasets.Dataset.from_list([ROW, {**ROW, "input": None}]).to_parquet(path)
    assert load(path) == [
        Record("What is 2 + 2?", "", "It is 4.", "4", "svamp", "svamp", number) for number in (1, 2)
    ]


def test_gsm8k_rows_become_the_solution_and_its_final_number(write):
    solution = "2 + 2 = <<2+2=4>>4\n#### 1,004"
    (found,) = load(write("gsm8k.jsonl", [{"question": "How many?", "answer": solution}]))
    assert found == Record("How many?", "", solution, "1,004", "gsm8k", "gsm8k", 1)


def test_byte_order_mark_blank_lines_and_line_separators_in_text_are_fine(write):
    text = "\ufeff" + json.dumps({**ROW, "output": "a\u2028b"}, ensure_ascii=False)
    found = load(write("a.jsonl", f"{text}\r\n\n{json.dumps(ROW)}\n"))
    assert [(r.output, r.index) for r in found] == [("a\u2028b", 1), ("It is 4.", 2)]


def test_prompts_are_read_from_records_without_output_and_from_text_lines(write):
    asked = load(write("a.jsonl", [{"instruction": "One?"}, {"question": "Two?"}]), "predict")
    assert [r.instruction for r in asked] == ["One?", "Two?"]
    lines = load(write("a.txt", "One?\r\n\nTwo {x}?\n"), "predict")
    assert [(r.instruction, r.index) for r in lines] == [("One?", 1), ("Two {x}?", 2)]


@pytest.mark.parametrize("stream", [False, True])
def test_records_beyond_max_examples_are_left_out_as_the_seed_chooses(write, stream):
    path = write("a.jsonl", [{**ROW, "answer": str(number)} for number in range(50)])
    source = Source(path=path, max_examples=20, stream=stream)
    chosen = list(load_records(source, seed=1))
    assert len(chosen) == 20
    assert chosen == list(load_records(source, seed=1)) != list(load_records(source, seed=2))
    assert chosen == sorted(set(chosen), key=lambda one: one.index)
    assert all(one.index == int(str(one.answer)) + 1 for one in chosen)
    assert len(load_records(replace(source, max_examples=51))) == 50


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_records_are_those_of_the_file_however_many_are_converted_at_once(
    chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr("rosa_lightning.data.records._CHUNK", chunk)
    rows = [{"instruction": f"q{n}", "output": f"a{n}" * n, "answer": str(n)} for n in range(1, 31)]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    found = load_records(Source(path=str(path)))
    said = [(row["instruction"], row["output"], row["answer"]) for row in rows]
    assert [(one.instruction, one.output, one.answer) for one in found] == said
    assert [one.index for one in found] == [*range(1, 31)]
    assert [one.answer for one in found[5:16]] == [str(n) for n in range(6, 17)]
    assert [one.answer for one in found.take([29, 3, 8])] == ["30", "4", "9"]
    texts = (len(row["instruction"] + row["output"]) for row in rows)
    assert found.sizes().tolist() == list(texts)
    few = load_records(Source(path=str(path), max_examples=9), seed=3)
    assert len(few) == 9
    assert [*few] == sorted(few, key=lambda one: one.index)


@pytest.mark.parametrize("stream", [False, True])
def test_empty_file_on_disk_or_not_holds_no_records(write, stream):
    assert "holds no records" in message(write("a.jsonl", "\n\n"), stream=stream)


def test_streamed_records_are_those_in_memory(write):
    path = write("a.jsonl", [{**ROW, "answer": number} for number in range(50)])
    assert load(path, stream=True) == load(path)
    assert load(path, "test", stream=True) == load(path, "test")  # only training is streamed


def compressed(content: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content[:10]) + gzip.compress(content[10:])  # as cat joins files
    return bytes(pyarrow.compress(content, "zstd", asbytes=True)) if ".zst" in name else content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("stream", [False, True])
def test_compressed_files_are_read_as_their_content(write, suffix, stream):
    lines = "".join(json.dumps({**ROW, "answer": n}) + "\n" for n in range(3)).encode()
    listed = json.dumps([{**ROW, "answer": n} for n in range(3)]).encode()
    table = b"instruction,output,answer\n" + b"".join(
        b'"What is\n2 + ""2""?",It is 4.,%d\r\n' % n for n in range(3)
    )
    for name, content in {"a.jsonl": lines, "a.json": listed, "a.csv": table}.items():
        if stream and name == "a.json":
            continue
        name += suffix
        found = load(write(name, compressed(content, name.lower())), stream=stream)
        assert [(r.output, r.answer, r.source, r.index) for r in found] == [
            ("It is 4.", str(n), "a", n + 1) for n in range(3)
        ]
    assert found[0].instruction == 'What is\n2 + "2"?'


@pytest.mark.parametrize("where", ["", "*.jsonl", "**/*.jsonl", "b*/*"])
def test_records_of_a_folder_or_pattern_are_those_of_its_files(write, tmp_path, where):
    (tmp_path / "data" / "below").mkdir(parents=True)
    files = {"b.jsonl": 2, "a.jsonl": 1, "below/c.jsonl": 3}
    for name, count in files.items():
        write(f"data/{name}", [{**ROW, "output": name}] * count)
    (tmp_path / "data" / "README.md").write_text("Not data.")
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    (tmp_path / "data" / ".cache").mkdir()
    write("data/.cache/d.jsonl", [ROW])
    path = str(tmp_path / "data" / where)
    names = {"*.jsonl": ["a.jsonl", "b.jsonl"], "b*/*": ["below/c.jsonl"]}
    chosen = names.get(where, ["a.jsonl", "b.jsonl", "below/c.jsonl"])
    found = load(path, name="some")
    assert [r.output for r in found] == [name for name in chosen for _ in range(files[name])]
    assert [r.index for r in found] == list(range(1, len(found) + 1))
    assert load(path, name="some", stream=True) == found
    assert Source(path=path).label == "data"
    write("data/a.jsonl", [{**ROW, "instruction": 1}])
    if "a.jsonl" in chosen:
        assert "data/a.jsonl, record 1: field 'instruction'" in message(path)


def test_a_text_file_is_one_text_to_train_on(write):
    (found,) = load(write("a.txt", "One.\n\nTwo.\n"))
    assert found == Record("", "", "One.\n\nTwo.\n", None, "text", "a", 1)
    assert found.is_text
    assert "which holds no answers" in message(write("a.txt", "One."), "test")


# Files that are not.


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "instruction,output\na\n", ["line 2", "2 values", "quotes"]),
        ("a.csv", "instruction,output\na,b,c\n", ["line 2", "2 values"]),
        ("a.csv", 'instruction,output\na,"b\n', ["line 2 is not CSV"]),
        ("a.csv", "instruction,instruction\na,b\n", ["header instruction, instruction"]),
        ("a.csv", b"instruction,output\na,\xff\n", ["line 2 is not UTF-8"]),
        ("a.jsonl.gz", b"\x1f\x8b\x08nonsense", ["cannot be decompressed"]),
        ("a.jsonl.zst", b"nonsense", ["cannot be decompressed"]),
        ("a.parquet.gz", b"", ["ends in '.gz'"]),
    ],
)
def test_damaged_tables_and_archives_are_named(write, name, content, words):
    text = message(write(name, content))
    assert all(word in text for word in words), text


def test_a_file_that_unpacks_to_far_more_than_text_would_is_refused(write, monkeypatch):
    monkeypatch.setattr(rows, "_MOST_DECODED", 1000)
    line = json.dumps(ROW).encode() + b"\n"
    for name, content in {"a.jsonl.gz": line * 5000, "a.json.gz": b"[" + b" " * 400_000}.items():
        text = message(write(name, gzip.compress(content)))
        assert "decompresses to more than" in text


def test_nothing_that_matches_is_an_error(write, tmp_path):
    assert "matches no file" in message(str(tmp_path / "*.jsonl"), error=OSError)
    (tmp_path / "empty").mkdir()
    assert "is a folder without data" in message(str(tmp_path / "empty"), error=OSError)


def test_unreadable_file(write, monkeypatch):
    path = write("a.json", [ROW])

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "a.json cannot be read: Permission denied" in message(path, error=OSError)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "[{]", ["a.json is not JSON: line 1, column 3", "list of objects"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["Extra data", "name it .jsonl"]),
        ("a.json", '{"a": 1}', ["holds an object at the top", "list of objects"]),
        ("a.json", "[3]", ["record 1 is a number", "expected an object"]),
        ("a.json", "[]", ["a.json (task text) holds no records"]),
        ("a.jsonl", '{"instruction": 1}', ["record 1", "'instruction' is a number"]),
        ("a.jsonl", "\n{]\n", ["a.jsonl, line 2 is not JSON"]),
        ("a.json", b'["\xff"]', ["is not UTF-8 text (byte 2)"]),
        ("a.tsv", "a,b", ["ends in '.tsv'", ".jsonl"]),
    ],
)
def test_file_of_wrong_shape(write, name, content, words):
    text = message(write(name, content))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("row", "purpose", "words"),
    [
        ({"instruction": "a", "answer": "b"}, "train", ["'output' is missing"]),
        ({**ROW, "output": " \n"}, "train", ["'output' is empty"]),
        ({**ROW, "output": ["a"]}, "train", ["'output' is a list", "expected text"]),
        ({**ROW, "instruction": ""}, "predict", ["'instruction' is empty"]),
        ({**ROW, "answer": {"a": 1}}, "train", ["'answer' is an object"]),
        ({**ROW, "answer": "", "output": ""}, "test", ["'answer' is missing or empty"]),
        ({"sentence": "a", "label": 1}, "train", ["fields sentence, label", "instruction, input"]),
        ({"question": "a", "answer": "42"}, "train", ["'answer' is '42'", "#### 42"]),
        ({"question": "a"}, "test", ["'answer' is missing"]),
        (None, "train", ["is nothing"]),
    ],
)
def test_wrong_record_is_named_with_file_number_and_field(write, row, purpose, words):
    path = write("set.jsonl", [ROW, row])
    text = message(path, purpose)
    assert f"{path}, record 2" in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("gsm8k", {**ROW, "answer": "many"}, "its prompt asks for a number"),
        ("aqua", {**ROW, "answer": "F"}, "asks for one of A, B, C, D, E"),
        (
            "arc_easy",
            {**ROW, "instruction": "Which?\n\nAnswer format: answer1/answer2", "answer": "answer3"},
            "asks for one of answer1, answer2",
        ),
        (
            "arc_easy",
            {**ROW, "instruction": "Which?\n\nAnswer format: answer1/answer1/answer2"},
            "the prompt offers 'answer1' twice",
        ),
    ],
)
def test_gold_answers_that_the_format_cannot_express_are_named(write, task, row, words):
    good = {**ROW, "answer": {"aqua": "A", "arc_easy": "answer1"}.get(task, "4")}
    path = write("set.jsonl", [good, row])
    text = message(path, "test", task=task)
    assert f"{path}, record 2 (task {task})" in text
    assert words in text
    assert len(load(path, "train", task=task)) == 2  # to train, the response alone counts


# The hub.


def test_hub_data_set_that_cannot_be_reached_is_one_line_naming_the_way_out():
    with pytest.raises(OSError, match=r"no-such-owner/none") as caught:
        load_records(Source(hub="no-such-owner/none", split="test"))
    text = str(caught.value)
    assert "\n" not in text
    assert "split test" in text
    assert "{path: FILE.jsonl}" in text


@pytest.fixture
def hub(monkeypatch):
    """Puts rows in place of the hub; holds what was asked for."""
    import datasets

    asked = {}

    def serve(rows):
        def load_dataset(name, subset, *, split, revision, **options):
            asked.update(name=name, subset=subset, split=split, revision=revision, **options)
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def test_hub_rows_are_read_with_subset_split_and_revision(hub):
    asked = hub([{"question": "How many?", "answer": "#### 3"}])
    source = Source(hub="openai/gsm8k", subset="main", split="test", revision="v1")
    (found,) = load_records(source)
    assert found == Record("How many?", "", "#### 3", "3", "gsm8k", "gsm8k", 1)
    assert asked == {"name": "openai/gsm8k", "subset": "main", "split": "test", "revision": "v1"}


def test_streamed_hub_conversations_are_those_in_memory(hub, monkeypatch):
    import datasets

    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    asked = hub([{"chat": turns * (n + 1), "id": n} for n in range(9)])
    source = Source(hub="a/chats", columns={"conversations": "chat"})
    memory = list(load_records(source))
    served = datasets.load_dataset

    def stream(*args, streaming=False, **options):
        found = served(*args, streaming=streaming, **options)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", stream)
    streamed = load_records(replace(source, stream=True))
    assert asked["streaming"]
    assert streamed.on_disk
    assert list(streamed) == memory
    assert [len(one.turns) for one in memory] == [0, *range(3, 18, 2)]


def test_hub_rows_on_disk_are_those_in_memory(hub):
    asked = hub(
        [{"question": f"How many are {number}?", "answer": f"#### {number}"} for number in range(9)]
    )
    source = Source(hub="openai/gsm8k", stream=True)
    assert load_records(source).on_disk
    assert list(load_records(source)) == list(load_records(replace(source, stream=False)))
    assert asked["streaming"]


def test_hub_rows_of_another_schema_are_named(hub):
    hub([{"question": "is it?", "answer": {"text": ["it is"]}, "context": "it is"}])
    with pytest.raises(ValueError, match=r"hub data set rajpurkar/squad, record 1: .*'answer' is"):
        load_records(Source(hub="rajpurkar/squad"))


@pytest.mark.parametrize(
    ("hub_id", "subset", "task"),
    [(row.hub, row.subset, name) for name, row in TASKS.items() if row.hub],
)
def test_a_hub_data_set_of_a_benchmark_is_known_by_its_id_and_subset(hub_id, subset, task):
    assert Source(hub=hub_id, subset=subset).benchmark == task


def test_on_the_parquet_branch_a_subset_is_a_folder(hub):
    asked = hub([{"input": "a", "output_answer": "3"}])
    load_records(Source(hub="allenai/lila", subset="addsub", split="test"), "test")
    assert (asked["subset"], asked["data_dir"]) == (None, "addsub")


# The published files.


def test_train_files_of_the_benchmarks_are_read(real_data):
    sizes = {"boolq": 9427, "openbookqa": 4957, "arc_easy": 2251, "arc_challenge": 1119}
    for name, size in sizes.items():
        records = load(str(real_data / "train" / f"{name}.json"))
        assert len(records) == size
        assert {r.task for r in records} == {name}
    assert len(load(str(real_data / "train" / "gsm8k.jsonl"))) == 7473


def test_records_to_look_at_may_lack_a_response(write):
    rows = [{"instruction": "What?", "output": " "}, {"instruction": "Why?"}]
    assert [r.output for r in load(write("a.json", rows), "audit")] == [" ", ""]
    rows = [{"question": "What?", "answer": ""}, {"question": "Why?"}]
    assert [r.output for r in load(write("b.json", rows), "audit")] == ["", ""]
    with pytest.raises(ValueError, match=r"ends in '\.tsv'"):
        load(write("c.tsv", ""), "audit")
