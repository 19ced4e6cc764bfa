"""Texts that a model writes, by the `generate` of transformers: greedy, by beams or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rosa_lightning.models.vocabulary import num_embeddings, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """Divides the logits; 0 draws nothing and takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest ones that hold this probability together, above 0."""

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("temperature", self.temperature >= 0, "at least 0; 0 draws nothing"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1; 1 leaves no token out"),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)} is not {expected}.")

    def settings(self) -> dict[str, Any]:
        """As `GenerationConfig` takes it."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "top_k": 0, **vars(self)}


GREEDY = Sampling()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Any],
    max_new_tokens: int,
    *,
    num_beams: int = 1,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    streamer: Any = None,
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
        sampling: Temperature and top-p of drawn tokens.
        stop: Texts that are not part of a continuation, nor is what follows them.
        stop_ids: Tokens that end a continuation, besides those of tokenizer and model.
        streamer: Of `transformers`; takes the tokens of a single row as they come.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    ids_of = (list(stop_ids), tokenizer.eos_token_id, own.eos_token_id)
    ends = [one for ids in ids_of for one in (ids if isinstance(ids, list) else [ids])]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        **sampling.settings(),
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
            streamer=streamer,
        )
    finally:
        model.generation_config = own
    texts = list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
    for end in stop:
        texts = [text.split(end, 1)[0] for text in texts]
    return texts
