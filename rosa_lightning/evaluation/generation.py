"""Texts that a model writes, by the `generate` of transformers: greedy or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rosa_lightning.models.vocabulary import num_embeddings, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    max_new_tokens: int,
    *,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Continuations of left-padded prompts, without special tokens.

    Each row ends by itself: at an end-of-sequence token of the tokenizer or the model, or where a
    text of ``stop`` begins.

    Args:
        model: The causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch: ``input_ids`` and ``attention_mask``, shape (B, T).
        max_new_tokens: Longest continuation, in tokens.
        num_beams: Beams of the search; 1 is greedy.
        stop: Texts that are not part of a continuation, nor is what follows them.
        stop_ids: Tokens that end a continuation, besides those of tokenizer and model.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    ids_of = (list(stop_ids), tokenizer.eos_token_id, own.eos_token_id)
    ends = [one for ids in ids_of for one in (ids if isinstance(ids, list) else [ids])]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_id(tokenizer, num_embeddings(model)),
        eos_token_id=list(dict.fromkeys(one for one in ends if one is not None)) or None,
    )
    width = batch["input_ids"].shape[1]
    # Every token but the last few of a stop text holds a byte of it at least.
    longest = max((len(text.encode()) for text in stop), default=0) + 4

    def has_stopped(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = tokenizer.batch_decode(ids_BT[:, width:][:, -longest:])
        found = [any(text in tail for text in stop) for tail in tails]
        return torch.tensor(found, device=ids_BT.device)

    # What a call leaves unset transformers takes from the model's own settings: sampling and
    # penalties that would change the answer.
    model.generation_config = config
    try:
        output = cast("Any", model).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            stopping_criteria=[has_stopped] if stop else [],
        )
    finally:
        model.generation_config = own
    texts = list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
    for end in stop:
        texts = [text.split(end, 1)[0] for text in texts]
    return texts
