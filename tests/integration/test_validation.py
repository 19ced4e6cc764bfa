"""Accuracy in validation is of answers that the model has written, and of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from rosa_lightning import ReasoningDataModule, RoSAModule
from rosa_lightning.data.prompts import AlpacaStyle
from rosa_lightning.models import tiny
from rosa_lightning.tasks.records import reference
from tests import ranks
from tests.conftest import data_module, rosa_module


def trainer(folder: Path, **options: Any) -> Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(**{**silent, **settings, **options})


def validated(folder: Path, data: ReasoningDataModule, **options: Any) -> dict[str, float]:
    built = rosa_module("tiny", **{"max_new_tokens": 8, **options})
    (metrics,) = trainer(folder).validate(built, data, verbose=False)
    return dict(metrics)


def demo(**options: Any) -> ReasoningDataModule:
    return data_module(**{"sources": "demo", "val_fraction": 0.05, **options})


def chosen(data: ReasoningDataModule) -> list[dict[str, Any]]:
    """The prompts of the validation batches whose answers are written."""
    return [one["to_answer"] for one in data.val_dataloader() if one["to_answer"] is not None]


@torch.no_grad()
def last_number(built: RoSAModule, ids: list[int]) -> str | None:
    """What the model writes token by token to one prompt, and the last number of it."""
    tokens = torch.tensor([ids])
    for _ in range(8):
        token = built.model(input_ids=tokens).logits[:, -1:].argmax(-1)
        if token.item() == built.tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, token], 1)
    found = re.findall(r"\d+", built.tokenizer.decode(tokens[0, len(ids) :]))
    return found[-1] if found else None


@pytest.fixture(scope="module")
def half_right(tmp_path_factory) -> Path:
    """Problems of the demonstration; of every other one the base's own answer is the right one."""
    built = RoSAModule("tiny")
    built.configure_model()
    built.model.eval()
    lines = (Path(tiny.__file__).parent / "demo_test.jsonl").read_text().splitlines()[:24]
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        text = AlpacaStyle(None).apply(record["instruction"], "")
        written = last_number(built, built.tokenizer(text)["input_ids"])
        record["answer"] = written if number % 2 else str(int(written or 0) + 1)
        record["output"] = record["answer"]
    path = tmp_path_factory.mktemp("half") / "half.json"
    path.write_text(json.dumps(records))
    return path


def half(path: Path, **options: Any) -> ReasoningDataModule:
    sources = [{"path": str(path), "task": "demo"}]
    return demo(**{"sources": sources, "val_fraction": 0.9, "val_generate": 99, **options})


def test_accuracy_is_that_of_answers_written_to_the_prompts_alone(tmp_path, half_right):
    data = half(half_right)
    metrics = validated(tmp_path, data)
    held = [example.record.index for source in data._set.val for example in source]
    share = sum(index % 2 == 0 for index in held) / len(held)
    assert len(held) > 20
    assert metrics["val/accuracy"] == pytest.approx(share)
    assert metrics["val/accuracy/demo"] == pytest.approx(share)


def with_rationale(path: Path, outputs: str) -> Path:
    """Problems that the base answers, each with a solution that states a number of its own."""
    records = [
        {"instruction": f"Say {n}.", "output": outputs.format(n), "answer": str(n)}
        for n in range(40)
    ]
    path.write_text(json.dumps(records))
    return path


def test_a_rationale_that_states_the_answer_lifts_no_accuracy(tmp_path):
    path = with_rationale(tmp_path / "own.json", "It is {0}, {0}, {0}, {0}: #### {0}")
    data = demo(sources=[{"path": str(path), "task": "gsm8k"}], val_fraction=0.4)
    metrics = validated(tmp_path, data)
    accuracies = [name for name in metrics if "accuracy" in name]
    assert set(accuracies) == {"val/accuracy", "val/accuracy/gsm8k"}
    assert metrics["val/accuracy"] == 0
    assert "val/answer_tokens_given_rationale" in metrics


@pytest.mark.parametrize("batching", ["length", "packed"])
def test_prompts_to_answer_are_spread_over_the_sources_with_answers(tmp_path, batching):
    paths = [with_rationale(tmp_path / f"{name}.json", "{}") for name in "abc"]
    tasks = ["gsm8k", "svamp", "text"]
    sources = [{"path": str(p), "task": t} for p, t in zip(paths, tasks, strict=True)]
    data = demo(
        sources=sources, tokenizer="tiny", val_fraction=0.5, val_generate=9, batching=batching
    )
    data.setup("fit")
    prompts = chosen(data)
    assert len(prompts) == 1
    assert {prompts[0]["source"].count(name) for name in "ab"} == {4, 5}
    assert "c" not in prompts[0]["source"]
    held = {(e.record.source, e.record.index): e for source in data._set.val for e in source}
    assert len(held) == 60
    for row, key in enumerate(zip(prompts[0]["source"], prompts[0]["index"].tolist(), strict=True)):
        mask = prompts[0]["attention_mask"][row].bool()
        assert prompts[0]["input_ids"][row][mask].tolist() == list(held[key].prompt)
        assert prompts[0]["reference"][row] == reference(held[key].record)


def test_free_texts_records_without_an_answer_and_val_generate_0_have_no_accuracy(tmp_path):
    path = with_rationale(tmp_path / "own.json", "{}")
    refusals = [{"instruction": f"Say {n}.", "output": "I will not."} for n in range(40)]
    (tmp_path / "refusals.json").write_text(json.dumps(refusals))
    unanswered = [{"path": str(tmp_path / "refusals.json"), "task": "gsm8k"}]
    for options in ({"sources": [str(path)]}, {"val_generate": 0}, {"sources": unanswered}):
        metrics = validated(tmp_path, demo(**options))
        assert not [name for name in metrics if "accuracy" in name]
        assert "val/loss" in metrics


class Foreign(LightningModule):
    """Another module than ours, validated on the same data."""

    def validation_step(self, batch, batch_idx):
        self.log("rows", float(len(batch["labels"])), batch_size=1, reduce_fx="sum")


def test_a_foreign_module_validates_on_the_same_records(tmp_path):
    data = demo(tokenizer="tiny", cache_dir=None)
    (metrics,) = trainer(tmp_path).validate(Foreign(), data, verbose=False)
    assert metrics["rows"] == sum(map(len, data._set.val))


def test_loaders_made_by_hand_give_the_same_accuracy(tmp_path):
    data = demo(tokenizer="tiny")
    expected = validated(tmp_path, data)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    (found,) = trainer(tmp_path).validate(
        rosa_module("tiny", max_new_tokens=8), loader, verbose=False
    )
    assert found["val/accuracy"] == expected["val/accuracy"]


def on_two_ranks(folder: Path) -> dict[str, float]:
    run = trainer(folder, strategy=ranks.ddp(), devices=ranks.WORLD)
    (metrics,) = run.validate(
        rosa_module("tiny", max_new_tokens=8), half(folder / "half.json"), verbose=False
    )
    sharded = trainer(folder, strategy=ranks.fsdp2(), devices=ranks.WORLD)
    (without,) = sharded.validate(rosa_module("tiny", max_new_tokens=8), demo(), verbose=False)
    assert not [name for name in without if "accuracy" in name]
    return dict(metrics)


@pytest.mark.slow
def test_two_ranks_give_the_accuracy_of_one(tmp_path, half_right):
    (tmp_path / "half.json").write_text(half_right.read_text())
    expected = validated(tmp_path, half(half_right))
    for found in ranks.launch(on_two_ranks, tmp_path):
        assert found == pytest.approx(expected, abs=1e-5)
