import peft
import pytest
import torch
from torch import nn

from rosa_lightning.dls.layers import find_layers
from tests.conftest import build


class WeightlessNorm(nn.Module):
    pass


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.q_norm = nn.RMSNorm(2)
        # Modules of adapters inside the layers are no layers.
        self.adapters = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 4)])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(4)
        self.attention = Attention()
        self.post_attention_layernorm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self, num_layers=3):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(num_layers)])


def test_the_only_stack_is_found_with_its_own_norms():
    root = nn.ModuleDict({"model": Model()})
    found = find_layers(root)
    block = root["model"].layers[1]
    assert [layer.name for layer in found] == [f"model.layers.{i}" for i in range(3)]
    assert found[1].norms == (block.input_layernorm.weight, block.post_attention_layernorm.weight)
    assert set(found[1].candidates.values()) == set(block.parameters())
    assert "model.layers.1.attention.q_proj.weight" in found[1].candidates
    root["model"].layers[1].attention.requires_grad_(False)
    found = find_layers(root)
    assert not [name for name in found[1].candidates if "attention" in name.split(".")]


def test_patterns_choose_norms_and_candidates():
    (first, *_) = find_layers(Model(), norms="*.q_norm, post_*", trainable="*q_proj*,*.bias")
    assert [weight.numel() for weight in first.norms] == [2, 4]
    assert {name.removeprefix("layers.0.") for name in first.candidates} == {
        "attention.q_proj.weight",
        "attention.q_proj.bias",
        "attention.adapters.0.bias",
        "attention.adapters.1.bias",
        "post_attention_layernorm.bias",
    }


def test_one_of_several_lists_is_named_by_a_path_or_a_pattern():
    root = nn.ModuleDict({"encoder": Model(3), "decoder": Model(5)})
    with pytest.raises(ValueError, match=r"found 2: encoder.layers, decoder.layers"):
        find_layers(root)
    assert len(find_layers(root, "decoder.layers")) == 5
    assert len(find_layers(root, "dec*.layers")) == 5
    with pytest.raises(ValueError, match=r"'\*.layers' matches 2.*encoder.layers, decoder.layers"):
        find_layers(root, "*.layers")
    with pytest.raises(ValueError, match=r"'encoder.layer' matches 0.*encoder.layers"):
        find_layers(root, "encoder.layer")
    for path in (None, "encoder.layers"):
        with pytest.raises(ValueError, match=r"(found|matches) 0.*layers"):
            find_layers(nn.Linear(2, 2), path)


def test_a_sequential_of_layers_can_be_named():
    root = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})
    assert [layer.name for layer in find_layers(root, "blocks")] == ["blocks.0", "blocks.1"]


def test_a_layer_whose_norms_have_no_weight_is_named():
    root = Model()
    root.layers[1].input_layernorm = WeightlessNorm()
    assert len(find_layers(root)[1].norms) == 1
    root.layers[1].post_attention_layernorm = WeightlessNorm()
    with pytest.raises(ValueError, match=r"Layer 'layers.1' has no norm weight.*attention.q_norm"):
        find_layers(root)


def test_layers_that_share_a_parameter_or_a_frozen_norm_are_refused():
    shared, normed = Model(), Model()
    shared.layers[2].attention = shared.layers[0].attention
    normed.layers[0].input_layernorm.requires_grad_(False)
    normed.layers[2].input_layernorm = normed.layers[0].input_layernorm
    for root, setting in ((shared, "trainable"), (normed, "norms")):
        with pytest.raises(ValueError, match=rf"'layers.0' and 'layers.2' share.*{setting}="):
            find_layers(root)
    assert len(find_layers(normed, norms="post*")) == 3


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("pattern", [None, "*layernorm", "*layernorm*"])
@pytest.mark.parametrize("wrapped", [[], ["input_layernorm"], ["*"], "tuned"])
def test_norms_that_peft_trains_score_with_the_weights_that_take_gradients(wrapped, pattern):
    base = build("llama")
    names = ["input_layernorm", "post_attention_layernorm"]
    if wrapped == "tuned":
        config = peft.LNTuningConfig(target_modules=names)
    else:
        kept = names if wrapped == ["*"] else wrapped
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=kept)
    model = peft.get_peft_model(base, config)
    layers = find_layers(model, norms=pattern)
    for layer in layers:
        for norm in layer.norms:
            norm.requires_grad_(True)
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert [len(layer.norms) for layer in layers] == [2, 2]
    assert all(norm.grad is not None for layer in layers for norm in layer.norms)


def test_layers_wrapped_by_the_compiler_are_seen_through():
    root = Model()
    plain = find_layers(root)
    for index, block in enumerate(root.layers):
        root.layers[index] = torch.compile(block, backend="eager")
    assert find_layers(root) == plain
