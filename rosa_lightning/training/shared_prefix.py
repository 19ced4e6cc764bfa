"""Whether a model can compute the token prefix that all rows of a batch share once, with gradients.

`kv_cache.inputs_after_prefix` computes it. Whether loss and gradients stay the same is tested on
the model itself.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from rosa_lightning.models.kv_cache import (
    SharedPrefixCacheLayer,
    cache_argument,
    forward_arguments,
    inputs_after_prefix,
    new_cache,
)
from rosa_lightning.training.compile import is_compiled
from rosa_lightning.training.head import decoder_of
from rosa_lightning.training.probes import difference
from rosa_lightning.utils.modules import in_mode, is_checkpointed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window")


def rows_after_prefix(
    model: PreTrainedModel, batch: dict[str, Any], num_shared: int
) -> dict[str, Any]:
    """Compute the shared prefix with gradients; arguments as for `inputs_after_prefix`."""
    cache = prefix_cache(model, keep=False)
    return inputs_after_prefix(model, batch, num_shared, cache, decoder_of(model))


def prefix_cache(model: PreTrainedModel, *, keep: bool) -> DynamicCache:
    """An empty cache for rows that are run in one piece after their prefix."""
    cache = DynamicCache()
    cache.layers = [SharedPrefixCacheLayer(keep) for _ in _cache_layers(model)]
    return cache


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    cache = new_cache(model)
    return [] if cache is None else list(cache.layers)


def attention_window(model: PreTrainedModel) -> int | None:
    """The shortest attention window of any layer, in tokens; None where all see all tokens."""
    layers = [one for one in _cache_layers(model) if isinstance(one, DynamicSlidingWindowLayer)]
    widths: list[Any] = [layer.sliding_window for layer in layers]
    config = model.config.get_text_config(decoder=True)
    widths += [getattr(config, name, None) for name in _WINDOWS]
    return min((width for width in widths if isinstance(width, int) and width > 0), default=None)


def unsupported_reason(model: PreTrainedModel, ids_T: Tensor, *, training: bool) -> str:
    """Why a model cannot share a prefix; empty if it can.

    Logits after a shared prefix are compared with those of single rows, on at least 17 ids, and in
    training gradients too.
    """
    if reason := cache_reason(model, training=training):
        return reason
    if training and (reason := random_part(model)):
        return reason
    with in_mode(model, False), torch.inference_mode(False), torch.set_grad_enabled(training):
        return _difference(model, ids_T[-17:].clone(), gradients=training)


def cache_reason(model: PreTrainedModel, *, training: bool) -> str:
    """Why a model cannot run tokens after a cache of others, by what can be read of it."""
    kind = type(model).__name__
    if training and is_checkpointed(model):
        return "with gradient checkpointing decoder layers drop their keys and values"
    if training and is_compiled(model):
        return "compiled layers would run uncompiled after keys and values"
    if not cache_argument(model):
        return f"{kind} takes no cache"
    if "position_ids" not in forward_arguments(model):
        return f"{kind} counts positions by columns, padding included"
    if not _cache_layers(model):
        return f"{kind} keeps more than keys and values, or rotates by the length of a text"
    return ""


def random_part(model: nn.Module) -> str:
    """Why tokens cannot be computed once for several rows in training; empty if they can."""
    found = next(_random_parts(model), "")
    return f"{found} would fall on all rows alike" if found else ""


def _random_parts(model: nn.Module) -> Iterator[str]:
    """What is drawn at random while training, by name and value."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    settings = [item for config in configs.values() for item in config.to_dict().items()]
    for name, module in model.named_modules():
        if "Dropout" in type(module).__name__:
            settings.append((f"dropout of {name}", getattr(module, "p", 0.0)))
        settings += vars(module).items()
    for name, value in settings:
        drawn = any(word in name for word in ("drop", "jitter"))
        elsewhere = any(word in name for word in ("classifier", "summary"))
        if drawn and not elsewhere and isinstance(value, float) and value > 0:
            yield f"{name}={value:g}"


def _difference(model: PreTrainedModel, ids: Tensor, gradients: bool) -> str:
    """How two rows after a shared prefix differ from the same rows alone."""
    start, first, second = ids[:8], ids[8:14], ids[14:17]
    wanted = torch.cat([_single(model, start, rest) for rest in (first, second)])
    run = partial(_together, model, start, first, second)
    to, where = "continue from a cache", "after a shared prefix"
    return difference(model, run, wanted, to=to, where=where, gradients=gradients)


def _single(model: PreTrainedModel, start: Tensor, rest: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=torch.cat([start, rest])[None], use_cache=False).logits
    return logits[0, -len(rest) :]


def _together(model: PreTrainedModel, start: Tensor, first: Tensor, second: Tensor) -> Tensor:
    gap = len(first) - len(second)
    ids_BT = torch.stack([torch.cat([start, first]), torch.cat([first[:gap], start, second])])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :gap] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    logits: Tensor = model(**rows_after_prefix(model, batch, len(start))).logits
    return torch.cat([logits[0], logits[1, gap:]])
