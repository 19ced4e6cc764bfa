"""Keys and values that a model keeps of what it has read, and what prompts have in common."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int]

WORTH_SHARING = 16
"""Tokens at the beginning of all rows from which on they are computed once."""


def common_start(rows: Sequence[Ids]) -> Ids:
    """The tokens that all rows begin with."""
    ordered = sorted(map(list, rows))  # what the first and the last share, all share
    first, last = ordered[0], ordered[-1]
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return first[:same]


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache that several rows can go on from; None where a model keeps more than that.

    States of other kinds are advanced by one token at a time in most models. And where the length
    of a text decides how its tokens are rotated, no part of it can be read for itself.
    """
    config = model.config
    if {"longrope", "dynamic"} & set(_rope_types(config.to_dict())):
        return None
    cache = DynamicCache(config=config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    cache.layers = [
        PreallocatedCacheLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache if cache.layers else None


def cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its cache; empty where it takes none."""
    names = ("past_key_values", "cache")  # later `transformers` call it cache
    return next((name for name in names if name in forward_arguments(model)), "")


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of what a model's forward takes."""
    # FSDP1 stands around a model and takes anything.
    inner = model.module if isinstance(model, FullyShardedDataParallel) else model
    return _arguments(type(inner))  # type: ignore[arg-type]  # which takes a class for unhashable


@cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _rope_types(settings: Any) -> Iterator[str]:
    """What is said of rotation anywhere in a configuration."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name == "rope_type":
                yield str(value)
            yield from _rope_types(value)


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, with room for more.

    `DynamicLayer` copies all it holds to add a token, which took half of the time of writing.
    """

    _rooms: Sequence[Tensor] = ()
    _held: Tensor | None = None
    """The keys as they were left; others have been selected or reordered."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, shape (B, heads, T, D), and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Tensor = self.keys  # type: ignore[assignment]
        before = held.shape[-2] if held.ndim == 4 else 0
        after = before + key_states.shape[-2]
        rooms = self._rooms
        if held is not self._held or after > rooms[0].shape[2]:
            rooms = [
                new.new_empty(*new.shape[:2], after + max(64, after // 2), new.shape[3])
                for new in (key_states, value_states)
            ]
            if before:
                rooms[0][:, :, :before] = held
                rooms[1][:, :, :before] = self.values  # type: ignore[assignment]
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in rooms)
        self._rooms, self._held = rooms, self.keys
        return self.keys, self.values
