"""Numbers, letters and labels found in text and compared."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.tasks.answers import expresses, extract, find, number, same
from rosa_lightning.tasks.registry import TASKS

LETTERS = tuple("ABCDE")
LISTED = [task for task in TASKS.values() if task.labels]

# --- every spelling of an answer is found again ----------------------------------------------

PLAIN_BEFORE = [
    "",
    "First 3 + 4 = 7. ",
    "A bag holds 12 of them.\n",
    "On 3/4/2020, 17-9 were left; ",
]
STATED = ["The answer is ", "the correct answer is: ", "Answer: ", "x = 3\n#### ", "answer is **"]


def spellings(value: Fraction) -> list[str]:
    """Ways to write a number, the sign of a fraction before all of it."""
    sign, size = "-" if value < 0 else "", abs(value)
    if value.denominator in (1, 10, 100, 1000):
        digits = f"{float(size):,.3f}" if value.denominator > 1 else f"{size.numerator:,}"
        plain = digits.replace(",", "")
        written = [digits, plain, f"${digits}", f"\\${plain}", f"{plain}%", f"{plain} %"]
        written += [f"{size.numerator}e0"] if value.denominator == 1 else []
    else:
        whole, rest = divmod(size.numerator, size.denominator)
        written = [f"{size.numerator}/{size.denominator}"]
        written += [f"\\frac{{{size.numerator}}}{{{size.denominator}}}"]
        if whole:
            written += [
                f"{whole} {rest}/{size.denominator}",
                f"{whole}\\dfrac{{{rest}}}{{{size.denominator}}}",
            ]
    return [mark + text for text in written for mark in ([sign, "\u2212"] if sign else ["", "+"])]


values = st.one_of(
    st.integers(-(10**15), 10**15).map(Fraction),
    st.integers(-(10**9), 10**9).map(lambda n: Fraction(n, 1000)),
    st.builds(Fraction, st.integers(-(10**4), 10**4), st.integers(2, 999)),
)


written_values = values.flatmap(
    lambda value: st.tuples(st.just(value), st.sampled_from(spellings(value)))
)


@given(
    written=written_values,
    before=st.sampled_from(PLAIN_BEFORE),
    opener=st.sampled_from(STATED),
    after=st.sampled_from(["", ".", "\n", " apples.", ", which took 3 steps.", "** miles/hour"]),
)
def test_a_stated_number_is_found_again_in_every_spelling(written, before, opener, after):
    value, text = written
    found = extract("number", (), before + opener + text + after)
    assert found is not None
    assert number(found) == value
    assert same("number", found, text)


@pytest.mark.parametrize("task", LISTED, ids=lambda task: task.name)
@given(data=st.data())
def test_every_label_and_letter_is_found_again(task, data):
    answer = data.draw(st.sampled_from(task.labels))
    other = data.draw(st.sampled_from(task.labels))
    spelt = [answer]
    if task.format == "label":
        spelt += [answer.upper(), answer.title()]
    text = data.draw(st.sampled_from(spelt))
    if task.format == "letter":
        text = data.draw(st.sampled_from([text, f"({text})", f"option {text}", f"**{text}**"]))
    opener = data.draw(st.sampled_from(["The answer is ", "Answer: ", "\\boxed{", "#### "]))
    before = data.draw(st.sampled_from(["", f"The answer is {other}? No. ", f"A {other} B. "]))
    after = data.draw(st.sampled_from(["", ".", "}", "\n", " (I am sure)."]))
    found = extract(task.format, task.labels, before + opener + text + after)
    assert found == answer
    assert same(task.format, found, text.strip("(*)").removeprefix("option "))


@given(st.text())
def test_free_text_is_its_own_answer(text):
    found = extract("text", (), f" {text}\n")
    assert found == (text.strip() or None)
    assert found is None or same("text", found, text)


# --- nothing else is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 5, but the answer is 7", "7"),  # the last statement, whatever its form
        ("The answer is 7.\n#### 5", "5"),
        ("The answer is not 19. We solve it: the answer is 10.", "10"),
        ("The answer is 4 + 16 + 20 = 40.", "40"),
        ("The answer is x = 5.", "5"),
        ("The answer must be 5, not 6", "5"),
        ("The answer is approximately 3.14", "3.14"),
        ("The answer is $118 000.", "118000"),
        ("-$9", "-9"),
        ("in 2019 100 came", "100"),  # spaces join digits after a currency sign only
        ("3/4/2020", "2020"),
        ("1e-05", "1e-05"),
        ("x2 and y3", None),
        ("The answer is 2 \u00d7 3 = 6", "6"),
        ("The answer is 2 x 3 = 6", "6"),
        (r"The answer is 2 \times 3 = 6", "6"),
        ("The answer is 6 ÷ 3 = 2", "2"),
        ("The answer is 3 \u2013 5 = \u20132", "-2"),
        (r"The answer is \frac{1}{2} \cdot 4 = 2", "2"),
        ("The answer is 20% of 50 = 10", "10"),
        ("The answer is $3 x 4 = $12.", "12"),
        # Working that only follows an answer is not that answer's.
        ("The answer is 5. 2 \u00d7 3 = 6", "5"),
        ("#### 5\n2 \u00d7 3 = 6", "5"),
        ("The answer is 5 = five", "5"),
    ],
)
def test_the_number_that_is_stated(text, answer):
    assert extract("number", (), text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (b).", "B"),
        ("Option A fails, so the correct answer is: (c) 12 km", "C"),
        ("(d)", "D"),
        ("b", "B"),
        ("The answer is a bag.", None),
        ("The answer is (a bag).", None),
        (r"The answer is $\text{C}$", "C"),
        (r"\boxed{\mathrm{D}}", "D"),
        ("The answer must be B, not C", "B"),
        ("The correct option should be (d)", "D"),
    ],
)
def test_small_letters_are_answers_in_parentheses_or_alone(text, answer):
    assert extract("letter", LETTERS, text) == answer


@pytest.mark.parametrize(
    "filler",
    [
        *(" ", "\n", "(", "*", "\\", "{", "}", "=", ".", "$", "\u2013", "- ", "= ", "x ", "of "),
        *("9", "9 ", "9=", "{9}", "1/", "1,", "1{,}", "111,", "111{,}", "111\\,", "1 and "),
        *("\\frac", "\\frac1", "\\frac{", "\\text{", "\\boxed{", "####", "answer is ", "x = "),
    ],
)
def test_long_runs_of_anything_do_not_hang_the_search(filler):
    """Quadratic time would take minutes here."""
    run = filler * (50_000 // len(filler))
    for start in ("", "The answer is ", "The answer is 9 ", "9", "x = "):
        find("number", (), start + run)
        assert find("letter", LETTERS, start + run) == find("letter", LETTERS, start + 3 * filler)


def test_degenerate_numbers_equal_nothing_and_raise_nothing():
    for text in ("9" * 5000, "1/0", "3 1/0"):
        assert number(text) is None
        assert not same("number", text, text)


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        ("15", "15.001", True),
        ("15", "15.0011", False),
        ("1/3", "0.333", True),
        ("1/3", "0.33", False),
        ("10000000000000.5", "10,000,000,000,000.50", True),
        ("10000000000000.5", "10000000000000.6", False),  # the tolerance does not grow with size
        ("20%", "20", True),
        ("1e400", "1e400", True),
        ("3 and 1/2", "3.5", True),
        ("\u20133 and 1/2", "-3.5", True),
        (r"\frac12", "0.5", True),
        ("1{,}234", "1234", True),
    ],
)
def test_numbers_agree_within_a_thousandth(first, second, agree):
    assert same("number", first, second) is agree


def test_labels_are_whole_words_and_the_longest_that_fits():
    labels = ("yes", "yes and no", "c++")
    assert extract("label", labels, "The answer is yes and no.") == "yes and no"
    assert extract("label", labels, "It is C++!") == "c++"
    assert extract("label", labels, "eyes") is None


@pytest.mark.parametrize(
    ("form", "labels", "can", "cannot"),
    [
        ("number", (), "1,200", "many"),
        ("label", ("true", "false"), "True", "maybe"),
        ("letter", LETTERS, "b", "F"),
        ("text", (), "anything", " "),
    ],
)
def test_what_a_format_can_express(form, labels, can, cannot):
    assert expresses(form, labels, can)
    assert not expresses(form, labels, cannot)


# --- the field's own rules -----------------------------------------------------------------


def field_number(text: str) -> float:
    """LLM-Adapters, evaluate.py: the last match without commas, else infinity."""
    matches = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(matches[-1]) if matches else float("inf")


@given(st.text("0123456789.,- $a"))
def test_paper_numbers_are_judged_as_the_field_judges_them(text):
    found = extract("number", (), text, "paper")
    assert (float(found) if found is not None else float("inf")) == field_number(text)
    for gold in ("5", "12.0", "-3"):
        wanted = abs(float(gold) - field_number(text)) <= 0.001
        assert same("number", found, gold) is wanted


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("aqua", "\nA: The answer is (D).", "A"),
        ("aqua", "none", None),
        ("boolq", "untrue, so false", "true"),
        ("boolq", "True", None),
        ("piqa", "solution12", "solution1"),
        ("social_i_qa", "answer5 or answer1", "answer5"),  # one pattern for three choices and five
        ("openbookqa", "answer5", "answer5"),
        ("hellaswag", "ending4, not ending1", "ending4"),
        ("winogrande", "the correct answer is option2", "option2"),
        ("gsm8k", "The answer is 8. It took 3 steps.", "3"),
        ("gsm8k", "17-9", "-9"),
        ("gsm8k", "1,200.", "1200."),
    ],
)
def test_paper_rules_keep_the_fields_errors(task, text, answer):
    row = TASKS[task]
    assert extract(row.format, row.labels, text, "paper") == answer
