"""Training mode, tensors and gradients of a module, one by one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in one mode for a while; each of its modules then has its own mode again."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def is_checkpointed(model: nn.Module) -> bool:
    """Whether any module of a `transformers` model recomputes its activations in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object or class, and put its own one back, or none."""
    own = name in vars(holder)
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own:
            setattr(holder, name, before)
        else:
            delattr(holder, name)


@contextmanager
def replaced_tensors(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exchange a model's parameters and buffers for others, and put them back at the end.

    `replace` is called once for a tensor that several modules share, and maps parameters to
    parameters.
    """
    held = [
        (module, name, tensor)
        for module in model.modules()
        for tensors in (module.named_parameters, module.named_buffers)
        for name, tensor in tensors(recurse=False, remove_duplicate=False)
    ]
    made: dict[int, Tensor] = {}
    try:
        for module, name, tensor in held:
            if id(tensor) not in made:
                made[id(tensor)] = replace(tensor)
            setattr(module, name, made[id(tensor)])
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


def held_gradients(module: nn.Module) -> dict[str, Tensor]:
    """This rank's part of the gradients that are there, by the parameter's name, on the CPU."""
    held = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {
        name: (grad.to_local() if isinstance(grad, DTensor) else grad).detach().cpu()
        for name, grad in held.items()
    }


def hold_gradients(module: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Put back what `held_gradients` gave, and nothing besides."""
    for name, parameter in module.named_parameters():
        grad = held[name].to(parameter.device, copy=True) if name in held else None
        if grad is not None and isinstance(parameter, DTensor):
            grad = DTensor.from_local(
                *(grad, parameter.device_mesh, parameter.placements),
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = grad
