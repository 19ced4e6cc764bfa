from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.utils.checkpoint import checkpoint

from rosa_lightning.dls.checks import check_graph, check_module, check_strategy
from tests.conftest import build
from tests.dls.toys import Toy


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
def test_known_strategies_are_accepted(strategy):
    check_strategy(strategy())


def test_deepspeed_is_refused_with_what_to_take_instead():
    # Made without its package.
    with pytest.raises(ValueError, match=r"under DeepSpeedStrategy.*Set trainer\.strategy to ddp"):
        check_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))


def test_state_that_sharded_checkpoints_need_is_not_freed():
    check_strategy(DDPStrategy(), frees_state=True)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy.*Set optimizer_state='reset'"):
        check_strategy(ModelParallelStrategy(), frees_state=True)


def test_fsdp_that_joins_the_parameters_is_refused():
    model = nn.Linear(2, 2)
    model.joined = FlatParameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"use_orig_params=False.*Leave use_orig_params out"):
        check_module(Toy(), model)


def loss_of(**options) -> torch.Tensor:
    """Of a frozen Llama with activation checkpointing, of which one layer trains."""
    model = build("llama").requires_grad_(False).train()
    model.activation_checkpointing_enable(options)
    model.enable_input_require_grads()
    model.model.layers[-1].requires_grad_(True)
    return model(input_ids=torch.arange(3, 9)[None]).logits.sum()


def test_reentrant_checkpointing_is_refused_wherever_it_is_called():
    x = torch.randn(2, 2, requires_grad=True)
    own = checkpoint(nn.Linear(2, 2), x, use_reentrant=True).sum()
    for loss in (loss_of(use_reentrant=True), own):
        with pytest.raises(ValueError, match=r"reentrant.*Enable it with use_reentrant=False"):
            check_graph(loss)


def test_activations_that_require_gradients_are_warned_of():
    with pytest.warns(UserWarning, match=r"saves no time\. Call disable_input_require_grads\(\)"):
        check_graph(loss_of(use_reentrant=False))
    check_graph(checkpoint(nn.Linear(2, 2), torch.randn(2, 2), use_reentrant=False).sum())
