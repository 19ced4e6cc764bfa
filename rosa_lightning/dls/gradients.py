"""Gradients: of the global batch, under every way of sharding, and none for what is frozen.

Pure torch. A gradient can be a plain tensor (one process, DDP), a `DTensor` (FSDP2), or this
rank's flat piece of it (FSDP1, which shows None where a rank holds no piece).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

Gradients = list[list[Tensor | None]]


def global_gradients(
    groups: Sequence[Sequence[nn.Parameter]], model: nn.Module, device: torch.device
) -> Gradients:
    """Tensors with the L2 norms of the global batch's gradients, the same on every rank.

    Every rank must call this, whatever gradients it holds.

    Args:
        groups: The parameters, in groups.
        model: What holds them, as it was wrapped.
        device: Where ranks can exchange tensors.

    Returns:
        A tensor for each parameter of each group; None where no rank has a gradient.
    """
    gradients = [parameter.grad for group in groups for parameter in group]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        units = FullyShardedDataParallel.fsdp_modules(model)
        if units and units[0].sharding_strategy != ShardingStrategy.NO_SHARD:
            gradients = _norms_of_pieces(gradients, units[0].process_group, device)
        else:
            parameters = [parameter for group in groups for parameter in group]
            gradients = _means(parameters, gradients, device)
    rest = iter(gradients)
    return [[next(rest) for _ in group] for group in groups]


def _norms_of_pieces(
    pieces: Sequence[Tensor | None], group: dist.ProcessGroup | None, device: torch.device
) -> list[Tensor | None]:
    """The norm of each gradient of which every rank holds a piece, each piece a mean already."""
    sums = torch.zeros(2, len(pieces), dtype=torch.float64, device=device)
    for index, piece in enumerate(pieces):
        if piece is not None:
            sums[0, index] = piece.detach().double().square().sum()
            sums[1, index] = 1
    dist.all_reduce(sums, group=group)
    squares, holders = sums
    return [square.sqrt() if held else None for square, held in zip(squares, holders, strict=True)]


def _means(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], device: torch.device
) -> list[Tensor | None]:
    """Each gradient whole and averaged over ranks; what is averaged already stays as it is.

    DDP averages what required a gradient when it wrapped the model, and nothing else.
    """
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    flat = [
        torch.zeros(parameter.shape, device=device) if gradient is None else gradient.detach()
        for parameter, gradient in zip(parameters, whole, strict=True)
    ]
    held = torch.tensor([float(gradient is not None) for gradient in whole])
    parts = [held, *(gradient.flatten() for gradient in flat)]
    buffer = torch.cat([part.to(device, torch.float64) for part in parts])
    dist.all_reduce(buffer)
    buffer /= dist.get_world_size()
    holders, *means = torch.split(buffer, [part.numel() for part in parts])
    return [mean if count else None for mean, count in zip(means, holders, strict=True)]


def num_elements(
    groups: Sequence[Sequence[nn.Parameter]], model: nn.Module, device: torch.device
) -> list[int]:
    """How many numbers each group of parameters has in all, whatever part of them is here.

    Every rank must call this. The arguments are those of `global_gradients`.
    """
    counts = [sum(parameter.numel() for parameter in group) for group in groups]
    units = FullyShardedDataParallel.fsdp_modules(model)
    if units and units[0].sharding_strategy != ShardingStrategy.NO_SHARD:
        sums = torch.tensor(counts, device=device)
        dist.all_reduce(sums, group=units[0].process_group)
        counts = sums.tolist()
    return counts


def require_grad(parameters: Iterable[nn.Parameter], required: bool) -> None:
    """Let all of them take gradients, or none."""
    for parameter in parameters:
        parameter.requires_grad_(required)


def drop_grad(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients that are there."""
    for parameter in parameters:
        # None, not zero: AdamW still moves a weight whose gradient is zero.
        parameter.grad = None


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients that are there and take no more."""
    for parameter in parameters:
        drop_grad([parameter])
        parameter.requires_grad_(False)


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
                grad,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = grad
