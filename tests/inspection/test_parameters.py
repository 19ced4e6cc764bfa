from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rosa_lightning.adapters.methods import FullFinetuning, apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.dls.selector import PolicyOptions, SelectionConfig
from rosa_lightning.inspection.memory import MemoryEstimate
from rosa_lightning.inspection.parameters import (
    compare_memory,
    memory_table,
    parameter_tables,
    summarize,
)
from rosa_lightning.models.loading import load_skeleton
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build
from tests.model_zoo.small import build_small

STEP = {"batch_size": 2, "length": 40, "response_length": 8}


def printed(renderable: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def adapted(family: str, roae: RoAEConfig | None = None, **changes):
    model = build(family, **changes)
    inject_roae(model, roae or RoAEConfig(rank=2))
    return model


def test_every_layer_is_told_in_full():
    model = load_skeleton("tiny")
    inject_roae(model, RoAEConfig(rank=16, low_freq_ratio=0.25, targets=("q", "up")))
    ((layer, indices),) = summarize(model).items()
    assert indices == [0, 1, 2, 3]
    q, up = layer.projections
    assert (q.projection, q.target, q.num_heads) == ("self_attn.q_proj", "q", 5)
    assert q.dims == (*range(12, 16), *range(28, 32))
    assert (q.table.head_dim, len(q.adapted_pairs), len(q.table.pairs)) == (32, 4, 16)
    assert min(q.table.inv_freq) == pytest.approx(10000 ** (-30 / 32), rel=1e-4)
    assert q.frequencies[1] == pytest.approx(10000 ** (-24 / 32), rel=1e-4)
    assert q.num_parameters == 16 * 160 + 5 * 8 * 16
    assert layer.projection_sizes[0] == 160 * 160 + 160 + q.num_parameters
    assert (up.projection, up.dims, up.table.pairs) == ("mlp.up_proj", (), ())
    assert up.num_parameters == 16 * (160 + 432)
    assert layer.trainable == q.num_parameters + up.num_parameters
    own = 4 * (160 * 160 + 160) + 3 * 160 * 432 + 2 * 160
    assert layer.total == own + layer.trainable


def test_the_numbers_of_every_layer_and_of_the_model_are_printed():
    model = load_skeleton("tiny")
    inject_roae(model, RoAEConfig(rank=16, low_freq_ratio=0.25))
    text = printed(parameter_tables(model))
    lines = [line.split() for line in text.splitlines()]
    assert ["model.layers", "0-3"] in lines
    assert ["q", "self_attn.q_proj", "5", "3,200", "28,960", "11.05"] in lines
    assert ["one", "layer", "6,400", "317,120", "2.02"] in lines
    assert ["4", "layers", "25,600", "1,268,480", "2.02"] in lines
    assert ["other", "parts", "0", "131,680", "0.00"] in lines
    assert ["model", "25,600", "1,400,160", "1.83"] in lines
    flat = " ".join(text.split())
    assert "q, k: 4 of 16 RoPE pairs, dimensions 12-15, 28-31 of 32, which turn once in" in flat
    assert "which turn once in 6,283 to 35,333 tokens" in flat  # 2 pi 10000^(12/16), ^(15/16)


def test_layers_that_are_alike_share_a_table_and_the_others_have_their_own():
    text = printed(parameter_tables(adapted("llama", num_hidden_layers=80)))
    assert "model.layers 0-79" in text
    assert len(text.splitlines()) < 25
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = printed(parameter_tables(adapted("gemma3", layer_types=kinds, num_hidden_layers=6)))
    assert "model.layers 0-1, 3-4" in text
    assert "model.layers 2, 5" in text
    assert text.count("which turn once in") == 2


def test_a_layer_without_a_term_says_so():
    text = printed(parameter_tables(adapted("smollm3")), width=200)
    assert re.search(r"layers 1: no term, as no attention is rotated; 3\d,\d{3} parameters", text)
    rotated, other = summarize(adapted("smollm3"))
    assert (len(rotated.projections), other.projections, other.trainable) == (2, (), 0)


@pytest.mark.filterwarnings("ignore")
def test_reasons_why_a_layer_does_without_are_told_once():
    model = build_small("Qwen2MoeConfig")
    report = inject_roae(model, RoAEConfig(rank=2, targets=("q", "k", "gate", "up")))
    assert len(report.notes) == 4
    assert [len(layer.notes) for layer in summarize(model)] == [2]
    text = " ".join(printed(parameter_tables(model)).split())
    assert text.count("no term on gate, up: its routed experts") == 1


def test_terms_on_a_fused_projection_and_after_a_norm_name_their_place():
    text = printed(parameter_tables(adapted("phi3")))
    assert len(re.findall(r"[qk] +self_attn\.qkv_proj +[24] ", text)) == 2
    roae = RoAEConfig(rank=2, placement="state")
    text = printed(parameter_tables(adapted("qwen3", roae)))
    assert "q (after self_attn.q_norm), k (after self_attn.k_norm)" in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["DeepseekV3", "LongcatFlash", "GPTNeoX", "HrmText", "Moshi"])
