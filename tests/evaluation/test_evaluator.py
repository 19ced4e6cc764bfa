from __future__ import annotations

import pytest
import torch

from rosa_lightning.evaluation.checks import check_test_records
from rosa_lightning.evaluation.evaluator import (
    Evaluation,
    EvaluationConfig,
    item_id,
)
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.tasks.records import Record


@pytest.fixture
def base(base_folder):
    return load_base(str(base_folder)), load_tokenizer(str(base_folder))


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
    check_test_records([(record(), 99)], BOTH, 100)
    check_test_records([(record(), 99)], BOTH, None)
    with pytest.raises(
        ValueError, match=r"task boolq: record 7 of source file has a prompt of 100"
    ):
        check_test_records([(record(), 99), (record(), 100)], BOTH, 100)


def test_candidates_that_cannot_be_chosen_from_are_named(monkeypatch):
    wrong = record("Which? Answer format: answer1/answer2", "answer3", "openbookqa")
    with pytest.raises(ValueError, match=r"record 7 of source file has the answer 'answer3', and"):
        check_test_records([(wrong, 9)], BOTH, 100)
    assert check_test_records([(wrong, 9)], EvaluationConfig(), 100) == []
    monkeypatch.setattr("rosa_lightning.evaluation.checks.candidates", lambda _: ("true", "true"))
    with pytest.raises(ValueError, match=r"record 7 of source file has the candidate 'true' twice"):
        check_test_records([(record(), 9)], BOTH, 100)


def test_tasks_without_candidates_are_left_out_of_likelihood_and_alone_refused():
    number = record("2 + 2?", "4", "gsm8k")
    assert check_test_records([(record(), 9), (number, 9)], BOTH, 100) == ["gsm8k"]
    only = EvaluationConfig(protocols=("likelihood",))
    with pytest.raises(ValueError, match=r"no task of data.test_sources \(gsm8k\) has candidates"):
        check_test_records([(number, 9)], only, 100)


def evaluation(base, **options) -> Evaluation:
    model, tokenizer = base
    config = EvaluationConfig(protocols=("likelihood",), **options)
    return Evaluation(model.eval(), tokenizer, config, 4, tasks=["boolq", "gsm8k"])


def exercise(tokenizer, choices: list[tuple[str, ...]], tasks: list[str]) -> dict:
    count = len(tasks)
    texts = [f"Is {n} odd? " * (n + 1) for n in range(count)]
    return {
        **tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"),
        "source": ["file"] * count,
        "index": list(range(count)),
        "prompt": texts,
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


def test_an_earlier_answer_is_taken_over_only_for_the_same_question(base):
    _, tokenizer = base
    batch = exercise(tokenizer, [("true", "false")] * 2, ["boolq"] * 2)
    earlier = [item | {"answer": "taken over"} for item in evaluation(base).step(batch)]
    again = evaluation(base)
    again.answered = {item_id(item): item for item in earlier}
    assert [item["answer"] for item in again.step(batch)] == ["taken over"] * 2
    batch["prompt"][1] = "Another?"
    assert "taken over" not in [item["answer"] for item in again.step(batch)]


def test_shares_are_counted_over_all_records_and_for_each_task(base):
    _, tokenizer = base
    model, _ = base
    counted = Evaluation(model, tokenizer, EvaluationConfig(), 4, tasks=["boolq", "gsm8k", "piqa"])
    answers = [("boolq", "true"), ("boolq", None), ("boolq", "false"), ("gsm8k", "true")]
    batch = exercise(tokenizer, [()] * 4, [task for task, _ in answers])
    columns = {name: batch[name] for name in ("source", "index", "task", "prompt", "reference")}
    for row, (_, answer) in enumerate(answers):
        item = {name: column[row] for name, column in columns.items()}
        item |= {"input": None, "protocol": "generate", "correct": answer == "true"}
        counted.answered[item_id(item)] = item | {"answer": answer}
    counted.step(batch)
    assert counted.compute() == pytest.approx(
        {
            "accuracy": 2 / 4,
            "accuracy/boolq": 1 / 3,
            "accuracy/gsm8k": 1,
            "format_failures": 1 / 4,
            "format_failures/boolq": 1 / 3,
            "format_failures/gsm8k": 0,
            "macro_accuracy/commonsense": 1 / 3,
            "macro_accuracy/arithmetic": 1,
        }
    )


@pytest.mark.parametrize(
    ("style", "rules", "wanted"),
    [
        ("alpaca", "strict", ("### Instruction:",)),
        ("alpaca", "paper", ()),
        ("plain", "strict", ()),
        (None, "strict", ()),
    ],
)
def test_an_answer_ends_where_a_strict_reader_sees_the_next_prompt_of_its_style(
    style, rules, wanted, base, monkeypatch
):
    given = []

    def write(*_, stop, **__):
        given.append(stop)
        return ["the answer is 3"]

    monkeypatch.setattr("rosa_lightning.evaluation.evaluator.generate", write)
    config = EvaluationConfig(rules=rules)
    built = Evaluation(*base, config, 4, tasks=["gsm8k"], prompt_style=style)
    batch = {name: [""] for name in ("source", "prompt", "input")}
    built.step({**batch, "index": torch.tensor([0]), "task": ["gsm8k"], "reference": ["3"]})
    assert given == [wanted]
