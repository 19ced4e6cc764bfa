from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from rosa_lightning.evaluation.likelihood import log_likelihoods, say_not_shared
from tests.conftest import FAMILIES, build

PAD = 0

SLIDING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 32,
}


def model_of(family: str):
    return build(family, **(SLIDING if family == "gemma3" else {}))


def one_by_one(model, prompt: list[int], candidate: list[int]) -> float:
    """A single row without padding or cache, in float64 from the logits on."""
    logits = model(input_ids=torch.tensor([[*prompt, *candidate]]), use_cache=False).logits[0]
    after = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
    return float(after[range(len(candidate)), candidate].sum())


def ids(count: int) -> list[int]:
    return torch.randint(3, 96, (count,)).tolist()


def exercises() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of different lengths, and candidates of all the ways to differ."""
    start = ids(4)
    prompts = [ids(13), ids(5), ids(1), ids(21), ids(9)]
    candidates = [
        [[*start, 5], [*start, 6], [*start, 7]],  # in the last token
        [ids(3), ids(7), ids(1)],  # in all, at different lengths
        [[*start, *ids(6)], [*start, *ids(2)]],  # behind a common start
        [[8, 9], [8, 9, 10], [8, 9, 10, 11]],  # one begins another
        [ids(4)],  # nothing to differ from
    ]
    return prompts, candidates


def check(model, prompts, candidates) -> None:
    scores = log_likelihoods(model, prompts, candidates, PAD)
    for prompt, own, found in zip(prompts, candidates, scores, strict=True):
        wanted = [one_by_one(model, prompt, candidate) for candidate in own]
        assert_close(found, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_candidates_score_as_single_rows_without_padding_do(family):
    """With prompts that differ, and with a beginning that is long enough to be read once."""
    model, (prompts, candidates) = model_of(family), exercises()
    check(model, prompts, candidates)
    start = ids(24)
    check(model, [[*start, *prompt] for prompt in prompts], candidates)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_short_and_long_candidates_score_as_single_rows(family):
    """There are enough of them for two calls, of which the second must not see the first."""
    check(model_of(family), [ids(9), ids(5)] * 4, [[ids(3), ids(21)] for _ in range(8)])


def test_a_prompt_is_read_once_and_labels_take_no_second_look(monkeypatch):
    model, seen = model_of("llama"), []
    forward = model.forward

    def counted(input_ids, logits_to_keep=0, **options):
        options["logits_to_keep"] = logits_to_keep
        seen.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    log_likelihoods(model, [ids(9), ids(5)], [[[4, 5], [4, 6]], [[4, 7], [4, 8]]], PAD)
    assert seen == [(2, 10)]
    seen.clear()
    log_likelihoods(model, [ids(9)], [[[4, 5, 6, 7], [4, 6, 5]]], PAD)
    assert seen == [(1, 10), (2, 2)]
    seen.clear()
    start = ids(20)
    log_likelihoods(model, [[*start, 8, 9, 10], [*start, 7]], [[[4, 5], [4, 6]]] * 2, PAD)
    assert seen == [(1, 20), (2, 4)]
    seen.clear()
    log_likelihoods(model, [ids(9)] * 8, [[[4, 5, 6], [7, *ids(20)]]] * 8, PAD)
    assert seen == [(8, 9), (8, 2), (8, 20)]


@torch.no_grad()
def test_a_model_that_keeps_a_state_reads_whole_prompts_and_says_so_once(caplog):
    config = Qwen3NextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    say_not_shared.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            check(model, *exercises())
    assert caplog.text.count("cannot be shared") == 1


lists = st.lists(st.integers(3, 5), min_size=1, max_size=4)


@given(st.lists(st.tuples(lists, st.lists(lists, min_size=1, max_size=4)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
@torch.no_grad()
def test_any_batch_of_any_candidates_scores_as_its_rows_alone(exercise):
    torch.manual_seed(0)
    model = build("llama", num_hidden_layers=1)
    check(model, [prompt for prompt, _ in exercise], [own for _, own in exercise])
