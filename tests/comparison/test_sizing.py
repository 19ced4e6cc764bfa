from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.adapters.methods import apply_method
from rosa_lightning.adapters.peft_method import PeftMethod
from rosa_lightning.comparison.sizing import sized, solve_rank, with_rank
from rosa_lightning.models.loading import load_base
from rosa_lightning.module import RoSAModule
from rosa_lightning.roae.inject import PEFT_ADAPTER
from rosa_lightning.roae.layer import RoAEConfig


@given(budget=st.integers(1, 10**6), step=st.integers(1, 5000), fixed=st.integers(0, 5000))
def test_the_rank_comes_closest_to_the_budget(budget, step, fixed):
    def count(rank):
        return fixed + step * rank

    found = solve_rank(count, budget, most=64)
    assert abs(count(found) - budget) == min(abs(count(rank) - budget) for rank in range(1, 65))


@pytest.mark.parametrize(
    "method",
    [
        RoAEConfig(rank=4, alpha=8.0),
        PeftMethod("peft.LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}),
        PeftMethod(
            "peft.LoraConfig",
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True},
        ),
    ],
)
def test_another_rank_has_the_same_scale(method):
    def scale(of):
        model = load_base("tiny")
        apply_method(model, of)
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        return module.scale if isinstance(of, RoAEConfig) else module.scaling[PEFT_ADAPTER]

    assert scale(with_rank(method, 16)) == pytest.approx(scale(method))


def test_a_method_that_looks_at_the_weights_is_sized():
    shira = {"class_path": "peft.ShiraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}
    found = sized(RoSAModule("tiny", peft=shira), "SHiRA", {}, 3_000)
    model = load_base("tiny")
    method = with_rank(PeftMethod.of(shira), found.rank)
    assert found.trainable_parameters == apply_method(model, method).num_trainable
    assert abs(found.trainable_parameters / 3_000 - 1) < 0.3
