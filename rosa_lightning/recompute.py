"""What cheap modules give, made again in the backward pass instead of being held for it.

The output of an activation function or a norm is saved by whoever takes it: a gated feed-forward
block multiplies it, a low-rank term needs it for its own gradient. It takes a few operations an
element to make it again from what the module was given, which is held anyway. So is what a norm
saves inside, in 16 bits a float32 copy of its input. No matrix product is made twice. Megatron-LM
does the like with its ``CheckpointWithoutOutput``; here hooks on saved tensors do it, whatever the
model's code.
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

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")

_Held = Tensor | Callable[[], Tensor]
"""A saved tensor, or what makes it again."""


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The activation functions and norms of a model; none where it has another way.

    A model under gradient checkpointing makes whole layers again, and a compiled one decides for
    itself.
    """
    if any(
        getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None
        for module in model.modules()
    ):
        return []
    return [module for module in model.modules() if _is_cheap(module)]


def _is_cheap(module: nn.Module) -> bool:
    """Whether a module works element by element or row by row, and alike each time."""
    if any(True for _ in (*module.children(), *module.buffers())):
        return False
    weights = [*module.parameters()]
    if weights:
        return all(weight.ndim == 1 for weight in weights)
    return type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.RReLU)


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, what these modules give is not held for the backward pass.

    Gradients are of the same operations on the same numbers, so they stay bit for bit. The backward
    pass may come after the context has ended, and more than once.

    Args:
        modules: As `recomputable` finds them. One with hooks of others is left alone, and so is a
            call with more than one tensor.
    """
    calls = _Calls()
    with ExitStack() as stack:
        for module in modules:
            if module._forward_hooks or module._forward_pre_hooks:
                continue
            begin = module.register_forward_pre_hook(calls.begin, with_kwargs=True)
            end = module.register_forward_hook(calls.end)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        stack.callback(calls.ended.clear)  # saved tensors hold on to the hooks
        stack.enter_context(saved_tensors_hooks(calls.pack, _unpack))
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
        if call is None or not isinstance(output, Tensor) or output.shape != args[0].shape:
            return
        if output.requires_grad and _place(output) != _place(args[0]):
            call.output_version = output._version
            # A place is used anew once its tensor is gone.
            self.ended[_place(output)] = weakref.ref(output), call

    def pack(self, tensor: Tensor) -> _Held:
        """What to hold instead of a tensor."""
        if self.running is not None:
            return self.running.hold_inner(tensor)
        output, call = self.ended.get(_place(tensor), (None, None))
        if output is None or call is None or output() is None:
            return _itself(tensor)
        return call.hold_output(tensor)


class _Call:
    """One call of a module, which can be made again."""

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        device = given.device.type
        self.module = module
        self.given = given.detach()
        self.given_version = given._version
        self.output_version = 0
        self.autocast = partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        self.num_inner = self.outputs_to_take = 0
        self.inner: dict[int, Tensor] = {}
        self.output: Tensor | None = None

    def hold_inner(self, tensor: Tensor) -> _Held:
        """For what the module saves itself: the tensor, if it is small or held anyway."""
        if not self._is_inner(tensor):
            return _itself(tensor)
        self.num_inner += 1
        return partial(self.take_inner, self.num_inner - 1)

    def hold_output(self, tensor: Tensor) -> _Held:
        """For the module's output, or a view of it: the tensor, if it is no longer as given."""
        if tensor._version != self.output_version:
            return _itself(tensor)
        self.outputs_to_take += 1
        return partial(self.take_output, tensor.shape, tensor.stride(), tensor.storage_offset())

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
        if self.given._version != self.given_version:
            raise RuntimeError(
                f"what {type(self.module).__name__} was given was changed in place afterwards, so "
                "that it cannot be run again. Set model.recompute_activations to false."
            )
        inner: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> None:
            if self._is_inner(tensor):
                inner[len(inner)] = tensor.detach()

        given = self.given.detach().requires_grad_()
        with (
            torch.set_grad_enabled(self.num_inner > 0),
            self.autocast(),
            saved_tensors_hooks(pack, _unpack),
        ):
            output: Tensor = self.module.forward(given).detach()
        self.inner = inner
        self.output = output if self.outputs_to_take > 0 else None
        return output


def _itself(tensor: Tensor) -> Tensor:
    """The tensor without its graph, which it would hold on to for ever as an output of it."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def _unpack(held: _Held) -> Tensor:
    return held if isinstance(held, Tensor) else held()


def _place(tensor: Tensor) -> int:
    """Which storage a tensor lies in, as long as that is alive."""
    place: int = tensor.untyped_storage()._cdata
    return place
