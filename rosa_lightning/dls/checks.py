"""What layer selection cannot work with, refused before training with the line that mends it.

Attributes of activation checkpointing in `transformers` (read in 5.24) and torch (2.13) have no
public name: ``_gradient_checkpointing_func``, ``_require_grads_hook(s)`` and ``checkpoint_impl``.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .layers import Layer


def check_strategy(strategy: object, frees_state: bool = False) -> None:
    """Refuse strategies whose gradients cannot be read and dropped."""
    known = isinstance(
        strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy
    )
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
        raise ValueError(
            f"DynamicLayerSelection does not work under {type(strategy).__name__}, which keeps "
            "gradients where it cannot drop them. Set trainer.strategy to "
            "ddp_find_unused_parameters_true, fsdp or ModelParallelStrategy, or policy to all."
        )
    if frees_state and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"optimizer_state='free' does not work under {type(strategy).__name__}, whose "
            "checkpoints need state for every parameter. Set optimizer_state='reset'."
        )


def check_wrapped(model: nn.Module) -> None:
    """Refuse what a strategy has wrapped so that parameters cannot be frozen and thawed."""
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise ValueError(
                "DDP with static_graph=True expects the same gradients at every step; a selection "
                "changes them. Leave static_graph out of trainer.strategy, or set policy to all."
            )
        if not model.find_unused_parameters:
            raise ValueError(
                "DDP without find_unused_parameters=True expects a gradient of every parameter; "
                "frozen layers have none. Set trainer.strategy to "
                "ddp_find_unused_parameters_true, or DDPStrategy(find_unused_parameters=True)."
            )
    if any(name.rpartition(".")[2] == "_flat_param" for name, _ in model.named_parameters()):
        raise ValueError(
            "FSDP with use_orig_params=False joins the parameters of many layers into one. Leave "
            "use_orig_params out of trainer.strategy; True is Lightning's default."
        )


def check_module(module: nn.Module) -> None:
    """Refuse manual optimization and reentrant activation checkpointing.

    A reentrant checkpoint gives a layer no gradients when nothing below it trains, and DDP fails
    on it. Calls of `torch.utils.checkpoint.checkpoint` in a module's own code cannot be seen here.
    """
    if isinstance(module, LightningModule) and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually; DynamicLayerSelection needs "
            "automatic_optimization=True: one optimizer, and training_step returns the loss. Set "
            "that, or policy to all."
        )
    for name, part in module.named_modules():
        if is_reentrant(part):
            raise ValueError(
                f"{name or type(part).__name__} uses reentrant activation checkpointing, which "
                "loses the gradients of layers above frozen ones. Enable it with "
                "use_reentrant=False."
            )
    if any(_has_input_hook(part) for part in module.modules()):
        rank_zero_warn(
            "A hook of enable_input_require_grads makes every backward pass run through all "
            "layers, the frozen ones too, so that selection saves no time. Call "
            "disable_input_require_grads() on the model after enabling checkpointing."
        )


def is_reentrant(module: nn.Module) -> bool:
    """Whether a module's activations are checkpointed in the reentrant way."""
    # transformers' layers; torch's own default is reentrant.
    call = getattr(module, "_gradient_checkpointing_func", None)
    if getattr(module, "gradient_checkpointing", False) and isinstance(call, partial):
        return bool(call.keywords.get("use_reentrant", True))
    # torch's checkpoint_wrapper.
    return getattr(getattr(module, "checkpoint_impl", None), "name", None) == "REENTRANT"


def _has_input_hook(module: nn.Module) -> bool:
    one, more = (getattr(module, f"_require_grads_hook{s}", None) for s in ("", "s"))
    handles = [handle for handle in (one, *(more or ())) if handle is not None]
    return any(handle.id in (handle.hooks_dict_ref() or {}) for handle in handles)


def check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], candidates: Mapping[str, nn.Parameter]
) -> None:
    """Check that frozen parameters stay where they are and any layer can be made to train."""
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ValueError(
            "LBFGS moves parameters that have no gradient, so layers cannot be frozen under "
            "it. Use a first-order optimizer such as AdamW."
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {parameter for group in groups for parameter in group["params"]}
    missing = [name for name, parameter in candidates.items() if parameter not in held]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"The optimizer lacks {', '.join(missing[:3])}{more}. Build it over all parameters "
            "that require a gradient before fit, so that every layer can be selected."
        )


def check_sole_owner(layers: Sequence[Layer], others: Sequence[Sequence[Layer]]) -> None:
    """Check that no other callback freezes and scores what this one does."""
    taken = {p for found in others for other in found for p in _touched(other)}
    for layer in layers:
        if not taken.isdisjoint(_touched(layer)):
            raise ValueError(
                f"Two DynamicLayerSelection callbacks select layer {layer.name!r}. Keep one of "
                "them, or set their layers= to different lists."
            )


def _touched(layer: Layer) -> set[nn.Parameter]:
    return {*layer.norms, *layer.candidates.values()}


def check_resumed(saved: Sequence[str], own: Sequence[str]) -> None:
    """Check that a checkpoint selects among the layers of this model."""
    if list(saved) != list(own):
        raise ValueError(
            f"The checkpoint selects among {len(saved)} layers, {saved[0]} to {saved[-1]}; "
            f"this model has {len(own)}, {own[0]} to {own[-1]}. Resume with the model and "
            "layers= that wrote it."
        )


# Settings of several ranks are compared through the store of the process group, not by
# collectives: a rank without the callback takes part in none, and would make the others wait.


def publish_settings(key: str, settings: Mapping[str, Any]) -> None:
    """Tell the other ranks, if there are any, without waiting for them."""
    if dist.is_available() and dist.is_initialized() and dist.group.WORLD is not None:
        store, rank = dist.group.WORLD.get_group_store(), dist.get_rank()
        store.delete_key(f"{key}/{rank}/read")
        store.set(f"{key}/{rank}", json.dumps(settings))


def check_published(key: str, name: str) -> None:
    """Behind a barrier, check that every rank has published the same settings of a callback."""
    if not (dist.is_available() and dist.is_initialized() and dist.group.WORLD is not None):
        return
    store, rank, world = dist.group.WORLD.get_group_store(), dist.get_rank(), dist.get_world_size()
    there = [other for other in range(world) if store.check([f"{key}/{other}"])]
    found = {other: json.loads(store.get(f"{key}/{other}")) for other in there}
    store.set(f"{key}/{rank}/read", "1")
    until = time.monotonic() + 10
    with suppress(RuntimeError):  # the store went with rank 0, which had seen that all have read
        while time.monotonic() < until and not all(store.check([f"{key}/{n}/read"]) for n in there):
            time.sleep(0.01)
        store.delete_key(f"{key}/{rank}")
    missing = [other for other in range(world) if other not in found]
    problems = [f"{name} (given on rank {there[0]}, missing on rank {n})" for n in missing[:1]]
    for setting, value in found[there[0]].items():
        for other in there[1:]:
            if (theirs := found[other][setting]) != value:
                both = f"{value} on rank {there[0]}, {theirs} on rank {other}"
                problems.append(f"{name}.{setting} ({both})")
                break
    if problems:
        raise ValueError(
            f"the ranks disagree on {', '.join(problems[:6])}. Start all of them with the same "
            "configuration."
        )
