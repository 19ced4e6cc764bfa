from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from rosa_lightning import EvaluationConfig, ReasoningDataModule, RoAEConfig, RoSAModule
from rosa_lightning.evaluation.writers import PredictionWriter, ResultWriter
from tests import ranks
from tests.conftest import data_module, rosa_module, save_base, write_records


class Echo(LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("broken")
        return [{"index": int(value), "response": "é"} for value in batch]


def predict(folder: Path, fail_at: int | None = None) -> None:
    options = {"logger": False, "enable_progress_bar": False, "callbacks": [PredictionWriter()]}
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", **options)
    trainer.predict(Echo(fail_at), DataLoader(torch.arange(5), batch_size=2))


def test_every_record_is_a_line_in_order(tmp_path):
    predict(tmp_path)
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["index"] for line in text.splitlines()] == [0, 1, 2, 3, 4]
    assert "é" in text
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_run_that_fails_leaves_the_older_file_and_nothing_half_written(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("older\n")
    with pytest.raises(RuntimeError, match="broken"):
        predict(tmp_path, fail_at=1)
    assert (tmp_path / "predictions.jsonl").read_text() == "older\n"
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_full_disk_is_said_with_the_file_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
    try:
        with pytest.raises(OSError, match=r"predictions\.jsonl cannot be written: File too large"):
            predict(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


BOTH = EvaluationConfig(protocols=("generate", "likelihood"))


class Stop(Callback):
    """Stops an evaluation after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.after:
            raise RuntimeError("stopped")


def exercises(folder: Path, num_labels: int = 11, **options) -> ReasoningDataModule:
    """Seven numbers and eleven labels, three of which stand in the training data."""
    training = [
        {"instruction": f"say  {number}!", "output": "yes", "answer": "true"}
        for number in (3, 5, 9)
    ]
    (folder / "train.json").write_text(json.dumps(training))
    numbers = write_records(folder / "gsm8k.json", 7)
    labels = write_records(folder / "boolq.json", num_labels, "the correct answer is true", "true")
    return data_module(
        sources=[{"path": str(folder / "train.json"), "task": "boolq"}],
        test_sources=[{"path": str(labels)}, {"path": str(numbers)}],
        **{"batch_size": 4, "max_length": 300, **options},
    )


def evaluate(base: Path, folder: Path, *callbacks, data=None, module=None, logger=None, **options):
    built = module or rosa_module(base, RoAEConfig(rank=2), max_new_tokens=5, evaluation=BOTH)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=logger or False,
        enable_progress_bar=False,
        callbacks=[*callbacks, ResultWriter()],
        **options,
    )
    return trainer.test(built, data or exercises(folder), verbose=False)[0]


def read(folder: Path) -> tuple[list[dict], dict]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "results.json").read_text())


def plain(results: dict) -> dict:
    """Results without what differs from run to run."""
    passing = ("wall_time_s", "resumed_answers", "contaminated_by")
    return {key: value for key, value in results.items() if key not in passing}


def test_an_evaluation_leaves_its_answers_and_its_results_and_shows_them(
    base_folder, tmp_path, capsys
):
    logged = evaluate(base_folder, tmp_path)
    items, results = read(tmp_path)
    assert [(item["protocol"], item["source"], item["index"]) for item in items] == [
        *(("generate", "boolq", number) for number in range(1, 12)),
        *(("generate", "gsm8k", number) for number in range(1, 8)),
        *(("likelihood", "boolq", number) for number in range(1, 12)),
    ]
    rows = {(row["protocol"], row["task"]): row for row in results["results"]}
    for (protocol, task), row in rows.items():
        own = [i for i in items if (i["protocol"], i["task"]) == (protocol, task)]
        right = [item["correct"] for item in own]
        assert row["n"] == len(own)
        assert row["accuracy"] == sum(right) / len(right)
        assert row["contaminated"] == (3 if task == "boolq" else 2)
        prefix = "" if protocol == "generate" else "likelihood/"
        assert logged[f"test/{prefix}accuracy/{task}"] == pytest.approx(row["accuracy"])
    failed = [item["answer"] is None for item in items if item["protocol"] == "generate"]
    assert logged["test/format_failures"] == pytest.approx(sum(failed) / len(failed))
    assert rows["likelihood", "boolq"]["format_failure_rate"] is None
    assert results["model"] == str(base_folder)
    assert results["template"] == "alpaca"
    assert results["contaminated_by"] == [str(tmp_path / "train.json")]
    assert results["cut_prompts"] == {"boolq": 0, "gsm8k": 0}
    assert "boolq*" in capsys.readouterr().out


def test_sources_of_no_task_have_rows_of_their_own(base_folder, tmp_path, capsys):
    paths = [write_records(tmp_path / f"{name}.json", n) for name, n in (("one", 2), ("two", 3))]
    data = data_module(
        sources=[{"path": str(paths[0])}], test_sources=[{"path": str(p)} for p in paths]
    )
    module = rosa_module(base_folder, RoAEConfig(rank=2), max_new_tokens=2)
    logged = evaluate(base_folder, tmp_path, data=data, module=module)
    items, results = read(tmp_path)
    assert {item["task"] for item in items} == {"text"}
    rows = [(row["task"], row["n"], row["contaminated"]) for row in results["results"]]
    assert rows == [("one", 2, 2), ("two", 3, 2)]  # their first two records are the same
    assert {"test/accuracy/one", "test/accuracy/two"} <= logged.keys()


@pytest.mark.parametrize("decontaminate", [True, False])
def test_contaminations_are_those_of_the_training_whatever_the_configuration_says_now(
    decontaminate, base_folder, tmp_path, capsys
):
    data = exercises(tmp_path, decontaminate=decontaminate)
    train = tmp_path / "train.json"
    more = [{"instruction": f"{n}?", "output": "no", "answer": "false"} for n in range(9)]
    train.write_text(json.dumps(json.loads(train.read_text()) + more))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(
        **quiet,
        max_steps=1,
        enable_checkpointing=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    module = rosa_module(base_folder, RoAEConfig(rank=2), max_new_tokens=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    now = exercises(tmp_path, decontaminate=decontaminate)
    other = [{"instruction": "Of no benchmark.", "output": "no", "answer": "false"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    now.sources = [str(tmp_path / "other.json")]
    tester = Trainer(**quiet, default_root_dir=tmp_path, callbacks=[ResultWriter()])
    tester.test(module, now, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    _, results = read(tmp_path)
    contaminated = {row["task"]: row["contaminated"] for row in results["results"]}
    assert contaminated == ({"boolq": 0, "gsm8k": 0} if decontaminate else {"boolq": 3, "gsm8k": 2})
    assert results["contaminated_by"] == [str(train)]
    assert ("boolq*" in capsys.readouterr().out) is not decontaminate


def test_unreadable_training_data_leave_the_contamination_unknown(base_folder, tmp_path, capsys):
    data = exercises(tmp_path)
    (tmp_path / "train.json").unlink()
    evaluate(base_folder, tmp_path, data=data)
    assert {row["contaminated"] for row in read(tmp_path)[1]["results"]} == {None}
    assert "train.json does not exist" in " ".join(capsys.readouterr().out.split())


def count_batches(monkeypatch) -> list[int]:
    from rosa_lightning.evaluation import evaluator as home

    calls, generate = [], home.generate

    def counted(model, tokenizer, batch, *arguments, **options):
        calls.append(len(batch["task"]))
        return generate(model, tokenizer, batch, *arguments, **options)

    monkeypatch.setattr(home, "generate", counted)
    return calls


def test_a_stopped_evaluation_goes_on_and_ends_as_one_that_was_not(
    base_folder, tmp_path, monkeypatch, caplog
):
    """Stopped twice, the second time with a line cut in two, and lines that are no answers."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    evaluate(base_folder, straight)
    calls = count_batches(monkeypatch)
    for after in (2, 4):
        with pytest.raises(RuntimeError, match="stopped"):
            evaluate(base_folder, stopped, Stop(after))
    assert calls == [4, 4, 4, 4]
    assert not json.loads((stopped / "results.json").read_text())["complete"]
    path = stopped / "predictions.jsonl"
    first, rest = path.read_text().split("\n", 1)
    damaged = [{**json.loads(first), **wrong} for wrong in ({"index": [1]}, {"correct": "no"})]
    lines = [
        first,
        "{}",
        *map(json.dumps, damaged),
        "[" * 50_000,
        "7" * 5_000,
        "\udcff",
        rest[:-40],
    ]
    path.write_text("\n".join(lines), errors="surrogateescape")
    with caplog.at_level(logging.INFO):
        evaluate(base_folder, stopped)
    assert calls == [4, 4, 4, 4, 4, 2]
    assert "going on with" in caplog.text
    assert read(stopped)[0] == read(straight)[0]
    assert plain(read(stopped)[1]) == plain(read(straight)[1])
    evaluate(base_folder, stopped)  # complete: begins anew
    assert read(stopped)[1]["resumed_answers"] == 0


def test_a_logger_that_begins_a_new_folder_does_not_hide_the_stopped_run(
    base_folder, tmp_path, monkeypatch
):
    data = exercises(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(base_folder, tmp_path, Stop(3), data=data, logger=TensorBoardLogger(tmp_path))
    calls = count_batches(monkeypatch)
    evaluate(base_folder, tmp_path, data=exercises(tmp_path), logger=TensorBoardLogger(tmp_path))
    assert calls == [4, 2]
    assert (tmp_path / "lightning_logs/version_1/results.json").exists()


def adapted(base: Path) -> RoSAModule:
    built = rosa_module(base, RoAEConfig(rank=2), max_new_tokens=5, evaluation=BOTH)
    built.configure_model()
    for name, parameter in built.named_parameters():
        if name.endswith("roae_B"):
            torch.nn.init.normal_(parameter, std=0.5)
    return built


def other_rules(base: Path) -> RoSAModule:
    config = EvaluationConfig(protocols=BOTH.protocols, rules="paper")
    return rosa_module(base, RoAEConfig(rank=2), max_new_tokens=5, evaluation=config)


@pytest.mark.parametrize("make", [adapted, other_rules])
def test_answers_of_another_evaluation_are_not_taken_over(make, base_folder, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(base_folder, tmp_path, Stop(3))
    calls = count_batches(monkeypatch)
    evaluate(base_folder, tmp_path, module=make(base_folder))
    assert sum(calls) == 18
    assert read(tmp_path)[1]["resumed_answers"] == 0


def of_two_ranks(folder: Path) -> dict:
    ranks_folder = folder / "ranks"
    ranks_folder.mkdir(exist_ok=True)
    while not (folder / "data").exists():
        time.sleep(0.05)
    strategy = ranks.ddp(find_unused_parameters=False)
    data = exercises(folder / "data", num_labels=12)
    return evaluate(folder / "base", ranks_folder, data=data, strategy=strategy, devices=2)


@pytest.mark.slow
def test_two_processes_find_what_one_does_in_a_set_that_does_not_divide(tmp_path):
    (tmp_path / "data").mkdir()
    save_base(tmp_path / "base")
    data = exercises(tmp_path / "data", num_labels=12, batch_size=3)
    one = evaluate(tmp_path / "base", tmp_path, data=data)
    two = ranks.launch(of_two_ranks, tmp_path)
    assert two == [one, one]
    items, results = read(tmp_path / "ranks")
    expected = read(tmp_path)[0]
    assert len(expected) == 19 + 12
    for item, other in zip(items, expected, strict=True):
        # Sums of other batches are rounded otherwise.
        assert item.pop("scores", []) == pytest.approx(other.pop("scores", []), abs=1e-3)
        assert item == other
    assert results["results"] == read(tmp_path)[1]["results"]
