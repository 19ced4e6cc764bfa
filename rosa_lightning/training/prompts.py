"""Prompts without gradients: what stands before a row's first label runs without a graph.

Keys and values of those tokens are constants to the backward pass, which then goes through the
tokens of the response alone. The loss is that of the whole batch; its gradient leaves out what
passes through the prompt, a token selection as in Simoulin et al., 2024 (arXiv 2501.18824).

Axes: B rows, T tokens, P tokens of the longest prompt, R of the longest response.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rosa_lightning.data.collators import IGNORE_INDEX, complete_batch
from rosa_lightning.models.kv_cache import cache_argument, fill_cache, inputs_after_prefix
from rosa_lightning.training.head import decoder_of
from rosa_lightning.training.packing import probe_ids
from rosa_lightning.training.probes import difference
from rosa_lightning.training.shared_prefix import cache_reason, prefix_cache
from rosa_lightning.utils.modules import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rosa_lightning.models.kv_cache import SharedPrefixCacheLayer


def widths(batch: dict[str, Any]) -> tuple[int, int]:
    """P and R of a padded batch; a response begins with the token that predicts its first label."""
    start_B, first_B, width = _bounds(batch)
    longest: list[int] = torch.stack([(first_B - start_B).max(), width - first_B.min()]).tolist()
    return longest[0], longest[1]


def rows_after_prompts(
    model: PreTrainedModel, batch: dict[str, Any], widths: tuple[int, int], num_shared: int = 0
) -> dict[str, Any]:
    """Run all prompts without a graph, and give the inputs for the responses, shape (B, R).

    Args:
        model: A causal language model for which `unsupported_reason` is empty.
        batch: `input_ids`, `attention_mask`, `position_ids` and `labels`, padded on the left.
        widths: P and R, or more.
        num_shared: Tokens that all prompts begin with, run once.
    """
    cache, decoder = prefix_cache(model, keep=True), decoder_of(model)
    start_B, first_B, width = _bounds(batch)
    num_prompt, num_response = widths
    prompts = _moved_to_right_end(batch, start_B, first_B, num_prompt)
    mask_BT = prompts["attention_mask"]
    with torch.no_grad():
        if num_shared:
            prompts = inputs_after_prefix(model, prompts, num_shared, cache, decoder)
            mask_BT = prompts["attention_mask"]
        if num_prompt > num_shared:
            fill_cache(decoder, prompts, cache)
    torch.clear_autocast_cache()  # of weights cast without a graph
    for layer in cache.layers:
        cast("SharedPrefixCacheLayer", layer).keep = False
    columns_R = torch.arange(width - num_response, width, device=first_B.device)
    own_BR = (columns_R >= first_B[:, None]).to(mask_BT.dtype)
    return {
        "input_ids": batch["input_ids"][:, -num_response:],
        "attention_mask": torch.cat([mask_BT, own_BR], dim=1),
        "position_ids": batch["position_ids"][:, -num_response:],
        cache_argument(model): cache,
        "use_cache": True,
    }


def unsupported_reason(model: PreTrainedModel) -> str:
    """Why a model cannot run prompts apart; empty if it can, compared on two short rows."""
    if reason := cache_reason(model, training=True):
        return reason
    with in_mode(model, False), torch.no_grad():
        return _difference(model, probe_ids(model, 17))


def _difference(model: PreTrainedModel, ids: Tensor) -> str:
    """How two rows of different lengths differ from the same rows run whole."""
    rows, prompts = [ids[:14], ids[6:17]], [11, 6]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    labels = [
        torch.cat([row[:length].new_full((length,), IGNORE_INDEX), row[length:]])
        for row, length in zip(rows, prompts, strict=True)
    ]
    given = {
        "input_ids": padded(rows),
        "labels": padded(labels, padding_value=IGNORE_INDEX),
        "attention_mask": padded([torch.ones_like(row) for row in rows]),
    }
    batch = complete_batch(given, model)
    whole = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    wanted = torch.cat([whole[0][-4:], whole[1][-6:]])

    def run() -> Tensor:
        logits: Tensor = model(**rows_after_prompts(model, batch, widths(batch))).logits
        return torch.cat([logits[0, -4:], logits[1, -6:]])

    return difference(model, run, wanted, to="continue from a cache", where="after its prompts")


def _bounds(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Columns of the first token and of the one before the first label, shape (B,), and T."""
    labels_BT, mask_BT = batch["labels"], batch["attention_mask"]
    width = labels_BT.shape[1]
    start_B = width - mask_BT.sum(1)
    labelled_BT = labels_BT != IGNORE_INDEX
    # A row without a label is a prompt up to its last token.
    first_B = torch.where(labelled_BT.any(1), labelled_BT.int().argmax(1), width) - 1
    return start_B, first_B, width


def _moved_to_right_end(
    batch: dict[str, Any], start_B: Tensor, first_B: Tensor, num_prompt: int
) -> dict[str, Any]:
    """The prompts, shape (B, P), padded on the left."""
    back_P = torch.arange(-num_prompt, 0, device=first_B.device)
    from_BP = first_B[:, None] + back_P
    own_BP = from_BP >= start_B[:, None]
    moved = {
        field: batch[field].gather(1, from_BP.clamp(min=0)).masked_fill(~own_BP, 0)
        for field in ("input_ids", "position_ids")
    }
    return {**moved, "attention_mask": own_BP.to(batch["attention_mask"].dtype)}
