"""Log-likelihood of candidate answers: each prompt is read once, and shared by its candidates.

Axes: B items, R rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rosa_lightning.models.kv_cache import (
    WORTH_SHARING,
    Ids,
    SharedPrefixCacheLayer,
    cache_argument,
    common_start,
    forward_arguments,
    inputs_after_prefix,
    new_cache,
)

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
    candidates then differ in one token, as labels mostly do, that is all; longer ends follow on the
    cached keys and values. A model that caches more than these (a recurrent state) reads such
    candidates with their whole prompts instead.

    Args:
        model: The causal language model, in evaluation mode.
        prompts: Token ids of each prompt, none empty.
        candidates: Token ids of each candidate of each prompt, none empty.
        pad_id: Token that fills rows; it is masked.
    """
    starts = [common_start(own) for own in candidates]
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, starts, strict=True)]
    # What each candidate ends with, beside the index of its prompt.
    ends = [
        (item, number, ids[len(starts[item]) :])
        for item, own in enumerate(candidates)
        for number, ids in enumerate(own)
    ]
    longer = [one for one in ends if len(one[2]) > 1]
    keep = max(map(len, starts)) + 1
    state = prefill(model, rows, keep, pad_id, extendable=bool(longer))
    log_probs_BKV = state.logits.log_softmax(-1)
    scores: list[list[float]] = []
    for last_KV, start, own in zip(log_probs_BKV, starts, candidates, strict=True):
        last_KV = last_KV[len(last_KV) - len(start) - 1 :]
        common, firsts = float(_picked(last_KV, start).sum()), last_KV[-1].tolist()
        ids = [own_ids[len(start) :] for own_ids in own]
        scores.append([common + (firsts[end[0]] if end else 0.0) for end in ids])
    if not longer:
        return scores
    owners, rests = [item for item, _, _ in longer], [end for _, _, end in longer]
    if state.cache is None:
        _say_not_shared(type(model).__name__)
        whole = [[*rows[owner], end[0]] for owner, end in zip(owners, rests, strict=True)]
        found = in_full(model, whole, [[end[1:]] for end in rests], pad_id, len(rows))
        values = [value for (value,) in found]
    else:
        width = max(map(len, rests)) - 1
        padding = [width - len(end) + 1 for end in rests]
        ids_RT = [[*end[:-1], *[pad_id] * n] for end, n in zip(rests, padding, strict=True)]
        mask_RT = [[1] * (width - n) + [0] * n for n in padding]
        ends_RT = torch.tensor([ids_RT, mask_RT], device=model.device)
        logits_RTV = state.extend(model, owners, ends_RT[0], ends_RT[1])
        log_probs = zip(logits_RTV.log_softmax(-1), rests, strict=True)
        values = [float(_picked(own_TV, end[1:]).sum()) for own_TV, end in log_probs]
    for (item, number, _), value in zip(longer, values, strict=True):
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
        state = prefill(model, rows, keep, pad_id, extendable=False, share=False)
        for own_KV, (item, _, ids) in zip(state.logits.log_softmax(-1), part, strict=True):
            scores[item].append(float(_picked(own_KV[len(own_KV) - len(ids) :], ids).sum()))
    return scores


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


@dataclass
class PrefillState:
    """Rows that a model has read, and the cache to read on from."""

    logits: Tensor
    """After the last positions, float32, shape (R, K, V)."""
    cache: Any
    """Keys and values, or None if they cannot be shared."""
    mask: Tensor
    """Which cached positions hold a token, shape (R, T)."""
    lengths: Tensor
    """Tokens of each row, shape (R,)."""

    def extend(
        self, model: PreTrainedModel, rows: Sequence[int], ids_RT: Tensor, mask_RT: Tensor
    ) -> Tensor:
        """Read more tokens after some of the rows, of which one may come more than once.

        Returns:
            Logits after each position, float32, shape (R, T, V).
        """
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        positions_RT = self.lengths[index, None] + torch.arange(ids_RT.shape[1]).to(ids_RT.device)
        output = model(
            input_ids=ids_RT,
            attention_mask=torch.cat([self.mask[index], mask_RT], dim=1),
            position_ids=positions_RT,
            use_cache=True,
            **{cache_argument(model): self.cache},
        )
        logits: Tensor = output.logits.float()
        return logits


def prefill(
    model: PreTrainedModel,
    rows: Sequence[Ids],
    keep: int,
    pad_id: int,
    *,
    extendable: bool,
    share: bool = True,
) -> PrefillState:
    """Read rows of any lengths.

    What all rows begin with, an instruction template say, is read once, if the model caches nothing
    but keys and values of all tokens. The rest is padded on the left, after that beginning.

    Args:
        model: The causal language model, in evaluation mode.
        rows: Token ids of each row, none empty.
        keep: Last positions whose logits are needed; of rows that are shorter, all.
        pad_id: Token that fills rows; it is masked.
        extendable: Whether more will be read after them.
        share: Whether a common beginning may be read once.
    """
    cache = new_cache(model) if share or extendable else None
    num_shared = 0
    if cache is not None and all(type(layer) is SharedPrefixCacheLayer for layer in cache.layers):
        num_shared = min(len(common_start(rows)), max(0, min(map(len, rows)) - keep))
    width = max(map(len, rows))
    ids_RT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask_RT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids_RT, "attention_mask": mask_RT}
    inputs["position_ids"] = (mask_RT.cumsum(1) - 1).clamp(min=0)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if num_shared >= WORTH_SHARING and len(rows) > 1:
        inputs = inputs_after_prefix(model, inputs, num_shared, cache)
    elif extendable and cache is not None:
        inputs |= {"use_cache": True, cache_argument(model): cache}
    else:
        inputs["use_cache"] = False
    if "logits_to_keep" in forward_arguments(model):
        inputs["logits_to_keep"] = keep
    output: Any = model(**inputs)
    return PrefillState(
        logits=output.logits[:, -keep:].float(),
        cache=cache if output.get(cache_argument(model)) is cache else None,
        mask=inputs["attention_mask"],
        lengths=inputs["attention_mask"].sum(1),
    )
