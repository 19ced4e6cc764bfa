"""What layer selection cannot work with, refused with the line that corrects it."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

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
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Adagrad, Optimizer

from .layers import Layer


def check_strategy(strategy: object, frees_state: bool = False) -> None:
    """Refuse strategies whose gradients cannot be read and dropped."""
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    known = sharded or isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
        raise ValueError(
            f"DynamicLayerSelection does not work under {type(strategy).__name__}, which keeps "
            "gradients where it cannot drop them. Set trainer.strategy to "
            "ddp_find_unused_parameters_true, fsdp or ModelParallelStrategy, or policy to all."
        )
    if frees_state and sharded:
        raise ValueError(
            f"optimizer_state='free' does not work under {type(strategy).__name__}, whose "
            "checkpoints need state for every parameter. Set optimizer_state='reset'."
        )


def check_module(module: LightningModule, wrapped: nn.Module) -> None:
    """Refuse manual optimization, and parameters that the strategy's wrapper holds fast."""
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually; DynamicLayerSelection needs "
            "automatic_optimization=True: one optimizer, and training_step returns the loss. Set "
            "that, or policy to all."
        )
    is_ddp = isinstance(wrapped, DistributedDataParallel)
    if is_ddp and (wrapped.static_graph or not wrapped.find_unused_parameters):
        raise ValueError(
            "DDP expects a gradient of every parameter at every step, and frozen layers have none. "
            "Leave static_graph out and set trainer.strategy to ddp_find_unused_parameters_true, "
            "or DDPStrategy(find_unused_parameters=True)."
        )
    if any(isinstance(parameter, FlatParameter) for parameter in wrapped.parameters()):
        raise ValueError(
            "FSDP with use_orig_params=False joins the parameters of many layers into one. Leave "
            "use_orig_params out of trainer.strategy; True is Lightning's default."
        )


def check_graph(loss: Tensor) -> None:
    """Refuse reentrant activation checkpointing, and warn where a backward cannot stop early.

    A reentrant checkpoint gives a layer no gradients when nothing below it trains, and DDP fails
    on it.
    """
    nodes = [loss.grad_fn]
    seen = set(nodes)
    for node in nodes:
        for below, _ in node.next_functions if node is not None else ():
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)
    if any(node is not None and node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise ValueError(
            "The model uses reentrant activation checkpointing, which loses the gradients of "
            "layers above frozen ones. Enable it with use_reentrant=False."
        )
    leaves = [getattr(node, "variable", None) for node in nodes]
    if any(leaf is not None and not isinstance(leaf, nn.Parameter) for leaf in leaves):
        rank_zero_warn(
            "An activation requires a gradient, so that every backward pass runs through all "
            "layers, and selection saves no time. Call disable_input_require_grads() on the model "
            "after enabling checkpointing."
        )


def check_optimizers(
    optimizers: Sequence[Optimizer], candidates: Mapping[str, nn.Parameter], keeps_state: bool
) -> None:
    """Check that frozen parameters stay where they are and any layer can be made to train."""
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ValueError(
            "LBFGS moves parameters that have no gradient, so layers cannot be frozen under "
            "it. Use a first-order optimizer such as AdamW."
        )
    if not keeps_state and any(isinstance(optimizer, Adagrad) for optimizer in optimizers):
        raise ValueError(
            "Adagrad makes its state once and for all, so it cannot be reset or freed. Set "
            "optimizer_state='keep'."
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


def check_sole_owner(layers: Sequence[Layer], others: Sequence[Layer]) -> None:
    """Check that no other callback freezes and scores what this one does."""
    taken = {p for other in others for p in (*other.norms, *other.candidates.values())}
    for layer in layers:
        if not taken.isdisjoint([*layer.norms, *layer.candidates.values()]):
            raise ValueError(
                f"Two DynamicLayerSelection callbacks select layer {layer.name!r}. Keep one of "
                "them, or set their layers= to different lists."
            )


# Settings of several ranks are compared through the store of the process group, not by
# collectives: a rank without the callback takes part in none, and would make the others wait.


def publish_settings(key: str, settings: Mapping[str, Any]) -> None:
    """Tell the other ranks, if there are any, without waiting for them."""
    if dist.is_available() and dist.is_initialized() and dist.group.WORLD is not None:
        store, rank = dist.group.WORLD.get_group_store(), dist.get_rank()
        store.delete_key(f"{key}/{rank}/read")
        store.set(f"{key}/{rank}", json.dumps(settings, default=asdict))


def check_published(key: str, name: str) -> None:
    """Behind a barrier, check that every rank has published the same settings of a callback."""
    if not (dist.is_available() and dist.is_initialized() and dist.group.WORLD is not None):
        return
    store, world = dist.group.WORLD.get_group_store(), range(dist.get_world_size())
    there = [rank for rank in world if store.check([f"{key}/{rank}"])]
    first, *others = [json.loads(store.get(f"{key}/{rank}")) for rank in there]
    _withdraw(store, key, there)
    problems = [f"{name} (missing on rank {rank})" for rank in world if rank not in there]
    for rank, settings in zip(there[1:], others, strict=True):
        for key, value in settings.items():
            if value != first[key]:
                both = f"{first[key]} on rank {there[0]}, {value} on rank {rank}"
                problems.append(f"{name}.{key} ({both})")
    if problems:
        raise ValueError(
            f"the ranks disagree on {', '.join(problems[:6])}. Start all of them with the same "
            "configuration."
        )


def _withdraw(store: Any, key: str, there: Sequence[int]) -> None:
    """Take this rank's settings back once all have read them, for the next fit of this process."""
    store.set(f"{key}/{dist.get_rank()}/read", "1")
    until = time.monotonic() + 10
    with suppress(RuntimeError):  # the store went with rank 0, which had seen that all have read
        while time.monotonic() < until and not all(store.check([f"{key}/{n}/read"]) for n in there):
            time.sleep(0.01)
        store.delete_key(f"{key}/{dist.get_rank()}")
