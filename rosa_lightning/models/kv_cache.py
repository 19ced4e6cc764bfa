"""Key-value caches, and a token prefix that all rows of a batch share, computed once.

Axes: B rows, T tokens, P tokens of the shared prefix.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int]

WORTH_SHARING = 16
"""Shortest shared prefix, in tokens, that is computed once."""


def common_start(rows: Sequence[Ids]) -> Ids:
    """The tokens that all rows begin with."""
    first, last = min(map(list, rows)), max(map(list, rows))  # what these two share, all share
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (one, other) in pairs if one != other), len(first))]


def new_cache(
    model: PreTrainedModel, kind: type[SharedPrefixCacheLayer] | None = None
) -> DynamicCache | None:
    """An empty cache; None for models that keep more than keys and values.

    None, too, where the length of a text decides how its tokens are rotated.

    Args:
        model: A causal language model.
        kind: Of its layers with full attention; `SharedPrefixCacheLayer` by default.
    """
    config = model.config
    if {"longrope", "dynamic"} & set(_rope_types(config.to_dict())):
        return None
    cache = DynamicCache(config=config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    kind = kind or SharedPrefixCacheLayer
    cache.layers = [kind() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache if cache.layers else None


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among a forward's arguments; empty where there is none."""
    names = ("past_key_values", "cache")  # later `transformers` call it cache
    return next((name for name in names if name in forward_arguments(model)), "")


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward takes."""
    # FSDP1 wraps a model and takes anything.
    inner = model.module if isinstance(model, FullyShardedDataParallel) else model
    return _arguments(type(inner))  # type: ignore[arg-type]  # which takes a class for unhashable


@cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _rope_types(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name == "rope_type":
                yield str(value)
            yield from _rope_types(value)


def inputs_after_prefix(
    model: PreTrainedModel,
    batch: dict[str, Any],
    num_shared: int,
    cache: Any,
    decoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Run the shared prefix once into a cache, and give the inputs for the rest of all rows.

    Args:
        model: A causal language model that takes position ids and a cache.
        batch: `input_ids`, `attention_mask` and `position_ids`, shape (B, T), padded on the left:
            the rest of every row stands right of column P. Padding, and a row's own copy of the
            prefix where that reaches so far, are masked.
        num_shared: P, at least 1 and below the length of every row.
        cache: Empty, of `SharedPrefixCacheLayer`.
        decoder: Runs the prefix in place of the model, without the head.
    """
    ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
    positions_P = torch.arange(num_shared, device=ids_BT.device)
    first = ids_BT.shape[1] - 1 - positions_BT[0, -1]  # column of the first row's first token
    name = cache_argument(model)
    inputs = {
        "input_ids": ids_BT[:1].index_select(1, positions_P + first),
        "position_ids": positions_P[None],
    }
    fill_cache(decoder or model, inputs, cache)
    own_BT = (positions_BT[:, num_shared:] >= num_shared).to(batch["attention_mask"].dtype)
    return {
        "input_ids": ids_BT[:, num_shared:],
        "attention_mask": F.pad(own_BT, (num_shared, 0), value=1),
        "position_ids": positions_BT[:, num_shared:],
        name: cache,
        "use_cache": True,
    }


def fill_cache(model: nn.Module, inputs: dict[str, Any], cache: Any) -> None:
    """Run a model or its decoder for keys and values alone, with as few logits as it can give."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
    model(**{**inputs, cache_argument(model): cache, "use_cache": True, **few})


class SharedPrefixCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: one row's at first, then expanded over all rows that follow.

    Args:
        keep: Keep what follows, too; else it is given back alone, as nothing comes after it.
    """

    def __init__(self, keep: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keep = keep

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, shape (B, heads, T, D), and return all."""
        keys, values = key_states, value_states
        begun = self.is_initialized
        if begun:
            keys, values = _joined(self.keys, keys), _joined(self.values, values)
        else:
            self.lazy_initialization(keys, values)
        if self.keep or not begun:
            self.keys, self.values = keys, values
        return keys, values


def _joined(held: Any, new: Tensor) -> Tensor:
    return torch.cat([held.expand(len(new), -1, -1, -1), new], dim=-2)


class GrowingCacheLayer(SharedPrefixCacheLayer):  # type: ignore[no-untyped-call]
    """The same for many single tokens, without gradients: few of them copy what came before."""

    room = 64
    """Tokens for which memory is taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, shape (B, heads, T, D), and return all."""
        if not self.is_initialized:
            return super().update(key_states, value_states)
        self.keys = self._with("keys", self.keys, key_states)
        self.values = self._with("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and no memory of the others."""
        super().batch_select_indices(indices)
        self._held.clear()

    def _with(self, name: str, old: Any, new: Tensor) -> Tensor:
        """`old` with `new` after it, in the memory of `old` where that has room."""
        start, end = old.shape[-2], old.shape[-2] + new.shape[-2]
        held = self._held.get(name)
        # Rows that were chosen or repeated since lie elsewhere.
        if held is None or held.data_ptr() != old.data_ptr() or held.shape[-2] < end:
            held = new.new_empty(*new.shape[:2], end + self.room, new.shape[-1])
            held[:, :, :start] = old
            self._held[name] = held
        held[:, :, start:end] = new
        return held[:, :, :end]
