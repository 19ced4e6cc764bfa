"""Records to token ids, and the table that keeps them."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rosa_lightning.data.encoding import Encoder, Example
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.data.text_tokens import prompt_prefix
from rosa_lightning.data.tokenization import cache_folder, tokenize
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import Record
from tests.hostile import KINDS, limited, put


def byte_tokenizer(*, adds="", merges=()):
    """A byte-level tokenizer; `adds` names what it puts around a text by default."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=259 + len(merges),
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(list(merges) * 2, trainer)
    if adds:
        inner.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


PLAIN = byte_tokenizer()
WITH_BOS = byte_tokenizer(adds="<s> $A")
WITH_BOTH = byte_tokenizer(adds="<s> $A </s>")
MERGING = byte_tokenizer(merges=["\n\n"])  # would merge across the border of prompt and response


def record(instruction="Say so", output="so", answer="so", task="text", source="a", index=1):
    return Record(instruction, "", output, answer, task, source, index)


def encode_one(given_record, tokenizer=PLAIN, **options):
    return Encoder(tokenizer, "plain", **options)([given_record])[0]


# Encoding.


@pytest.mark.parametrize(
    ("tokenizer", "prefix"), [(PLAIN, []), (WITH_BOS, [1]), (WITH_BOTH, [1]), (MERGING, [])]
)
def test_prompt_begins_with_what_the_tokenizer_adds_and_never_ends_with_eos(tokenizer, prefix):
    assert prompt_prefix(tokenizer) == prefix
    example = encode_one(record(), tokenizer)
    assert tokenizer.decode(example.prompt) == "<s>" * len(prefix) + "Say so\n"


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, WITH_BOTH, MERGING])
@given(instruction=st.text(min_size=1), output=st.text(min_size=1))
def test_border_between_prompt_and_response_is_exact(tokenizer, instruction, output):
    example = encode_one(record(instruction, output), tokenizer, max_length=10_000)
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == f"{instruction}\n"
    assert example.response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.response[:-1]) == output
    assert not example.too_long


@pytest.mark.parametrize(
    ("output", "answer", "task", "span"),
    [
        ("the correct answer is true", "true", "boolq", "true</s>"),
        ("a\n#### 72", "72", "gsm8k", "72</s>"),
        ("é = 15. The answer is 15.", "15.0", "multiarith", "15.</s>"),
        ("72", "72", "demo", "72</s>"),
        ("The answer is 16 hours.", "16", "gsm8k", "The answer is 16 hours.</s>"),
        ("no answer", None, "text", "no answer</s>"),
    ],
)
def test_answer_begins_at_the_final_answer_or_else_at_the_response(output, answer, task, span):
    example = encode_one(record(output=output, answer=answer, task=task))
    assert PLAIN.decode(example.response[example.answer :]) == span


def test_slow_tokenizers_take_the_whole_response_for_the_answer():
    tokenizer = ByT5Tokenizer()
    example = encode_one(record(output="it is true", answer="true", task="boolq"), tokenizer)
    assert tokenizer.decode(example.response) == "it is true</s>"
    assert example.answer == 0


@given(
    size=st.integers(0, 40),
    reply=st.integers(1, 40),
    max_length=st.integers(8, 60),
    bos=st.booleans(),
)
def test_cut_records_keep_prefix_end_of_prompt_and_beginning_of_response(
    size, reply, max_length, bos
):
    text, output = "0123456789" * 4, "abcdefghij" * 4
    given_record = record(text[:size] or "?", output[:reply])
    asked = given_record.instruction + "\n"
    example = encode_one(given_record, WITH_BOS if bos else PLAIN, max_length=max_length)
    full = bos + len(asked) + reply + 1
    assert len(example.prompt) + len(example.response) == min(full, max_length)
    assert example.too_long == (full > max_length)
    assert example.prompt[0] == 1 or not bos
    kept = WITH_BOS.decode(example.prompt, skip_special_tokens=True)
    assert asked.endswith(kept)
    room = max_length - 1  # one token, BOS or the prompt's last, stays before the response
    assert example.response_cut == (reply + 1 > room)
    answered = PLAIN.decode(example.response)
    assert answered == (output[:room] if reply + 1 > room else f"{output[:reply]}</s>")
    assert 0 <= example.answer < len(example.response)


def test_prompts_to_answer_are_cut_and_never_dropped():
    example = encode_one(
        record("x" * 50 + "end"), WITH_BOS, max_length=8, overlong="drop", with_response=False
    )
    assert WITH_BOS.decode(example.prompt) == "<s>xxxend\n"
    assert len(example.response) == 0
    assert example.too_long


# The table.


