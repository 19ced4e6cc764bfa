"""Logits at the supervised positions alone: the head, and the last feed-forward block, narrowed.

What stands between the decoder and the logits (the head, soft-capping, scaling) is left to the
model's own forward; hooks narrow the decoder's output on its way there, and the input of the last
layer's feed-forward block, after which no token looks at another.

Axes: B rows, T tokens, N chosen positions, D features, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rosa_lightning.dls.layers import outermost_lists
from rosa_lightning.roae.layer import RoAELinear
from rosa_lightning.training.compile import is_compiled
from rosa_lightning.utils.modules import in_mode, is_checkpointed, replaced
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE = 8
"""Tokens of a row that the narrowed head is compared on."""


def logits_at(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    positions_N: Tensor,
    block: nn.Module | None = None,
) -> Tensor:
    """Logits at some positions, shape (N, V), in the model's own dtype.

    Args:
        model: A causal language model for which `unsupported_reason` is empty.
        inputs: What its forward takes.
        positions_N: Indices into the flattened (B, T) of the inputs, each once.
        block: What `last_block` found, to be run at these positions alone.
    """
    with (
        decoder_of(model).register_forward_hook(lambda *args: _at(args[-1], positions_N)),
        _narrowed(block, positions_N),
    ):
        logits: Tensor = model(**inputs).logits
    return logits[0]


def states_at(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    positions_N: Tensor,
    block: nn.Module | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The head's input at some positions, and the head; arguments as for `logits_at`.

    Returns:
        States, shape (N, D), and a function of some of them, (n, D), to logits, (n, V). It calls
        the model with the decoder's output given, so it may be run again in the backward pass.
    """
    decoder = decoder_of(model)
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        outputs.append(_at(output, positions_N))
        return _with_states(outputs[0], outputs[0].last_hidden_state[:, :1])

    with decoder.register_forward_hook(keep), _narrowed(block, positions_N):
        model(**inputs)
    output = outputs[0]

    def head(states_ND: Tensor) -> Tensor:
        with replaced(decoder, "forward", lambda *_, **__: _with_states(output, states_ND[None])):
            logits: Tensor = model(**inputs).logits
        return logits[0]

    return output.last_hidden_state[0], head


@torch.no_grad()
def unsupported_reason(model: PreTrainedModel, ids_BT: Tensor) -> str:
    """Why a model's head cannot be given fewer positions; empty if it can, compared on some ids."""
    name = type(model).__name__
    if decoder_of(model) is model:
        return f"{name} has no decoder apart from its head"
    inputs, positions_N = _sample(ids_BT)
    with in_mode(model, False):
        whole_NV = model(**inputs).logits.flatten(0, 1)[positions_N]
        try:
            states_ND, head = states_at(model, inputs, positions_N)
            found = (logits_at(model, inputs, positions_N), head(states_ND))
        except Exception as error:
            line = f"{type(error).__name__}: {one_line(error, 120)}"
            return f"the head of {name} refuses fewer positions: {line}"
    if not all(one.shape == whole_NV.shape and close(one, whole_NV) for one in found):
        return f"the head of {name} gives other logits for fewer positions"
    return ""


@torch.no_grad()
def last_block(model: PreTrainedModel, ids_BT: Tensor, *, compare: bool = True) -> nn.Module | None:
    """The last layer's feed-forward block, if running it at some positions changes no logits there.

    Without `compare`, for fake tensors, only the shapes are looked at.
    """
    block = _candidate(model)
    if block is None:
        return None
    inputs, positions_N = _sample(ids_BT)
    # With a mask, as batches have one: some mixtures of experts count by it.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with in_mode(model, False):
        try:
            found_NV = logits_at(model, inputs, positions_N, block)
        except Exception:  # it takes or gives more than one tensor, or looks at other tokens
            return None
        same = not compare or close(found_NV, logits_at(model, inputs, positions_N))
    return block if same else None


def _sample(ids_BT: Tensor) -> tuple[dict[str, Any], Tensor]:
    ids = ids_BT[:2, -_SAMPLE:]
    positions_N = torch.arange(1, ids.numel(), 2, device=ids.device)
    return {"input_ids": ids, "use_cache": False}, positions_N


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose output a model's head reads; the model itself where that cannot be told."""
    found: nn.Module = model.base_model
    if found is model:  # some name a prefix that they have no module of
        parts = [part for part in model.children() if hasattr(part, "config")]
        return parts[0] if len(parts) == 1 else model
    return found


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder: of its own lists the one with the most weights, if it has any."""
    lists = outermost_lists(decoder_of(model), lambda _: True)
    own = [layers for name, layers in lists.items() if "." not in name]
    sizes = {layers: sum(map(torch.numel, _weights(layers))) for layers in own}
    return max(own, key=lambda layers: sizes[layers], default=nn.ModuleList())


def close(found: Tensor, wanted: Tensor, half: float = 0.02) -> bool:
    """Whether two results differ by rounding alone; `half` bounds the difference in 16 bits."""
    bound = 2e-4 if torch.get_float32_matmul_precision() == "highest" else 5e-3
    if torch.is_autocast_enabled(wanted.device.type) or wanted.element_size() < 4:
        bound = half
    wanted, found = wanted.double(), found.double()
    return bool((found - wanted).norm() <= bound * wanted.norm())


def _candidate(model: PreTrainedModel) -> nn.Module | None:
    """What looks like the last layer's feed-forward block: its largest part without attention."""
    if is_compiled(model) or is_checkpointed(model):  # those layers run whole
        return None
    layers, sizes = layer_list(model), {}
    for part in layers[-1].children() if len(layers) else ():
        weights = _weights(part)
        adapted = any(isinstance(module, RoAELinear) for module in part.modules())
        # No norm, which attention may follow.
        if not adapted and any(weight.ndim > 1 for weight in weights):
            sizes[part] = sum(weight.numel() for weight in weights)
    return max(sizes, key=lambda part: sizes[part], default=None)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]  # weights in few bits may be buffers


def _at(output: Any, positions_N: Tensor) -> Any:
    states_BTD: Tensor = output.last_hidden_state
    return _with_states(output, states_BTD.flatten(0, 1).index_select(0, positions_N)[None])


def _with_states(output: Any, states: Tensor) -> Any:
    changed = copy.copy(output)
    changed.last_hidden_state = states
    return changed


@contextmanager
def _narrowed(block: nn.Module | None, positions_N: Tensor) -> Iterator[None]:
    """Run a block at some positions, with zeros at all others."""
    if block is None:
        yield
        return
    shape: list[torch.Size] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (states_BTD,) = args
        shape[:] = [states_BTD.shape]
        return (states_BTD.flatten(0, 1).index_select(0, positions_N)[None],)

    def after(_: nn.Module, args: Any, output_1ND: Tensor) -> Tensor:
        batch, tokens = shape[0][:2]
        zeros = output_1ND.new_zeros(batch * tokens, output_1ND.shape[-1])
        return zeros.index_copy(0, positions_N, output_1ND[0]).view(batch, tokens, -1)

    with block.register_forward_pre_hook(before), block.register_forward_hook(after):
        yield
