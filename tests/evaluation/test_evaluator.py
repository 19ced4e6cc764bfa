from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rosa_lightning.data.prompts import STYLES
from rosa_lightning.data.text_info import TextInfo
from rosa_lightning.evaluation.checks import check_test_prompts
from rosa_lightning.evaluation.evaluator import Evaluation, EvaluationConfig, item_id
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.tasks.records import Record


@pytest.fixture
def base(base_folder):
    return load_base(str(base_folder)).eval(), load_tokenizer(str(base_folder))


@pytest.mark.parametrize("protocols", [(), ("generate", "guess")])
def test_protocols_that_do_not_exist_are_named(protocols):
    with pytest.raises(ValueError, match=r"protocols=.*generate or likelihood.*model.evaluation"):
        EvaluationConfig(protocols=protocols)


@pytest.mark.parametrize("wrong", [{"rules": "papr"}, {"num_beams": 1.5}, {"num_beams": 0}])
def test_a_wrong_setting_is_named_before_anything_is_loaded(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}=.* Set model\.evaluation\.{name}"):
        EvaluationConfig(**wrong)


def prompt(length: int, *fields: str):
    asked, answer, task = fields or ("Is it?", "true", "boolq")
    record = Record(asked, "", "", answer, task, "file", 7)
    return SimpleNamespace(record=record, prompt=[0] * length)


BOTH = EvaluationConfig(protocols=("generate", "likelihood"))
WRONG = ("Which? Answer format: answer1/answer2", "answer3", "openbookqa")
SUM = ("2 + 2?", "4", "gsm8k")


@pytest.mark.parametrize(
    ("prompts", "protocols", "words"),
    [
        ([prompt(99), prompt(100)], BOTH.protocols, "task boolq: record 7 of source file has a pr"),
        ([prompt(9, *WRONG)], BOTH.protocols, "record 7 of source file has the answer 'answer3'"),
        ([prompt(9, *SUM)], ["likelihood"], r"no task of data.test_sources \(gsm8k\) has cand"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(prompts, protocols, words):
    config = EvaluationConfig(protocols=protocols)
    with pytest.raises(ValueError, match=words):
        check_test_prompts(prompts, replace(config, max_new_tokens=1), 100)


@pytest.mark.filterwarnings("error")
def test_prompts_that_can_be_answered_pass_and_what_is_left_out_is_said(caplog):
    short = replace(BOTH, max_new_tokens=1)
    check_test_prompts([prompt(9, *WRONG)], EvaluationConfig(max_new_tokens=1), 100)
    check_test_prompts([prompt(99), prompt(999)], short, None)
    with caplog.at_level("INFO"):
        check_test_prompts([prompt(99), prompt(9, *SUM)], short, 100)
    assert "likelihood leaves out gsm8k" in caplog.text
    with pytest.warns(UserWarning, match="1 of 2 test prompts leave fewer than max_new_tokens=5"):
        check_test_prompts([prompt(99), prompt(9)], replace(BOTH, max_new_tokens=5), 100)


def evaluation(base, **options) -> Evaluation:
    config = EvaluationConfig(**{"protocols": ("likelihood",), "max_new_tokens": 4, **options})
    return Evaluation(*base, config, TextInfo(task_names=["boolq", "gsm8k", "piqa"]))


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


def log_probs(model, tokenizer, batch, row, text, *more) -> torch.Tensor:
    """Of a candidate's tokens after a prompt of the batch, alone and without padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    own = torch.tensor([*tokenizer(text).input_ids, *more])
    logits = model(torch.cat([ids, own])[None]).logits[0].log_softmax(-1)
    return logits[len(ids) - 1 : -1].gather(1, own[:, None])


@pytest.mark.parametrize("normalized", [False, True])
@torch.no_grad()
def test_the_likeliest_candidate_is_taken_per_token_if_asked_for(base, normalized):
    texts = ("it is true, and has always been so", "false")
    batch = exercise(base[1], [texts, (), texts], ["boolq", "gsm8k", "boolq"])
    items = evaluation(base, length_normalized=normalized).step(batch)
    assert [item["task"] for item in items] == ["boolq", "boolq"]
    for item, row in zip(items, (0, 2), strict=True):
        found = [log_probs(*base, batch, row, text) for text in texts]
        wanted = [float(own.mean() if normalized else own.sum()) for own in found]
        assert item["scores"] == pytest.approx(wanted, abs=1e-4)
        assert item["response"] == texts[wanted.index(max(wanted))]
        assert item["correct"] is (item["answer"] == "true")
    # The short one wins unless lengths are evened out.
    assert (items[0]["answer"] == "false") or normalized


@torch.no_grad()
def test_a_candidate_that_goes_on_from_another_is_scored_to_its_end(base):
    texts = ("it is good", "it is good enough")
    batch = exercise(base[1], [texts], ["boolq"])
    (item,) = evaluation(base).step(batch)
    for text, score in zip(texts, item["scores"], strict=True):
        wanted = log_probs(*base, batch, 0, text, base[1].eos_token_id).sum()
        assert score == pytest.approx(float(wanted), abs=1e-3)


def test_an_earlier_answer_is_taken_over_only_for_the_same_question(base):
    batch = exercise(base[1], [("true", "false")] * 2, ["boolq"] * 2)
    earlier = [item | {"answer": "taken over"} for item in evaluation(base).step(batch)]
    again = evaluation(base)
    again.answered = {item_id(item): item for item in earlier}
    assert [item["answer"] for item in again.step(batch)] == ["taken over"] * 2
    batch["prompt"][1] = "Another?"
    assert "taken over" not in [item["answer"] for item in again.step(batch)]


def test_shares_are_counted_over_all_records_and_for_each_task(base):
    counted = evaluation(base, protocols=["generate"])
    answers = [("boolq", "true"), ("boolq", None), ("boolq", "false"), ("gsm8k", "true")]
    batch = exercise(base[1], [()] * 4, [task for task, _ in answers])
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
    ],
)
def test_an_answer_ends_where_a_strict_reader_sees_the_next_prompt_of_its_style(
    style, rules, wanted, base
):
    text = TextInfo(next_prompt=STYLES[style].next_prompt)
    assert Evaluation(*base, EvaluationConfig(rules=rules, max_new_tokens=4), text).stop == wanted
