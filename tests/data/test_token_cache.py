from __future__ import annotations

import copy
import json
import pickle
import resource
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from rosa_lightning.data import token_cache
from rosa_lightning.data.datamodule import ReasoningDataModule
from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source
from rosa_lightning.data.streamed import Lines, Streamed
from rosa_lightning.data.token_cache import cache_folder, encode_cached
from rosa_lightning.data.tokenization import Encoder, encode_all
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import Record
from tests.conftest import byte_tokenizer
from tests.hostile import KINDS, limited, put


def records(count: int = 7) -> list[Record]:
    """Records whose lengths differ, the later the longer."""
    return [
        Record(f"Say {'é' * n} {n}.", "", f"It is {n}.", str(n), "gsm8k", "numbers", n + 1)
        for n in range(count)
    ]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_tokenizer(), "plain", 64)


@pytest.fixture
def no_tokenising(monkeypatch) -> Any:
    """From its call on, encoding anything is an error."""

    def forbid() -> None:
        def fail(*args: Any) -> None:
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Encoder, "__call__", fail)

    return forbid


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_what_is_read_is_what_was_encoded(tmp_path, encoder, no_tokenising, overlong):
    encoder = replace(encoder, overlong=overlong, max_length=26)
    expected, count = encode_all(records(), encoder)
    assert 0 < count.too_long < 7
    assert len(expected) == (7 if overlong == "cut" else 7 - count.too_long)
    assert any(example.answer for example in expected)
    for _ in range(2):
        found, counted = encode_cached(records(), encoder, tmp_path)
        assert list(found) == list(expected)
        assert counted == count
        no_tokenising()


def test_examples_are_found_like_those_of_a_list(tmp_path, encoder):
    expected, _ = encode_all(records(), encoder)
    found, _ = encode_cached(records(), encoder, tmp_path)
    assert (found[-1], found[2], found[1:3]) == (expected[-1], expected[2], expected[1:3])
    with pytest.raises(IndexError):
        found[7]
    assert list(pickle.loads(pickle.dumps(found))) == expected  # for loader workers
    assert found.lengths.tolist() == [len(e.prompt) + len(e.response) for e in expected]


def test_many_records_keep_their_order_behind_a_bar(tmp_path, encoder, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setattr(token_cache, "_RECORDS_AT_A_TIME", 3)
    monkeypatch.setattr(token_cache, "_BAR_FROM", 5)
    encoder = replace(encoder, overlong="drop", max_length=24)
    # The longest first, so that the parts have gaps at their starts.
    given = records()[::-1]
    expected, count = encode_all(given, encoder)
    found, counted = encode_cached(given, encoder, tmp_path)
    assert (list(found), counted) == (expected, count)
    assert "Tokenizing" in capsys.readouterr().err


def test_a_source_of_which_nothing_fits_is_kept_too(tmp_path, encoder, no_tokenising):
    encoder = replace(encoder, overlong="drop", max_length=8)
    for _ in range(2):
        found, count = encode_cached(records(), encoder, tmp_path)
        assert (len(found), list(found), count.too_long) == (0, [], 7)
        no_tokenising()


def changed_tokenizer(encoder: Encoder) -> Encoder:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(["Say"])
    return replace(encoder, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, template="alpaca"),
        lambda e: replace(e, max_length=22),
        lambda e: replace(e, overlong="drop"),
        lambda e: replace(e, with_response=False),
        changed_tokenizer,
    ],
)
def test_another_encoder_finds_tokens_of_its_own(tmp_path, encoder, change):
    encode_cached(records(), encoder, tmp_path)
    other = change(encoder)
    found, _ = encode_cached(records(), other, tmp_path)
    assert list(found) == list(encode_all(records(), other)[0])
    assert len(list(tmp_path.glob("*.tokens"))) == 2


own = with_own_tasks([{"name": "mood", "format": "label", "labels": ["good", "bad"]}])["mood"]


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "Say 9."},
        {"input": "9"},
        {"output": "It is 9."},
        {"answer": "It"},
        {"index": 9},
        {"task": "svamp"},
        {"own_task": own},
    ],
)
def test_another_record_finds_tokens_of_its_own(tmp_path, encoder, change):
    encode_cached(records(), encoder, tmp_path)
    other = [*records()[:-1], replace(records()[-1], **change)]
    found, _ = encode_cached(other, encoder, tmp_path)
    assert list(found) == list(encode_all(other, encoder)[0])
    assert len(list(tmp_path.glob("*.tokens"))) == 2


