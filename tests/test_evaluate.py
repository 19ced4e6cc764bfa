from __future__ import annotations

import pytest
import torch

from rosa_lightning.base import load_base, load_tokenizer
from rosa_lightning.evaluate import generate


@pytest.fixture
def base(base_folder):
    return load_base(str(base_folder)), load_tokenizer(str(base_folder))


def greedy(model, tokenizer, text: str, count: int) -> str:
    """Token by token, without a cache and without padding."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + count:
        choice = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, choice], dim=1)
        if choice == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_padded_prompts_are_answered_as_each_would_be_alone_and_without_the_prompt(base):
    model, tokenizer = base
    prompts = ["Say 1.", "What is the number that comes after 41?", "Why"]
    batch = dict(tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"))
    written = generate(model, tokenizer, batch, max_new_tokens=6)
    assert written == [greedy(model, tokenizer, prompt, 6) for prompt in prompts]


def test_the_bases_own_generation_settings_do_not_change_the_answer(base):
    model, tokenizer = base
    batch = dict(tokenizer(["Say 1."], return_tensors="pt"))
    plain = generate(model, tokenizer, batch, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    assert generate(model, tokenizer, batch, max_new_tokens=6) == plain


def test_writing_stops_at_any_of_the_tokens_it_is_given(base):
    model, tokenizer = base
    batch = dict(tokenizer(["Say 1."], return_tensors="pt"))
    first = model(batch["input_ids"]).logits[0, -1].argmax().item()
    (whole,) = generate(model, tokenizer, batch, 6)
    (stopped,) = generate(model, tokenizer, batch, 6, [tokenizer.eos_token_id, first])
    assert stopped == tokenizer.decode([first], skip_special_tokens=True) != whole
