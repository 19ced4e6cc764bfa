"""An exported adapter in lm-evaluation-harness: the same prompts give the answers of `test`."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rosa_lightning import RoAEConfig, export_adapter, inject_roae
from rosa_lightning.cli.main import main
from rosa_lightning.models import tiny
from rosa_lightning.roae.inject import roae_layers

pytestmark = pytest.mark.slow
QUESTION = (
    "Please choose the correct answer to the question: How many apples has {name}?\n\n"
    "Answer1: {a} Answer2: {b} Answer3: {c}\n\nAnswer format: answer1/answer2/answer3"
)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")


@pytest.fixture
def records(tmp_path) -> list[dict[str, str]]:
    found = []
    for number, name in enumerate(NAMES):
        asked = QUESTION.format(name=name, a=number, b=number + 3, c=7)
        answer = f"answer{number % 3 + 1}"
        output = f"the correct answer is {answer}"
        found.append({"instruction": asked, "input": "", "output": output, "answer": answer})
    (tmp_path / "arc_easy.json").write_text(json.dumps(found))
    return found


@pytest.fixture
def adapter(tmp_path) -> str:
    """For PEFT; with an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder())
    inject_roae(model, RoAEConfig(rank=4, low_freq_ratio=0.5))
    for _, layer in roae_layers(model):
        torch.nn.init.normal_(layer.roae_B, std=0.3)
    export_adapter(model, tmp_path / "adapter", "peft")
    return str(tmp_path / "adapter")


def harness(records, adapter, tmp_path) -> list[list[float]]:
    """Log-likelihoods of the answers to each question, by the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"question": r["instruction"], "gold": int(r["answer"][-1]) - 1} for r in records]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_arc",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "target_delimiter": "",
        "doc_to_choice": [f"the correct answer is answer{n}" for n in (1, 2, 3)],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_arc.yaml").write_text(yaml.safe_dump(task))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny.folder()), "peft": adapter, "dtype": "float32"},
        tasks=["local_arc"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["local_arc"], key=lambda sample: sample["doc_id"])
    return [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]


def ours(adapter, tmp_path) -> list[list[float]]:
    source = json.dumps([{"name": "arc_easy", "path": str(tmp_path / "arc_easy.json")}])
    command = [
        "test",
        "--model.base=tiny",
        f"--model.adapter={adapter}",
        "--data.prompt_style=plain",
    ]
    command += [f"--data.test_sources={source}", "--model.evaluation.protocols=[likelihood]"]
    command += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path / 'ours'}"]
    assert main(command) == 0
    (file,) = (tmp_path / "ours").rglob("predictions.jsonl")
    items = [json.loads(line) for line in file.read_text().splitlines()]
    return [item["scores"] for item in sorted(items, key=lambda item: item["index"])]


def test_the_harness_gives_the_likelihoods_of_test(records, adapter, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is missing")
    monkeypatch.setattr("sys.argv", ["rosa"])
    monkeypatch.chdir(tmp_path)
    theirs, own = torch.tensor(harness(records, adapter, tmp_path)), ours(adapter, tmp_path)
    # The harness counts the line break before an answer to the answer, the same for all of them.
    own, theirs = (found - found[:, :1] for found in (torch.tensor(own), theirs))
    torch.testing.assert_close(own, theirs, atol=1e-3, rtol=1e-4)
    assert theirs[:, 1:].std(0).min() > 0.01  # the questions differ