def source_of(folder: Path, count: int = 7, **changes: Any) -> Any:
    """Records whose lengths differ, the later the longer; read from a file."""
    rows = [
        {"instruction": f"Say {'é' * n} {n}.", "output": f"It is {n}.", "answer": str(n)}
        for n in range(count)
    ]
    rows[-1] |= changes
    path = folder / "numbers.json"
    path.write_text(json.dumps(rows))
    return load_records(Source(path=str(path), task="gsm8k"))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(PLAIN, "plain", 26)


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """How many records were tokenized, call by call."""
    counts, call = [], Encoder.__call__

    def counting(self: Encoder, records: Any) -> list[Example]:
        counts.append(len(records))
        return call(self, records)

    monkeypatch.setattr(Encoder, "__call__", counting)
    return counts


def test_what_is_read_is_what_was_encoded(tmp_path, encoder, tokenized):
    records = source_of(tmp_path)
    expected = encoder(list(records))
    assert {one.too_long for one in expected} == {True, False}
    for _ in range(2):
        found = tokenize(source_of(tmp_path), encoder, tmp_path / "cache")
        assert list(found) == expected
        assert (found[-1], found[2], found[1:3]) == (expected[-1], expected[2], expected[1:3])
        assert found.lengths().tolist() == [one.num_tokens for one in expected]
        assert list(pickle.loads(pickle.dumps(found.select(np.arange(7) > 4)))) == expected[5:]
    assert tokenized == [7, 7]
    assert list(tokenize(records, encoder, None)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"style_name": "alpaca"},
        {"max_length": 22},
        {"num_rows": 259},
        {"tokenizer": byte_tokenizer(merges=["It"])},
        {"output": "It is 9."},
        {"answer": "It"},
    ],
)
def test_other_records_and_settings_have_a_table_of_their_own(tmp_path, encoder, change):
    tokenize(source_of(tmp_path), encoder, tmp_path / "cache")
    is_setting = not change.keys() & {"instruction", "input", "output", "answer"}
    records = source_of(tmp_path, **({} if is_setting else change))
    encoder = replace(encoder, **change) if is_setting else encoder
    found = tokenize(records, encoder, tmp_path / "cache")
    assert list(found) == encoder(list(records))
    same = change.keys() == {"num_rows"}  # whose ids are all within them
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1 + (not same)


def test_what_a_call_left_in_the_tokenizer_makes_no_difference(tmp_path, encoder, tokenized):
    tokenize(source_of(tmp_path), encoder, tmp_path / "cache")
    encoder.tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    tokenize(source_of(tmp_path), replace(encoder), tmp_path / "cache")
    assert tokenized == [7]


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "noise":
        path.write_bytes(b"noise" * 99)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        datasets.Dataset.from_dict({"a": [1]}).map(cache_file_name=str(path), new_fingerprint="a")
        path.exists() or path.write_bytes(b"")
    else:
        put(how, path)


@pytest.mark.parametrize("how", ["cut", "noise", "empty", "other", *KINDS])
def test_a_damaged_file_is_made_anew_and_said_once(tmp_path, encoder, how):
    cache = tmp_path / "cache"
    expected = list(tokenize(source_of(tmp_path), encoder, cache))
    (path,) = cache.glob("*.arrow")
    damaged(path, how)
    with limited(60), pytest.warns(UserWarning, match=r"is damaged|cannot be kept"):
        assert list(tokenize(source_of(tmp_path), encoder, cache)) == expected


def test_a_folder_that_cannot_be_written_to_is_said_and_done_without(tmp_path, encoder):
    (tmp_path / "file").write_text("")
    records = source_of(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot be kept .* Set data\.loading\.cache_dir"):
        assert list(tokenize(records, encoder, tmp_path / "file")) == encoder(list(records))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_done_without(tmp_path, encoder):
    records = source_of(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.warns(UserWarning, match="cannot be kept"):
            found = tokenize(records, encoder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(found) == encoder(list(records))
    assert not list((tmp_path / "cache").glob("*.arrow"))
    gc.collect()  # the file that `datasets` has left open


def test_of_several_that_start_at_once_one_tokenizes(tmp_path, encoder, tokenized):
    records = [source_of(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        encoders = [replace(encoder, tokenizer=copy.deepcopy(PLAIN)) for _ in records]
        found = list(pool.map(tokenize, records, encoders, [tmp_path / "cache"] * 4))
    assert tokenized == [7]
    assert all(list(one) == list(found[0]) for one in found)


def test_the_cache_stands_in_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder("auto") == Path("/caches/rosa_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "rosa_lightning"
    assert cache_folder("~/mine") == Path.home() / "mine"
    assert cache_folder(None) is None


def test_an_own_tasks_labels_are_part_of_what_is_kept(tmp_path):
    """The answer's place in a response depends on them."""
    (tmp_path / "mood.json").write_text(json.dumps([{"instruction": "How?", "output": "good"}]))
    for labels in (["good", "bad"], ["It is good", "bad"]):
        tasks = with_own_tasks([{"name": "mood", "format": "label", "labels": labels}])
        records = load_records(Source(path=str(tmp_path / "mood.json")), tasks=tasks)
        tokenize(records, Encoder(PLAIN), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
