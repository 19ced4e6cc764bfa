from copy import deepcopy

import pytest
import torch
from torch import nn, optim

from rosa_lightning.dls.optimizer_state import (
    fill_state,
    forget_state,
    global_gradients,
)

OPTIMIZERS = {
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adamw capturable rate": lambda p: optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "adam with decay": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.5),
    "amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "muon": lambda p: optim.Muon(p, lr=0.1),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
}
OTHERS = {
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
}
"""Their state does not start at zero."""


def weights():
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=source)) for _ in range(2)]


def step(optimizer, parameters, seed):
    source = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2, generator=source)
    optimizer.step()


@pytest.mark.parametrize("build", (OPTIMIZERS | OTHERS).values(), ids=OPTIMIZERS | OTHERS)
def test_a_forgotten_parameter_goes_on_as_under_a_new_optimizer(build):
    parameters = weights()
    optimizer = build(parameters)
    for seed in range(4):
        step(optimizer, parameters, seed)
    first, second = parameters
    new, old = nn.Parameter(first.detach().clone()), deepcopy(optimizer.state.get(second))

    forget_state([optimizer], [first])
    assert str(optimizer.state.get(second)) == str(old)
    fresh = build([new])
    for seed in range(4, 7):
        step(optimizer, [first], seed)
        step(fresh, [new], seed)
        torch.testing.assert_close(first, new, rtol=0, atol=0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_filled_state_changes_nothing_of_what_training_does(make):
    """The second weight takes its first step when the first has made three."""
    trained = []
    for filled in (False, True):
        pair = weights()
        groups = [{"params": [pair[0]]}, {"params": [pair[1]], "weight_decay": 0.25}]
        optimizer = make(groups)
        before = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        for step in range(6):
            if filled:  # also in the middle of training, with gradients at hand
                held = [weight.grad for weight in pair]
                fill_state(optimizer)
                assert all(a is w.grad for a, w in zip(held, pair, strict=True))
            for index, weight in enumerate(pair):
                weight.grad = weight.detach().sin() if index == 0 or step >= 3 else None
            optimizer.step()
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == before
        trained.append([weight.detach().clone() for weight in pair])
        steps = [float(optimizer.state[w].get("step", 0)) for w in pair]
    for plain, same in zip(*trained, strict=True):
        assert torch.equal(plain, same)
    assert steps in ([6.0, 3.0], [0.0, 0.0])


def test_in_one_process_the_gradients_are_those_at_hand():
    first, second = weights()
    second.grad = torch.ones(3, 2)
    gradients = global_gradients([[first], [second]], nn.Module(), torch.device("cpu"))
    assert gradients[0] == [None]
    assert gradients[1][0] is second.grad
