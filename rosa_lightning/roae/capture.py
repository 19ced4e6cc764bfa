"""Which modules of a model are its attention, and what they are called with, seen by running it.

Two tokens go through the model once. Whoever lets queries and keys meet is an attention module,
whatever its name or its parts' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rosa_lightning.roae.meeting import ByHand, at_interface
from rosa_lightning.utils.modules import in_mode


@dataclass(frozen=True)
class Leaf:
    """One call of a module without parts."""

    path: str
    module: nn.Module
    given: Tensor
    output: Tensor

    @property
    def is_projection(self) -> bool:
        """Whether the module maps the last axis with a matrix: a linear layer by any name.

        A quantised one may hold its matrix in parts that have other names.
        """
        weight = getattr(self.module, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim == 2
        named = hasattr(self.module, "out_features")
        return (matrix or named) and self.given.is_floating_point()


@dataclass(frozen=True)
class AttentionCall:
    """One attention module, what it was called with, and the projections it called."""

    path: str
    module: nn.Module
    by_interface: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    projections: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the projections called before the states met, by dotted path."""
    output: str | None = None
    """The last projection called after they met."""

    @property
    def num_rows(self) -> int:
        """R."""
        return sum(output.shape[-1] for output in self.projections.values())


@dataclass(frozen=True)
class Trace:
    """What two tokens showed on their way through a model."""

    attentions: tuple[AttentionCall, ...]
    leaves: tuple[Leaf, ...]
    """Calls of modules without parts, in order."""


@torch.no_grad()
def trace(model: nn.Module) -> Trace:
    """Run two tokens through a language model and find its attention modules.

    Raises:
        ValueError: The model cannot be run on token ids alone.
    """
    recorder = _Recorder(model)
    by_hand = ByHand(lambda *_: recorder.meet_by_hand(), lambda _: None)
    with recorder.listening(), at_interface(model, recorder.meet), by_hand:
        _run_two_tokens(model)
    attentions = recorder.attentions()
    if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
        return Trace(attentions, tuple(recorder.leaves))
    precise = _float32_arguments(model, {call.path: call.module for call in attentions})
    attentions = tuple(
        replace(call, args=precise[call.path][0], kwargs=precise[call.path][1])
        for call in attentions
    )
    return Trace(attentions, tuple(recorder.leaves))


def _run_two_tokens(model: nn.Module) -> None:
    device = next(model.parameters()).device
    # Not both can be padding, whose embedding may be zero and tells nothing apart.
    ids = torch.tensor([[1, 2]], device=device)
    try:
        with in_mode(model, training=False):
            model(input_ids=ids, use_cache=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} cannot be run on two token ids, so its attention cannot be "
            f"measured: {type(error).__name__}: {reason[:200]}"
        ) from error


class _Recorder:
    """Keeps the calls of all modules, and which of them let queries and keys meet."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.leaves: list[Leaf] = []
        # Each meeting with the number of leaves called before it.
        self.at_interface: dict[nn.Module, int] = {}
        self.by_hand: dict[nn.Module, int] = {}

    def meet(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Note a meeting at the interface; attend to nothing."""
        self.at_interface.setdefault(module, len(self.leaves))
        batch, heads, tokens, _ = query.shape
        return value.new_zeros(batch, tokens, heads, value.shape[-1])

    def meet_by_hand(self) -> None:
        """Note a product of queries and keys in the module that is running."""
        if self.stack:
            self.by_hand.setdefault(self.stack[-1], len(self.leaves))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Follow all calls."""
        with ExitStack() as stack:
            for module in self.paths:
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                after = module.register_forward_hook(self._leave, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(module)
        self.calls.setdefault(self.paths[module], (args, kwargs))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is not None and isinstance(output, Tensor) and not any(module.children()):
            self.leaves.append(Leaf(self.paths[module], module, given, output))

    def attentions(self) -> tuple[AttentionCall, ...]:
        """The modules seen at the interface; only where there are none, those seen multiplying."""
        by_interface = bool(self.at_interface)
        meetings = self.at_interface if by_interface else self.by_hand
        projections = [leaf for leaf in self.leaves if leaf.is_projection]
        found = {}
        for module, moment in meetings.items():
            path = _owner(self.paths[module], projections)
            inside = [leaf for leaf in projections if is_inside(leaf.path, path)]
            before = {id(leaf) for leaf in self.leaves[:moment]}
            after = [leaf.path for leaf in inside if id(leaf) not in before]
            found[path] = AttentionCall(
                path,
                self.model.get_submodule(path),
                by_interface,
                *self.calls[path],
                projections={leaf.path: leaf.output for leaf in inside if id(leaf) in before},
                output=after[-1] if after else None,
            )
        return tuple(found.values())


def _owner(path: str, projections: list[Leaf]) -> str:
    """A module's path, or that of the nearest one around it that holds a projection."""
    while path and not any(is_inside(leaf.path, path) for leaf in projections):
        path = path.rpartition(".")[0]
    return path


def is_inside(path: str, parent: str) -> bool:
    """Whether one dotted path lies below another."""
    return not parent or path.startswith(f"{parent}.")


def _float32_arguments(
    model: nn.Module, attentions: dict[str, nn.Module]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each attention module is called with, its cosines and sines in float32.

    Rotary modules are made to answer in float32, since a half-precision cosine cannot tell the
    slowest pairs apart; the model itself goes on in its own dtype.
    """
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            arguments.setdefault(path, (args, kwargs))
            return _cast((args, kwargs), hidden_states(args, kwargs).dtype)

        return hook

    def to_float32(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), torch.float32)

    def nothing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1])

    with ExitStack() as stack:
        hooks = [(module, to_float32) for module in model.modules() if _is_rotary(module)]
        hooks += [(module, keep(path)) for path, module in attentions.items()]
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(at_interface(model, nothing))
        _run_two_tokens(model)
    return arguments


def _is_rotary(module: nn.Module) -> bool:
    """A rotary module holds frequencies: a floating buffer, no weights and no parts."""
    has_parts = any(True for _ in module.children()) or any(True for _ in module.parameters())
    # A quantised linear layer may hold its scales in buffers.
    is_linear = hasattr(module, "out_features")
    floats = any(buffer.is_floating_point() for buffer in module.buffers())
    return floats and not has_parts and not is_linear


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast all floating tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of an attention module."""
    first = [kwargs["hidden_states"]] if "hidden_states" in kwargs else []
    for value in (*first, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    raise ValueError("it is called without hidden states of shape (batch, tokens, width).")
