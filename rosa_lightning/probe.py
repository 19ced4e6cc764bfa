"""What a model's own attention code does with its Q and K projections, seen by running it.

Nothing is looked up by model name. Each attention module is run alone, with unit vectors in place
of its projections' outputs, and its states are caught at the moment they are handed to the
attention kernel. Weights play no part in it, so the cost is small whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rosa_lightning.rope import PairTable, read_pair_table

_PROBE = "rosa_probe"


class _States(Exception):  # noqa: N818
    """Carries the rotated states out of an attention module, past code that needs no running."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key


def read_pair_tables(model: nn.Module) -> dict[str, PairTable]:
    """Measure the rotation of every attention module of a causal language model.

    Args:
        model: A `transformers` decoder whose attention modules have ``q_proj`` and ``k_proj``.

    Returns:
        Pair tables by the dotted path of each attention module that rotates its states; layers
        without rotation are left out.

    Raises:
        ValueError: No attention with separate projections, no rotation anywhere, or one that
            cannot be read; names the class, the layer and the reason.
    """
    kind = type(model).__name__
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "q_proj", None), nn.Module)
        and isinstance(getattr(module, "k_proj", None), nn.Module)
    }
    if not attentions:
        raise ValueError(
            f"{kind} has no attention with separate q_proj and k_proj, so RoAE cannot be added. "
            "Give a RoPE model of that form, such as Llama, Qwen, Mistral or Gemma."
        )
    tables = {}
    for name, kwargs in _attention_inputs(model, attentions).items():
        try:
            table = _read_layer(attentions[name], kwargs)
        except Exception as error:
            raise ValueError(
                f"{kind}: the rotation in layer {name} ({type(attentions[name]).__name__}) cannot "
                f"be read from its own forward: {error} Give a model whose attention turns pairs "
                "of dimensions."
            ) from error
        if table.pairs:
            tables[name] = table
    if not tables:
        raise ValueError(
            f"{kind} rotates neither Q nor K, so it has no rotary position embedding and no RoPE "
            "dimensions to adapt. Give a RoPE model, such as Llama, Qwen, Mistral or Gemma."
        )
    return tables


@torch.no_grad()
def _attention_inputs(
    model: nn.Module, attentions: Mapping[str, nn.Module]
) -> dict[str, dict[str, Any]]:
    """Run two tokens through the model and keep what each attention module is called with.

    Rotary modules are made to answer in float32, since a half-precision cosine cannot tell the
    slowest pairs apart; the model itself goes on in its own dtype.
    """
    inputs: dict[str, dict[str, Any]] = {}

    def to_float32(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), torch.float32)

    def keep(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            inputs[name] = {"hidden_states": hidden, **rest}
            return _cast((args, kwargs), hidden.dtype)

        return hook

    with ExitStack() as stack:
        for module in model.modules():
            if _is_rotary(module):
                handle = module.register_forward_pre_hook(to_float32, with_kwargs=True)
                stack.callback(handle.remove)
        for name, module in attentions.items():
            handle = module.register_forward_pre_hook(keep(name), with_kwargs=True)
            stack.callback(handle.remove)
        was_training = model.training
        stack.callback(model.train, was_training)
        device = next(model.parameters()).device
        model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return inputs


def _is_rotary(module: nn.Module) -> bool:
    """A rotary module holds frequencies: a floating buffer, no weights and no parts."""
    has_parts = any(True for _ in module.children()) or any(True for _ in module.parameters())
    return not has_parts and any(buffer.is_floating_point() for buffer in module.buffers())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast all floating tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


@torch.no_grad()
def _read_layer(attention: nn.Module, kwargs: dict[str, Any]) -> PairTable:
    """The pair table of one attention module, Q and K checked against each other."""
    query, key = _rotated_states(attention, kwargs, None)
    head_dim = query.shape[-1]

    def rotate(which: int) -> Callable[[Tensor], Tensor]:
        def rotation(x_NTD: Tensor) -> Tensor:
            states = _rotated_states(attention, kwargs, x_NTD)[which].float().cpu()
            if not torch.equal(states, states[:, :1].expand_as(states)):
                raise ValueError("its heads are not rotated alike.")
            return states[:, 0]

        return rotation

    table = read_pair_table(rotate(0), head_dim)
    if key.shape[-1] != head_dim or read_pair_table(rotate(1), head_dim) != table:
        raise ValueError("Q and K are not rotated alike.")
    return table


def _rotated_states(
    attention: nn.Module, kwargs: dict[str, Any], x_NTD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Q and K as (N, heads, T, head_dim), when every head's projection is given as ``x_NTD``.

    None stands for a zero projection, whose states tell the number of heads and the head size.
    """
    hidden = kwargs["hidden_states"].float()
    num_rows = 1 if x_NTD is None else x_NTD.shape[0]
    kwargs = {**kwargs, "hidden_states": hidden[:1].expand(num_rows, -1, -1)}
    with ExitStack() as stack:
        stack.enter_context(_probing(attention))
        for name, module in attention.named_children():
            if name in ("q_proj", "k_proj", "v_proj"):
                output = _projection(module, hidden, x_NTD, is_value=name == "v_proj")
                stack.enter_context(patch.object(module, "forward", lambda x, out=output: out))
            elif "norm" in type(module).__name__.lower():
                # A norm on Q or K scales unit vectors; it does not turn them.
                stack.enter_context(patch.object(module, "forward", lambda x, *_: x))
        try:
            attention(**kwargs)
        except _States as states:
            return states.query, states.key
    raise ValueError("it does not use the attention interface of transformers.")


def _projection(
    module: nn.Module, hidden: Tensor, x_NTD: Tensor | None, *, is_value: bool
) -> Tensor:
    """A projection's stand-in output, the same unit vectors in every head."""
    width = cast(Tensor, module.weight).shape[0]
    if x_NTD is None or is_value:
        rows = 1 if x_NTD is None else x_NTD.shape[0]
        return hidden.new_zeros(rows, 2, width)
    return x_NTD.to(hidden.device).repeat(1, 1, width // x_NTD.shape[-1])


@contextmanager
def _probing(attention: nn.Module) -> Iterator[None]:
    """Make an attention module hand its rotated states to `_States` instead of a kernel."""
    from transformers import AttentionInterface

    def probe(module: nn.Module, query: Tensor, key: Tensor, *_: Any, **__: Any) -> Any:
        raise _States(query, key)

    AttentionInterface.register(_PROBE, probe)
    config = cast(Any, attention).config
    before = config._attn_implementation
    config._attn_implementation = _PROBE
    try:
        yield
    finally:
        config._attn_implementation = before
