"""Log-likelihood of candidate answers; each prompt is read once for all of its candidates.

Axes: B items, R rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

import copy
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

COST_OF_A_CALL = 64
"""About as many tokens cost what a call of the model costs by itself."""


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
    rows = [[*prompt, *start] for prompt, start in zip(prompts, starts, strict=True)]
    ends = [
        [ids[len(start) :] for ids in own] for own, start in zip(candidates, starts, strict=True)
    ]
    longer = [
        (item, number, end)
        for item, own in enumerate(ends)
        for number, end in enumerate(own)
        if len(end) > 1
    ]
    state = prefill(model, rows, max(map(len, starts)) + 1, pad_id, extendable=bool(longer))
    scores: list[list[float]] = []
    for all_KV, start, own in zip(state.logits.log_softmax(-1), starts, ends, strict=True):
        last_KV = all_KV[len(all_KV) - len(start) - 1 :]
        common, firsts = _log_likelihood(last_KV, start), last_KV[-1].tolist()
        scores.append([common + (firsts[end[0]] if end else 0.0) for end in own])
    if not longer:
        return scores
    if state.cache is None:
        say_not_shared(type(model).__name__)
        whole = [[*rows[item], end[0]] for item, _, end in longer]
        rests = [[end[1:]] for _, _, end in longer]
        found = uncached_log_likelihoods(model, whole, rests, pad_id, len(rows))
        for (item, number, _), (value,) in zip(longer, found, strict=True):
            scores[item][number] += value
        return scores
    for part in _short_and_long(sorted(longer, key=lambda one: len(one[2]))):
        more = [end[:-1] for _, _, end in part]
        logits_RTV = state.extend(model, [item for item, _, _ in part], more, pad_id)
        for (item, number, end), own_TV in zip(part, logits_RTV.log_softmax(-1), strict=True):
            scores[item][number] += _log_likelihood(own_TV, end[1:])
    return scores


def _short_and_long(longer: list[tuple[int, int, Ids]]) -> list[list[tuple[int, int, Ids]]]:
    """Candidates in order of length, cut in two where that spares padding worth a call."""
    lengths, count = [len(end) - 1 for _, _, end in longer], len(longer)

    def tokens(cut: int) -> int:
        call = COST_OF_A_CALL if cut < count else 0
        return cut * lengths[cut - 1] + (count - cut) * lengths[-1] + call

    cut = min(range(1, count + 1), key=tokens)
    return [part for part in (longer[:cut], longer[cut:]) if part]


@torch.no_grad()
def uncached_log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    candidates: Sequence[Sequence[Ids]],
    pad_id: int,
    batch_size: int,
) -> list[list[float]]:
    """As `log_likelihoods`, each candidate with its whole prompt, ``batch_size`` rows at a time."""
    pairs = zip(prompts, candidates, strict=True)
    flat = [(item, prompt, ids) for item, (prompt, own) in enumerate(pairs) for ids in own]
    scores: list[list[float]] = [[] for _ in prompts]
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        keep = max(len(ids) for _, _, ids in part)
        rows = [[*prompt, *ids[:-1]] for _, prompt, ids in part]
        state = prefill(model, rows, keep, pad_id, extendable=False, share=False)
        for own_KV, (item, _, ids) in zip(state.logits.log_softmax(-1), part, strict=True):
            scores[item].append(_log_likelihood(own_KV[len(own_KV) - len(ids) :], ids))
    return scores


def _log_likelihood(log_probs_KV: Tensor, ids: Ids) -> float:
    """Of tokens, each at its own position from the first on."""
    index_K = torch.tensor(ids, device=log_probs_KV.device, dtype=torch.long)
    return float(log_probs_KV[: len(ids)].gather(1, index_K[:, None]).sum())


@cache
def say_not_shared(kind: str) -> None:
    """Say once why a model reads prompts several times."""
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
        self, model: PreTrainedModel, rows: Sequence[int], more: Sequence[Ids], pad_id: int
    ) -> Tensor:
        """Read more tokens after some of the rows, of which one may come more than once.

        The rows stay as they are, for other tokens.

        Returns:
            Logits after each position, float32, shape (R, T, V).
        """
        device, width = self.mask.device, max(map(len, more))
        index = torch.tensor(rows, device=device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(index)
        ids = [[*ids, *[pad_id] * (width - len(ids))] for ids in more]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in more]
        mask_RT = torch.tensor(mask, device=device)
        output = model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.cat([self.mask[index], mask_RT], dim=1),
            position_ids=self.lengths[index, None] + torch.arange(width, device=device),
            use_cache=True,
            **{cache_argument(model): cache},
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

    What all rows begin with, such as an instruction template, is read once, if the model caches
    nothing but keys and values of all tokens. The rest is padded on the left, after that beginning.

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
