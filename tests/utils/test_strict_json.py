"""JSON that would lose something is refused, in one line."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.utils.strict_json import JSONError, half_character, items, parse, read_object

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=20
)


@settings(max_examples=30)
@given(VALUES)
def test_what_is_written_is_read(value):
    assert parse(json.dumps(value)) == value


def outcome(read, text: str):
    try:
        return read(text)
    except JSONError as error:
        return str(error)


@settings(max_examples=100)
@given(
    st.lists(LEAVES | st.lists(LEAVES, max_size=2), max_size=5),
    st.sampled_from([None, 0, 2]),
    st.integers(0, 200),
    st.sampled_from(["", " ", "\n", ",", "]", "[", "1", '"', "\xa0"]),
    st.booleans(),
)
def test_a_list_read_by_item_is_the_list_or_the_same_error(values, indent, at, odd, replace):
    text = f" {json.dumps(values, indent=indent)}\n"
    text = text[:at] + odd + text[at + replace :]
    wanted = outcome(parse, text)
    if isinstance(wanted, list) or text.lstrip(" \n").startswith("["):
        found = outcome(lambda text: [*items(text)], text)
        if isinstance(wanted, list):
            assert repr(found) == repr(wanted)
        else:
            # Versions of Python say and place it otherwise.
            assert isinstance(found, str)
            assert found.startswith("is not JSON") == wanted.startswith("is not JSON")


def test_items_are_read_one_by_one():
    found = items('[{"a": 1}, {"b": 2, "b": 3}]')
    assert next(found) == {"a": 1}
    with pytest.raises(JSONError, match="gives 'b' twice"):
        next(found)
    with pytest.raises(JSONError, match="no list"):
        next(items("{}"))


@pytest.mark.parametrize("text", ["[1\n 2]", "[1] 2", "[1, {2}]", "[", " [1 ", "[1,\n\n,2]"])
def test_an_error_among_items_stands_where_it_would_in_the_whole(text):
    assert outcome(lambda text: [*items(text)], text) == outcome(parse, text)


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
