from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import demo_source
from rosa_lightning.models import tiny
from rosa_lightning.models.loading import load_base, load_tokenizer
from rosa_lightning.models.tiny import problems, recipe


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model():
    return load_base("tiny").eval()


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text):
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


@torch.no_grad()
def exact_matches(model, tokenizer, records) -> float:
    """Greedy decoding of each prompt alone, token by token."""
    right = 0
    for record in records:
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{record.instruction}\n\n### Response:\n"
        )
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted = [*tokenizer(record.output).input_ids, tokenizer.eos_token_id]
        for token in wanted:
            choice = int(model(ids).logits[0, -1].argmax())
            if choice != token:
                break
            ids = torch.cat([ids, torch.tensor([[choice]])], dim=1)
        else:
            right += 1
    return right / len(records)


def test_the_base_cannot_solve_the_demonstration_problems(model, tokenizer):
    assert exact_matches(model, tokenizer, load_records(demo_source("test"))[:100]) < 0.2


def test_the_base_has_the_skill_that_the_demonstration_needs(model, tokenizer):
    from random import Random

    turns = problems.skill_problems(Random("another seed"), 100)
    assert recipe.accuracy(model, tokenizer, turns) > 0.9


def test_no_problem_for_testing_is_one_for_training():
    train, test = (
        {record.instruction for record in load_records(demo_source(split))}
        for split in ("train", "test")
    )
    assert len(train) >= 2000
    assert len(test) >= 200
    assert not train & test


@pytest.mark.slow
def test_the_recipe_makes_a_folder_that_loads_and_is_the_same_for_a_seed(tmp_path, capsys):
    for name in ("one", "two"):
        recipe.main(["--output", str(tmp_path / name), "--steps", "2"])
    assert "parameters" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    made = load_base(str(tmp_path / "one"))
    assert {weight.dtype for weight in made.parameters()} == {torch.float32}
    for name in ("tokenizer.json", "demo_train.jsonl", "demo_test.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tiny.folder() / name).read_bytes()
    record = json.loads((tmp_path / "one" / "demo_test.jsonl").read_text().splitlines()[0])
    assert set(record) == {"instruction", "input", "output", "answer"}
