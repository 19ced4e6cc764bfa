from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rosa_lightning.adapters.card import CardDetails
from rosa_lightning.adapters.checkpoint import read_checkpoint
from rosa_lightning.cli.main import main
from rosa_lightning.inspection.run_card import run_card
from rosa_lightning.inspection.run_facts import run_tests
from tests.conftest import write_records


@pytest.fixture(scope="module")
def runs(base_folder, tmp_path_factory) -> Path:
    """A folder of runs: a training in version_0, and a test of it in version_1."""
    folder = tmp_path_factory.mktemp("runs")
    train, tested = write_records(folder / "mine.json", 40), write_records(folder / "t.json", 6)
    config = folder / "given.yaml"
    settings = {
        "model": {
            "base": str(base_folder),
            "roae": {"layer_ratio": 0.5},
            "evaluation": {"max_new_tokens": 2},
        },
        "data": {
            "sources": [{"path": str(train), "task": "gsm8k"}],
            "test_sources": [{"path": str(tested), "task": "gsm8k", "name": "asked"}],
            "batch_size": 4,
            "loading": {"decontaminate": False},
        },
        "dls": {"interval": 2, "num_active": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "accumulate_grad_batches": 2,
            "limit_val_batches": 0,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
        },
    }
    config.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rosa"])
        patch.chdir(folder)
        assert main(["fit", "--config", str(config)]) == 0
        (found,) = (folder / "lightning_logs/version_0/checkpoints").glob("*.ckpt")
        found.rename(found.with_name("last.ckpt"))
        path = "lightning_logs/version_0/checkpoints/last.ckpt"
        assert main(["test", "--config", str(config), "--ckpt_path", path]) == 0
    return folder / "lightning_logs"


def export(path: Path, folder: Path, *options: str) -> ModelCard:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rosa"])
        given = ["--ckpt_path", str(path), "--output", str(folder), *options]
        assert main(["export", *given]) == 0
    return ModelCard.load(folder / "README.md")


def test_the_card_holds_data_settings_and_results(runs, tmp_path):
    path = runs / "version_0" / "checkpoints" / "last.ckpt"
    card = export(path, tmp_path / "out", "--license", "mit")
    assert "| mine | file mine.json | 39 | 24 |" in card.content
    assert "contamination): gsm8k 6 of 6." in card.content
    for row in (
        "| steps | 3 of 8 examples, on average |",
        "| optimizer | torch.optim.AdamW(lr=0.01,",
        "| dls.num_active | 1 |",
        "| seed_everything | 0 |",
    ):
        assert row in card.content
    layers = re.search(r"times selected, of 2: (.*) \|", card.content)[1]
    assert {one.split()[0] for one in layers.split(", ")} <= {"2", "3"}  # which alone have terms
    (row,) = json.loads((runs / "version_1" / "results.json").read_text())["results"]
    low, high = (100 * bound for bound in row["interval"])
    shown = f"| gsm8k | generate | {100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f}) | 6 | 6 |"
    assert shown in card.content
    (score,) = card.data.eval_results
    assert (score.metric_value, score.dataset_type) == (row["accuracy"], "openai/gsm8k")
    assert (score.dataset_config, score.dataset_split) == ("main", "test")
    assert card.data.license == "mit"
    assert str(runs.parent) not in card.content
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_card_says_that_gradients_were_approximate(runs):
    path = runs / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert "| gradients |" not in run_card(str(path), checkpoint, CardDetails()).training
    checkpoint["hyper_parameters"]["speed"]["prompt_gradients"] = False
    card = run_card(str(path), checkpoint, CardDetails())
    assert "| gradients | through responses alone " in card.training


def test_tests_of_other_weights_and_stopped_ones_are_no_results(runs, tmp_path):
    copied = tmp_path / "lightning_logs"
    shutil.copytree(runs, copied)
    results = copied / "version_1" / "results.json"
    content = json.loads(results.read_text())
    for change in ({"weights_digest": "of others"}, {"complete": False}):
        results.write_text(json.dumps(content | change))
        path = copied / "version_0" / "checkpoints" / "last.ckpt"
        card = export(path, tmp_path / f"out_{next(iter(change))}")
        assert "No finished test of these weights was found" in card.content
        assert "no test was found beside the run" in card.content
        assert card.data.eval_results is None


