"""Prompts read by a model: what they have in common once, and what is kept to go on from.

Axes: B rows, T tokens, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int]

WORTH_SHARING = 16
"""Tokens at the beginning of all rows from which on they are read apart."""


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
    if cache is not None and all(type(layer) is RoomyLayer for layer in cache.layers):
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
        RoomyLayer() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
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


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
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
