from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from rosa_lightning.dls.checks import check_module, check_strategy, check_wrapped
from tests.conftest import build


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
    model._flat_param = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"use_orig_params=False.*Leave use_orig_params out"):
        check_wrapped(model)


def enabled(**options) -> nn.Module:
    model = build("llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    return model


@pytest.mark.filterwarnings("ignore:A hook of enable_input_require_grads")
@pytest.mark.parametrize(
    "model",
    [
        partial(enabled, use_reentrant=True),
        lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2), CheckpointImpl.REENTRANT)),
    ],
    ids=["transformers", "torch"],
)
def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match=r"reentrant.*Enable it with use_reentrant=False") as error:
        check_module(model())
    assert "\n" not in str(error.value)


def test_the_hook_that_checkpointing_leaves_on_the_embeddings_is_warned_of():
    model = enabled(use_reentrant=False)
    with pytest.warns(UserWarning, match=r"saves no time\. Call disable_input_require_grads\(\)"):
        check_module(model)
    model.disable_input_require_grads()
    check_module(model)
    check_module(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))))
