r"""Answers in text: found, written plainly, compared.

Two sets of rules: `strict` takes the last answer that a text states; `paper` are the rules of
LLM-Adapters' `evaluate.py` and `commonsense_evaluate.py`, errors included.

Numbers may have a sign, thousands separators, decimals, an exponent, a currency or percent sign, a
unit; they may be fractions (3/4, 1 1/2, 1 and 1/2, \frac{3}{4}, \frac34) and stand after `####` or
in `\boxed{}`. A percent sign is a unit: 50 % is 50, as the benchmarks' gold answers have it.
"""

import re
from fractions import Fraction
from functools import cache
from typing import Literal

AnswerFormat = Literal["label", "letter", "number", "text"]
Rules = Literal["strict", "paper"]

NUMBER_TOLERANCE = 1e-3
"""Two numeric answers at most this far apart are the same."""

# Thousands: 1,234, and LaTeX's 1{,}234 and 1\,234.
_INTEGER = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
# "$118 000": only after a currency sign, or two numbers side by side would be one.
_SPACED = r"(?<=[$€£])\d{1,3}(?: \d{3})+(?!\d)"
# TeX takes a digit without braces for a whole argument: \frac12 is 1/2.
_ABOVE, _BELOW = (rf"(?:\{{\s*{sign}{_INTEGER}\s*\}}|\d)" for sign in ("-?", ""))
_LATEX = rf"\\[dt]?frac\s*{_ABOVE}\s*{_BELOW}"
# Not within a date (3/4/2020), and not before decimals.
_SLASHED = rf"(?<!/){_INTEGER}/{_INTEGER}(?![\d/]|[.,]\d)"
_AND = r"(?:and[ \u00a0]+)?"
_FRACTION = rf"(?:{_INTEGER}\s*{_AND})?{_LATEX}|(?:{_INTEGER}[ \u00a0]+{_AND})?{_SLASHED}"
# A minus sign is also written as an en dash. A sign counts only where no operand stands before it:
# in "17-9" the minus is an operator.
_SIGNS = r"[-+\u2212\u2013]"
_SIGN = rf"(?:(?<![\w)\]}}%.]){_SIGNS})?"
_CURRENCY = r"\\?[$€£]\s?"
_BEFORE = rf"(?:{_SIGN}(?:{_CURRENCY})?|{_CURRENCY}{_SIGNS})(?<!\w)"
_NUMBER = rf"{_BEFORE}(?:{_FRACTION}|{_SPACED}|{_DECIMAL})"

_SAYS = r"\s*(?:is|are|was|(?:would|should|must|will) be|equals|=|:)|####|\\boxed\s*\{"
_STATED = rf"\b(?:answer|option|choice){_SAYS}"
# "One option is 3 packs" states no number.
_NUMBER_STATED = rf"\banswer{_SAYS}"
# Atomic, as working may begin with the same characters: no backtracking on long blanks. (Not
# `(...)*+`, which Python before 3.11.5 matches wrongly.)
_MARKUP = r"(?>(?:\\text\s*\{|\\(?![dt]?frac)|[\s*:_({\[])*)"
_LETTER_MARKUP = (
    r"(?>(?:\\(?:text|math)[a-z]{0,2}\s*\{|\\(?![a-zA-Z])|[\s*:_({\[$\"'\u201c\u2018])*)"
)
_HEDGE = r"(?:(?:about|approximately|around|exactly|only|roughly|still)\s+)?"
_TERMS = (
    r"(?>(?:[\d+*/()${}^%\u00d7\u00f7\u00b7\u2212\u2013-]|[^\S\n]|[.,](?=\d)|[xX](?=\s*+[\d($\\])"
    r"|of\b|\\(?:times|cdot|div|[dt]?frac|[,$%]))*)"
)
# Possessive for the same reason. A full stop or line break ends the working: "5. 2 + 2 = 4" says 5.
_WORKING = rf"(?:[a-zA-Z]\s*+=\s*+)?(?:{_TERMS}=\s*+)*"
"""What stands before the last "=" of "the answer is 20% of 50 = 2 * 5 = 10", or of "x = 5"."""


