from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rosa_lightning.evaluation.evaluator import (
    Evaluation,
    EvaluationConfig,
    check_exercises,
    generate,
    weights_digest,
)
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.tasks.records import TASKS, Record


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
    (stopped,) = generate(model, tokenizer, batch, 6, stop_ids=[tokenizer.eos_token_id, first])
    assert stopped == tokenizer.decode([first], skip_special_tokens=True) != whole


def prompts_of(tokenizer, texts: list[str]) -> dict:
    return dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))


def test_greedy_answers_are_the_same_one_by_one_and_thirty_two_at_a_time():
    """The embedded base, on prompts of very different lengths, in float32."""
    model, tokenizer = load_base("tiny", dtype="float32"), load_tokenizer("tiny")
    model.eval()
    texts = [f"Ada has {n} apples. " * (1 + n % 9) + "How many?\n" for n in range(32)]
    together = generate(model, tokenizer, prompts_of(tokenizer, texts), 12)
    alone = [generate(model, tokenizer, prompts_of(tokenizer, [t]), 12)[0] for t in texts]
    assert together == alone
    assert len(set(together)) > 5


def test_beams_find_no_less_likely_text_than_greedy_search(base):
    model, tokenizer = base
    batch = prompts_of(tokenizer, ["Say 1.", "What is the number after 41?", "Why"])
    greedy_texts = generate(model, tokenizer, batch, 4)
    found = generate(model, tokenizer, batch, 4, num_beams=256)
    assert found != greedy_texts

    def likelihood(prompt: str, text: str) -> float:
        ids = tokenizer(prompt + text, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        after = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return float(after.gather(1, ids[0, start:, None]).sum())

    for prompt, one, other in zip(
        ["Say 1.", "What is the number after 41?", "Why"], found, greedy_texts, strict=True
    ):
        if len(one.encode()) == len(other.encode()) == 4 and "\ufffd" not in one + other:
            assert likelihood(prompt, one) >= likelihood(prompt, other) - 1e-4


def scripted(base, monkeypatch, texts: list[str]):
    """The base, made to write these texts, and how many tokens it was asked for."""
    model, tokenizer = base
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    steps: list[int] = []
    forward = model.forward

    def written(input_ids, **options):
        output = forward(input_ids, **options)
        step = len(steps)
        steps.append(step)
        output.logits = torch.full_like(output.logits, -1e4)
        for row, ids in enumerate(rows[-len(input_ids) :]):  # the last one to end stays
            token = ids[step] if step < len(ids) else 65
            output.logits[row, -1, token] = 0.0
        return output

    monkeypatch.setattr(model, "forward", written)
    return model, tokenizer, steps


def test_each_row_stops_where_its_next_exercise_begins(base, monkeypatch):
    texts = ["it is 3\n\n### Instruction:\nSay 4.", "a longer answer of 5 ### Instruction: x"]
    model, tokenizer, steps = scripted(base, monkeypatch, texts)
    batch = prompts_of(tokenizer, ["Say 1.", "Say 2."])
    found = generate(model, tokenizer, batch, 200, stop=("### Instruction:",))
    assert found == ["it is 3\n\n", "a longer answer of 5 "]
    assert len(steps) == len("a longer answer of 5 ### Instruction:")


def test_an_end_token_of_the_base_alone_ends_an_answer_too(base, monkeypatch):
    model, tokenizer, steps = scripted(base, monkeypatch, ["yes!no"])
    monkeypatch.setattr(
        model.generation_config, "eos_token_id", [*tokenizer("!").input_ids, tokenizer.eos_token_id]
    )
    (found,) = generate(model, tokenizer, prompts_of(tokenizer, ["Say 1."]), 50)
    assert found == "yes!"
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ()}, "protocols=.*model.evaluation.protocols"),
        ({"protocols": ("generate", "guess")}, "protocols=.*generate or likelihood"),
        ({"protocols": ("generate", "generate")}, "each once"),
        ({"num_beams": 0}, "num_beams=0 is not a whole number of at least 1"),
        ({"rules": "loose"}, "rules='loose'; there are strict and paper"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)


def record(instruction: str = "Is it?", answer: str = "true", task: str = "boolq") -> Record:
    return Record(instruction, "", "", answer, task, "file", 7)


BOTH = EvaluationConfig(protocols=("generate", "likelihood"))


def test_a_prompt_longer_than_the_context_is_named():
    check_exercises([(record(), 99)], BOTH, 100)
    check_exercises([(record(), 99)], BOTH, None)
    with pytest.raises(
        ValueError, match=r"task boolq: record 7 of source file has a prompt of 100"
    ):
        check_exercises([(record(), 99), (record(), 100)], BOTH, 100)


