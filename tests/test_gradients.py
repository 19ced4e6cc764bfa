from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam, RMSprop

from rosa_lightning.gradients import fill_optimizer_state, global_gradients

OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw amsgrad": lambda p: AdamW(p, lr=0.1, amsgrad=True, foreach=False),
    "adamw capturable rate": lambda p: AdamW(p, lr=torch.tensor(0.1), fused=True),
    "adam with decay": lambda p: Adam(p, lr=0.1, weight_decay=0.5),
    "nadam": lambda p: NAdam(p, lr=0.1),
    "radam": lambda p: RAdam(p, lr=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: SGD(p, lr=0.1),
}


def two_weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3)) for _ in range(2)]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_filled_state_changes_nothing_of_what_training_does(make):
    """The second weight takes its first step when the first has made three."""
    trained = []
    for filled in (False, True):
        weights = two_weights()
        groups = [{"params": [weights[0]]}, {"params": [weights[1]], "weight_decay": 0.25}]
        optimizer = make(groups)
        before = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        for step in range(6):
            if filled:  # also in the middle of training, with gradients at hand
                held = [weight.grad for weight in weights]
                fill_optimizer_state(optimizer)
                assert all(a is w.grad for a, w in zip(held, weights, strict=True))
            for index, weight in enumerate(weights):
                weight.grad = weight.detach().sin() if index == 0 or step >= 3 else None
            optimizer.step()
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == before
        trained.append([weight.detach().clone() for weight in weights])
        steps = [float(optimizer.state[w].get("step", 0)) for w in weights]
    for plain, same in zip(*trained, strict=True):
        assert torch.equal(plain, same)
    assert steps in ([6.0, 3.0], [0.0, 0.0])


def test_every_weight_has_state_once_filled():
    weights = two_weights()
    optimizer = AdamW(weights)
    fill_optimizer_state(optimizer)
    assert all(set(optimizer.state[w]) == {"step", "exp_avg", "exp_avg_sq"} for w in weights)
    assert not any(value.any() for w in weights for value in optimizer.state[w].values())


def test_in_one_process_the_gradients_are_those_at_hand():
    weights = two_weights()
    weights[1].grad = torch.ones(3)
    gradients = global_gradients([[weights[0]], [weights[1]]], nn.Module(), torch.device("cpu"))
    assert gradients[0] == [None]
    assert gradients[1][0] is weights[1].grad