@cache
def _patterns(form: AnswerFormat, labels: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Patterns whose group 1 is an answer: where one is stated, then where one only stands."""
    if form == "number":
        stated = rf"(?i:{_NUMBER_STATED}){_MARKUP}(?i:{_HEDGE}){_WORKING}({_NUMBER})"
        return re.compile(stated), re.compile(f"({_NUMBER})")
    # Longest first, or "yes" would be found in "yes and no".
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    if form == "letter":
        # A lone capital in running text is no answer ("A bag holds ..."), so one must be stated.
        # A small letter may be a word ("the answer is a bag"), unless it stands in parentheses.
        either = rf"{names}|(?<=\()(?i:{names})(?=\))"
        named = (
            rf"(?i:{_STATED}){_LETTER_MARKUP}(?i:(?:option|choice)\s*)?\(?({either})(?![A-Za-z0-9])"
        )
        return re.compile(named), re.compile(rf"\A\W*((?i:{names}))\W*\Z")
    label = rf"(?<!\w)({names})(?!\w)"
    return re.compile(rf"(?:{_STATED})\W*?{label}", re.I), re.compile(label, re.I)


def find(form: AnswerFormat, labels: tuple[str, ...], text: str) -> tuple[int, int] | None:
    """Start and end of the last answer that `text` states; for `text` there is none to find."""
    if form == "text":
        return None
    for pattern in _patterns(form, labels):
        spans = [match.span(1) for match in pattern.finditer(text)]
        if spans:
            return spans[-1]
    return None


def extract(
    form: AnswerFormat, labels: tuple[str, ...], text: str, rules: Rules = "strict"
) -> str | None:
    """The answer that `text` gives by the rules, or None.

    Labels and letters come as they stand in `labels`, numbers without currency sign and thousands
    separators; for `text` it is the text without outer white space.
    """
    if rules not in ("strict", "paper"):
        raise ValueError(f"rules={rules!r} are none of strict, paper. Name one of these.")
    if form == "text":
        return text.strip() or None
    if rules == "paper":
        return _paper(form, labels, text)
    span = find(form, labels, text)
    if span is None:
        return None
    answer = text[slice(*span)]
    if form == "number":
        return _plain_number(answer)
    return {label.casefold(): label for label in labels}[answer.casefold()]


def _paper(form: AnswerFormat, labels: tuple[str, ...], text: str) -> str | None:
    if form == "number":
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return numbers[-1] if numbers else None
    if labels[:1] == ("answer1",):  # all such tasks share one pattern there, three choices or five
        labels = tuple(f"answer{number}" for number in range(1, 6))
    names = re.findall("|".join(re.escape(label) for label in labels), text)
    return names[0] if names else None


def _plain_number(written: str) -> str:
    """A match of `_NUMBER` in digits alone: -1200, 2.50, 3/4, 1 1/2."""
    plain = re.sub(r"\{,\}|\\?[,$€£+]|and", "", re.sub("[\u2212\u2013]", "-", written))
    above, below = r"(?:\{\s*(-?\d+)\s*\}|(\d))", r"(?:\{\s*(\d+)\s*\}|(\d))"
    plain = re.sub(rf"\\[dt]?frac\s*{above}\s*{below}", r" \1\2/\3\4", plain)
    plain = " ".join(plain.split()).replace("- ", "-")
    return plain if "/" in plain else plain.replace(" ", "")


def number(text: str) -> Fraction | None:
    """The number that `text` states, exactly; None where it states none, or 1/0."""
    plain = extract("number", (), text)
    if plain is None:
        return None
    sign = -1 if plain.startswith("-") else 1
    try:
        return sign * sum((Fraction(part) for part in plain.lstrip("-").split()), Fraction(0))
    except (ValueError, ZeroDivisionError):  # more digits than Python reads; no number
        return None


def same(form: AnswerFormat, first: str | None, second: str | None) -> bool:
    """Whether two answers agree: numbers within 1e-3, others but for case and white space.

    None, for no answer found, agrees with nothing.
    """
    if first is None or second is None:
        return False
    if form == "number":
        one, other = number(first), number(second)
        if one is None or other is None:
            return False
        return abs(one - other) <= Fraction(str(NUMBER_TOLERANCE))
    return " ".join(first.casefold().split()) == " ".join(second.casefold().split())


def expresses(form: AnswerFormat, labels: tuple[str, ...], answer: str) -> bool:
    """Whether an answer of this format can be `answer`."""
    if form == "number":
        return number(answer) is not None
    if form == "text":
        return bool(answer.strip())
    return any(same(form, answer, label) for label in labels)
