from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from rosa_lightning.adapters.fidelity import (
    agreement,
    logits_on,
    rounding_of_base,
    sample_tokens,
)
from rosa_lightning.adapters.methods import apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.models import tiny
from rosa_lightning.roae.inject import inject_roae, roae_layers
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build


def test_agreement_and_divergence_of_distributions_by_hand():
    p, q = torch.tensor([[0.7, 0.3], [0.5, 0.5]]), torch.tensor([[0.4, 0.6], [0.5, 0.5]])
    found = agreement(p.log(), q.log() + 3)
    assert (found.num_tokens, found.greedy) == (2, 0.5)
    wanted = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert found.divergence == pytest.approx(wanted / 2, rel=1e-6)


def test_text_is_taken_where_a_tokenizer_fits_the_model():
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.folder())
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder())
    assert "market" in tokenizer.decode(sample_tokens(model, tokenizer).flatten())
    small = build("llama")
    assert sample_tokens(small, tokenizer).max() < small.config.vocab_size


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "glm"])
def test_rounding_is_that_of_the_base_against_its_own_copy_in_float32(family):
    torch.manual_seed(0)
    model = build(family, dtype=torch.bfloat16)
    ids = sample_tokens(model, None)
    wide = build(family)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    wanted = agreement(logits_on(wide, ids), logits_on(model, ids))
    inject_roae(model, RoAEConfig(rank=4))
    for _, layer in roae_layers(model):
        nn.init.normal_(layer.roae_B)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = rounding_of_base(model, ids)
    assert found.divergence == pytest.approx(wanted.divergence, rel=1e-3)
    assert found.divergence > 0
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_an_adapter_of_peft_is_left_out_and_comes_back(ids_BT):
    model = build("llama", dtype=torch.bfloat16)
    ids = sample_tokens(model, None)
    plain = rounding_of_base(model, ids)
    apply_method(model, PeftMethod("peft.LoraConfig", {"r": 4, "init_lora_weights": False}))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = model(ids_BT).logits
    assert rounding_of_base(model, ids).divergence == pytest.approx(plain.divergence, rel=1e-3)
    assert torch.equal(model(ids_BT).logits, expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_base_in_float32_is_compared_with_nothing():
    model = build("llama")
    assert rounding_of_base(model, sample_tokens(model, None)) is None
