"""What is checked of test prompts before a base is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rosa_lightning.evaluation.evaluator import EvaluationConfig
from rosa_lightning.tasks.records import (
    Record,
    candidates,
    extract_answer,
    reference,
    same_answer,
    task_of,
)

if TYPE_CHECKING:
    from rosa_lightning.data.encoding import Example


def check_lengths(max_length: int | None, context: int | None) -> None:
    """Warn of records that may be longer than what the base reads, both in tokens."""
    if max_length is not None and context is not None and max_length > context:
        rank_zero_warn(
            f"data.max_length={max_length} is beyond the {context} tokens that model.base reads: "
            "longer records would stand at positions that it does not know. Set data.max_length "
            f"to {context} or less."
        )


def check_test_prompts(
    examples: Sequence[Example], config: EvaluationConfig, context: int | None
) -> None:
    """Check that each test prompt can be answered, and say what is left out or cut short.

    Args:
        examples: The prompts and their records.
        config: How they will be answered.
        context: Most tokens that the base reads, if it says so.

    Raises:
        ValueError: Names task, record and source of the first that cannot, and the remedy.
    """
    longest = context or math.inf
    has_candidates: dict[str, bool] = {}
    for example in examples:
        record, length = example.record, len(example.prompt)
        where = f"task {record.task}: record {record.index} of source {record.source}"
        if length >= longest:
            raise ValueError(
                f"{where} has a prompt of {length} tokens, and model.base reads {context} at most, "
                f"answers included. Set data.max_length below {context} to cut the prompt's "
                "beginning, or take the record out."
            )
        if "likelihood" in config.protocols:
            found = has_candidates.get(record.task, False)
            has_candidates[record.task] = _check_candidates(record, where) or found
    left_out = [task for task, found in has_candidates.items() if not found]
    if left_out and len(left_out) == len(has_candidates) and config.protocols == ("likelihood",):
        raise ValueError(
            f"no task of data.test_sources ({', '.join(left_out)}) has candidates to choose from. "
            "Set model.evaluation.protocols to [generate]."
        )
    for task in left_out:
        rank_zero_info(f"likelihood leaves out {task}: it has no candidates to choose from.")
    short = sum(len(example.prompt) > longest - config.max_new_tokens for example in examples)
    if short and "generate" in config.protocols:
        rank_zero_warn(
            f"{short} of {len(examples)} test prompts leave fewer than max_new_tokens="
            f"{config.max_new_tokens} of the {context} tokens that model.base reads. Lower "
            "model.evaluation.max_new_tokens, or data.max_length to cut them."
        )


def _check_candidates(record: Record, where: str) -> bool:
    """Whether a record has candidates; ValueError if none of them states the gold answer."""
    try:
        texts = candidates(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Correct the record, or take it out.") from error
    task, gold = task_of(record), reference(record)
    if texts and not any(same_answer(task, extract_answer(task, text), gold) for text in texts):
        raise ValueError(
            f"{where} has the answer {gold!r}, and none of its candidates states it: "
            f"{', '.join(map(repr, texts))}. Correct the record, or take it out."
        )
    return bool(texts)
