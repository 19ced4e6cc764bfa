"""The table of tasks: fifteen benchmarks, named as in the LLM-Adapters suite.

Two more rows serve other data: `demo`, the embedded demonstration set (answers are numbers), and
`text`, any instruction data (the answer is the whole response).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rosa_lightning.tasks import converters
from rosa_lightning.tasks.answers import AnswerFormat
from rosa_lightning.tasks.converters import Sample

Converter = Callable[[Mapping[str, Any]], Sample]


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
    convert: Converter | None = None
    """Hub row to sample; None where `sources` reads the fields themselves."""


def _numbered(word: str, last: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, last + 1))


def _choice(name: str, labels: tuple[str, ...], **row: Any) -> Task:
    says = "the correct answer is {answer}"
    return Task(name=name, group="commonsense", format="label", labels=labels, response=says, **row)


def _word_problem(name: str, **row: Any) -> Task:
    says = "The answer is {answer}."
    return Task(name=name, group="arithmetic", format="number", response=says, **row)


def _hub(hub: str, convert: Converter | None, fields: str, **more: str) -> dict[str, Any]:
    """Where a data set is, and how its rows are read."""
    return {
        "hub": hub,
        "convert": convert,
        "fields": tuple(fields.split()),
        "split": "validation",
        **more,
    }


_PARQUET = "refs/convert/parquet"
_SIQA_FIELDS = "context question answerA answerB answerC label"
_ALL_SPLITS = "train+validation+test"

_ALL = (
    _choice(
        "boolq",
        ("true", "false"),
        **_hub("google/boolq", converters.boolq, "question answer"),
    ),
    _choice(
        "piqa",
        _numbered("solution", 2),
        **_hub("ybisk/piqa", converters.piqa, "goal sol1 sol2 label", revision=_PARQUET),
    ),
    _choice(
        "social_i_qa",
        _numbered("answer", 3),
        aliases=("siqa", "socialiqa"),
        **_hub("allenai/social_i_qa", converters.social_i_qa, _SIQA_FIELDS, revision=_PARQUET),
    ),
    _choice(
        "hellaswag",
        _numbered("ending", 4),
        **_hub("Rowan/hellaswag", converters.hellaswag, "activity_label ctx endings label"),
    ),
    _choice(
        "winogrande",
        _numbered("option", 2),
        **_hub("allenai/winogrande", converters.winogrande, "sentence option1 option2 answer"),
        subset="winogrande_xl",
    ),
    _choice(
        "arc_easy",
        _numbered("answer", 5),
        aliases=("arce",),
        **_hub("allenai/ai2_arc", converters.arc, "question choices answerKey", split="test"),
        subset="ARC-Easy",
    ),
    _choice(
        "arc_challenge",
        _numbered("answer", 5),
        aliases=("arcc",),
        **_hub("allenai/ai2_arc", converters.arc, "question choices answerKey", split="test"),
        subset="ARC-Challenge",
    ),
    _choice(
        "openbookqa",
        _numbered("answer", 4),
        aliases=("obqa",),
        **_hub(
            "allenai/openbookqa",
            converters.openbookqa,
            "question_stem choices answerKey",
            split="test",
        ),
        subset="main",
    ),
    _word_problem(  # the hub's copies of this and of svamp are cut in two, the field tests on all
        "multiarith",
        **_hub(
            "ChilleD/MultiArith", converters.multiarith, "question final_ans", split="train+test"
        ),
    ),
    _word_problem(
        "gsm8k",
        **_hub("openai/gsm8k", None, "question answer", split="test"),
        subset="main",
    ),
    _word_problem(
        "addsub",
        **_hub("allenai/lila", converters.lila, "input output_answer", split=_ALL_SPLITS),
        subset="addsub",
        revision=_PARQUET,
    ),
    Task(
        name="aqua",
        group="arithmetic",
        format="letter",
        labels=tuple("ABCDE"),
        aliases=("aquarat",),
        response="The answer is ({answer}).",
        **_hub(
            "deepmind/aqua_rat", converters.aqua, "question options rationale correct", split="test"
        ),
        subset="raw",
    ),
    _word_problem(
        "singleeq",
        aliases=("singleq",),
        **_hub("allenai/lila", converters.lila, "input output_answer", split=_ALL_SPLITS),
        subset="singleq",
        revision=_PARQUET,
    ),
    _word_problem(
        "svamp",
        **_hub("ChilleD/SVAMP", converters.svamp, "Body Question Answer", split="train+test"),
    ),
    _word_problem(  # another cut of MAWPS than the 238 problems of LLM-Adapters
        "mawps",
        aliases=("calcmawps",),
        **_hub("MU-NLPC/Calc-mawps", converters.mawps, "question result_float", split="test"),
    ),
    Task(name="demo", format="number"),
    Task(name="text", format="text"),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
