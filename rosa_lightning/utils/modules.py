"""Training mode and gradients of a module, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
