"""Recompute cheap activations in the backward pass instead of holding them, bit for bit.

A gated feed-forward block saves both input and output of its activation function, and a norm saves
a float32 copy of a 16-bit input. To recompute these takes a few operations an element and no matrix
product. Megatron-LM has ``CheckpointWithoutOutput`` for this; here hooks on saved tensors do it,
whatever the model's code. Uses `Tensor._version` and `_backward_hooks`, a module's
`_forward_hooks`, and `UntypedStorage._cdata` (torch 2.13), and a module's
`_gradient_checkpointing_func` (transformers 5.24).
`MemoryTracker` counts what is held, by `TorchDispatchMode`, the one way to see every tensor of a
backward pass.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_lightning.training.compile import is_compiled
from rosa_lightning.utils.modules import is_checkpointed

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")

_Restore = Callable[[], Tensor]
"""Gives a saved tensor, or recomputes it."""


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The activation functions and norms of a model; none where it is checkpointed or compiled.

    FSDP1 keeps weights flat and elsewhere, so that there no norm is found.
    """
    modules = [*model.modules()]
    if is_compiled(model) or is_checkpointed(model):
        return []
    flat = any(isinstance(module, FullyShardedDataParallel) for module in modules)
    return [m for m in modules if _is_activation(m) or (_is_row_wise(m) and not flat)]


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts."""
    found: int = tensor._version
    return found


def has_gradient_hooks(model: nn.Module) -> bool:
    """Whether a trained parameter has a hook on its gradient."""
    return any(weight.requires_grad and weight._backward_hooks for weight in model.parameters())


def is_reentrant(module: nn.Module) -> bool:
    """Whether a module's activations are checkpointed in the reentrant way."""
    # transformers' layers; torch's own default is reentrant.
    call = getattr(module, "_gradient_checkpointing_func", None)
    if getattr(module, "gradient_checkpointing", False) and isinstance(call, partial):
        return bool(call.keywords.get("use_reentrant", True))
    # torch's checkpoint_wrapper.
    return getattr(getattr(module, "checkpoint_impl", None), "name", None) == "REENTRANT"


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function that gives the same each time."""
    known = type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.RReLU)
    held = (*module.children(), *module.buffers(), *module.parameters())
    return known and not getattr(module, "inplace", False) and not held


def _is_row_wise(module: nn.Module) -> bool:
    """Whether a module holds nothing but 1-D weights, and so works row by row."""
    weights = [*module.parameters()]
    others = (*module.children(), *module.buffers())
    return bool(weights) and not others and all(weight.ndim == 1 for weight in weights)


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, what these modules save is recomputed in the backward pass.

    As autograd does, the backward pass refuses tensors that were changed in place after they were
    saved, a norm's input among them. Modules with hooks of others are left alone, and so are calls
    with more than one tensor. `saved_tensors_hooks` around this context see nothing.
    """
    calls = _Calls()
    with ExitStack() as stack:
        for module in modules:
            if not (module._forward_hooks or module._forward_pre_hooks):
                begin = module.register_forward_pre_hook(calls.begin, with_kwargs=True)
                stack.enter_context(begin)
                stack.enter_context(module.register_forward_hook(calls.end, always_call=True))
        stack.callback(calls.ended.clear)  # saved tensors hold on to the hooks
        stack.enter_context(saved_tensors_hooks(calls.pack, operator.call))
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
        if call is None or call.weights or not isinstance(output, Tensor):
            return
        if output.requires_grad:
            call.made = output.dtype, output._version
            # A storage's address is used anew once its tensor is gone.
            self.ended[_storage(output)] = weakref.ref(output), call

    def pack(self, tensor: Tensor) -> _Restore:
        """What to hold instead of a tensor."""
        if tensor.layout is not torch.strided:  # sparse ones have no storage
            return _held(tensor)
        if self.running is not None:
            return self.running.hold_inner(tensor)
        output, call = self.ended.get(_storage(tensor), (None, None))
        if output is None or call is None or output() is None:
            return _held(tensor)
        return call.hold_output(tensor)


class _Call:
    """One call of a module, which can be run again."""

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        device = given.device.type
        self.module = module
        # As it is now: a faster one may stand in for it.
        self.forward = module.forward
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
        self.num_inner = 0
        self.inner: dict[int, Tensor] = {}

    def hold_inner(self, tensor: Tensor) -> _Restore:
        """For what the module saves itself: the tensor, if it is small or held anyway."""
        if not self._is_inner(tensor):
            return _held(tensor)
        self.num_inner += 1
        return partial(self._take_inner, self.num_inner - 1)

    def hold_output(self, tensor: Tensor) -> _Restore:
        """For the module's output, or a view of it: the tensor, if it has been changed since."""
        if (tensor.dtype, tensor._version) != self.made:
            return _held(tensor)
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: self._run().as_strided(*view)

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in (self.given, *self.weights)]

    def _is_inner(self, tensor: Tensor) -> bool:
        return tensor.numel() >= self.given.numel() and _storage(tensor) != _storage(self.given)

    def _take_inner(self, number: int) -> Tensor:
        """What the module saved as its number-th tensor."""
        if number not in self.inner:
            self._run()
        return self.inner.pop(number)

    def _run(self) -> Tensor:
        """The output, and in `inner` what the module saves."""
        if self._versions() != self.versions:
            raise _changed(f"input or weight of {type(self.module).__name__}")
        inner: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> None:
            if self._is_inner(tensor):
                inner[len(inner)] = tensor.detach()

        given = self.given.detach().requires_grad_()
        with (
            torch.set_grad_enabled(self.num_inner > 0),
            self.autocast(),
            saved_tensors_hooks(pack, operator.call),
        ):
            output: Tensor = self.forward(given).detach()
        self.inner = inner
        return output


def _held(tensor: Tensor) -> _Restore:
    """The tensor itself, checked as autograd checks those that have no hooks."""
    # Without its graph, which it would hold on to for ever where it is an output.
    bare, version = tensor if tensor.grad_fn is None else tensor.detach(), tensor._version

    def restore() -> Tensor:
        if bare._version != version:
            raise _changed(f"tensor of shape {tuple(bare.shape)}")
        return bare

    return restore


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        f"the backward pass needs a {what} that an in-place operation has changed since. Fix the "
        "model's code, or set model.speed.recompute_activations to false, if it trains without it."
    )


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor lies in, as long as that is alive."""
    address: int = tensor.untyped_storage()._cdata
    return address


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are alive, and apart those that the head made."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.at_head = False
        self.now_of_head = self.peak_of_head = 0
        self._known: set[int] = set()
        self.add(*tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what is new."""
        out = func(*args, **(kwargs or {}))
        self.add(*(out if isinstance(out, tuple | list) else (out,)))
        return out

    def add(self, *values: Any) -> None:
        """Count the storages of tensors until they are freed, those that are not counted yet."""
        for value in values:
            if isinstance(value, tuple | list):
                self.add(*value)
            elif isinstance(value, Tensor):
                storage = value.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key in self._known:
                    continue
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                if self.at_head:
                    self.now_of_head += size
                    self.peak_of_head = max(self.peak_of_head, self.now_of_head)
                weakref.finalize(storage, self._freed, key, size, self.at_head)

    def _freed(self, key: int, size: int, of_head: bool) -> None:
        self._known.discard(key)
        self.now -= size
        self.now_of_head -= size * of_head