def test_tables_fit_80_columns_and_keep_numbers_whole(family):
    model = build_small(f"{family}Config")
    inject_roae(model, RoAEConfig(rank=2))
    text = printed(parameter_tables(model))
    assert all(len(line) <= 80 for line in text.splitlines())
    for layer in summarize(model):
        for number in (layer.trainable, layer.total, *layer.projection_sizes):
            assert f" {number:,} " in text


def test_memory_of_the_kinds_of_steps_is_compared():
    estimates = compare_memory(adapted("llama", num_hidden_layers=4), **STEP)
    assert list(estimates) == ["all layers", "layers 2-3", "selecting"]
    every, half, selecting = estimates.values()
    assert half.activations == pytest.approx(every.activations / 2, rel=0.1)
    assert half.gradients == every.gradients / 2
    assert half.peak < every.peak < selecting.peak
    text = printed(memory_table(estimates))
    assert all(len(line) <= 80 for line in text.splitlines())
    for line in ("weights, float32", "trained weights", "gradients", "optimizer", "logits", "peak"):
        assert re.search(rf"^ {line} +(\S+ KiB +){{2}}\S+ KiB|^ {line} .*MiB", text, re.M)


def test_the_layers_of_policy_fixed_are_those_estimated():
    options = PolicyOptions(fixed_layers=[0, 3])
    fixed = SelectionConfig(policy="fixed", policy_options=options)
    estimates = compare_memory(adapted("llama", num_hidden_layers=4), selection=fixed, **STEP)
    assert list(estimates) == ["all layers", "fixed layers 0, 3", "selecting"]
    # The backward runs down to layer 0.
    assert estimates["fixed layers 0, 3"].activations > 0.9 * estimates["all layers"].activations


def test_what_cannot_be_estimated_is_told_and_the_rest_shown():
    sizes = dict.fromkeys(["adapter", "gradients", "optimizer", "activations", "logits", "peak"], 0)
    estimate = MemoryEstimate(base={"bfloat16": 10, "float32": 2048}, **sizes)
    text = printed(memory_table({"all layers": estimate, "a": "no [1] here", "b": "no [1] here"}))
    assert "weights, bfloat16" in text
    assert "2.00 KiB" in text
    assert text.splitlines()[-1].strip() == "a, b: no [1] here"


def test_the_modules_that_a_method_of_peft_adapts_are_told_and_those_outside_the_layers():
    model = build("llama", tie_word_embeddings=False)
    settings = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": None}
    apply_method(model, PeftMethod("peft.LoraConfig", settings))
    text = " ".join(printed(parameter_tables(model)).split())
    q, embedding = model.model.layers[0].self_attn.q_proj, model.model.embed_tokens
    own, all_of_it = 2 * sum(q.base_layer.weight.shape), sum(p.numel() for p in q.parameters())
    assert f"self_attn.q_proj {own:,} {all_of_it:,}" in text
    rest = sum(p.numel() for p in embedding.parameters() if p.requires_grad)
    assert f"other parts {rest:,} " in text
    assert f"model {2 * own + rest:,} " in text


def test_full_finetuning_trains_every_module():
    model = build("llama")
    apply_method(model, FullFinetuning())
    text = " ".join(printed(parameter_tables(model)).split())
    assert "input_layernorm 64 64 100.00" in text
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"model {total:,} {total:,} 100.00" in text


def test_a_layer_in_which_nothing_trains_is_told():
    model = build("llama")
    settings = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    apply_method(model, PeftMethod("peft.LoraConfig", settings))
    assert "model.layers 0: nothing trains;" in printed(parameter_tables(model))
