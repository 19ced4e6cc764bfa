"""Whether another way to run a model gives its logits and gradients, tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_lightning.training.head import close, layer_list
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = 0.1
"""Bound on relative differences in 16 bits: another way uses other kernels."""


_SMALL = 4096
"""Numbers of a buffer that is compared by value, as frequencies are."""


class RefusedError(ValueError):
    """Says by itself why a model cannot be run in some way."""


def tried(model: PreTrainedModel, try_out: Callable[[], str]) -> str:
    """Why something cannot be done; empty if it can.

    Tried with few layers first; a refusal or an error there is checked with all of them.
    """
    with suppress(Exception), few_layers(model):
        if not try_out():
            return ""
    return try_out()


@contextmanager
def few_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model has its first layers, as many as hold one of each kind, and its last.

    Layers stand where a layer of the same kind does, as some models go by the place of a layer.
    """
    layers = layer_list(model)
    kinds = [frozenset(settings.items()) for settings in _settings(model, layers)]
    count = next(
        (n for n in range(len(kinds)) if {*kinds[:n]} >= {*kinds} and kinds[n] == kinds[-1]), 0
    )
    if not count:
        yield
        return
    few = nn.ModuleList([*layers[:count], layers[-1]])
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if child is layers
    ]
    try:
        for holder, name in places:
            setattr(holder, name, few)
        yield
    finally:
        for holder, name in places:
            setattr(holder, name, layers)


def _settings(model: PreTrainedModel, layers: nn.ModuleList) -> list[dict[Any, Any]]:
    """What tells layers of different kinds apart."""
    found = [_own_settings(layer) for layer in layers]
    # What a configuration lists layer by layer.
    for name, values in model.config.get_text_config(decoder=True).to_dict().items():
        if isinstance(values, list) and len(values) == len(layers):
            for settings, value in zip(found, values, strict=True):
                settings[name] = str(value)
    # A layer's own number is no kind.
    for key in {key for settings in found for key in settings}:
        values = [settings.get(key) for settings in found]
        if values == [*range(len(layers))]:
            for settings in found:
                settings.pop(key)
    return found


def _own_settings(layer: nn.Module) -> dict[Any, Any]:
    """Types, settings and hooks of a layer's modules, its weights and buffers, and what trains."""
    found: dict[Any, Any] = {}
    for path, module in layer.named_modules():
        found[path] = type(module)
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str)
            # Of others, that they are there, and how many: hooks, weights, other modules.
            found[path, name] = value if plain else len(value) if isinstance(value, dict) else None
    for path, weight in layer.named_parameters():
        found[path, "weight"] = weight.shape, weight.dtype, weight.requires_grad
    for path, buffer in layer.named_buffers():
        # Large ones hold weights in few bits, which differ as all weights do.
        read = buffer.numel() <= _SMALL and not buffer.is_meta
        value = buffer.double().sum().item() if read else None
        found[path, "buffer"] = buffer.shape, buffer.dtype, value
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