def test_candidates_that_cannot_be_chosen_from_are_named(monkeypatch):
    wrong = record("Which? Answer format: answer1/answer2", "answer3", "openbookqa")
    with pytest.raises(ValueError, match=r"record 7 of source file has the answer 'answer3', and"):
        check_exercises([(wrong, 9)], BOTH, 100)
    assert check_exercises([(wrong, 9)], EvaluationConfig(), 100) == []
    monkeypatch.setattr(
        "rosa_lightning.evaluation.evaluator.candidates", lambda _: ("true", "true")
    )
    with pytest.raises(ValueError, match=r"record 7 of source file has the candidate 'true' twice"):
        check_exercises([(record(), 9)], BOTH, 100)


def test_tasks_without_candidates_are_left_out_of_likelihood_and_alone_refused():
    number = record("2 + 2?", "4", "gsm8k")
    assert check_exercises([(record(), 9), (number, 9)], BOTH, 100) == ["gsm8k"]
    only = EvaluationConfig(protocols=("likelihood",))
    with pytest.raises(ValueError, match=r"no task of data.test_sources \(gsm8k\) has candidates"):
        check_exercises([(number, 9)], only, 100)


def evaluation(base, known_tasks=TASKS, **options) -> Evaluation:
    model, tokenizer = base
    config = EvaluationConfig(protocols=("likelihood",), **options)
    tasks = ["boolq", "gsm8k"]
    return Evaluation(model.eval(), tokenizer, config, 4, tasks=tasks, known_tasks=known_tasks)


def exercise(tokenizer, choices: list[tuple[str, ...]], tasks: list[str]) -> dict:
    count = len(tasks)
    return {
        **prompts_of(tokenizer, [f"Is {n} odd? " * (n + 1) for n in range(count)]),
        "task": tasks,
        "reference": ["true"] * count,
        "candidates": choices,
    }


@pytest.mark.parametrize("normalized", [False, True])
@torch.no_grad()
def test_the_likeliest_candidate_is_taken_per_token_if_asked_for(base, normalized):
    model, tokenizer = base
    texts = ("it is true, and has always been so", "false")
    batch = exercise(tokenizer, [texts, (), texts], ["boolq", "gsm8k", "boolq"])
    items = evaluation(base, length_normalized=normalized).step(batch)
    assert [item["task"] for item in items] == ["boolq", "boolq"]
    for item, row in zip(items, (0, 2), strict=True):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        wanted = []
        for text in texts:
            own = tokenizer(text, return_tensors="pt").input_ids[0]
            logits = model(torch.cat([ids, own])[None]).logits[0].log_softmax(-1)
            picked = logits[len(ids) - 1 : -1].gather(1, own[:, None])
            wanted.append(float(picked.mean() if normalized else picked.sum()))
        assert item["scores"] == pytest.approx(wanted, abs=1e-4)
        assert item["response"] == texts[wanted.index(max(wanted))]
        assert item["correct"] is (item["answer"] == "true")
    # The short one wins unless lengths are evened out.
    assert (items[0]["answer"] == "false") or normalized


@torch.no_grad()
def test_a_candidate_that_goes_on_from_another_is_scored_to_its_end(base):
    model, tokenizer = base
    texts = ("it is good", "it is good enough")
    batch = exercise(tokenizer, [texts], ["boolq"])
    (item,) = evaluation(base).step(batch)
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    for text, score in zip(texts, item["scores"], strict=True):
        own = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
        logits = model(torch.cat([ids, own])[None]).logits[0].log_softmax(-1)
        wanted = logits[len(ids) - 1 : -1].gather(1, own[:, None]).sum()
        assert score == pytest.approx(float(wanted), abs=1e-3)


def test_an_answer_is_taken_over_only_if_all_that_it_depends_on_is_equal(base):
    _, tokenizer = base
    batch = exercise(tokenizer, [("true", "false")] * 2, ["boolq"] * 2)
    first = evaluation(base)
    items = first.step(batch)
    again = evaluation(base)
    assert again.digest == first.digest
    assert evaluation(base, length_normalized=True).digest != first.digest
    own = {"boolq": replace(TASKS["boolq"], labels=("yes", "no"))}
    assert evaluation(base, known_tasks=TASKS | own).digest != first.digest
    again.answered = {item["key"]: {**item, "answer": "taken over"} for item in items}
    assert [item["answer"] for item in again.step(batch)] == ["taken over"] * 2
    other = exercise(tokenizer, [("true", "false"), ("false", "true")], ["boolq"] * 2)
    assert [item["answer"] == "taken over" for item in again.step(other)] == [True, False]


def test_equal_weights_alone_have_equal_digests():
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    assert weights_digest(weights) == weights_digest(dict(reversed(weights.items())))
    changed = [
        {"a": torch.ones(3, 2), "b": torch.zeros(1)},
        {"a": torch.ones(2, 3), "b": torch.full((1,), 1e-30)},
        {"a": torch.ones(2, 3), "c": torch.zeros(1)},
        {"a": torch.ones(2, 3).bfloat16(), "b": torch.zeros(1)},
    ]
    digests = {weights_digest(one) for one in [weights, *changed]}
    assert len(digests) == 5
