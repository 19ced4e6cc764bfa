"""Gradients against those of plain autograd, which holds all, and the bytes that are held."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from rosa_lightning.models.loading import enable_checkpointing
from rosa_lightning.training.compile import compile_layers
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.recompute import MemoryTracker, recomputable, recomputed
from rosa_lightning.training.speed import SpeedConfig
from tests.conftest import FAMILIES, build
from tests.model_zoo.small import build_small
from tests.training.test_loss import adapted, batch_of, packed

MODELS = {
    **{family: (lambda family=family: build(family)) for family in FAMILIES},
    "experts": lambda: build_small("MixtralConfig"),
    "squared ReLU": lambda: build_small("NemotronConfig"),
    "parallel": lambda: build_small("GPTNeoXConfig"),
}

UNGATED = ("neox", "parallel", "persimmon", "phi", "squared ReLU")


def trained(model, batch, *, on: bool, autocast=None):
    """The loss, all gradients, and the bytes that wait for the backward pass."""
    model.zero_grad()
    run = LossComputer(model, SpeedConfig(recompute_activations=on))
    run.loss(batch)  # finds out what can be left out
    with MemoryTracker(model.parameters()) as live:
        before = live.now
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = run.loss(batch)
        held = live.now - before
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, held


def check(model, batch, **options) -> float:
    """The same to the bit with and without. Returns the share of bytes that is still held."""
    wanted_loss, wanted, whole = trained(model, batch, on=False, **options)
    loss, found, held = trained(model, batch, on=True, **options)
    assert torch.equal(loss, wanted_loss)
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name
    assert any(gradient is not None for gradient in found.values())
    return held / whole


def with_norms(model):
    """A model whose norm weights train too, as in a step that scores layers."""
    for name, weight in model.named_parameters():
        if "norm" in name and weight.ndim == 1:
            weight.requires_grad_(True)
    return model


WAYS = [  # data type, autocast, whether norm weights train
    (torch.float32, None, False),
    (torch.float32, torch.bfloat16, True),
    (torch.bfloat16, None, True),
    *(
        pytest.param(*way, marks=pytest.mark.slow)
        for way in (
            (torch.float32, None, True),
            (torch.float32, torch.bfloat16, False),
            (torch.bfloat16, None, False),
            (torch.bfloat16, torch.bfloat16, False),
            (torch.bfloat16, torch.bfloat16, True),
        )
    ),
]


@pytest.mark.parametrize(("dtype", "autocast", "scoring"), WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_stay_to_the_bit_and_fewer_bytes_are_held(kind, dtype, autocast, scoring):
    model = adapted(MODELS[kind]().to(dtype))
    rows = batch_of(0, ((60, 3), (64, 4), (50, 2)))
    share = check(with_norms(model) if scoring else model, rows, autocast=autocast)
    # Without a gate, and with norms of one operation, there is nothing to gain.
    assert share < (1.001 if kind in UNGATED else 0.98)


@pytest.mark.parametrize("scoring", [False, True])
def test_with_frozen_layers_and_packed_rows_too(scoring):
    model = adapted(build("llama"))
    model.model.layers[0].requires_grad_(False)
    check(with_norms(model) if scoring else model, packed(batch_of()))


def test_a_graph_that_is_dropped_frees_what_its_modules_were_given():
    """Though another, of the same forward pass, lives on."""
    act, x = nn.SiLU(), torch.randn(1000, requires_grad=True)
    with MemoryTracker([x]) as live:
        with recomputed([act]):
            dropped = (act(x * 2) * x).sum()
            kept = (act(x * 3) * x).sum()
        both = live.now
        del dropped
        assert both - live.now >= x.nbytes
    kept.backward()


def test_a_backward_pass_may_come_twice():
    model, batch = adapted(build("qwen3")), batch_of()
    run = LossComputer(model)
    loss = run.loss(batch)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, first, again))


class Counted(nn.SiLU):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.silu(x)


def test_a_module_that_is_watched_or_changed_is_left_alone():
    act, x = Counted(), torch.randn(5, requires_grad=True)
    factor = torch.randn(5, requires_grad=True)
    act.register_forward_hook(lambda _, __, out: 3 * out)
    with recomputed([act]):
        (act(x) * factor).sum().backward()
    assert act.calls == 1
    torch.testing.assert_close(factor.grad, 3 * F.silu(x.detach()))


@pytest.mark.parametrize("act", [nn.GLU(), ACT2FN["linear"], nn.Softmax(-1)])
def test_outputs_that_are_views_or_smaller_are_right_too(act):
    """Halves of a fused projection share their storage; a linear activation gives its input."""
    x = torch.randn(3, 16, requires_grad=True)
    factors = [torch.randn(3, size, requires_grad=True) for size in (8, act(x[:, :8]).shape[1])]
    found = []
    for modules in ([act], []):
        with recomputed(modules):
            gate, up = (x * 2).chunk(2, -1)
            total = (up * factors[0]).sum() + (act(gate) * factors[1]).sum() + (gate * up).sum()
        found.append(torch.autograd.grad(total, [x, *factors]))
    assert all(map(torch.equal, *found))


def test_an_output_changed_in_place_is_held_as_it_is():
    act, x = nn.SiLU(), torch.randn(5, requires_grad=True)
    factor = torch.randn(5, requires_grad=True)
    with recomputed([act]):
        y = act(x).add_(1)
        (y * factor).sum().backward()
    torch.testing.assert_close(factor.grad, F.silu(x.detach()) + 1)


@pytest.mark.parametrize("what", ["given", "weight", "other"])
def test_what_was_changed_in_place_is_refused(what):
    """As autograd itself does it."""
    act, norm = nn.SiLU(), build_small("MixtralConfig").model.norm
    x = torch.randn(5, norm.weight.shape[0], requires_grad=True)
    given, other = x * 1, x * 2
    with recomputed([act, norm]):
        total = (norm(act(given) * other)).sum()
    changed = {"given": given, "weight": norm.weight, "other": other}[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match=r"in-place operation has changed .* to false"):
        total.backward()


def test_what_draws_or_counts_or_multiplies_is_not_made_again():
    kept = nn.ModuleList([nn.SiLU(), nn.GELU(), nn.LayerNorm(4), nn.RMSNorm(4)])
    left = [
        nn.Dropout(),
        nn.SiLU(inplace=True),
        nn.RReLU(),
        nn.BatchNorm1d(4),
        nn.Linear(4, 4),
        nn.Identity(),
    ]
    found = recomputable(nn.ModuleList([*left, *kept]))
    assert found == [*kept]


def test_checkpointed_and_compiled_models_are_left_alone():
    checkpointed, compiled = adapted(build("llama")), adapted(build("llama"))
    assert recomputable(checkpointed)
    enable_checkpointing(checkpointed)
    compile_layers(compiled, backend="eager")
    assert not recomputable(checkpointed)
    assert not recomputable(compiled)


def test_second_derivatives_are_those_of_plain_autograd():
    torch.manual_seed(0)
    layer, act = nn.Linear(4, 4), nn.SiLU()
    x = torch.randn(3, 4, requires_grad=True)

    def twice(modules):
        with recomputed(modules):
            y = (act(layer(x)) * x).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(twice([act]), twice([]))
