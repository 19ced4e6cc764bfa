"""What is told of a way to run a model that differs from the model's own."""

from functools import partial

import pytest
import torch
from torch import nn

from rosa_lightning import RoAEConfig, inject_roae
from rosa_lightning.training import head, pack_attention, prompts, shared_prefix
from rosa_lightning.training.head import layer_list
from rosa_lightning.training.probes import RefusedError, difference, few_layers, tried
from tests.conftest import build
from tests.model_zoo import small


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (lambda model, x: model(x), ""),
        (lambda model, x: model(x) + 1, "Linear gives other logits after a prefix"),
        (lambda model, x: model(x.detach()) + 0 * x, ""),
        (lambda model, x: model(x) + 0 * model.weight.sum() / 0, "Linear gives other logits"),
        (
            lambda model, x: model(2 * x) - 2 * model(x).detach() + model(x).detach(),
            "the gradients",
        ),
        (lambda model, x: model(None), "Linear cannot go on: TypeError: "),
    ],
)
def test_logits_gradients_and_errors_are_told(way, told):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)

    def run() -> torch.Tensor:
        return way(model, x)

    about = {"to": "go on", "where": "after a prefix", "gradients": True}
    found = difference(model, run, model(x), **about)
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_a_reason_stands_by_itself():
    def run() -> torch.Tensor:
        raise RefusedError("this kernel keeps rows apart by itself")

    about = {"to": "go on", "where": "after a prefix"}
    wanted = torch.zeros(1, 4)
    assert (
        difference(nn.Linear(4, 4), run, wanted, **about)
        == "this kernel keeps rows apart by itself"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and torch
def test_a_kernel_that_keeps_rows_apart_is_named():
    model = build("llama", attn_implementation="flex_attention")
    reason = pack_attention.unsupported_reason(model, training=False)
    assert reason == "flex_attention keeps rows apart by itself"


def kept(model) -> list[int]:
    """Numbers of the layers that a way is tried with."""
    own = [*layer_list(model)]
    with few_layers(model):
        found = [own.index(layer) for layer in layer_list(model)]
        assert [*model.base_model.layers] == [own[number] for number in found]
    assert [*layer_list(model)] == own
    return found


def test_a_way_is_tried_with_the_first_layers_of_each_kind_and_the_last():
    model = build("llama", num_hidden_layers=8)
    layers = model.base_model.layers
    assert kept(model) == [0, 7]
    layers[2].self_attn.attention_dropout = 0.1
    assert kept(model) == [0, 1, 2, 7]
    layers[4].mlp.requires_grad_(False)
    assert kept(model) == [0, 1, 2, 3, 4, 7]
    # The last one stands in no place of another kind.
    layers[5].mlp.act_fn = nn.GELU()
    layers[7].mlp.act_fn = nn.GELU()
    assert kept(model) == [*range(8)]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: vars(layer).update(forward=layer.forward),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_buffer("shift", torch.ones(1)),
        lambda layer: layer.mlp.float().to(torch.bfloat16),
    ],
)
def test_a_layer_that_differs_in_some_other_way_is_tried(change):
    model = build("llama", num_hidden_layers=6)
    change(model.base_model.layers[3])
    assert kept(model) == [0, 1, 2, 3, 5]


def test_numbers_of_buffers_make_kinds_but_where_they_are_weights():
    model = build("llama", num_hidden_layers=6)
    for number, layer in enumerate(model.base_model.layers):
        layer.register_buffer("packed", torch.randint(99, (80, 80)))
        layer.register_buffer("base", torch.ones(1) + (number == 3))
    assert kept(model) == [0, 1, 2, 3, 5]
    model.base_model.layers[3].base.fill_(1)
    assert kept(model) == [0, 5]


def test_what_a_configuration_says_of_layers_makes_kinds():
    kinds = ["full_attention"] * 2 + ["sliding_attention"] + ["full_attention"] * 4
    model = build("gemma3", num_hidden_layers=7, layer_types=kinds)
    for layer in model.base_model.layers:
        layer.attention_type = layer.self_attn.is_sliding = layer.self_attn.sliding_window = None
        layer.self_attn.layer_type = None
    assert kept(model) == [0, 1, 2, 6]


def test_layers_are_the_list_with_the_most_weights():
    model = build("llama")
    model.base_model.projections = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert layer_list(model) is model.base_model.layers


def test_what_fails_with_few_layers_is_tried_with_all():
    model = build("llama", num_hidden_layers=6)

    def reason() -> str:
        model.base_model.layers[5]
        return ""

    with few_layers(model), pytest.raises(IndexError):
        reason()
    assert tried(model, reason) == ""


def test_what_seems_impossible_with_few_layers_is_tried_with_all():
    model, tried_with = build("llama", num_hidden_layers=6), []

    def reason(most: int) -> str:
        tried_with.append(len(layer_list(model)))
        return "too few layers" if len(layer_list(model)) < most else ""

    assert tried(model, lambda: reason(6)) == ""
    assert tried(model, lambda: reason(7)) == "too few layers"
    assert tried(model, lambda: reason(0)) == ""
    assert tried_with == [2, 6, 2, 6, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", small.causal_models())
def test_few_layers_decide_as_all_of_them(name, monkeypatch):
    monkeypatch.setattr(small, "REPEATS", 3)
    for size in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        monkeypatch.setitem(small.SMALL, size, 5)
    try:
        model = small.build_small(name)
        inject_roae(model, RoAEConfig(rank=2))
    except Exception as error:
        pytest.skip(f"not adapted: {error}")
    whole = len(layer_list(model))
    with few_layers(model):
        if len(layer_list(model)) == whole:
            pytest.skip("there are no fewer layers")
    ids = torch.arange(40) * 7 % 60 + 3
    ways = [
        partial(shared_prefix.unsupported_reason, model, ids[:20], training=True),
        partial(head.unsupported_reason, model, ids.view(2, 20)),
        lambda: "" if head.last_block(model, ids.view(2, 20)) else "none",
        partial(prompts.unsupported_reason, model),
        partial(pack_attention.unsupported_reason, model, training=True),
    ]
    for way in ways:
        assert bool(tried(model, way)) == bool(way())
