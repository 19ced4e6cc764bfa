"""What an optimizer remembers of parameters that were frozen for a while.

Pure torch. Moments of a frozen parameter stay as they were, and point where its gradient pointed
then; zeroed, they start over, with the bias correction of a first step.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adagrad, Optimizer

Moments = Literal["keep", "reset", "free"]

_FRESH = {
    "step": 0,
    # Adam and its kin: AdamW, NAdam, RAdam, Adamax, Adafactor, Lion.
    "exp_avg": 0,
    "exp_avg_sq": 0,
    "max_exp_avg_sq": 0,
    "exp_inf": 0,
    "mu_product": 1,
    "row_var": 0,
    "col_var": 0,
    "variance": 0,
    # SGD, Muon, RMSprop, Adadelta.
    "momentum_buffer": 0,
    "square_avg": 0,
    "grad_avg": 0,
    "acc_delta": 0,
}
"""The value with which each entry of an optimizer's state begins."""


def check_moments(
    moments: Moments, optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]
) -> None:
    """Check that the state of these parameters can be forgotten.

    Before a parameter's first step, by what an optimizer of the same class and settings makes for
    a stand-in; where that cannot be built, only by the state that is there.

    Raises:
        ValueError: Names the optimizer, and the entry of its state that stands against it.
    """
    if moments == "free" and any(isinstance(optimizer, Adagrad) for optimizer in optimizers):
        raise ValueError(
            "moments='free' does not work with Adagrad, which makes its state once and for all. "
            "Set moments='keep'."
        )
    if moments != "reset":
        return
    for optimizer in optimizers:
        keys = [key for _, state in _states([optimizer], parameters) for key in state]
        unknown = [key for key in keys or _coming_keys(optimizer, parameters) if key not in _FRESH]
        if unknown:
            raise ValueError(
                f"moments='reset' does not know how {unknown[0]!r} begins, which "
                f"{type(optimizer).__name__} remembers. Set moments='keep' or, if it makes its "
                "state at a parameter's first step, moments='free'."
            )


def _coming_keys(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[str]:
    """What a new optimizer of this class and settings remembers of small stand-ins."""
    known = inspect.signature(type(optimizer)).parameters
    keys: list[str] = []
    for group in optimizer.param_groups:
        # State may depend on the axes (Adafactor, Muon), not on how a step is computed.
        held = set(group["params"])
        axes = {parameter.ndim for parameter in parameters if parameter in held}
        settings: dict[str, Any] = {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name in known and name not in ("params", "fused", "foreach", "capturable")
        }
        for ndim in axes:
            stand_in = nn.Parameter(torch.zeros([2] * ndim))
            stand_in.grad = torch.zeros_like(stand_in)
            # Other people's optimizers may refuse anything of this, each in its own way. What they
            # compile is not worth it here.
            with suppress(Exception), torch.compiler.set_stance("force_eager"):
                twin = type(optimizer)([stand_in], **settings)
                twin.step()
                keys.extend(twin.state[stand_in])
    return keys


def reset_moments(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Make optimizers forget these parameters, in place, so that all entries stay where they are.

    Sharded checkpoints need the entries.
    """
    for _, state in _states(optimizers, parameters):
        _restart(state, state.keys())


def free_moments(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Give back the memory of what optimizers remember of these parameters.

    For optimizers that make a parameter's state at its first step, as almost all do.
    """
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def fill_optimizer_state(optimizer: Optimizer) -> None:
    """Give every parameter the state that its first step would make, before any step.

    FSDP2 loads optimizer state for all parameters or fails, and a layer that was never active has
    none. Exact for optimizers whose moments start at zero: SGD, RMSprop, Adam and its kin.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    fresh = [p for p in parameters if not optimizer.state.get(p) and p.numel() > 0]
    held = [parameter.grad for parameter in parameters]
    settings: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "weight_decay") if key in group} for group in groups
    ]
    for parameter in parameters:
        parameter.grad = None
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    for group, setting in zip(groups, settings, strict=True):
        # Zero in the setting's own type: the rate of a capturable optimizer is a tensor.
        group.update({key: value * 0 for key, value in setting.items()})
    optimizer.step()
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    for parameter, gradient in zip(parameters, held, strict=True):
        parameter.grad = gradient
    # Zero gradients have left all else as it begins.
    for _, state in _states([optimizer], fresh):
        _restart(state, {"step", "mu_product"} & state.keys())


def _states(
    optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    for optimizer in optimizers:
        for parameter in parameters:
            # Looking up what is not there would make an entry.
            if parameter in optimizer.state:
                yield optimizer, optimizer.state[parameter]


def _restart(state: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if isinstance(state[key], Tensor):
            _fill(state[key], _FRESH[key])
        elif state[key] is not None:
            state[key] = _FRESH[key]


def _fill(entry: Tensor, value: float) -> None:
    local = entry.to_local() if isinstance(entry, DTensor) else entry
    # Not fill_, which entries of 8 bits lack. Any that a step writes can be copied into.
    local.copy_(torch.full(local.shape, value, dtype=local.dtype, device=local.device))
