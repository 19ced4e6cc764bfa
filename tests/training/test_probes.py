"""What is told of a way to run a model that differs from the model's own."""

from functools import partial

import pytest
import torch
from torch import nn

from rosa_lightning import RoAEConfig, inject_roae
from rosa_lightning.training import head, pack_attention, prompts, shared_prefix
from rosa_lightning.training.head import decoder_layers
from rosa_lightning.training.probes import RefusedError, difference, few_layers, tried
from tests.conftest import build
from tests.model_zoo.small import SMALL, build_small, causal_models


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
    own = [*decoder_layers(model)]
    with few_layers(model):
        found = [own.index(layer) for layer in decoder_layers(model)]
        assert [*model.base_model.layers] == [own[number] for number in found]
    assert [*decoder_layers(model)] == own
    return found


def test_a_layer_of_each_kind_is_tried():
    model = build("llama", num_hidden_layers=8)
    assert kept(model) == [0, 7]
    # Other settings, another type, and others that train.
    model.base_model.layers[2].self_attn.attention_dropout = 0.1
    model.base_model.layers[5].mlp.act_fn = nn.GELU()
    model.base_model.layers[4].requires_grad_(False)
    assert kept(model) == [0, 2, 4, 5, 7]
    model.base_model.layers[6].requires_grad_(False)
    assert kept(model) == [0, 2, 4, 5, 7]


def test_what_a_configuration_says_of_layers_makes_kinds():
    kinds = ["full_attention"] * 3 + ["sliding_attention", "full_attention"]
    model = build("gemma3", num_hidden_layers=5, layer_types=kinds)
    for layer in model.base_model.layers:
        layer.attention_type = layer.self_attn.is_sliding = layer.self_attn.sliding_window = None
        layer.self_attn.layer_type = None
    assert kept(model) == [0, 3, 4]


def test_what_seems_impossible_with_few_layers_is_tried_with_all():
    model, tried_with = build("llama", num_hidden_layers=6), []

    def reason(most: int) -> str:
        tried_with.append(len(decoder_layers(model)))
        return "too few layers" if len(decoder_layers(model)) < most else ""

    assert tried(model, lambda: reason(6)) == ""
    assert tried(model, lambda: reason(7)) == "too few layers"
    assert tried(model, lambda: reason(0)) == ""
    assert tried_with == [2, 6, 2, 6, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", causal_models())
def test_few_layers_decide_as_all_of_them(name, monkeypatch):
    for size in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        monkeypatch.setitem(SMALL, size, 5)
    try:
        model = build_small(name)
        inject_roae(model, RoAEConfig(rank=2))
    except Exception as error:
        pytest.skip(f"not adapted: {error}")
    ids = torch.arange(40) * 7 % 60 + 3
    ways = [
        partial(shared_prefix.unsupported_reason, model, ids[:20], training=True),
        partial(head.unsupported_reason, model, ids.view(2, 20)),
        partial(prompts.unsupported_reason, model),
        partial(pack_attention.unsupported_reason, model, training=True),
    ]
    for way in ways:
        assert bool(tried(model, way)) == bool(way())