def test_a_chat_template_that_differs_in_later_turns_alone_is_another(tmp_path, encoder):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    encoder = replace(encoder, template="chat")
    encoder.tokenizer.chat_template = template
    encode_cached(records(), encoder, tmp_path)
    changed = template.replace("<{{", "{% if m.content == 'Say é 1.' %}!{% endif %}<{{")
    encoder.tokenizer.chat_template = changed
    found, _ = encode_cached(records(), encoder, tmp_path)
    assert list(found) == list(encode_all(records(), encoder)[0])


def test_what_a_call_left_in_the_tokenizer_makes_no_difference(tmp_path, encoder):
    encode_cached(records(), encoder, tmp_path)
    encoder.tokenizer(["a", "bc"], padding=True, truncation=True, max_length=4)
    encode_cached(records(), encoder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def forged(change: Any) -> Any:
    """A damage with a checksum that fits: `change` is given the header and the arrays' numbers."""

    def damage(content: bytes) -> bytes:
        start = len(token_cache._MAGIC) + 4
        end = start + int.from_bytes(content[start - 4 : start], "little")
        header = json.loads(content[start:end])
        rows, body = header["records"], bytearray(content[end + -end % 8 :])
        places = (0, rows * 16, rows * 20, rows * 24, len(body))
        parts = [body[a:b] for a, b in pairwise(places)]
        numbers = [array(kind, bytes(part)) for kind, part in zip("qiii", parts, strict=True)]
        change(header, *numbers)
        body = bytearray(b"".join(part.tobytes() for part in numbers))
        header["checksum"] = zlib.crc32(body)
        text = json.dumps(header).encode()
        begin = token_cache._MAGIC + len(text).to_bytes(4, "little") + text
        return begin + bytes(-len(begin) % 8) + bytes(body)

    return damage


def setting(part: int, place: int, value: int) -> Any:
    def change(header: dict[str, Any], *numbers: Any) -> None:
        numbers[part][place] = value

    return forged(change)


DAMAGES = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-9],
    "cut off in its header": lambda content: content[:40],
    "another kind of file": lambda content: b"{" + content[1:],
    "a token changed": lambda content: content[:-4] + b"\x05\x00\x00\x00",
    "a token beyond the vocabulary": setting(3, 5, 258),
    "a token below zero": setting(3, 5, -1),
    "a record that is not there": setting(1, -1, 7),
    "a record twice": setting(1, 1, 0),
    "a record before the first": setting(1, 0, -1),
    "an end before its beginning": setting(0, 3, 1),
    "an end beyond the tokens": setting(0, -1, 2**40),
    "an answer beyond its response": setting(2, 0, 10_000),
    "an answer before its response": setting(2, 0, -1),
    "records below zero": forged(lambda header, *_: header.update(records=-1, tokens=10**6)),
    "no whole number of records": forged(lambda header, *_: header.update(records=7.0)),
    "no counts": forged(lambda header, *_: header.update(count=5)),
    "nested deeply": lambda content: (
        token_cache._MAGIC + (100_000).to_bytes(4, "little") + b"[" * 100_000
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew_and_said_once(tmp_path, encoder, no_tokenising, damage):
    expected = list(encode_cached(records(), encoder, tmp_path)[0])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"\.tokens is damaged .*tokenised anew") as said:
        found, _ = encode_cached(records(), encoder, tmp_path)
    assert (list(found), len(said)) == (expected, 1)
    no_tokenising()
    assert list(encode_cached(records(), encoder, tmp_path)[0]) == expected


def test_a_folder_that_cannot_be_written_to_is_said_and_done_without(tmp_path, encoder):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file.* Set data\.cache_dir"):
        found, _ = encode_cached(records(), encoder, tmp_path / "file" / "in")
    assert list(found) == list(encode_all(records(), encoder)[0])


