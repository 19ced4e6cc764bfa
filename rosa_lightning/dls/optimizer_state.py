"""Optimizer state of layers that are frozen for a while, and gradients of the global batch.

State of a frozen parameter stays as it was, and points where its gradient pointed then; reset, it
starts over, with the bias correction of a first step. A gradient can be a plain tensor (one
process, DDP), a `DTensor` (FSDP2), or this rank's flat piece of it (FSDP1, which shows None where a
rank holds no piece).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.optim import Adagrad, Optimizer

OptimizerState = Literal["keep", "reset", "free"]

_FRESH = dict.fromkeys(
    (
        # Adam and its kin: AdamW, NAdam, RAdam, Adamax, Adafactor, Lion.
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
        *("row_var", "col_var", "variance"),
        # SGD, Muon, RMSprop, Adadelta.
        *("momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    ),
    0,
) | {"mu_product": 1}
"""The value with which each entry of an optimizer's state begins."""


def check_optimizer_state(mode: OptimizerState, optimizers: Sequence[Optimizer]) -> None:
    """Refuse Adagrad, which makes its state once and for all, where state is to be forgotten."""
    if mode != "keep" and any(isinstance(optimizer, Adagrad) for optimizer in optimizers):
        raise ValueError(
            f"optimizer_state={mode!r} does not work with Adagrad, which makes its state once and "
            "for all. Set optimizer_state='keep'."
        )


def reset_state(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Make optimizers forget these parameters.

    Entries of torch's optimizers stay, as sharded checkpoints need; state with others is made anew
    at the next step.
    """
    for optimizer in optimizers:
        for parameter, state in _states(optimizer, parameters):
            if state.keys() <= _FRESH.keys():
                _restart(state, state.keys())
            else:
                del optimizer.state[parameter]


def free_state(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Give back the memory of optimizer state, which almost all make anew at a first step."""
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def fill_state(optimizer: Optimizer) -> None:
    """Give every parameter the state that its first step would make, before any step.

    FSDP2 loads optimizer state for all parameters or fails, and a layer that was never active has
    none. Exact for optimizers whose state starts at zero: SGD, RMSprop, Adam and its kin.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    fresh = {p for p in parameters if not optimizer.state.get(p) and p.numel() > 0}
    held = [parameter.grad for parameter in parameters]
    settings: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "weight_decay") if key in group} for group in groups
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter in fresh else None
    for group, setting in zip(groups, settings, strict=True):
        # Zero in the setting's own type: the rate of a capturable optimizer is a tensor.
        group.update({key: value * 0 for key, value in setting.items()})
    optimizer.step()
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    for parameter, gradient in zip(parameters, held, strict=True):
        parameter.grad = gradient
    # Zero gradients have left all else as it begins.
    for _, state in _states(optimizer, fresh):
        _restart(state, {"step", "mu_product"} & state.keys())


def _states(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    # Looking up what is not there would make an entry.
    return [(p, optimizer.state[p]) for p in parameters if p in optimizer.state]


def _restart(state: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        entry = state[key]
        if isinstance(entry, Tensor):
            local = entry.to_local() if isinstance(entry, DTensor) else entry
            # Not fill_, which entries of 8 bits lack. Any that a step writes can be copied into.
            kind: dict[str, Any] = {"dtype": local.dtype, "device": local.device}
            local.copy_(torch.full(local.shape, _FRESH[key], **kind))
        elif entry is not None:
            state[key] = _FRESH[key]


def global_gradients(
    groups: Sequence[Sequence[nn.Parameter]], model: nn.Module, device: torch.device
) -> list[list[Tensor | None]]:
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
    """How many numbers each group of parameters has on all ranks; arguments as above."""
    counts = [sum(parameter.numel() for parameter in group) for group in groups]
    if (unit := _sharded_unit(model)) is not None:
        sums = torch.tensor(counts, device=device)
        dist.all_reduce(sums, group=unit.process_group)
        counts = sums.tolist()
    return counts


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients that are there and take no more."""
    for parameter in parameters:
        # None, not zero: AdamW still moves a weight whose gradient is zero.
        parameter.grad = None
        parameter.requires_grad_(False)
