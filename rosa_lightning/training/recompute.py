"""What cheap modules make, made again in the backward pass instead of being held for it.

A gated feed-forward block saves what its activation function gives, and also what that was given,
from which it follows. A norm saves a float32 copy of a 16-bit input, and where its weight trains,
its input normalised. To make these again takes a few operations an element and no matrix product.
Megatron-LM does the like with its ``CheckpointWithoutOutput``; here hooks on saved tensors do it,
whatever the model's code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FullyShardedDataParallel

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")

_Take = Callable[[], Tensor]
"""Gives a saved tensor, or makes it again."""

_CHANGED = (
    "the backward pass needs a {} that an in-place operation has changed since. Mend the model's "
    "code, or set model.recompute_activations to false, if the model trains without it."
)


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The activation functions and norms of a model; none where it has another way.

    A model under gradient checkpointing makes whole layers again, and a compiled one decides for
    itself. FSDP1 keeps weights flat and elsewhere, so that there no norm is found.
    """
    modules = [*model.modules()]
    if any(
        getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None
        for module in modules
    ):
        return []
    flat = any(isinstance(module, FullyShardedDataParallel) for module in modules)
    return [m for m in modules if _is_function(m) or (_is_norm(m) and not flat)]


def _is_function(module: nn.Module) -> bool:
    """Whether a module is an activation function that gives the same each time."""
    known = type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.RReLU)
    changes_input = getattr(module, "inplace", False)
    return known and not changes_input and not _holds(module)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module holds nothing but 1-D weights, and so works row by row."""
    weights = [*module.parameters()]
    others = (*module.children(), *module.buffers())
    return bool(weights) and not others and all(weight.ndim == 1 for weight in weights)


def _holds(module: nn.Module) -> bool:
    return any(True for _ in (*module.children(), *module.buffers(), *module.parameters()))


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, what these modules can make again is not held for the backward pass.

    Gradients are of the same operations on the same numbers, so they stay bit for bit. The backward
    pass may come after the context has ended, and more than once. As autograd does, it refuses
    tensors that were changed in place after they were saved; what a norm was given counts among
    them. `saved_tensors_hooks` around this context see nothing.

    Args:
        modules: As `recomputable` finds them. One with hooks of others is left alone, and so is a
            call with more than one tensor.

    Raises:
        RuntimeError: In the backward pass, for a tensor that was changed in place.
    """
    calls = _Calls()
    with ExitStack() as stack:
        for module in modules:
            if module._forward_hooks or module._forward_pre_hooks:
                continue
            begin = module.register_forward_pre_hook(calls.begin, with_kwargs=True)
            end = module.register_forward_hook(calls.end, always_call=True)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        stack.callback(calls.ended.clear)  # saved tensors hold on to the hooks
        stack.enter_context(saved_tensors_hooks(calls.pack, _taken))
        yield


class _Calls:
    """The call that is running, and those whose output may still be saved by others."""

    def __init__(self) -> None:
        self.running: _Call | None = None
        self.ended: dict[int, tuple[weakref.ref[Tensor], _Call]] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(given, Tensor) and torch.is_grad_enabled() and given.requires_grad:
            self.running = _Call(module, given)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self.running = self.running, None
        if call is None or not isinstance(output, Tensor):
            return
        if output.requires_grad and not call.weights:
            call.made = output.dtype, output._version
            # A place is used anew once its tensor is gone.
            self.ended[_place(output)] = weakref.ref(output), call

    def pack(self, tensor: Tensor) -> _Take:
        """What to hold instead of a tensor."""
        if self.running is not None:
            return self.running.hold_inner(tensor)
        output, call = self.ended.get(_place(tensor), (None, None))
        if output is None or call is None or output() is None:
            return _kept(tensor)
        return call.hold_output(tensor)


class _Call:
    """One call of a module, which can be made again."""

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        device = given.device.type
        self.module = module
        self.given = given.detach()
        self.weights = [*module.parameters()]
        self.versions = self._versions()
        self.made = given.dtype, 0
        self.autocast = partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        self.num_inner = self.outputs_to_take = 0
        self.inner: dict[int, Tensor] = {}
        self.output: Tensor | None = None

    def hold_inner(self, tensor: Tensor) -> _Take:
        """For what the module saves itself: the tensor, if it is small or held anyway."""
        if not self._is_inner(tensor):
            return _kept(tensor)
        self.num_inner += 1
        return partial(self.take_inner, self.num_inner - 1)

    def hold_output(self, tensor: Tensor) -> _Take:
        """For the module's output, or a view of it: the tensor, if it is no longer as it was."""
        if (tensor.dtype, tensor._version) != self.made:
            return _kept(tensor)
        self.outputs_to_take += 1
        return partial(self.take_output, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in (self.given, *self.weights)]

    def _is_inner(self, tensor: Tensor) -> bool:
        return tensor.numel() >= self.given.numel() and _place(tensor) != _place(self.given)

    def take_inner(self, number: int) -> Tensor:
        """What the module saved as its number-th tensor."""
        if number not in self.inner:
            self._run()
        return self.inner.pop(number)

    def take_output(self, *view: Any) -> Tensor:
        """A view of the output, by shape, strides and offset."""
        output = self._run() if self.output is None else self.output
        self.outputs_to_take -= 1  # below zero in a second backward pass
        self.output = output if self.outputs_to_take > 0 else None
        return output.as_strided(*view)

    def _run(self) -> Tensor:
        """The output, and in `inner` what the module saves."""
        if self._versions() != self.versions:
            raise RuntimeError(_CHANGED.format(f"input or weight of {type(self.module).__name__}"))
        inner: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> None:
            if self._is_inner(tensor):
                inner[len(inner)] = tensor.detach()

        given = self.given.detach().requires_grad_()
        with (
            torch.set_grad_enabled(self.num_inner > 0),
            self.autocast(),
            saved_tensors_hooks(pack, _taken),
        ):
            output: Tensor = self.module.forward(given).detach()
        self.inner = inner
        self.output = output if self.outputs_to_take > 0 else None
        return output


def _kept(tensor: Tensor) -> _Take:
    """The tensor itself, checked as autograd checks those that have no hooks."""
    # Without its graph, which it would hold on to for ever where it is an output.
    bare = tensor if tensor.grad_fn is None else tensor.detach()
    return partial(_unchanged, bare, tensor._version)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(_CHANGED.format(f"tensor of shape {tuple(tensor.shape)}"))
    return tensor


def _taken(take: _Take) -> Tensor:
    return take()


def _place(tensor: Tensor) -> int:
    """Which storage a tensor lies in, as long as that is alive."""
    place: int = tensor.untyped_storage()._cdata
    return place