def test_streamed_records_and_slow_tokenizers_are_left_alone(tmp_path, encoder):
    (tmp_path / "lines").write_text("a\nb\n")
    streamed = Streamed(Lines(tmp_path / "lines"), lambda line, number: records()[number])
    assert isinstance(encode_cached(streamed, encoder, tmp_path)[0], Streamed)

    encode_cached(records(), replace(encoder, tokenizer=ByT5Tokenizer()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_of_several_that_start_at_once_one_tokenises(tmp_path, encoder, monkeypatch):
    encode, calls, both_looked = Encoder.__call__, [], Barrier(2)
    read = token_cache._read

    def look(*args: Any, say: bool = True) -> Any:
        found = read(*args, say=say)
        if say:
            both_looked.wait(timeout=20)
        return found

    def count(self: Encoder, given: Any) -> Any:
        calls.append(given)
        return encode(self, given)

    monkeypatch.setattr(token_cache, "_read", look)
    monkeypatch.setattr(Encoder, "__call__", count)
    with ThreadPoolExecutor(2) as pool:
        # Each with a tokenizer of its own, which threads cannot share.
        encoders = [replace(encoder, tokenizer=byte_tokenizer()) for _ in range(2)]
        jobs = [pool.submit(encode_cached, records(), own, tmp_path) for own in encoders]
        first, second = (list(job.result()[0]) for job in jobs)
    assert (first, len(calls)) == (second, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tokens"]


def test_the_data_module_trains_on_the_same_batches_from_the_cache(
    tmp_path, sources, no_tokenising
):
    def batches(cache_dir: str | None) -> list[Any]:
        data = ReasoningDataModule(
            sources=sources, tokenizer=byte_tokenizer(), val_fraction=0.2, cache_dir=cache_dir
        )
        data.setup("fit")
        loaders = (data.train_dataloader(), data.val_dataloader())
        return [batch["input_ids"].tolist() for loader in loaders for batch in loader]

    plain, kept = batches(None), batches(str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept").glob("*.tokens"))) == 4  # each source's two parts
    no_tokenising()
    assert batches(str(tmp_path / "kept")) == kept == plain


def test_the_cache_stands_in_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder("auto") == Path("/caches/rosa_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "rosa_lightning"
    assert cache_folder("~/own") == Path.home() / "own"
    assert cache_folder(None) is None


def test_the_encoding_is_the_one_that_files_of_this_number_hold(encoder, real_data):
    """Where this fails, tokens have changed: raise ENCODING, and put the new sums here."""
    sums = []
    for name in ("boolq.json", "gsm8k.jsonl"):
        given = load_records(Source(path=str(real_data / "train" / name)))[:20]
        for template in ("alpaca", "plain"):
            made, _ = encode_all(given, replace(encoder, template=template, max_length=200))
            rows = [(*e.prompt, -1, *e.response, e.answer) for e in made]
            sums.append(sum(i * value for row in rows for i, value in enumerate(row)))
    assert (token_cache.ENCODING, sums) == (2, [38328265, 28671186, 33149529, 33194601])


# Folders that others can write to.


@pytest.mark.parametrize("ending", [".lock", ".tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_said_and_done_without(tmp_path, encoder, kind, ending):
    encode_cached(records(), encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    put(kind, path.with_suffix(ending))
    with limited(), pytest.warns(UserWarning, match=r"cannot be kept in .* Set data\.cache_dir"):
        found, _ = encode_cached(records(), encoder, tmp_path)
    assert list(found) == list(encode_all(records(), encoder)[0])


def test_what_a_lock_or_a_file_is_linked_to_stays_as_it_is(tmp_path, encoder):
    precious, cache = tmp_path / "precious", tmp_path / "cache"
    precious.write_text("kept")
    encode_cached(records(), encoder, cache)
    (path,) = cache.iterdir()
    path.unlink()
    path.with_suffix(".lock").symlink_to(precious)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        encode_cached(records(), encoder, cache)
    assert precious.read_text() == "kept"
    path.with_suffix(".lock").unlink()
    path.symlink_to(precious)
    with pytest.warns(UserWarning, match=r"is damaged .*tokenised anew"):
        encode_cached(records(), encoder, cache)
    assert precious.read_text() == "kept"
    assert not path.is_symlink()


def test_a_full_disk_is_said_with_the_file_and_done_without(tmp_path, encoder):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.warns(UserWarning, match=r"\.tokens cannot be written: File too large"):
            found, _ = encode_cached(records(), encoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(found) == list(encode_all(records(), encoder)[0])
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
