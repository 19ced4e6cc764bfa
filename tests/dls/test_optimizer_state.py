from copy import deepcopy

import pytest
import torch
import torchao.optim
from torch import nn, optim

from rosa_lightning.dls.optimizer_state import (
    check_optimizer_state,
    fill_state,
    free_state,
    global_gradients,
    reset_state,
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
"""Their state has entries that are made anew."""


def weights():
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=source)) for _ in range(2)]


def step(optimizer, parameters, seed):
    source = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2, generator=source)
    optimizer.step()


@pytest.mark.parametrize("build", (OPTIMIZERS | OTHERS).values(), ids=OPTIMIZERS | OTHERS)
@pytest.mark.parametrize("forget", [reset_state, free_state])
def test_a_forgotten_parameter_goes_on_as_under_a_new_optimizer(build, forget):
    parameters = weights()
    optimizer = build(parameters)
    for seed in range(4):
        step(optimizer, parameters, seed)
    first, second = parameters
    new, old = nn.Parameter(first.detach().clone()), deepcopy(optimizer.state.get(second))

    forget([optimizer], [first])
    assert str(optimizer.state.get(second)) == str(old)
    fresh = build([new])
    for seed in range(4, 7):
        step(optimizer, [first], seed)
        step(fresh, [new], seed)
        torch.testing.assert_close(first, new, rtol=0, atol=0)


def test_a_reset_keeps_every_entry_where_it_is():
    parameters = weights()
    optimizer = OPTIMIZERS["adamw"](parameters)
    step(optimizer, parameters, 0)
    before = {key: value.data_ptr() for key, value in optimizer.state[parameters[0]].items()}
    reset_state([optimizer], parameters)
    after = {key: value.data_ptr() for key, value in optimizer.state[parameters[0]].items()}
    assert after == before


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
@torch.compiler.set_stance("force_eager")
def test_moments_of_eight_bits_are_reset_in_place(name):
    source = torch.Generator().manual_seed(0)
    # Smaller weights than this have moments of 32 bits.
    weight = nn.Parameter(torch.randn(64, 64, generator=source))
    optimizer = getattr(torchao.optim, name)([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn(64, 64, generator=source)
        optimizer.step()
    new = nn.Parameter(weight.detach().clone())
    entry = optimizer.state[weight]["exp_avg"]
    reset_state([optimizer], [weight])
    assert optimizer.state[weight]["exp_avg"] is entry
    fresh = getattr(torchao.optim, name)([new], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn(64, 64, generator=source)
        new.grad = weight.grad.clone()
        optimizer.step()
        fresh.step()
        torch.testing.assert_close(weight, new, rtol=0, atol=0)


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


@pytest.mark.parametrize("mode", ["reset", "free"])
def test_an_optimizer_that_makes_its_state_once_is_refused(mode):
    optimizer = optim.Adagrad(weights(), lr=0.1)
    with pytest.raises(ValueError, match=r"Adagrad.*optimizer_state='keep'"):
        check_optimizer_state(mode, [optimizer])
    check_optimizer_state("keep", [optimizer])


def test_in_one_process_the_gradients_are_those_at_hand():
    first, second = weights()
    second.grad = torch.ones(3, 2)
    gradients = global_gradients([[first], [second]], nn.Module(), torch.device("cpu"))
    assert gradients[0] == [None]
    assert gradients[1][0] is second.grad
