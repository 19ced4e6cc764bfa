"""`TextInfo`: what a data module tells a model of its texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rosa_lightning.tasks.records import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rosa_lightning.data.encoding import Example


@dataclass(frozen=True, kw_only=True)
class TextInfo:
    """How records become tokens, and how answers are read; the defaults where nothing is known."""

    tasks: Mapping[str, Task] = field(default_factory=lambda: TASKS)
    """By name, a user's own among them."""
    task_names: Sequence[str] = ("all", *TASKS)
    """All tasks that validation and test may meet, the same on every rank."""
    prompt_style: str | None = None
    max_length: int | None = None
    tokenizer_name: str | None = None
    """data.tokenizer, where it is a name."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """What texts are encoded with; None for the model's own."""
    stop_ids: Sequence[int] = ()
    """Tokens that end an answer, beside those that tokenizer and model name."""
    next_prompt: Sequence[str] = ()
    """What a model writes when it has answered and makes up the next instruction."""
    encode_response: Callable[[str, bool], list[int]] | None = None
    """Token ids of a response as they follow a prompt, with an end token or without."""
    test_examples: Sequence[Example] = ()
    cut_prompts: Mapping[str, int] | None = None
    """Prompts of each test and predict source that lost their beginning."""
