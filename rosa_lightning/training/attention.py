"""Attention of short rows by plain products, where torch's kernel is slow: bfloat16 on a CPU.

There the backward pass of `scaled_dot_product_attention` (torch 2.13) takes two to five times as
long as the same products one by one. These hold the probabilities in bfloat16, which grows with the
square of a row's length, so long rows are left to torch's kernel.

Axes: B rows, H heads, K key heads, T queries, S keys, D head width; N key heads of all rows, M
queries that share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOST_KEYS = 512
"""Keys of the longest rows: with more, probabilities hold more than all else in a layer does."""


@contextmanager
def short_rows_by_products() -> Iterator[None]:
    """Within it, models that attend by ``sdpa`` attend by `attend`, where that is faster."""
    from transformers import AttentionInterface

    kernel = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]
    AttentionInterface.register("sdpa", partial(_attend_or_call, kernel))
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", kernel)


def _attend_or_call(
    kernel: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend`, or ``kernel``; as the attention functions of `transformers`."""
    T, S, masked = query.shape[2], key.shape[2], attention_mask is not None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    other = dropout or any(more.get(name) is not None for name in ("position_bias", "softcap"))
    square = masked or T == S
    half = is_half_on_cpu(query.device.type, query.dtype)
    if not half or not 1 < T <= S <= MOST_KEYS or other or not square:
        given = (query, key, value, attention_mask)
        result: tuple[Tensor, Tensor | None] = kernel(
            module, *given, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
        return result
    if attention_mask is None and causal:
        attention_mask = query.new_ones(T, S, dtype=torch.bool).tril()[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHTD = attend(query, key, value, attention_mask, scale)
    return out_BHTD.transpose(1, 2).contiguous(), None


def is_half_on_cpu(device: str, dtype: torch.dtype) -> bool:
    """Whether products of tensors of a dtype run in bfloat16 on a CPU, as under autocast."""
    if device == "cpu" and torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return device == "cpu" and dtype == torch.bfloat16


def attend(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention, shape (B, H, T, D), in bfloat16.

    The mask, of a shape that broadcasts to (B, H, T, S), is true where a query sees a key, or is
    added to the scores. Head h reads key head h // (H / K).
    """
    B, H, T, _ = query_BHTD.shape
    K, S = key_BKSD.shape[1:3]
    # Without autocast, which has a softmax in float32, and holds that, too.
    with torch.autocast("cpu", enabled=False):
        query_NMD, key_NSD, value_NSD = (
            one.bfloat16().reshape(B * K, -1, one.shape[-1])
            for one in (query_BHTD, key_BKSD, value_BKSD)
        )
        scores_BHTS = torch.bmm(query_NMD, key_NSD.transpose(1, 2)).view(B, H, T, S)
        if mask is None:
            scores_BHTS = scale * scores_BHTS
        else:
            scores_BHTS = torch.add(_added(mask), scores_BHTS, alpha=scale)
        probs_NMS = scores_BHTS.softmax(-1).view(B * K, -1, S)
        return torch.bmm(probs_NMS, value_NSD).view(B, H, T, -1)


def _added(mask: Tensor) -> Tensor:
    """A mask as it is added to scores, finite also for a query that sees nothing."""
    lowest = torch.finfo(torch.bfloat16).min
    if mask.dtype != torch.bool:
        return mask.clamp(min=lowest).bfloat16()
    return torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, lowest)
