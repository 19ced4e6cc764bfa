"""Greedy writing, many rows at a time. Axes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch

from rosa_lightning.evaluation.reading import read
from rosa_lightning.models.kv_cache import Ids, new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FULL_ENOUGH = 0.75
"""Rows that have ended are taken out when no larger share is still being written."""


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    pad_id: int,
    *,
    ends: Collection[int] = (),
    has_ended: Callable[[Ids], bool] = lambda _: False,
) -> list[list[int]] | None:
    """What `transformers` writes greedily, faster, as rows that have ended are not computed on.

    Args:
        model: The causal language model, in evaluation mode.
        prompts: Token ids of each prompt, none empty.
        max_new_tokens: Longest continuation, in tokens.
        pad_id: Token that fills rows; it is masked.
        ends: Tokens that end a row; they are part of it.
        has_ended: Says of what a row has written so far whether it ends there.

    Returns:
        Token ids of each continuation; None for a model that keeps more than keys and values.
    """
    text = None if new_cache(model) is None else read(model, prompts, 1, pad_id, go_on=True)
    if text is None or text.cache is None:
        return None
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    being_written = set(rows)
    logits_BV = text.logits[:, -1]
    while True:
        tokens = logits_BV.argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in being_written:
                written[row].append(token)
                full = len(written[row]) >= max_new_tokens
                if full or token in ends or has_ended(written[row]):
                    being_written.remove(row)
        if not being_written:
            return written
        if len(being_written) <= _FULL_ENOUGH * len(rows):
            places = [place for place, row in enumerate(rows) if row in being_written]
            text.select(places)
            rows, tokens = [rows[place] for place in places], tokens[places]
        new = tokens[:, None]
        logits_BV = text.go_on(model, new, torch.ones_like(new))[:, -1]
