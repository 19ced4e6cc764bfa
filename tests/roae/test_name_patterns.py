"""Patterns match as `re` has it, and none hangs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.roae.name_patterns import check_patterns, matches
from tests.hostile import limited

NAMES = st.text("ab.0_\n", max_size=8)
LEAVES = st.sampled_from(
    ["a", "b", ".", r"\.", "0", r"\d", r"\w", "[ab]", "[^a]", "[0-9_]", r"[\d.]", "^", "$", r"\Z"]
)
SIMPLE = st.lists(
    st.builds(str.__add__, LEAVES, st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}", "*?"])),
    max_size=4,
).map("".join)
PATTERNS = st.recursive(
    SIMPLE,
    lambda part: st.one_of(
        st.lists(part, min_size=2, max_size=3).map("|".join),
        part.map("({})".format),
        part.map("(?:{})?".format),
        st.lists(part, min_size=2, max_size=2).map("".join),
    ),
    max_leaves=4,
)


@settings(max_examples=400)
@given(PATTERNS, NAMES)
def test_patterns_match_as_re_has_it(pattern, name):
    try:
        wanted = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        with pytest.raises(ValueError, match="no regular expression"):
            matches(pattern, name)
        return
    assert matches(pattern, name) == wanted


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(a*)*b", ".*.*.*.*.*.*.*.*b", "(a?){200}a{200}b"],
)
def test_what_takes_re_for_ever_is_matched_or_refused_at_once(pattern):
    refused = re.search(r"[*+]\)[*+]", pattern) is not None
    with limited(5):
        if refused:
            with pytest.raises(ValueError, match="repeats a repetition"):
                matches(pattern, "a" * 200)
        else:
            assert not matches(pattern, "a" * 200)


def test_the_slowest_that_is_followed_takes_a_moment():
    with limited(5):
        assert not matches("(" + "a" * 500 + "|a)*b", "a" * 500)
        assert not matches("(a|.){1,9999}" * 30 + "b", "a" * 500)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(?=a)a", r"(a)\1", "(?i)a", "(?i:a)", r"\ba", "(?>a)", "a" * 600 + "*", "((a+)b)*"),
        *("(" * 5_000 + ")" * 5_000, "(", "*", "a{99999999999}", "(?P<x", "[b-a]"),
        "(?:a{60000}){60000}b",
    ],
)
def test_what_is_not_followed_is_refused_by_name(pattern):
    with limited(5), pytest.raises(ValueError, match="has ") as caught:
        check_patterns({pattern: 1}, 3)
    assert repr(pattern[:20])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 400


def test_too_many_patterns_for_too_many_modules_are_refused():
    check_patterns({f"layers.{n}.q": 1 for n in range(1_000)}, 1_000)
    check_patterns(None, 10**9)
    with pytest.raises(ValueError, match="would take too long"):
        check_patterns({f"layers.{n}.q": 1 for n in range(10_000)}, 10_000)
    with pytest.raises(ValueError, match="would take too long"):
        check_patterns({f"layers.{n}.*q": 1 for n in range(1_000)}, 1_000)
