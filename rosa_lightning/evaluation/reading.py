"""Prompts read by a model: what they have in common once, and what is kept to go on from.

Axes: B rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rosa_lightning.models.kv_cache import (
    WORTH_SHARING,
    Ids,
    PreallocatedCacheLayer,
    cache_argument,
    common_start,
    forward_arguments,
    new_cache,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Read:
    """Rows that a model has read."""

    logits: Tensor
    """After the last positions, float32, shape (B, K, V)."""
    cache: Any
    """Keys and values, or None if they cannot be shared."""
    mask: Tensor
    """Which cached positions hold a token, shape (B, T)."""
    lengths: Tensor
    """Tokens of each row, shape (B,)."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; one may come more than once."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.lengths = self.mask[index], self.lengths[index]

    def go_on(self, model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Read on, after the rows; padding stands on the right.

        Returns:
            Logits after each position, float32, shape (B, T, V).
        """
        places = self.lengths[:, None] + torch.arange(ids_BT.shape[1], device=ids_BT.device)
        self.mask = torch.cat([self.mask, mask_BT], dim=1)
        self.lengths = self.lengths + mask_BT.sum(1)
        output = model(
            input_ids=ids_BT,
            attention_mask=self.mask,
            position_ids=places,
            use_cache=True,
            **{cache_argument(model): self.cache},
        )
        logits: Tensor = output.logits.float()
        return logits


def read(
    model: PreTrainedModel,
    rows: Sequence[Ids],
    keep: int,
    pad_id: int,
    *,
    go_on: bool,
    share: bool = True,
) -> Read:
    """Read rows of any lengths.

    What all rows begin with, a template say, is read once, if the model keeps nothing but keys and
    values of all tokens. The others are padded on the left, behind that beginning.

    Args:
        model: The causal language model, in evaluation mode.
        rows: Token ids of each row, none empty.
        keep: Last positions whose logits are needed; of rows that are shorter, all.
        pad_id: Token that fills rows; it is masked.
        go_on: Whether more will be read after them.
        share: Whether a common beginning may be read once.
    """
    cache = new_cache(model) if share or go_on else None
    device = model.device
    start: Ids = ()
    if cache is not None and all(type(layer) is PreallocatedCacheLayer for layer in cache.layers):
        start = common_start(rows)[: max(0, min(map(len, rows)) - keep)]
    if len(start) < WORTH_SHARING or len(rows) == 1:
        start = ()
    options: dict[str, Any] = {"use_cache": bool(start or go_on) and cache is not None}
    if options["use_cache"]:
        options[cache_argument(model)] = cache
    if start:
        assert cache is not None
        _forward(model, torch.tensor([start], device=device), 1, options)
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=device))
    rests = [row[len(start) :] for row in rows]
    width = max(map(len, rests))
    ids_BT = torch.tensor([[pad_id] * (width - len(rest)) + list(rest) for rest in rests])
    mask_BT = torch.tensor(
        [[1] * len(start) + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
    )
    places_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, len(start) :]
    options |= {"attention_mask": mask_BT.to(device), "position_ids": places_BT.to(device)}
    output = _forward(model, ids_BT.to(device), keep, options)
    return Read(
        logits=output.logits[:, -keep:].float(),
        cache=cache if output.get(cache_argument(model)) is cache else None,
        mask=options["attention_mask"],
        lengths=options["attention_mask"].sum(1),
    )


def _forward(model: PreTrainedModel, ids_BT: Tensor, keep: int, options: dict[str, Any]) -> Any:
    if "logits_to_keep" in forward_arguments(model):
        options = {**options, "logits_to_keep": keep}
    return model(input_ids=ids_BT, **options)
