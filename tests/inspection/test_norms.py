from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rosa_lightning import RoAEConfig, inject_roae
from rosa_lightning.inspection.norms import find_updates, update_norm, update_norms
from rosa_lightning.roae.inject import roae_layers
from tests.conftest import build


def adapted(family: str, **options) -> nn.Module:
    """A model whose terms are all different from zero."""
    model = build(family)
    inject_roae(model, RoAEConfig(rank=3, alpha=12, **options))
    for _, term in roae_layers(model):
        nn.init.normal_(term.roae_B, std=0.3)
    return model


@torch.no_grad()
def test_the_norm_is_that_of_the_product():
    for _, term in roae_layers(adapted("llama")):
        product = term.scale * term.roae_B.double() @ term.roae_A.double()
        assert float(update_norm(term)) == pytest.approx(float(product.norm()), rel=1e-12)


def test_the_norm_is_that_of_what_merging_adds_to_the_weight():
    model = adapted("phi3")  # q and k are two terms on one fused projection
    updates = find_updates(model)
    assert [(update.layer, update.target) for update in updates] == [
        (0, "q"),
        (0, "k"),
        (1, "q"),
        (1, "k"),
    ]
    norms = dict(zip([(u.layer, u.target) for u in updates], update_norms(updates), strict=True))
    for number, layer in enumerate(model.model.layers):
        outer = layer.self_attn.qkv_proj
        before = outer.weight.detach().clone()
        inner = outer.base
        inner.merge()
        outer.merge()
        moved = float((outer.weight - before).double().norm())
        wanted = math.hypot(norms[number, "q"], norms[number, "k"])
        assert moved == pytest.approx(wanted, rel=1e-5)


def test_the_base_norm_is_that_of_the_rows_that_take_the_term():
    model = adapted("llama", low_freq_ratio=0.5)
    update = find_updates(model)[1]
    term = model.model.layers[0].self_attn.k_proj
    assert update.terms == (term,)
    # Half-split pairs of 16 dimensions a head: the slower half of the pairs is 4-7 and 12-15.
    rows = [head * 16 + dim for head in range(2) for dim in (4, 5, 6, 7, 12, 13, 14, 15)]
    assert update.base_norm == pytest.approx(float(term.weight[rows].norm()), rel=1e-5)


def test_a_term_after_a_norm_has_no_weight_to_be_compared_with():
    for update in find_updates(adapted("qwen3", placement="state")):
        assert update.base_norm is None
        assert update_norms([update])[0] > 0


def test_a_packed_weight_has_no_norm():
    model = adapted("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.base.weight = packed
    known = {(u.layer, u.target): u.base_norm is not None for u in find_updates(model)}
    assert known == {(0, "q"): True, (0, "k"): True, (1, "q"): False, (1, "k"): True}


def test_sharded_adapters_are_refused():
    model = adapted("llama")
    term = model.model.layers[0].self_attn.q_proj
    term.roae_B = nn.Parameter(term.roae_B.detach().flatten()[:5])  # as FSDP shows its piece
    with pytest.raises(ValueError, match="shards"):
        find_updates(model)


def test_a_model_without_roae_has_no_updates():
    assert find_updates(build("llama")) == []


def test_adapters_are_found_inside_another_module():
    outer = nn.ModuleDict({"policy": adapted("llama"), "value": nn.Linear(2, 2)})
    assert len(find_updates(outer)) == 4


def test_a_new_adapter_has_moved_nothing():
    model = build("llama")
    inject_roae(model, RoAEConfig(rank=3))
    assert update_norms(find_updates(model)) == [0.0] * 4
