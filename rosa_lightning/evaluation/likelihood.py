"""How likely a model holds each candidate answer to be.

Axes: B items, N candidates, R rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rosa_lightning.evaluation.reading import Read, read
from rosa_lightning.models.kv_cache import Ids, common_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    candidates: Sequence[Sequence[Ids]],
    pad_id: int,
) -> list[list[float]]:
    """Log-likelihood of each candidate after its prompt, in nats, summed over its tokens.

    The prompt and the tokens that all of its candidates begin with are read once. Where the
    candidates then differ in one token, as labels mostly do, that is all; for longer ends the keys
    and values of that reading are kept, and the ends alone follow. A model that keeps more than
    these (a state, say) reads such candidates with their whole prompts instead.

    Args:
        model: The causal language model, in evaluation mode.
        prompts: Token ids of each prompt, none empty.
        candidates: Token ids of each candidate of each prompt, none empty.
        pad_id: Token that fills rows; it is masked.
    """
    shared = [common_start(own) for own in candidates]
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
    text = read(model, rows, keep, pad_id, go_on=bool(longer))
    log_probs_BKV = text.logits.log_softmax(-1)
    scores: list[list[float]] = []
    for item, (start, own) in enumerate(zip(shared, ends, strict=True)):
        last = log_probs_BKV[item, log_probs_BKV.shape[1] - len(start) - 1 :]
        common = float(_picked(last, start).sum())
        firsts = last[-1].tolist()
        scores.append([common + (firsts[end[0]] if end else 0.0) for end in own])
    if longer:
        owners = [item for item, _ in longer]
        rests = [ends[item][number] for item, number in longer]
        if text.cache is None:
            _say_not_shared(type(model).__name__)
            starts = [[*rows[owner], end[0]] for owner, end in zip(owners, rests, strict=True)]
            whole = in_full(model, starts, [[end[1:]] for end in rests], pad_id, len(rows))
            values = [value for (value,) in whole]
        else:
            text.select(owners)
            values = _after(model, text, rests, pad_id)
        for (item, number), value in zip(longer, values, strict=True):
            scores[item][number] += value
    return scores


@torch.no_grad()
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
        log_probs_RKV = read(
            model, rows, keep, pad_id, go_on=False, share=False
        ).logits.log_softmax(-1)
        for row, (item, _, ids) in enumerate(part):
            own = log_probs_RKV[row, log_probs_RKV.shape[1] - len(ids) :]
            scores[item].append(float(_picked(own, ids).sum()))
    return scores


def _after(model: PreTrainedModel, text: Read, ends: Sequence[Ids], pad_id: int) -> list[float]:
    """What the tokens after each end's first add, read after the row that it belongs to."""
    width = max(len(end) for end in ends) - 1
    ids = torch.tensor([[*end[:-1], *[pad_id] * (width - len(end) + 1)] for end in ends])
    own = torch.tensor([[1] * (len(end) - 1) + [0] * (width - len(end) + 1) for end in ends])
    logits_RTV = text.go_on(model, ids.to(model.device), own.to(model.device))
    log_probs_RTV = logits_RTV.log_softmax(-1)
    return [
        float(_picked(own_TV, end[1:]).sum())
        for own_TV, end in zip(log_probs_RTV, ends, strict=True)
    ]


def _picked(log_probs_KV: Tensor, ids: Ids) -> Tensor:
    """Log-probability of each token at its own position."""
    index = torch.tensor(ids, device=log_probs_KV.device, dtype=torch.long)
    return log_probs_KV[: len(ids)].gather(1, index[:, None])[:, 0]


@cache
def _say_not_shared(kind: str) -> None:
    rank_zero_info(
        f"likelihood: what {kind} keeps of a prompt cannot be shared, so candidates that differ in "
        "more than one token are read with their whole prompts."
    )
