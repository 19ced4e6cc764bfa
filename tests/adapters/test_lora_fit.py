from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rosa_lightning.adapters.lora import from_lora
from rosa_lightning.adapters.peft_format import LoraFiles
from rosa_lightning.cli.small import build_small
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"
QKV = "gpt_neox.layers.1.attention.query_key_value"


def lora(*modules: tuple[str, int, int, list[int]], rank: int = 3, **options: Any) -> LoraFiles:
    """LoRA by hand: path, inputs, outputs, and the rows of B that are not zero."""
    tensors: dict[str, Tensor] = {}
    for path, inputs, outputs, rows in modules:
        B = torch.zeros(outputs, rank)
        B[rows] = torch.randn(len(rows), rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    return LoraFiles({"r": rank, "lora_alpha": 6, **options}, tensors, {})


def refusal(family: str, files: LoraFiles, config: RoAEConfig | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        from_lora(build(family), files, config)
    assert "\n" not in str(error.value)
    return str(error.value)


# Llama: heads of 16 in halves, so that pair i is (i, i + 8), the slowest last. Four query heads.


@pytest.mark.parametrize(
    ("row", "head", "dim", "ratio"), [(0, 0, 0, 1.0), (37, 2, 5, 0.375), (60, 3, 12, 0.5)]
)
def test_a_row_off_the_low_frequencies_is_named_with_the_ratio_it_needs(row, head, dim, ratio):
    files = lora((Q, 64, 64, [7, row, 63]), (K, 64, 32, [15]))
    assert refusal("llama", files, RoAEConfig()) == (
        f"the LoRA changes row {row} of {Q}, dimension {dim} of q head {head}, and "
        "low_freq_ratio=0.25 adapts slower ones alone. Set model.roae.low_freq_ratio to "
        f"{ratio}."
    )
    config, _ = from_lora(build("llama"), files, RoAEConfig(low_freq_ratio=ratio))
    assert config.low_freq_ratio == ratio
    assert from_lora(build("llama"), files)[0].low_freq_ratio == ratio


def test_a_trained_lora_on_all_rows_is_refused_at_a_lower_ratio():
    files = lora((Q, 64, 64, list(range(64))))
    assert f"row 0 of {Q}, dimension 0 of q head 0" in refusal("llama", files, RoAEConfig())


# GPT-NeoX: heads of 48 rows, 16 each of q, k and v; of these the first 8 turn, in halves.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (48 + 16 + 1, "dimension 1 of k head 1, and low_freq_ratio=0.25 adapts slower ones"),
        (96 + 9, "dimension 9 of q head 2, which RoPE does not turn"),
        (32, "a row of v. Add v to model.roae.targets"),
    ],
)
def test_a_row_of_a_fused_projection_is_named_for_what_it_is(row, message):
    files = lora((QKV, 64, 192, [3, 16 + 7, row]))
    wanted = f"the LoRA changes row {row} of {QKV}, {message}"
    assert wanted in refusal("neox", files, RoAEConfig(low_freq_ratio=0.25))


def test_a_row_that_nothing_turns_is_refused_without_settings_too():
    message = refusal("neox", lora((QKV, 64, 192, [9])))
    assert "dimension 9 of q head 0, which RoPE does not turn, so that RoAE cannot" in message


def test_a_row_of_a_latent_projection_that_holds_no_state_is_refused():
    path = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    # 24 rows of the latent and 8 of the one rotated key.
    with pytest.raises(ValueError, match=r"row 3 of .*_with_mqa, a row of no target of RoAE"):
        from_lora(build_small("DeepseekV3Config"), lora((path, 64, 32, [3, 31])))


def test_a_target_that_the_settings_leave_out_is_named():
    files = lora((Q, 64, 64, [7]), (K, 64, 32, [15]))
    message = refusal("llama", files, RoAEConfig(targets=("q",)))
    assert message == f"the LoRA changes row 15 of {K}, a row of k. Add k to model.roae.targets."


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
def test_a_module_of_no_target_is_named(path):
    files = lora((Q, 64, 64, [7]), (path, 64, 96, [1]))
    assert f"the LoRA changes {path}, which is no target of RoAE" in refusal("llama", files)


def test_a_layer_that_rotates_nothing_is_no_target():
    path = "model.layers.1.self_attn.q_proj"
    assert f"the LoRA changes {path}, which is no target" in refusal(
        "smollm3", lora((path, 64, 64, [7]))
    )


