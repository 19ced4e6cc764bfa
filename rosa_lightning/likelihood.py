"""How likely a model holds each candidate answer to be.

Axes: B items, N candidates, R rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    candidates: Sequence[Sequence[Ids]],
    pad_id: int,
) -> list[list[float]]:
    """Log-likelihood of each candidate after its prompt, in nats, summed over its tokens.

    The prompt and the tokens that all of its candidates begin with are run once. Where the
    candidates then differ in one token, as labels mostly do, that is all; for longer ends the keys
    and values of that run are kept, and the ends alone follow. A model that keeps more than these
    (a state, say) reads such candidates with their whole prompts instead.

    Args:
        model: The causal language model, in evaluation mode.
        prompts: Token ids of each prompt, none empty.
        candidates: Token ids of each candidate of each prompt, none empty.
        pad_id: Token that fills rows; it is masked.
    """
    shared = [_common_start(ends) for ends in candidates]
    keep = max(len(ids) for ids in shared) + 1
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, shared, strict=True)]
    ends = [
        [ids[len(start) :] for ids in own] for start, own in zip(shared, candidates, strict=True)
    ]
    longer = [
        (item, number)
        for item, own in enumerate(ends)
        for number, end in enumerate(own)
        if len(end) > 1
    ]
    log_probs_BKV, memory = _run(model, rows, keep, pad_id, use_cache=bool(longer))
    scores: list[list[float]] = []
    for item, (start, own) in enumerate(zip(shared, ends, strict=True)):
        last = log_probs_BKV[item, keep - len(start) - 1 :]
        common = float(_picked(last, start).sum())
        firsts = last[-1].tolist()
        scores.append([common + (firsts[end[0]] if end else 0.0) for end in own])
    if longer:
        rests = [ends[item][number] for item, number in longer]
        owners = [item for item, _ in longer]
        added = _after_cache if _is_shareable(memory) else _in_full
        values = added(model, rows, owners, rests, memory, pad_id)
        for (item, number), value in zip(longer, values, strict=True):
            scores[item][number] += value
    return scores


def in_full(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    candidates: Sequence[Sequence[Ids]],
    pad_id: int,
    batch_size: int,
) -> list[list[float]]:
    """As `log_likelihoods`, each candidate with its whole prompt, ``batch_size`` rows at a time."""
    flat = [
        (item, prompt, ids)
        for item, (prompt, own) in enumerate(zip(prompts, candidates, strict=True))
        for ids in own
    ]
    scores: list[list[float]] = [[] for _ in prompts]
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        keep = max(len(ids) for _, _, ids in part)
        rows = [[*prompt, *ids[:-1]] for _, prompt, ids in part]
        log_probs_RKV, _ = _run(model, rows, keep, pad_id, use_cache=False)
        for row, (item, _, ids) in enumerate(part):
            scores[item].append(float(_picked(log_probs_RKV[row, keep - len(ids) :], ids).sum()))
    return scores


def _common_start(candidates: Sequence[Ids]) -> Ids:
    """The tokens that all candidates begin with."""
    ordered = sorted(map(list, candidates))  # what the first and the last share, all share
    first, last = ordered[0], ordered[-1]
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[:same]


def _picked(log_probs_KV: Tensor, ids: Ids) -> Tensor:
    """Log-probability of each token at its own position."""
    index = torch.tensor(ids, device=log_probs_KV.device, dtype=torch.long)
    return log_probs_KV[: len(ids)].gather(1, index[:, None])[:, 0]


def _run(
    model: PreTrainedModel, rows: Sequence[Ids], keep: int, pad_id: int, *, use_cache: bool
) -> tuple[Tensor, Any]:
    """Left-padded rows: log-probabilities after the last positions (R, K, V), and the cache."""
    width = max(len(row) for row in rows)
    ids_RT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask_RT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    places_RT = (mask_RT.cumsum(1) - 1).clamp(min=0)
    options: dict[str, Any] = {"logits_to_keep": keep} if _can_keep(model) else {}
    output = model(
        input_ids=ids_RT.to(model.device),
        attention_mask=mask_RT.to(model.device),
        position_ids=places_RT.to(model.device),
        use_cache=use_cache,
        **options,
    )
    memory = (output.get("past_key_values"), mask_RT, places_RT[:, -1]) if use_cache else None
    return output.logits[:, -keep:].float().log_softmax(-1), memory


def _can_keep(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _is_shareable(memory: Any) -> bool:
    """Whether all that a run leaves behind is keys and values, which several rows can go on from.

    States of another kind are advanced by one token at a time in most models.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kept = memory[0]
    shareable = isinstance(kept, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept.layers
    )
    if not shareable:
        _say_not_shared(type(kept).__name__)
    return shareable


@cache
def _say_not_shared(kind: str) -> None:
    rank_zero_info(
        f"likelihood: what this base keeps of a prompt ({kind}) cannot be shared, so candidates "
        "that differ in more than one token are read with their whole prompts."
    )


def _after_cache(
    model: PreTrainedModel,
    rows: Sequence[Ids],
    owners: Sequence[int],
    ends: Sequence[Ids],
    memory: Any,
    pad_id: int,
) -> Iterator[float]:
    """What the tokens after each end's first add, read after the kept rows that they belong to."""
    kept, mask_BT, places_B = memory
    width = max(len(end) for end in ends) - 1
    # Padded on the right: nothing that counts comes after.
    ids_RT = torch.tensor([[*end[:-1], *[pad_id] * (width - len(end) + 1)] for end in ends])
    own_RT = torch.tensor([[1] * (len(end) - 1) + [0] * (width - len(end) + 1) for end in ends])
    index_R = torch.tensor(owners)
    kept.batch_select_indices(index_R.to(model.device))
    output = model(
        input_ids=ids_RT.to(model.device),
        attention_mask=torch.cat([mask_BT[index_R], own_RT], dim=1).to(model.device),
        position_ids=(places_B[index_R, None] + 1 + torch.arange(width)).to(model.device),
        past_key_values=kept,
        use_cache=True,
    )
    log_probs_RTV = output.logits.float().log_softmax(-1)
    for row, end in enumerate(ends):
        yield float(_picked(log_probs_RTV[row], end[1:]).sum())


def _in_full(
    model: PreTrainedModel,
    rows: Sequence[Ids],
    owners: Sequence[int],
    ends: Sequence[Ids],
    memory: Any,
    pad_id: int,
) -> Iterator[float]:
    """As `_after_cache`, each end after its whole row, as many at a time as there are rows."""
    prompts = [[*rows[owner], end[0]] for owner, end in zip(owners, ends, strict=True)]
    rests = [[end[1:]] for end in ends]
    for (value,) in in_full(model, prompts, rests, pad_id, batch_size=len(rows)):
        yield value
