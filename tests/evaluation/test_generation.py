from __future__ import annotations

import functools
from collections import Counter, defaultdict

import pytest
import torch

from rosa_lightning.evaluation.generation import Sampling, generate
from rosa_lightning.models.kv_cache import cache_argument
from rosa_lightning.models.loading import load_base, load_tokenizer


@pytest.fixture
def base(base_folder):
    return load_base(str(base_folder)), load_tokenizer(str(base_folder))


def prompts_of(tokenizer, texts: list[str]) -> dict:
    return dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))


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
    written = generate(model, tokenizer, prompts_of(tokenizer, prompts), max_new_tokens=6)
    assert written == [greedy(model, tokenizer, prompt, 6) for prompt in prompts]


def test_the_bases_own_generation_settings_do_not_change_the_answer(base):
    model, tokenizer = base
    batch = prompts_of(tokenizer, ["Say 1."])
    plain = generate(model, tokenizer, batch, max_new_tokens=6)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    assert generate(model, tokenizer, batch, max_new_tokens=6) == plain


def test_drawn_tokens_are_those_of_the_nucleus_as_often_as_their_probability(base):
    model, tokenizer = base
    rows = 4000
    batch = prompts_of(tokenizer, ["Say 1."])
    probabilities = (model(**batch).logits[0, -1] / 1.5).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < 0.6).sum()) + 1]
    many = {name: ids.repeat(rows, 1) for name, ids in batch.items()}
    torch.manual_seed(0)
    drawn = generate(model, tokenizer, many, 1, sampling=Sampling(1.5, 0.6))
    share = probabilities[kept] / probabilities[kept].sum()
    expected: dict[str, float] = defaultdict(float)
    for token, one in zip(kept.tolist(), share.tolist(), strict=True):
        expected[tokenizer.decode(token, skip_special_tokens=True)] += one
    assert {*drawn} <= {*expected}
    for text, one in expected.items():
        assert drawn.count(text) / rows == pytest.approx(one, abs=4 * (one / rows) ** 0.5 + 1e-3)


def test_beams_find_no_less_likely_text_than_greedy_search(base):
    model, tokenizer = base
    prompts = ["Say 1.", "What is the number after 41?", "Why"]
    batch = prompts_of(tokenizer, prompts)
    greedy_texts = generate(model, tokenizer, batch, 4)
    found = generate(model, tokenizer, batch, 4, num_beams=256)
    assert found != greedy_texts

    def likelihood(prompt: str, text: str) -> float:
        ids = tokenizer(prompt + text, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        after = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return float(after.gather(1, ids[0, start:, None]).sum())

    for prompt, one, other in zip(prompts, found, greedy_texts, strict=True):
        if len(one.encode()) == len(other.encode()) == 4 and "\ufffd" not in one + other:
            assert likelihood(prompt, one) >= likelihood(prompt, other) - 1e-4


def scripted(base, monkeypatch, texts: dict[str, str]):
    """The base, made to write a text after each prompt, and how many rows each step had.

    Prompts are told from each other by their lengths.
    """
    model, tokenizer = base
    rows = {
        len(tokenizer(prompt).input_ids): tokenizer(text, add_special_tokens=False).input_ids
        for prompt, text in texts.items()
    }
    steps: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)  # transformers passes what it names
    def written(self, input_ids, attention_mask=None, **options):
        output = forward(self, input_ids, attention_mask=attention_mask, **options)
        if attention_mask is None:  # no row is padded
            total = options[cache_argument(model)].get_seq_length()
            attention_mask = torch.ones(len(input_ids), total, dtype=torch.long)
        step = len(steps)
        steps.append(len(input_ids))
        output.logits = torch.full_like(output.logits, -1e4)
        for row, tokens in enumerate(attention_mask.sum(1).tolist()):
            ids = rows[tokens - step]
            output.logits[row, -1, ids[step] if step < len(ids) else 65] = 0.0
        return output

    monkeypatch.setattr(type(model), "forward", written)
    return model, prompts_of(tokenizer, list(texts)), steps


def test_each_row_stops_where_its_next_exercise_begins(base, monkeypatch):
    longer = "a longer answer of 5 ### Instruction: x"
    texts = {"Say 1.": "it is 3\n\n### Instruction:\nSay 4.", "Say 22.": longer}
    model, batch, steps = scripted(base, monkeypatch, texts)
    found = generate(model, base[1], batch, 200, stop=("### Instruction:",))
    assert found == ["it is 3\n\n", "a longer answer of 5 "]
    assert len(steps) == len("a longer answer of 5 ### Instruction:")


def test_rows_that_have_ended_leave_the_batch(base, monkeypatch):
    lengths = {"a": 9, "bb": 3, "ccc": 20, "dddd": 6, "eeeee": 9, "ffffff": 100}
    texts = {prompt: "x" * length + "!" for prompt, length in lengths.items()}
    model, batch, steps = scripted(base, monkeypatch, texts)
    found = generate(model, base[1], batch, 30, stop=("!",))
    assert found == ["x" * min(length, 30) for length in lengths.values()]
    assert len(steps) == 30
    assert sum(steps) < 4 + 4 + 7 + 10 + 10 + 21 + 30 + 6


def test_rows_that_stay_go_on_from_their_own_keys_and_values(base, monkeypatch):
    model, tokenizer = base
    prompts = ["Say 1.", "What is the number after 41?", "Why", "Who?", "Anna has 3 apples.", "No"]
    whole = [greedy(model, tokenizer, prompt, 80) for prompt in prompts]
    # A token that ends some answers early.
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in whole]
    counts = Counter(token for ids in texts for token in {*ids[3:40]})
    end = next(token for token, count in counts.most_common() if count < len(prompts))
    wanted = [ids[: ids.index(end) + 1] if end in ids else ids for ids in texts]
    sizes: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def watched(self, input_ids, **options):
        sizes.append(len(input_ids))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    found = generate(model, tokenizer, prompts_of(tokenizer, prompts), 80, stop_ids=[end])
    assert found == tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert sizes[-1] < sizes[0]


def test_a_beginning_of_all_prompts_is_read_once_and_changes_no_answer(base, monkeypatch):
    model, tokenizer = base
    start = "A text that all of the prompts begin with, and then "
    prompts = [f"{start}{rest}" for rest in ("Say 1.", "What is the number after 41?", "Why")]
    wanted = [greedy(model, tokenizer, prompt, 100) for prompt in prompts]
    read: list[tuple[int, ...]] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def watched(self, input_ids, **options):
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    assert generate(model, tokenizer, prompts_of(tokenizer, prompts), 100) == wanted
    (one, beginning), (rows, rest) = read[:2]
    assert (one, rows) == (1, 3)
    assert beginning >= len(tokenizer(start).input_ids) - 1
    assert beginning + rest == max(len(tokenizer(prompt).input_ids) for prompt in prompts)


def test_an_end_token_of_the_base_alone_ends_an_answer_too(base, monkeypatch):
    model, batch, steps = scripted(base, monkeypatch, {"Say 1.": "yes!no"})
    tokenizer = base[1]
    monkeypatch.setattr(
        model.generation_config, "eos_token_id", [*tokenizer("!").input_ids, tokenizer.eos_token_id]
    )
    (found,) = generate(model, tokenizer, batch, 50)
    assert found == "yes!"
    assert len(steps) == 4