def test_a_module_of_no_target_may_stand_there_without_effect():
    files = lora((Q, 64, 64, [7]), ("lm_head", 64, 96, []))
    config, tensors = from_lora(build("llama"), files)
    assert config.targets == ("q",)
    assert len(tensors) == 4
    assert "lm_head is no RoAE target" in refusal("llama", lora(("lm_head", 64, 96, [])))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            ("model.layers.7.self_attn.q_proj", 64, 64, [7]),
            "has no model.layers.7.self_attn.q_proj",
        ),
        (
            (Q, 32, 64, [7]),
            f"changes {Q} as a weight of shape (64, 32), and that has shape (64, 64)",
        ),
        (
            (Q, 64, 96, [7]),
            f"changes {Q} as a weight of shape (96, 64), and that has shape (64, 64)",
        ),
    ],
)
def test_a_lora_of_another_model_is_told_by_the_first_thing_that_differs(module, message):
    refused = refusal("llama", lora(module, (K, 1, 1, [])))
    assert "the LoRA is for another model than this LlamaForCausalLM" in refused
    assert message in refused


def test_terms_after_a_norm_hold_no_lora():
    path = "model.layers.0.self_attn.q_proj"
    files = lora((path, 64, 128, [15]))
    message = refusal("qwen3", files, RoAEConfig(placement="state"))
    assert "placement=state adds terms after model.layers.0.self_attn.q_norm" in message
    assert "Set model.roae.placement to projection" in message


def test_a_rank_too_small_is_named_with_the_one_it_needs():
    message = refusal("llama", lora((Q, 64, 64, [7])), RoAEConfig(rank=2))
    assert message == (
        f"the LoRA on {Q} needs rank 3 for q, and rank=2 is given. Set model.roae.rank to at "
        "least 3."
    )


def test_an_untrained_lora_takes_its_rank_and_the_usual_ratio():
    config, tensors = from_lora(build("llama"), lora((Q, 64, 64, []), (K, 64, 32, [])))
    assert config == RoAEConfig(rank=3, alpha=6.0, low_freq_ratio=0.25, targets=("q", "k"))
    assert not any(tensor.any() for key, tensor in tensors.items() if key.endswith("roae_B"))
    assert all(tensor.any(1).all() for key, tensor in tensors.items() if key.endswith("roae_A"))


def test_the_scale_of_most_modules_is_kept_and_the_others_are_folded():
    other = Q.replace(".0.", ".1.")
    modules = [(K, 64, 32, [7]), (Q, 64, 64, [7]), (other, 64, 64, [7])]
    files = lora(*modules, alpha_pattern={"k_proj": 3})
    config, tensors = from_lora(build("llama"), files)
    assert config.scale == 2.0
    for path, factor in [(K, 0.5), (Q, 1.0), (other, 1.0)]:
        B = files.tensors[f"base_model.model.{path}.lora_B.weight"]
        # One pair: dimensions 7 and 15 of each head.
        assert torch.equal(tensors[f"{path}.roae_B"], factor * B.view(-1, 8, 3)[:, 7])


def test_a_lora_off_q_and_k_takes_the_usual_ratio():
    path = "model.layers.0.mlp.up_proj"
    config, _ = from_lora(build("llama"), lora((path, 64, 96, list(range(96)))))
    assert config == RoAEConfig(rank=3, alpha=6.0, low_freq_ratio=0.25, targets=("up",))


def test_the_ratio_holds_in_layers_of_different_numbers_of_pairs():
    # 128 pairs a head in one layer and 64 in the other; of each, the slowest pair.
    slowest = inject_roae(build_small("Gemma4TextConfig"), RoAEConfig(low_freq_ratio=1e-6))
    assert [len(p.table.pairs) for p in slowest.projections] == [128, 128, 64, 64]
    modules = [(p.projection, 64, p.num_rows, list(p.rows)) for p in slowest.projections]
    config, tensors = from_lora(build_small("Gemma4TextConfig"), lora(*modules))
    assert config.low_freq_ratio == 1 / 64
    rows = [len(tensors[f"{p.projection}.roae_B"]) for p in slowest.projections]
    assert rows == [len(p.rows) * (2 if i < 2 else 1) for i, p in enumerate(slowest.projections)]
