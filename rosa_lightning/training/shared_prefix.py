"""What all rows of a batch begin with, computed once and with gradients.

Keys and values of the common beginning are expanded over the rows, which go on behind it. In a
batch padded on the left the rest of every row is what stands right of column P: padding, and the
row's own copy of the beginning where that reaches so far, are masked.

Axes: B rows, T tokens, P tokens of the common beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rosa_lightning.models.kv_cache import cache_argument, forward_arguments, new_cache
from rosa_lightning.training.head import close
from rosa_lightning.utils.modules import in_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = 0.1
"""Bound on relative differences in 16 bits: rows behind a cache meet other kernels."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window")


class PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: one row's at first, then expanded over rows that go on.

    What the rows add is given back and not kept: nothing comes after them.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens, shape (B, heads, T, D), and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return _behind(self.keys, key_states), _behind(self.values, value_states)


def _behind(held: Any, new: Tensor) -> Tensor:
    return torch.cat([held.expand(len(new), -1, -1, -1), new], dim=-2)


def rows_behind(model: PreTrainedModel, batch: dict[str, Any], num_shared: int) -> dict[str, Any]:
    """Compute the common beginning, and say how the rows go on.

    Args:
        model: The causal language model; `why_not_shared` finds nothing against it.
        batch: `input_ids`, `attention_mask` and `position_ids`, shape (B, T), padded on the left.
        num_shared: P, at least 1, below the length of every row.

    Returns:
        What the model's forward takes for the columns from P on.
    """
    ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
    places_P = torch.arange(num_shared, device=ids_BT.device)
    first = ids_BT.shape[1] - 1 - positions_BT[0, -1]  # where the first row begins
    cache = DynamicCache()
    cache.layers = [PrefixLayer() for _ in new_layers(model)]  # type: ignore[no-untyped-call]
    name = cache_argument(model)
    start = {
        "input_ids": ids_BT[:1].index_select(1, places_P + first),
        "position_ids": places_P[None],
    }
    keep_one = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
    model(**start, **{name: cache}, use_cache=True, **keep_one)
    own_BT = (positions_BT[:, num_shared:] >= num_shared).to(batch["attention_mask"].dtype)
    return {
        "input_ids": ids_BT[:, num_shared:],
        "attention_mask": F.pad(own_BT, (num_shared, 0), value=1),
        "position_ids": positions_BT[:, num_shared:],
        name: cache,
        "use_cache": True,
    }


def new_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of a cache for a model, none where it keeps more than keys and values."""
    cache = new_cache(model)
    return [] if cache is None else list(cache.layers)


# --- what speaks against it -----------------------------------------------------------------


def why_not_in_training(model: PreTrainedModel) -> str:
    """Why the beginning cannot be shared in training mode; empty if it can."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "with gradient checkpointing decoder layers drop their keys and values"
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "compiled layers would run uncompiled behind keys and values"
    if found := next(_random_parts(model), ""):
        return f"{found} would fall on all rows alike"
    return ""


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


def window(model: PreTrainedModel) -> int | None:
    """The shortest window of any layer, in slots of the cache; None where all see all tokens."""
    layers = [one for one in new_layers(model) if isinstance(one, DynamicSlidingWindowLayer)]
    widths: list[Any] = [layer.sliding_window for layer in layers]
    config = model.config.get_text_config(decoder=True)
    widths += [getattr(config, name, None) for name in _WINDOWS]
    return min((width for width in widths if isinstance(width, int) and width > 0), default=None)


def why_not_shared(model: PreTrainedModel, ids_T: Tensor, *, gradients: bool) -> str:
    """Why a model cannot share a beginning whatever the mode and the batch; empty if it can.

    Args:
        model: The causal language model, in any mode.
        ids_T: Tokens to compare shared with single rows on, at least 17.
        gradients: Whether to compare gradients too.
    """
    kind = type(model).__name__
    if not cache_argument(model):
        return f"{kind} takes no cache"
    if "position_ids" not in forward_arguments(model):
        return f"{kind} counts positions by columns, padding included"
    if not new_layers(model):
        return f"{kind} keeps more than keys and values, or rotates by the length of a text"
    with in_mode(model, False), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        ids = ids_T[-17:].clone()
        start, first, second = ids[:8], ids[8:14], ids[14:17]
        wanted = [_single(model, torch.cat([start, rest]), len(rest)) for rest in (first, second)]
        try:
            found = _together(model, start, first, second)
        except Exception as error:
            line = " ".join(str(error).split())[:120]
            return f"{kind} cannot go on from a cache: {type(error).__name__}: {line}"
        if not close(found, torch.cat(wanted), _HALF):
            return f"{kind} answers otherwise behind a shared beginning"
        if gradients and not _same_gradients(model, found, torch.cat(wanted)):
            return f"the gradients of {kind} are others behind a shared beginning"
    return ""


def _single(model: PreTrainedModel, ids_T: Tensor, count: int) -> Tensor:
    logits: Tensor = model(input_ids=ids_T[None], use_cache=False).logits
    return logits[0, -count:]


def _together(model: PreTrainedModel, start: Tensor, first: Tensor, second: Tensor) -> Tensor:
    gap = len(first) - len(second)
    ids_BT = torch.stack([torch.cat([start, first]), torch.cat([first[:gap], start, second])])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :gap] = 0
    batch = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
    }
    logits: Tensor = model(**rows_behind(model, batch, len(start))).logits
    return torch.cat([logits[0], logits[1, gap:]])


def _same_gradients(model: nn.Module, found: Tensor, wanted: Tensor) -> bool:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (parameters and wanted.requires_grad and found.requires_grad):
        return wanted.requires_grad == found.requires_grad
    both = []
    for logits in (found, wanted):
        loss = F.log_softmax(logits.float(), -1)[:, 0].sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        both.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    shared, single = (one.to(wanted.dtype) for one in both)
    return shared.shape == single.shape and close(shared, single, _HALF)
