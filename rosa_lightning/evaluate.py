"""Answers written by a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
) -> list[str]:
    """Greedy continuations of left-padded prompts, without special tokens.

    Args:
        model: The causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch: ``input_ids`` and ``attention_mask``, shape (B, T).
        max_new_tokens: Longest continuation, in tokens.
        stop_ids: Tokens that end a continuation; by default the tokenizer's EOS.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(stop_ids) if stop_ids else tokenizer.eos_token_id,
    )
    prompt_BT = batch["input_ids"]
    # What a call leaves unset `transformers` takes from the model's own settings: sampling and
    # penalties that would change the answer.
    own, model.generation_config = model.generation_config, config
    try:
        output = cast("Any", model).generate(
            input_ids=prompt_BT, attention_mask=batch["attention_mask"]
        )
    finally:
        model.generation_config = own
    new = output[:, prompt_BT.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
