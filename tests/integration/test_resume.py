"""Runs of the shipped configurations that stop and go on end bit for bit as runs that do not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint

from rosa_lightning.cli.main import main
from rosa_lightning.data.settings import LoadingConfig
from tests import ranks

LOADING = [field.name for field in fields(LoadingConfig)]
CONFIGS = Path(__file__).parents[2] / "configs"


class SaveEverything(Checkpoint):
    """Notes the records of each batch, and saves after batches, validations and epochs.

    A `Checkpoint`, so that Lightning calls it behind all other callbacks.
    """

    seen: list[list[tuple[int, int]]]
    validated: list[int]

    def __init__(self, folder: str, moments: list[str] | None = None) -> None:
        self.folder, self.moments = Path(folder), moments

    def on_fit_start(self, trainer, pl_module):
        type(self).seen, type(self).validated = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(list(zip(batch["source"].tolist(), batch["index"].tolist(), strict=True)))

    def save(self, trainer, moment):
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        name = f"{moment}-{number}"
        if moment == "end" or name in (self.moments or ()):
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, "end")


def shipped(name: str, sources: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A shipped configuration on small data: what depends on the length of a run is left as is."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["model"]["base"] = "tiny"
    config["data"] |= {"sources": sources, "batch_size": 8, "val_fraction": 0.1, "max_length": 256}
    loading = {**config["data"].get("loading", {}), "val_generate": 2}
    config["data"] |= {"test_sources": None, "loading": loading}
    config["trainer"] |= {"accelerator": "cpu", "precision": "32-true", "logger": False}
    config["trainer"] |= {"max_epochs": 2, "val_check_interval": 5}
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    config["dls"]["interval"] = 3
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:-1]
    for key, value in changes.items():
        section, _, option = key.partition("__")
        is_loading = section == "data" and option in LOADING
        (loading if is_loading else config[section])[option] = value
    return config


def fit(config: dict[str, Any], moments: Iterable[str] = (), ckpt_path: Path | None = None):
    """Records batch by batch; the checkpoints lie in the working folder."""
    folder = Path("resumed" if ckpt_path else "straight")
    folder.mkdir(exist_ok=True)
    saver = {"folder": str(folder), "moments": list(moments)}
    callbacks = [
        *config["trainer"]["callbacks"],
        {"class_path": "tests.integration.test_resume.SaveEverything", "init_args": saver},
    ]
    config = {**config, "trainer": {**config["trainer"], "callbacks": callbacks}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    resume = ["--ckpt_path", str(ckpt_path)] if ckpt_path else []
    assert main(["fit", "--config", str(folder / "config.yaml"), *resume]) == 0
    return SaveEverything.seen, sorted(folder.glob("end-*.ckpt"))[-1]


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def differences(straight: Path, resumed: Path) -> list[str]:
    """What is not the same at the ends of two runs, of all but what callbacks measure of time."""
    first, second = (torch.load(path, weights_only=True) for path in (straight, resumed))
    for checkpoint in (first, second):
        checkpoint |= {"rng": checkpoint["rosa"]["rng"], **checkpoint["callbacks"]}
    names = ["state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "rng"]
    names += ["ReasoningDataModule", "current_model_state", "averaging_state"]
    names += [name for name in first if "DynamicLayerSelection" in name]
    return [name for name in names if not same(first.get(name), second.get(name))]


def assert_resumes(
    config: dict[str, Any], moments: Sequence[str], again: str = ""
) -> dict[str, list[int]]:
    """From each of these moments, named by the batches that went before; the steps of validations.

    From `batch-8`, the end of the first epoch, the run also goes on to the moment `again`, and from
    there once more.
    """
    seen, end = fit(config, moments)
    wrong, validated = {}, {}
    paths = [Path("straight", f"{moment}.ckpt") for moment in moments]
    stops = [(path.stem, path) for path in paths if path.exists()]
    while stops:
        moment, path = stops.pop()
        done = int(path.stem.partition("-")[2])
        if done == len(seen):
            continue  # nothing is left to train, which is an error
        later = [again] if again and moment == "batch-8" else []
        rest, resumed_end = fit(config, later, ckpt_path=path)
        found = differences(end, resumed_end)
        if rest != seen[done:]:
            found.append(f"{len(seen) - done} batches were to come and {len(rest)} came")
        if found:
            wrong[moment] = found
        resumed_end.unlink()
        validated[moment] = SaveEverything.validated
        if later and (path := Path("resumed", f"{again}.ckpt")).exists():
            stops.append((f"{moment}, {again}", path))
    assert not wrong
    assert len(validated) >= min(len(moments), 6)
    return validated


@pytest.fixture(autouse=True)
def _in_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rosa"])
    monkeypatch.chdir(tmp_path)


# 63 of 71 records are trained on, 8 a batch: an epoch has 8 batches.
EVERYWHERE = [f"batch-{number}" for number in (1, 7, 8, 9, 13, 15)]
EVERYWHERE += ["validation-5", "validation-8", "validation-10", "epoch-8"]


# The tests that follow stop tiny.yaml.
@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), "rosa"])
def test_a_shipped_configuration_resumes_in_its_second_epoch(name, sources):
    assert_resumes(shipped(name, sources), ["batch-13", "epoch-8"])


def test_a_run_resumed_at_an_epochs_end_resumes_in_the_next_epoch(sources):
    config = shipped("tiny", sources, trainer__limit_val_batches=0)
    assert_resumes(config, ["batch-8"], again="batch-13")


def test_a_step_that_had_some_of_its_batches_gets_the_others_when_resumed(sources):
    """The fourth and fifth batch are in one step, which scores layers by the gradients of both."""
    changes = {"trainer__accumulate_grad_batches": 3, "model__roae": {"rank": 4, "dropout": 0.1}}
    config = shipped("tiny", sources, **changes)
    config["dls"]["interval"] = 1
    assert_resumes(config, ["batch-4", "validation-5"])


def test_dropout_makes_runs_of_different_seeds_differ(sources):
    """Without this, runs could resume exactly with generators that are never restored."""
    ends = []
    for seed in (3, 4):
        dropout = {"model__roae": {"rank": 4, "dropout": 0.1}, "trainer__max_steps": 3}
        _, end = fit(shipped("tiny", sources, **dropout) | {"seed_everything": seed})
        ends.append(torch.load(end, weights_only=True)["state_dict"])
    assert not same(*ends)


AVERAGES = [
    {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.7}},
    {"class_path": "lightning.pytorch.callbacks.WeightAveraging"},
]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    "average", [AVERAGES[0], pytest.param(AVERAGES[1], marks=pytest.mark.slow)]
)
def test_a_run_that_averages_weights_resumes_and_is_tested(average, sources):
    tested = [{**sources[0], "max_examples": 2, "weight": None}]
    config = shipped("tiny", sources, data__test_sources=tested)
    config["data"]["loading"]["decontaminate"] = False
    config["trainer"]["callbacks"].append(average)
    assert_resumes(config, ["batch-5"])
    saved = torch.load("straight/batch-5.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    assert not same(saved["state_dict"], saved["current_model_state"])
    options = ["--config", "straight/config.yaml", "--ckpt_path", "straight/batch-5.ckpt"]
    assert main(["test", *options]) == 0


@pytest.mark.parametrize("interval", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_validation_that_was_due_when_a_run_was_saved_is_made_when_it_resumes(interval, sources):
    config = shipped("tiny", sources, trainer__val_check_interval=interval)
    config["data"]["loading"]["val_generate"] = 0
    validated = assert_resumes(config, ["batch-8", f"batch-{interval}"])
    for moment, steps in validated.items():
        done = int(moment.partition("-")[2])
        due = [step for step in range(interval, 17, interval) if step >= done]
        assert [step for step in steps if step] == due


def test_a_validation_that_was_due_is_left_out_where_a_resumed_run_validates_otherwise(sources):
    config = shipped("tiny", sources, trainer__val_check_interval=4)
    config["data"]["loading"]["val_generate"] = 0
    seen, _ = fit(config, ["batch-8"])
    config["trainer"]["limit_val_batches"] = 0
    rest, _ = fit(config, ckpt_path=Path("straight", "batch-8.ckpt"))
    assert SaveEverything.validated == []
    assert rest == seen[8:]


@pytest.fixture
def finished(sources) -> dict[str, Any]:
    """The configuration of a run of one epoch that has ended."""
    config = shipped("tiny", sources, trainer__max_epochs=1, trainer__limit_val_batches=0)
    fit(config)
    return config


def test_going_on_with_a_finished_run_names_the_limit_in_the_way(finished, capsys):
    epochs = "trainer.max_epochs=1 is reached. Raise trainer.max_epochs to go on"
    no_end = {"max_steps": -1, "max_epochs": -1, "max_time": "00:00:00:00"}
    for limits, way in [
        ({}, epochs),
        ({"max_steps": 300}, epochs),
        (
            {"max_steps": 8, "max_epochs": 3},
            "trainer.max_steps=8 is reached. Raise trainer.max_steps",
        ),
        ({"max_steps": 4}, "trainer.max_steps=4 and trainer.max_epochs=1 are reached. Raise"),
        (no_end, "trainer.max_time is reached. Raise trainer.max_time to go on"),
    ]:
        config = {**finished, "trainer": {**finished["trainer"], **limits}}
        # A run without an end has no schedule of its length.
        config["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.ConstantLR"}
        Path("further.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", "further.yaml", "--ckpt_path", "straight/end-8.ckpt"]) == 1
        assert f"step 8 after 1 whole epochs, and {way}" in capsys.readouterr().err


def test_going_on_with_a_finished_run_trains_where_its_limits_are_raised(finished):
    config = {**finished, "trainer": {**finished["trainer"], "max_epochs": 2, "max_steps": 11}}
    rest, _ = fit(config, ckpt_path=Path("straight", "end-8.ckpt"))
    assert len(rest) == 3


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "rosa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__num_workers": 0},
        {"data__num_workers": 2},
        {"data__batching": "random"},
        {"data__batching": "packed"},
        {"data__tokens_per_batch": 512},
        {"data__tokens_per_batch": 512, "data__batching": "packed"},
        {"trainer__accumulate_grad_batches": 3},
        {"trainer__accumulate_grad_batches": 4, "data__num_workers": 2},
        {"trainer__reload_dataloaders_every_n_epochs": 1},
        {"trainer__reload_dataloaders_every_n_epochs": 2, "data__num_workers": 2},
        {"trainer__limit_train_batches": 5},
        {"trainer__limit_train_batches": 0.7, "trainer__accumulate_grad_batches": 2},
        {"trainer__check_val_every_n_epoch": 1, "trainer__val_check_interval": 0.5},
        {"trainer__check_val_every_n_epoch": 1, "trainer__val_check_interval": 1.0},
        {"trainer__max_steps": 14},
        {"trainer__max_epochs": 4},
        {"data__stop": "oversample", "data__val_fraction": 0.0},
    ],
    ids=lambda changes: ",".join(f"{k.partition('__')[2]}={v}" for k, v in changes.items()),
)
def test_a_shipped_configuration_resumes_wherever_it_stopped(name, changes, sources):
    if "reload_dataloaders_every_n_epochs" in str(changes):
        changes = {**changes, "trainer__max_epochs": 4}
    assert_resumes(shipped(name, sources, **changes), EVERYWHERE, again="batch-9")


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """What differs on a rank for each stop, in a step that has had some of its batches too."""
    sys.argv = ["rosa"]
    sources = yaml.safe_load((folder / "sources.yaml").read_text())
    found = {}
    for accumulate, moments in ((1, ["batch-3", "batch-6"]), (3, ["batch-5"])):
        machine = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__num_workers": 2}
        machine["trainer__accumulate_grad_batches"] = accumulate
        config = shipped("rosa", sources, **machine)
        seen, end = fit(config, moments)
        for moment in moments:
            rest, resumed_end = fit(config, ckpt_path=Path("straight", f"{moment}.ckpt"))
            same_records = rest == seen[int(moment.partition("-")[2]) :]
            found[accumulate, moment] = [*differences(end, resumed_end), same_records]
    return found


@pytest.mark.slow
def test_two_processes_resume_where_they_stopped(sources, tmp_path):
    Path("sources.yaml").write_text(yaml.safe_dump(sources))
    for found in ranks.launch(on_two_ranks, tmp_path):
        assert found == {(1, "batch-3"): [True], (1, "batch-6"): [True], (3, "batch-5"): [True]}
