from __future__ import annotations

import json
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import demo_source
from rosa_lightning.models import tiny
from rosa_lightning.models.loading import load_base, load_tokenizer
from tests.tiny_model import problems, recipe


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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_heads_of_a_new_model_look_back_whatever_the_family(family, tokenizer):
    torch.manual_seed(0)
    model = recipe.new_model(tokenizer, family)
    model.set_attn_implementation("eager")
    ids = torch.randint(10, 800, (1, 60))
    weights_HTT = model(ids, output_attentions=True).attentions[0][0]
    for head, offset in enumerate(recipe.OFFSETS):
        assert weights_HTT[head].diagonal(-offset).mean() > 0.9


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stopped_pretraining_goes_on_exactly(family, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "CHECK_EVERY", 1)
    monkeypatch.setattr(recipe, "NUM_CHECK", 2)
    monkeypatch.setattr(
        problems,
        "batch_of_turns",
        lambda rng, _: [[turn] for turn in problems.skill_problems(rng, 2)],
    )
    checkpoint = tmp_path / "state.pt"

    def pretrained(seed: int, steps: int):
        torch.manual_seed(seed)
        model = recipe.new_model(tokenizer, family)
        recipe.pretrain(model, tokenizer, Random("text"), steps, checkpoint)
        return model.state_dict()

    whole = pretrained(0, 3)
    checkpoint.unlink()
    save, saved = recipe.save_state, []

    def save_and_stop(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(recipe, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrained(0, 3)
    assert list(tmp_path.iterdir()) == [checkpoint]
    gone_on = pretrained(1, 3)  # the start is the checkpoint's
    assert all(torch.equal(whole[key], gone_on[key]) for key in whole)


def test_another_family_does_not_replace_the_embedded_model(capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--family", "qwen3"])
    assert "--output is missing" in capsys.readouterr().err


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
