"""Texts that a model writes, by the `generate` of transformers: greedy, by beams or drawn.

Axes: B rows, T tokens, P tokens of a beginning that all rows share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_lightning.models.kv_cache import (
    WORTH_SHARING,
    GrowingCacheLayer,
    cache_argument,
    common_start,
    forward_arguments,
    inputs_after_prefix,
    new_cache,
)
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
    ends = {one for ids in ids_of for one in (ids if isinstance(ids, list) else [ids])} - {None}
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **sampling.settings()}
    options["pad_token_id"] = padding_id(tokenizer, num_embeddings(model))
    config = GenerationConfig(**options, eos_token_id=sorted(ends) or None)  # type: ignore[no-untyped-call]
    # Every token but the last few of a stop text holds a byte of it at least.
    longest = max((len(text.encode()) for text in stop), default=0) + 4
    plain = num_beams > 1 or streamer is not None or not cache_argument(model)
    cache = None if plain else new_cache(model, GrowingCacheLayer)
    width = batch["input_ids"].shape[1]

    def has_ended(ids_BT: Tensor) -> Tensor:
        ended_B = torch.isin(ids_BT[:, -1], ids_BT.new_tensor(sorted(ends)))
        if stop:
            tails = tokenizer.batch_decode(ids_BT[:, width:][:, -longest:])
            found = [any(text in tail for text in stop) for tail in tails]
            ended_B |= torch.tensor(found, device=ids_BT.device)
        return ended_B

    # What a call leaves unset transformers takes from the model's own settings: sampling and
    # penalties that would change the answer.
    model.generation_config = config
    try:
        if cache is not None and all(type(layer) is GrowingCacheLayer for layer in cache.layers):
            rows = _continued(model, batch, cache, max_new_tokens, has_ended)
        else:
            output = cast("Any", model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                stopping_criteria=[lambda ids_BT, scores, **_: has_ended(ids_BT)] if stop else [],
                streamer=streamer,
            )
            rows = list(output[:, width:])
    finally:
        model.generation_config = own
    texts = list(tokenizer.batch_decode(cast("Any", rows), skip_special_tokens=True))
    for end in stop:
        texts = [text.split(end, 1)[0] for text in texts]
    return texts


def _continued(
    model: PreTrainedModel,
    batch: dict[str, Any],
    cache: Any,
    max_new_tokens: int,
    has_ended: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """New tokens of each row; rows that have ended leave the batch, some at a time."""
    ids_BT, mask_BT = _after_prefix(model, batch, cache)
    width = ids_BT.shape[1]
    numbers = list(range(len(ids_BT)))
    found: dict[int, Tensor] = {}
    while numbers:
        ended_B = torch.zeros(len(numbers), dtype=torch.bool, device=ids_BT.device)

        def enough(now_BT: Tensor, scores: Any, ended_B: Tensor = ended_B, **_: Any) -> Tensor:
            ended_B |= has_ended(now_BT)
            # To go on with fewer rows copies their keys and values.
            return ended_B | (4 * ended_B.sum() >= len(ended_B))

        ids_BT = cast("Any", model).generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=width + max_new_tokens - ids_BT.shape[1],
            stopping_criteria=[enough],
            **{cache_argument(model): cache},
        )
        if ids_BT.shape[1] == width + max_new_tokens:
            ended_B[:] = True
        found |= {numbers[row]: ids_BT[row, width:] for row in ended_B.nonzero()[:, 0].tolist()}
        left = (~ended_B).nonzero()[:, 0]
        numbers = [numbers[row] for row in left.tolist()]
        ids_BT, mask_BT = ids_BT[left], mask_BT[left]
        mask_BT = F.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
        cache.batch_select_indices(left)
    return [found[number] for number in sorted(found)]


def _after_prefix(
    model: PreTrainedModel, batch: dict[str, Any], cache: Any
) -> tuple[Tensor, Tensor]:
    """Ids and mask, with what all rows begin with in the first columns, and in the cache."""
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    rows = [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
    num_shared = min(len(common_start(rows)), min(map(len, rows)) - 1)
    by_columns = "position_ids" not in forward_arguments(model)
    if len(rows) == 1 or num_shared < WORTH_SHARING or by_columns:
        return ids_BT, mask_BT
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    with torch.no_grad():
        rest = inputs_after_prefix(model, inputs, num_shared, cache)
    start_BP = ids_BT.new_tensor(rows[0][:num_shared]).expand(len(rows), -1)
    return torch.cat([start_BP, rest["input_ids"]], dim=1), rest["attention_mask"]
