from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rosa_lightning import RoAEConfig, inject_roae
from rosa_lightning.inspection.flops import flops_per_token, head_flops, lowest_active, uncounted
from tests.conftest import build


@pytest.fixture
def llama():
    model = build("llama", num_hidden_layers=4)
    inject_roae(model, RoAEConfig(rank=4))
    return model


@pytest.mark.parametrize("lowest", [0, 2])
def test_operations_are_those_that_torch_counts_in_products_with_weights(llama, lowest, ids_BT):
    blocks = list(llama.model.layers)
    for block in blocks[:lowest]:
        block.requires_grad_(False)
    assert lowest_active(blocks) == lowest
    counter = FlopCounterMode(display=False)
    with counter:
        llama(input_ids=ids_BT, labels=ids_BT).loss.backward()
    products = ("mm", "addmm")  # attention's own are batched, or of its kernel
    total = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation).removeprefix("aten.") in products
    )
    counted = flops_per_token(blocks) + head_flops(llama)
    # What reads the input of the lowest layer computes no gradient of it.
    attention = blocks[lowest].self_attn
    spared = sum(getattr(attention, f"{p}_proj").weight.numel() for p in "qkv")
    spared += sum(getattr(attention, f"{p}_proj").roae_A.numel() for p in "qk")
    assert total == ids_BT.numel() * (counted - 2 * spared)


def test_without_a_trained_layer_there_is_no_backward(llama):
    blocks = list(llama.model.layers)
    full = flops_per_token(blocks)
    for block in blocks:
        block.requires_grad_(False)
    assert lowest_active(blocks) is None
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    assert flops_per_token(blocks) == 2 * matrices < full / 1.9


def test_mixtures_of_experts_and_packed_weights_are_not_counted(llama):
    assert uncounted(llama.model.layers) is None
    block = llama.model.layers[1]
    block.packed = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert uncounted(llama.model.layers) == "weights are packed"
    del block.packed
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert "some only" in str(uncounted(llama.model.layers))
    del block.experts
    block.experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    assert "three axes" in str(uncounted(llama.model.layers))
