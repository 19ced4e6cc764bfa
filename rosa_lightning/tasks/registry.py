"""The fifteen benchmarks: one table.

Task names are those of the LLM-Adapters suite, test-set sizes those of its files. Two more rows
serve data outside it: `demo`, the embedded demonstration set (answers are numbers), and `text`, any
instruction data (the answer is the whole response).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rosa_lightning.tasks import converters as hub_rows
from rosa_lightning.tasks.answers import AnswerFormat
from rosa_lightning.tasks.converters import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the table."""

    name: str
    """What sources, logs and result tables call it."""
    group: Literal["commonsense", "arithmetic", "other"] = "other"
    """Which average it counts in."""
    format: AnswerFormat
    """What an answer looks like."""
    labels: tuple[str, ...] = ()
    """The answers that there are, for the formats `label` and `letter`."""
    aliases: tuple[str, ...] = ()
    """Other names in use, compared without case and punctuation."""
    response: str = "{answer}"
    """A response that states `{answer}` and nothing else, as the data to train on word it."""
    hub: str | None = None
    """Hugging Face data set id."""
    subset: str | None = None
    """Configuration of the hub data set, where it has several."""
    split: str | None = None
    """Split of the hub data set that the field tests on: the last one with public answers."""
    revision: str | None = None
    """Branch of the hub data set, where its main one is code that `datasets` no longer runs."""
    fields: tuple[str, ...] = ()
    """Fields of the hub data set that `convert` reads, the gold answer's last."""
    convert: Callable[[Mapping[str, Any]], Sample] | None = None
    """Hub row to sample; None where `sources` reads the fields themselves."""
    test_size: int | None = None
    """Records of the test set, as published."""
    source: str | None = None
    """The paper that it comes from."""
    licence: str | None = None
    """Licence of the data (SPDX)."""


def _numbered(word: str, last: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, last + 1))


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


def _choice(name: str, labels: tuple[str, ...], **row: Any) -> Task:
    response = "the correct answer is {answer}"
    return Task(
        name=name, group="commonsense", format="label", labels=labels, response=response, **row
    )


def _sum(name: str, **row: Any) -> Task:
    response = "The answer is {answer}."
    return Task(name=name, group="arithmetic", format="number", response=response, **row)


_KEYED = ("choices", "answerKey")
_PARQUET = "refs/convert/parquet"