def test_weights_of_the_same_norm_are_others(runs):
    path = runs / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(str(path))
    assert "| gsm8k |" in run_card(str(path), checkpoint, CardDetails()).results
    checkpoint["state_dict"] = {key: -one for key, one in checkpoint["state_dict"].items()}
    assert "No finished test" in run_card(str(path), checkpoint, CardDetails()).results


def test_of_results_of_the_first_versions_the_norm_of_the_weights_tells(runs, tmp_path):
    copied = tmp_path / "lightning_logs"
    shutil.copytree(runs, copied)
    path, results = copied / "version_0/checkpoints/last.ckpt", copied / "version_1/results.json"
    checkpoint, content = read_checkpoint(str(path)), json.loads(results.read_text())
    del content["weights_digest"]
    weights = checkpoint["state_dict"]
    norm = sum(weights[key].norm().item() for key in sorted(weights) if key.endswith("roae_B"))
    for factor, words in ((1, "| gsm8k |"), (1.001, "No finished test")):
        results.write_text(json.dumps(content | {"adapter_norm": factor * norm}))
        assert words in run_card(str(path), checkpoint, CardDetails()).results


@pytest.mark.parametrize(
    "row", [{"task": "gsm8k"}, {"interval": 3}, {"n": "x"}, {"accuracy": None}, 5, {"protocol": []}]
)
def test_a_damaged_row_of_a_neighbour_is_left_out_alone(runs, tmp_path, row):
    copied = tmp_path / "lightning_logs"
    shutil.copytree(runs, copied)
    content = json.loads((copied / "version_1/results.json").read_text())
    whole = content["results"][0] | {"task": "whole"}
    damaged = whole | row if isinstance(row, dict) and "task" not in row else row
    (copied / "version_2").mkdir()
    rows = {"results": [whole, damaged]}
    (copied / "version_2/results.json").write_text(json.dumps(content | rows))
    path = copied / "version_0/checkpoints/last.ckpt"
    found = run_card(str(path), read_checkpoint(str(path)), CardDetails())
    assert "| steps | 3" in found.training
    assert [one.split(" ")[1] for one in found.results.splitlines()[2:]] == ["gsm8k", "whole"]


def test_a_tested_checkpoint_is_found_from_another_working_folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the test was given a path relative to its own
    (test,) = run_tests(runs / "version_0")
    assert test[:3] == ("last.ckpt", "gsm8k", "generate")


def test_a_checkpoint_elsewhere_still_tells_its_data(runs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = shutil.copy(runs / "version_0/checkpoints/last.ckpt", tmp_path / "elsewhere/a.ckpt")
    card = export(Path(path), tmp_path / "out")
    assert "| mine | file mine.json | 39 | 24 |" in card.content
    assert "torch.optim" not in card.content


def test_hub_data_are_linked_and_listed(runs):
    path = runs / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(str(path))
    state = checkpoint["ReasoningDataModule"]
    state["trained_on"][0]["sources"] = [
        {"name": "mine", "hub": "ann/data", "revision": "v1", "subset": "main", "of_later": 1}
    ]
    state["trained_on"].append({"sources": [{"path": "/a/later.json"}], "left_out": []})
    state["trained_on"][0]["left_out"] = ["aa", "bb"]
    found = run_card(str(path), checkpoint, CardDetails())
    link = "[ann/data](https://huggingface.co/datasets/ann/data) at v1, main, split train"
    assert f"| mine | {link} | 39 | 24 |" in found.data
    assert "| later | file later.json |  |  |" in found.data
    assert "2 questions of test sources" in found.data
    assert found.datasets == ("ann/data",)


@pytest.mark.parametrize(
    "damaged", [{"trained_on": 3}, {"trained_on": [{"sources": [3]}]}, {"seen": None}, 7]
)
def test_a_damaged_entry_is_warned_of_and_leaves_the_details_as_they_were(runs, damaged):
    path = runs / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["ReasoningDataModule"]
    checkpoint["ReasoningDataModule"] = state | damaged if isinstance(damaged, dict) else damaged
    given = CardDetails(name="ann/reader")
    with pytest.warns(UserWarning, match="the model card says nothing of the training"):
        assert run_card(str(path), checkpoint, given) == given
