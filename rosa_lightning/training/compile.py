"""Compile decoder layers one by one, so that freezing and unfreezing them needs few graphs.

The compiler makes a graph for each way in which a layer's inputs and weights require gradients.
Layers alike share graphs, whatever layers are active; a model compiled as a whole would need one
for every set of active layers.

Private members (torch 2.13): `_compiled_call_impl` and `_call_impl` of modules, `torch._dynamo`,
and `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rosa_lightning.models.quantization import is_packed
from rosa_lightning.training.sharding import decoder_layers, is_sharded
from rosa_lightning.utils.modules import is_checkpointed

NUM_GRAPHS = 64
"""Graphs that layers of all kinds may need in all. Gradients make 6 of each kind of layer, masks
and precisions twice as many; torch's own limit is 8, beyond which it runs code uncompiled."""


def compile_layers(
    model: nn.Module, strategy: Strategy | None = None, backend: str = "inductor"
) -> None:
    """Compile each decoder layer of an adapted model for training, in place.

    In evaluation mode layers run uncompiled, and so do those that are given a cache, whose graph
    would hold for one layer alone. The number of rows and tokens may change from batch to batch.

    Raises:
        ValueError: The strategy shards the model, or gradient checkpointing is on, which Inductor
            (torch 2.13) refuses for attention.
    """
    if is_checkpointed(model) and backend == "inductor":
        raise ValueError(
            "model.speed.compile and model.speed.gradient_checkpointing do not go together: the "
            "compiler cannot recompute attention in the backward pass. Set one of them to false."
        )
    if is_sharded(strategy):
        raise ValueError(
            f"model.speed.compile=true does not go with {type(strategy).__name__}, which gathers "
            "weights within a layer. Set model.speed.compile to false, or trainer.strategy "
            "to ddp_find_unused_parameters_true."
        )
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, NUM_GRAPHS)
    for layer in decoder_layers(model).values():
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
        # Where torch keeps it: neither in copies nor in files of the model.
        layer._compiled_call_impl = partial(_call, layer, layer._compiled_call_impl)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def _call(layer: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, compiled in training and without a cache."""
    from transformers import Cache

    # By its class: releases differ in what they call it.
    cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    run = layer._call_impl if cached or not layer.training else compiled
    return run(*args, **kwargs)


def exclude_packed_from_ddp(module: nn.Module) -> None:
    """Keep packed weights out of what DDP broadcasts at its start.

    It cannot send them, and every rank has loaded its own.
    """
    packed = [name for name, weight in module.named_parameters() if is_packed(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, packed
    )