_ALL = (
    _choice(
        "boolq",
        ("true", "false"),
        hub="google/boolq",
        split="validation",
        fields=("question", "answer"),
        convert=hub_rows.boolq,
        test_size=3270,
        source=_arxiv("1905.10044"),
        licence="CC-BY-SA-3.0",
    ),
    _choice(
        "piqa",
        _numbered("solution", 2),
        hub="ybisk/piqa",
        split="validation",
        revision=_PARQUET,
        fields=("goal", "sol1", "sol2", "label"),
        convert=hub_rows.piqa,
        test_size=1838,  # of the file; LLM-Adapters' paper prints 1,830
        source=_arxiv("1911.11641"),
        licence="AFL-3.0",
    ),
    _choice(
        "social_i_qa",
        _numbered("answer", 3),
        aliases=("siqa", "socialiqa"),
        hub="allenai/social_i_qa",
        split="validation",
        revision=_PARQUET,
        fields=("context", "question", "answerA", "answerB", "answerC", "label"),
        convert=hub_rows.social_i_qa,
        test_size=1954,
        source=_arxiv("1904.09728"),
        licence="CC-BY-4.0",
    ),
    _choice(
        "hellaswag",
        _numbered("ending", 4),
        hub="Rowan/hellaswag",
        split="validation",
        fields=("activity_label", "ctx", "endings", "label"),
        convert=hub_rows.hellaswag,
        test_size=10042,
        source=_arxiv("1905.07830"),
        licence="MIT",
    ),
    _choice(
        "winogrande",
        _numbered("option", 2),
        hub="allenai/winogrande",
        subset="winogrande_xl",
        split="validation",
        fields=("sentence", "option1", "option2", "answer"),
        convert=hub_rows.winogrande,
        test_size=1267,
        source=_arxiv("1907.10641"),
        licence="Apache-2.0",
    ),
    _choice(
        "arc_easy",
        _numbered("answer", 5),
        aliases=("arce",),
        hub="allenai/ai2_arc",
        subset="ARC-Easy",
        split="test",
        fields=("question", *_KEYED),
        convert=hub_rows.arc,
        test_size=2376,
        source=_arxiv("1803.05457"),
        licence="CC-BY-SA-4.0",
    ),
    _choice(
        "arc_challenge",
        _numbered("answer", 5),
        aliases=("arcc",),
        hub="allenai/ai2_arc",
        subset="ARC-Challenge",
        split="test",
        fields=("question", *_KEYED),
        convert=hub_rows.arc,
        test_size=1172,
        source=_arxiv("1803.05457"),
        licence="CC-BY-SA-4.0",
    ),
    _choice(
        "openbookqa",
        _numbered("answer", 4),
        aliases=("obqa",),
        hub="allenai/openbookqa",
        subset="main",
        split="test",
        fields=("question_stem", *_KEYED),
        convert=hub_rows.openbookqa,
        test_size=500,
        source=_arxiv("1809.02789"),
        licence="Apache-2.0",
    ),
    _sum(
        "multiarith",
        hub="ChilleD/MultiArith",
        split="train+test",  # the hub's copy cuts the 600 in two, the field tests on all
        fields=("question", "final_ans"),
        convert=hub_rows.multiarith,
        test_size=600,
        source=_arxiv("1608.01413"),
        licence="MIT",
    ),
    _sum(
        "gsm8k",
        hub="openai/gsm8k",
        subset="main",
        split="test",
        fields=("question", "answer"),
        test_size=1319,
        source=_arxiv("2110.14168"),
        licence="MIT",
    ),
    _sum(
        "addsub",
        hub="allenai/lila",
        subset="addsub",
        split="train+validation+test",
        revision=_PARQUET,
        fields=("input", "output_answer"),
        convert=hub_rows.lila,
        test_size=395,
        source="https://doi.org/10.3115/v1/D14-1058",
        licence="MIT",
    ),
    Task(
        name="aqua",
        group="arithmetic",
        format="letter",
        labels=tuple("ABCDE"),
        aliases=("aquarat",),
        response="The answer is ({answer}).",
        hub="deepmind/aqua_rat",
        subset="raw",
        split="test",
        fields=("question", "options", "rationale", "correct"),
        convert=hub_rows.aqua,
        test_size=254,
        source=_arxiv("1705.04146"),
        licence="Apache-2.0",
    ),
    _sum(
        "singleeq",
        aliases=("singleq",),
        hub="allenai/lila",
        subset="singleq",
        split="train+validation+test",
        revision=_PARQUET,
        fields=("input", "output_answer"),
        convert=hub_rows.lila,
        test_size=508,
        source="https://doi.org/10.1162/tacl_a_00160",
        licence="MIT",
    ),
    _sum(
        "svamp",
        hub="ChilleD/SVAMP",
        split="train+test",  # cut in two as well
        fields=("Body", "Question", "Answer"),
        convert=hub_rows.svamp,
        test_size=1000,
        source=_arxiv("2103.07191"),
        licence="MIT",
    ),
    _sum(
        "mawps",
        aliases=("calcmawps",),
        hub="MU-NLPC/Calc-mawps",
        split="test",  # another cut of MAWPS than the 238 of LLM-Adapters
        fields=("question", "result_float"),
        convert=hub_rows.mawps,
        test_size=238,
        source="https://doi.org/10.18653/v1/N16-1136",
        licence="MIT",
    ),
    Task(name="demo", format="number"),
    Task(name="text", format="text"),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
