"""Optimizer state of layers that are frozen for a while, and gradients of the global batch.

A gradient is a plain tensor (one process, DDP), a `DTensor` (FSDP2), or this rank's flat piece of
it (FSDP1, which shows None where a rank holds no piece).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

OptimizerState = Literal["keep", "reset", "free"]

_RATES = ("lr", "weight_decay")
"""What moves a parameter whose gradient is zero."""


def forget_state(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Drop the state of these parameters, which almost all optimizers make anew at a first step."""
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def fill_state(optimizer: Optimizer) -> None:
    """Give every parameter without state the one with which its first step would begin.

    FSDP2 loads optimizer state for all parameters or fails, and a layer that was never active has
    none. Exact for optimizers whose state starts at zero: SGD, RMSprop, Adam and its kin.
    """
    groups = optimizer.param_groups
    gradients = {parameter: parameter.grad for group in groups for parameter in group["params"]}
    fresh = [p for p in gradients if not optimizer.state.get(p) and p.numel() > 0]
    settings = [{key: group[key] for key in _RATES if key in group} for group in groups]
    for parameter in gradients:
        parameter.grad = None
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    for group, setting in zip(groups, settings, strict=True):
        # Zero in the setting's own type: the rate of a capturable optimizer is a tensor.
        group.update({key: value * 0 for key, value in setting.items()})
    optimizer.step()
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    # Zero gradients have left all else as it begins.
    for state in [optimizer.state[p] for p in fresh if p in optimizer.state]:
        for key, start in {"step": 0, "mu_product": 1}.items():
            if isinstance(entry := state.get(key), Tensor):
                entry.fill_(start)
            elif entry is not None:
                state[key] = start


def global_gradients(
    groups: Sequence[Sequence[nn.Parameter]], model: nn.Module, device: torch.device
) -> list[list[Tensor | None]]:
    """For each parameter of each group a tensor of the global batch's gradient's L2 norm.

    The same on every rank; None where no rank has a gradient. Every rank must call this. Ranks
    exchange tensors on the device.
    """
    gradients = [parameter.grad for group in groups for parameter in group]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if (unit := _sharded_unit(model)) is not None:
            gradients = _norms_of_pieces(gradients, unit.process_group, device)
        else:
            parameters = [parameter for group in groups for parameter in group]
            gradients = _means(parameters, gradients, device)
    rest = iter(gradients)
    return [[next(rest) for _ in group] for group in groups]


def _sharded_unit(model: nn.Module) -> FullyShardedDataParallel | None:
    """A unit of FSDP1 that holds pieces of parameters, if there is one."""
    units = FullyShardedDataParallel.fsdp_modules(model)
    return units[0] if units and units[0].sharding_strategy != ShardingStrategy.NO_SHARD else None


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
    """How many numbers each group of parameters has on all ranks."""
    counts = [sum(parameter.numel() for parameter in group) for group in groups]
    if (unit := _sharded_unit(model)) is not None:
        sums = torch.tensor(counts, device=device)
        dist.all_reduce(sums, group=unit.process_group)
        counts = sums.tolist()
    return counts
