"""JSON that would lose something is refused, in one line."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.utils.strict_json import JSONError, half_character, parse, read_object

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=20
)


@settings(max_examples=30)
@given(VALUES)
def test_what_is_written_is_read(value):
    assert parse(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ("[1, " + "9" * 5_000 + "]", "an integer of more digits"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "gives 'c' twice in one object"),
        ("", "is not JSON: line 1, column 1"),
        ("[1,\n 2", "is not JSON: line 2, column"),
    ],
)
def test_what_cannot_be_kept_is_refused(text, words):
    with pytest.raises(JSONError, match=words):
        parse(text)


def test_only_a_second_value_is_extra():
    with pytest.raises(JSONError) as caught:
        parse("{}\n{}")
    assert caught.value.extra_data
    assert math.isnan(parse("NaN"))


def test_a_file_without_an_object_that_can_be_read_is_empty(tmp_path):
    path = tmp_path / "it.json"
    assert read_object(path) == {}
    for content in (b"{", b"[1]", b"\xff{}", b'{"a": 1, "a": 2}', b"[" * 50_000):
        path.write_bytes(content)
        assert read_object(path) == {}
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


@settings(max_examples=30)
@given(st.text())
def test_half_a_character_is_what_utf_8_cannot_say(text):
    assert half_character(text) is None
    assert half_character(text + "\ud83d" + text) == "\\ud83d"
    assert half_character(json.loads('"\\ud83d\\ude00"')) is None
