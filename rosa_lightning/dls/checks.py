"""What layer selection cannot work with, refused before training with the line that mends it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
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
from torch.nn.parallel import DistributedDataParallel

from rosa_lightning.dls.layers import Layer


def check_strategy(strategy: object, frees_state: bool = False) -> None:
    """Refuse strategies whose gradients cannot be read and dropped.

    Args:
        strategy: Of the trainer.
        frees_state: Whether optimizer state of frozen layers will be missing.

    Raises:
        ValueError: DeepSpeed, which steps its own copies, and any other that is not known; FSDP
            where state will be missing.
    """
    known = isinstance(
        strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy
    )
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
        raise ValueError(
            f"DynamicLayerSelection does not work under {type(strategy).__name__}, which keeps "
            "gradients where it cannot drop them. Set trainer.strategy to "
            "ddp_find_unused_parameters_true, fsdp or ModelParallelStrategy."
        )
    if frees_state and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"moments='free' does not work under {type(strategy).__name__}, whose checkpoints "
            "need state for every parameter. Set moments='reset'."
        )


def check_wrapped(model: nn.Module) -> None:
    """Refuse what a strategy has wrapped so that parameters cannot be frozen and thawed.

    Args:
        model: As the strategy wrapped it.

    Raises:
        ValueError: DDP that counts on every gradient, FSDP that hides the parameters.
    """
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise ValueError(
                "DDP with static_graph=True expects the same gradients at every step; a selection "
                "changes them. Leave static_graph out of trainer.strategy."
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


def check_module(module: LightningModule) -> None:
    """Refuse manual optimization, and what `check_checkpointing` refuses.

    Raises:
        ValueError: Names the module.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually; DynamicLayerSelection needs "
            "automatic_optimization=True: one optimizer, and training_step returns the loss."
        )
    check_checkpointing(module)


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing, and warn where nothing can be saved.

    A reentrant checkpoint gives a layer no gradients when nothing below it trains, and DDP fails
    on it. Calls of `torch.utils.checkpoint.checkpoint` in a module's own code cannot be seen here.

    Raises:
        ValueError: Names the module.
    """
    for name, module in model.named_modules():
        if is_reentrant(module):
            raise ValueError(
                f"{name or type(module).__name__} uses reentrant activation checkpointing, which "
                "loses the gradients of layers above frozen ones. Enable it with "
                "use_reentrant=False."
            )
    if any(True for module in model.modules() for _ in _input_hooks(module)):
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


def _input_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of transformers' enable_input_require_grads that are still in place."""
    handles = [*getattr(module, "_require_grads_hooks", ())]
    handles += [module._require_grads_hook] if hasattr(module, "_require_grads_hook") else []
    for handle in handles:
        if handle.id in (handle.hooks_dict_ref() or {}):
            yield handle


def check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], candidates: Mapping[str, nn.Parameter]
) -> None:
    """Check that frozen parameters stay where they are and any layer can be made to train.

    Args:
        optimizers: All that train.
        candidates: The parameters of all layers that can be selected, by their names.

    Raises:
        ValueError: Names the parameters that are missing.
    """
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
    """Check that no other callback freezes and scores what this one does.

    Raises:
        ValueError: Names a layer that two callbacks select.
    """
    taken = {parameter for found in others for layer in found for parameter in _touched(layer)}
    for layer in layers:
        if not taken.isdisjoint(_touched(layer)):
            raise ValueError(
                f"Two DynamicLayerSelection callbacks select layer {layer.name!r}. Keep one of "
                "them, or set their layers= to different lists."
            )


def _touched(layer: Layer) -> set[nn.Parameter]:
    return {*layer.norms, *layer.candidates.values()}


def check_reached(loss: Tensor, active: Sequence[int]) -> None:
    """Check that something that trains took part in a loss.

    Args:
        loss: Of a step in which some layers are frozen.
        active: Positions of the layers that train.

    Raises:
        ValueError: Names the layers.
    """
    if not loss.requires_grad:
        raise ValueError(
            f"The active layers {list(active)} took no part in this loss, and nothing else "
            "trains, so there is no gradient. Set always_active (or fixed_layers) to layers that "
            "every forward pass runs through, or raise num_active."
        )


def check_resumed(saved: Sequence[str], own: Sequence[str]) -> None:
    """Check that a checkpoint selects among the layers of this model.

    Raises:
        ValueError: Names the layers of both.
    """
    if list(saved) != list(own):
        raise ValueError(
            f"The checkpoint selects among {len(saved)} layers, {saved[0]} to {saved[-1]}; "
            f"this model has {len(own)}, {own[0]} to {own[-1]}. Resume with the model and "
            "layers= that wrote it."
        )
