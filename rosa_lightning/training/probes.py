"""Whether another way to run a model gives its logits and gradients, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.training.head import close, decoder_layers
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = 0.1
"""Bound on relative differences in 16 bits: another way uses other kernels."""


class RefusedError(ValueError):
    """Says by itself why a model cannot be run in some way."""


def tried(model: PreTrainedModel, try_out: Callable[[], str]) -> str:
    """Why something cannot be done, tried with few layers; where it seems so, with all of them."""
    try:
        with few_layers(model):
            reason = try_out()
    except Exception:  # a model that needs them all
        return try_out()
    return reason and try_out()


@contextmanager
def few_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model has no more than its first, its last and one layer of each other kind.

    So a way to run it is tried in little time.
    """
    layers = decoder_layers(model)
    if not len(layers):
        yield
        return
    kinds = [frozenset(settings.items()) for settings in _settings(model, layers)]
    kept = {0, len(layers) - 1, *(kinds.index(kind) for kind in kinds)}
    few = nn.ModuleList(layers[place] for place in sorted(kept))
    holders = [m for m in model.modules() if any(child is layers for child in m.children())]
    names = [next(name for name, m in holder.named_children() if m is layers) for holder in holders]
    try:
        for holder, name in zip(holders, names, strict=True):
            setattr(holder, name, few)
        yield
    finally:
        for holder, name in zip(holders, names, strict=True):
            setattr(holder, name, layers)


def _settings(model: PreTrainedModel, layers: nn.ModuleList) -> list[dict[Any, Any]]:
    """What tells layers of different kinds apart."""
    found = [_own_settings(layer) for layer in layers]
    # What a configuration lists layer by layer.
    for name, values in model.config.get_text_config(decoder=True).to_dict().items():
        if isinstance(values, list) and len(values) == len(layers):
            for settings, value in zip(found, values, strict=True):
                settings[name] = str(value)
    # What is another in each layer is the layer's number, or goes with it.
    for key in {key for settings in found for key in settings}:
        if len({settings.get(key) for settings in found}) == len(layers):
            for settings in found:
                settings.pop(key, None)
    return found


def _own_settings(layer: nn.Module) -> dict[Any, Any]:
    """Types and settings of a layer's modules, its weights' shapes, and what trains."""
    found: dict[Any, Any] = {}
    for path, module in layer.named_modules():
        found[path] = type(module)
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        found |= {(path, name): value for name, value in plain.items()}
    for path, weight in layer.named_parameters():
        found[path, "weight"] = weight.shape, weight.dtype, weight.requires_grad
    return found


def difference(
    model: nn.Module,
    run: Callable[[], Tensor],
    wanted: Tensor,
    *,
    to: str,
    where: str,
    gradients: bool = False,
) -> str:
    """How the logits of a way to run a model differ from the wanted ones; empty if they do not.

    Args:
        model: The model.
        run: Gives the logits.
        wanted: Those of the same tokens by the model's own forward, of equal shape.
        to: What the model cannot do if that raises, such as ``run rows apart``.
        where: Where the logits differ, such as ``after a shared prefix``.
        gradients: Compare gradients, too.
    """
    kind = type(model).__name__
    try:
        found = run()
    except RefusedError as error:
        return str(error)
    except Exception as error:
        return f"{kind} cannot {to}: {type(error).__name__}: {one_line(error, 120)}"
    if not close(found, wanted, _HALF):
        return f"{kind} gives other logits {where}"
    if gradients and not _same_gradients(model, found, wanted):
        return f"the gradients of {kind} differ {where}"
    return ""


def _same_gradients(model: nn.Module, found: Tensor, wanted: Tensor) -> bool:
    """Whether two logits of the same tokens have equal gradients of their first entries."""
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
